"""The records of a run: metrics.jsonl and TensorBoard's logs, and what its page (tools/report.py) needs beside them.

That is the machine, the class names and the predictions of the last evaluation.
"""
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager

from system import cpu, files
import utils
from utils import log

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.nn import functional as F

from data import class_names

SCALARS = ('loss', 'acc1', 'acc5', 'lr', 'images_per_s', 'data_wait')


# ---- records

class Metrics:
    """metrics.jsonl of a run folder: one JSON record per logging step and per evaluation, written by rank 0.

    And the same figures for TensorBoard below tensorboard/, where each split is a run of its own.
    """

    def __init__(self, folder):
        self.path = os.path.join(folder, 'metrics.jsonl')
        self.folder, self.purge_step, self.writers = os.path.join(folder, 'tensorboard'), 1, {}

    def write(self, **record):
        if utils.rank():
            return
        line = json.dumps({key: float(f'{value:.8g}') if isinstance(value, float) else value for key, value in record.items()})
        with files.appending(self.path, is_whole=is_json) as file:
            files.write_all(file, f'{line}\n'.encode())
        if record['step']:                          # an evaluation on its own, step 0, is no curve
            self._draw(record)

    def rewind(self, step, epochs):
        """Forget what comes after `step`, and the evaluations after `epochs` whole epochs: a resumed run writes them again.

        Raises ValueError for a line that is no record; the last one may be torn.
        """
        self.purge_step = step + 1
        if utils.rank() or not os.path.exists(self.path):
            return
        kept = []
        with open(self.path, encoding='utf-8', errors='replace') as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line) if line.endswith('\n') else {'step': step + 1}
                    if record['step'] <= step and (record['split'] == 'train' or record['epoch'] <= epochs):
                        kept.append(line)
                except (ValueError, TypeError, KeyError):
                    raise ValueError(f'{self.path}:{number}: not a record of a run; remove the line or the file') from None
        files.atomic_write(self.path, lambda file: file.write(''.join(kept).encode()))

    def _draw(self, record):
        """Add a record to TensorBoard's curves; where that fails once, as on a full disk, the run goes on without them."""
        split = record['split']
        try:
            if split not in self.writers:
                self.writers[split] = EventFile(os.path.join(self.folder, split), self.purge_step)
            if self.writers[split]:
                self.writers[split].add(record['step'], {k: v for k, v in record.items() if k in SCALARS and v is not None})
        except OSError as error:
            log.warning('%s: cannot write: %s; the run goes on without these curves', os.path.join(self.folder, split),
                        error.strerror)
            self.writers[split] = None


def is_json(line: bytes) -> bool:
    """True for a whole record."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:                              # UnicodeDecodeError is one
        return False


class EventFile:
    """A TensorBoard event file in `folder` that takes the place of what older files there say from `purge_step` on.

    Written as tensorboardX's SummaryWriter writes, but at once: its thread and its queue between processes do not go well
    with data processes that are forked and with runs that are killed.
    """

    def __init__(self, folder, purge_step):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2
        self.Event, self.Summary = event_pb2.Event, summary_pb2.Summary
        os.makedirs(folder, exist_ok=True)
        taken = len(os.listdir(folder))             # two files of the same second would have the same name
        self.file = EventsWriter(os.path.join(folder, 'events'), f'.{taken:04d}')
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(self.Event(step=purge_step, session_log=start))

    def add(self, step, scalars):
        values = [self.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(self.Event(step=step, summary=self.Summary(value=values)))

    def _write(self, event):
        event.wall_time = time.time()
        self.file.write_event(event)
        self.file.flush()


# ---- what is kept for the page

class NoPredictions:
    """Of the evaluations before the last: nothing is kept."""

    def add(self, indices, labels, logits):
        pass

    def save(self, split):
        pass


class Predictions:
    """What the model said about each image of an evaluation: predictions_SPLIT.npz in the run folder.

    Its arrays are in the order of the list: index, label, top1 (n,) int64; probability of top1 and of label (n,) float32.
    """

    def __init__(self, folder):
        self.folder, self.rows = folder, []

    @paddle.no_grad()
    def add(self, indices, labels, logits):
        """indices (B,), labels (B,), logits (B, K)"""
        probabilities = F.softmax(logits.astype('float32'), axis=1)          # (B, K)
        top, top1 = probabilities.topk(1, axis=1)
        own = probabilities.take_along_axis(labels.unsqueeze(1), axis=1)
        columns = [indices, labels, top1.squeeze(1), top.squeeze(1), own.squeeze(1)]
        self.rows.append(paddle.stack([column.astype('float64') for column in columns], axis=1))   # (B, 5)

    def save(self, split):
        """Bring the rows of all processes together and write them on rank 0; start anew."""
        rows = np.concatenate([np.zeros((0, 5)), *(row.numpy() for row in self.rows)])
        self.rows, parts = [], [rows]
        if utils.world_size() > 1:
            parts = []
            dist.all_gather_object(parts, rows)
        if utils.rank() == 0:
            with harmless('predictions'):
                write_predictions(os.path.join(self.folder, f'predictions_{split}.npz'), np.concatenate(parts))


def write_predictions(path, rows):
    rows = rows[np.argsort(rows[:, 0], kind='stable')]
    index, label, top1 = rows[:, :3].astype('int64').T
    probability, label_probability = rows[:, 3:].astype('float32').T
    files.atomic_write(path, lambda file: np.savez_compressed(
        file, index=index, label=label, top1=top1, probability=probability, label_probability=label_probability))


def write_machine(path, device):
    """machine.json of a run folder: where and with what the run was started last."""
    if utils.rank() == 0:
        with harmless(os.path.basename(path)):
            text = json.dumps(machine(device), indent=1)
            files.atomic_write(path, lambda file: file.write(text.encode()))


def keep_class_names(folder, data_path, count, resumed=False):
    """Put the class names of the data folder, of `count` classes, into a training's run folder; rank 0 writes.

    A resumed run keeps its own: they are those of the labels that it has learned. The log names a difference.
    """
    if utils.rank() == 0:
        with harmless(class_names.FILE):
            names, path = class_names.for_a_run(data_path, count), os.path.join(folder, class_names.FILE)
            if resumed and os.path.exists(path):
                _warn_of_other_names(path, names, data_path)
            else:
                _write_class_names(path, names)


def keep_names_of_weights(folder, weights, data_path, count):
    """Put the class names of a weight file, or else those of the data, into the folder of an evaluation; rank 0 writes."""
    if utils.rank() == 0:
        with harmless(class_names.FILE):
            names_of_data, path = class_names.for_a_run(data_path, count), os.path.join(folder, class_names.FILE)
            own = os.path.join(class_names.run_folder_of(weights), class_names.FILE)
            if os.path.exists(own):
                _warn_of_other_names(own, names_of_data, data_path)
            if not os.path.exists(os.path.join(folder, 'config.yaml')):      # else it belongs to a training
                _write_class_names(path, class_names.read_names(own) if os.path.exists(own) else names_of_data)


def _warn_of_other_names(path, names, data_path):
    difference = names and class_names.first_difference(class_names.read_names(path), names)
    if difference:
        log.warning('class names differ between %s and %s: %s; the labels may not mean the same', path,
                    os.path.join(data_path, class_names.FILE), difference)


def _write_class_names(path, names):
    """Write class names, one per line, unless the file has them already."""
    if names and not (os.path.exists(path) and class_names.read_names(path) == names):
        text = ''.join(f'{name}\n' for name in names)
        files.atomic_write(path, lambda file: file.write(text.encode()))


def machine(device):
    """{what: text} about the hardware and the versions that a run depends on."""
    facts = {'device': f'{device} x {utils.world_size()}', 'processor': cpu.model_name(), 'cores': cpu.cores()}
    if device == 'gpu':
        facts['gpu'] = paddle.device.cuda.get_device_name()
        facts['gpu memory'] = f'{paddle.device.cuda.get_device_properties().total_memory / 2 ** 30:.0f} GB'
        facts['cuda'], facts['cudnn'] = paddle.version.cuda(), paddle.version.cudnn()
    facts.update({'memory': f'{os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 ** 30:.0f} GB',
                  'system': platform.platform(), 'python': platform.python_version(), 'paddle': paddle.__version__,
                  'numpy': np.__version__, 'code': commit(), 'command': command(),
                  'folder': os.getcwd()})
    return facts


def command():
    """The program's name and arguments, as a shell takes them."""
    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def command_to_go_on(folder: str) -> str:
    """Return the command that resumes this run, as a shell takes it; for paddle's launcher, which has own options, in words."""
    resume = ['-opts', 'MODEL.RESUME', 'auto'] if 'MODEL.RESUME' in sys.argv else ['-resume', 'auto']
    more = [*resume, '-output', folder]
    if 'PADDLE_TRAINER_ID' in os.environ and multiprocessing.parent_process() is None:
        return f'the same command with {shlex.join(more)}'
    known = sys.argv[-len(more):] == more
    return shlex.join([sys.executable, *sys.argv, *([] if known else more)])


def commit():
    """The commit of this code, with a + where files differ from it; '' outside a clone, or without git."""
    command = ['git', 'describe', '--always', '--abbrev=12', '--dirty=+', '--exclude=*']
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False,
                              cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    except (OSError, subprocess.TimeoutExpired):    # no git, or one that hangs
        return ''
    return done.stdout.strip()


def write_report(folder):
    """report.html of the run folder, by rank 0."""
    if utils.rank() == 0:
        with harmless('report.html'):
            from reporting import report  # late: a page, which nothing in a training depends on
            log.info('page: %s', report.write([folder], os.path.join(folder, 'report.html')))


@contextmanager
def harmless(what):
    """Say in the log what could not be written for people to look at, and go on: a training does not fail of it."""
    try:
        yield
    except Exception as error:                      # whatever it is
        log.debug('traceback', exc_info=True)
        log.warning('%s could not be written: %s: %s', what, type(error).__name__, error)
