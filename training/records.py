"""The records of a run: metrics.jsonl, TensorBoard's logs, predictions, machine.json, report.html."""
import json
import math
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

from system import cpu, files
import utils
from utils import log

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.nn import functional as F

from reporting import runs, scores
from reporting.event_file import SCALARS, EventFile
from training.calibration import TemperatureSearch, best_temperature

# ---- metrics

class Metrics:
    """metrics.jsonl of a run folder: a JSON record per logging step and evaluation, written by rank 0.

    The same numbers go to TensorBoard below tensorboard/, where each split is a run of its own.
    """

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, 'metrics.jsonl')
        self.folder, self.purge_step = os.path.join(folder, 'tensorboard'), 1
        self.writers: dict[str, Optional[EventFile]] = {}            # of each split; None: not writable

    def write(self, **record: Any) -> None:
        """Append a record; floats get 8 significant digits."""
        if utils.rank() != 0:
            return
        for key, value in record.items():
            if isinstance(value, float):
                record[key] = float(f'{value:.8g}')
        with files.appending(self.path, is_whole=is_json) as file:
            files.write_all(file, f'{json.dumps(record)}\n'.encode())
        if record['step']:                          # an evaluation alone has step 0 and is no curve
            self._draw(record)

    def rewind(self, step: int, epochs: int) -> None:
        """Remove the records after `step`, and the evaluations after `epochs` whole epochs.

        A resumed run writes them again. Raises ValueError for a line that is no record; the last one
        may be torn.
        """
        self.purge_step = step + 1
        if utils.rank() != 0 or not os.path.exists(self.path):
            return
        kept = []
        with open(self.path, encoding='utf-8', errors='replace') as file:
            for number, line in enumerate(file, 1):
                if not line.endswith('\n'):         # torn
                    continue
                try:
                    record = json.loads(line)
                    if is_before(record, step, epochs):
                        kept.append(line)
                except (ValueError, TypeError, KeyError):
                    raise ValueError(f'{self.path}:{number}: not a record of a run; '
                                     'remove the line or the file') from None
        files.atomic_write(self.path, lambda file: file.write(''.join(kept).encode()))

    def _draw(self, record: dict[str, Any]) -> None:
        """Add a record to TensorBoard's curves. After an error the run goes on without them."""
        split = record['split']
        folder = os.path.join(self.folder, split)
        scalars = {key: value for key, value in record.items() if key in SCALARS and value is not None}
        try:
            if split not in self.writers:
                self.writers[split] = EventFile(folder, self.purge_step)
            writer = self.writers[split]
            if writer:
                writer.add(record['step'], scalars)
        except OSError as error:
            log.warning('%s: cannot write: %s; the run goes on without these curves', folder, error.strerror)
            self.writers[split] = None


def is_before(record: dict[str, Any], step: int, epochs: int) -> bool:
    """True for a record up to `step`; an evaluation has to belong to one of the first `epochs` epochs."""
    return record['step'] <= step and (record['split'] == 'train' or record['epoch'] <= epochs)


def is_json(line: bytes) -> bool:
    """True for a whole record."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:                              # UnicodeDecodeError is one
        return False


# ---- predictions

class NoPredictions:
    """Stands for Predictions in the evaluations before the last one: keeps nothing."""

    def add(self, indices: np.ndarray, labels: paddle.Tensor, logits: paddle.Tensor) -> None:
        pass

    def save(self, split: str) -> None:
        pass


class Predictions:
    """Keeps the prediction for each image of an evaluation: predictions_SPLIT.npz in the run folder.

    Its arrays are in the order of the list: index, label, top1 (n,) int64; probability of top1 and of
    label (n,) float32. `temperature` () float64 is that of calibration.best_temperature.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.indices: list[np.ndarray] = []
        self.rows: list[paddle.Tensor] = []          # of the same images, on the device
        self.search = TemperatureSearch()

    @paddle.no_grad()
    def add(self, indices: np.ndarray, labels: paddle.Tensor, logits: paddle.Tensor) -> None:
        """Keep a batch: indices (B,), labels (B,), logits (B, K)."""
        probabilities = F.softmax(logits.astype('float32'), axis=1)          # (B, K)
        top, top1 = probabilities.topk(1, axis=1)
        own = probabilities.take_along_axis(labels.unsqueeze(1), axis=1)
        columns = [labels, top1.squeeze(1), top.squeeze(1), own.squeeze(1)]
        rows = paddle.stack([column.astype('float64') for column in columns], axis=1)    # (B, 4)
        self.indices.append(indices)
        self.rows.append(rows)
        self.search.add(labels, logits)

    def save(self, split: str) -> None:
        """Gather the rows of all processes, write them on rank 0, and forget them."""
        parts = [np.zeros((0, 5))]
        for indices, rows in zip(self.indices, self.rows):
            parts.append(np.column_stack([indices, rows.numpy()]))
        rows = np.concatenate(parts)
        sums = np.sum(utils.gather(self.search.sums.numpy()), axis=0)
        self.indices, self.rows, self.search, parts = [], [], TemperatureSearch(), [rows]
        if utils.world_size() > 1:
            parts = []
            dist.all_gather_object(parts, rows)
        if utils.rank() == 0:
            with harmless('predictions'):
                path = os.path.join(self.folder, f'predictions_{split}.npz')
                write_predictions(path, np.concatenate(parts), best_temperature(sums))


def write_predictions(path: str, rows: np.ndarray, temperature: float = math.nan) -> None:
    """Write rows (n, 5) of index, label, top1 and two probabilities as the arrays of Predictions."""
    rows = rows[np.argsort(rows[:, 0], kind='stable')]
    index, label, top1 = rows[:, :3].astype('int64').T
    probability, label_probability = rows[:, 3:].astype('float32').T
    files.atomic_write(path, lambda file: np.savez_compressed(
        file, index=index, label=label, top1=top1, probability=probability,
        label_probability=label_probability, temperature=temperature))


# ---- machine and command

def write_machine(path: str, device: str, **choices: str) -> None:
    """Write machine.json, which describes the last start of the run, on rank 0.

    choices: what the run has chosen for this machine, {name: value}.
    """
    if utils.rank() == 0:
        with harmless(os.path.basename(path)):
            text = json.dumps({**machine(device), **choices}, indent=1)
            files.atomic_write(path, lambda file: file.write(text.encode()))


def machine(device: str) -> dict[str, Any]:
    """Return {name: value} of the hardware, the versions that a run depends on, and how it was started."""
    facts: dict[str, Any] = {'device': f'{device} x {utils.world_size()}'}
    facts['processor'], facts['cores'] = cpu.model_name(), cpu.cores()
    if device == 'gpu':
        facts['gpu'] = paddle.device.cuda.get_device_name()
        facts['gpu memory'] = gigabytes(paddle.device.cuda.get_device_properties().total_memory)
        facts['cuda'], facts['cudnn'] = paddle.version.cuda(), paddle.version.cudnn()
    facts['memory'] = gigabytes(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    facts.update(system=platform.platform(), python=platform.python_version(), paddle=paddle.__version__,
                 numpy=np.__version__, code=commit(), command=command(), folder=os.getcwd())
    return facts


def gigabytes(size: int) -> str:
    """Return a size in bytes as text in GB."""
    return f'{size / 2 ** 30:.0f} GB'


def command() -> str:
    """Return the program's name and arguments, as a shell takes them."""
    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def command_to_go_on(folder: str) -> str:
    """Return the command that resumes this run, as a shell takes it.

    Under Paddle's launcher, which has options of its own, it says in words what to add to that command.
    """
    resume = ['-opts', 'MODEL.RESUME', 'auto'] if 'MODEL.RESUME' in sys.argv else ['-resume', 'auto']
    more = [*resume, '-output', folder]
    if 'PADDLE_TRAINER_ID' in os.environ and multiprocessing.parent_process() is None:
        return f'the same command with {shlex.join(more)}'
    if sys.argv[-len(more):] == more:
        more = []
    return shlex.join([sys.executable, *sys.argv, *more])


def commit() -> str:
    """Return the commit of this code, with a + if files differ from it; '' outside a clone or without git."""
    command = ['git', 'describe', '--always', '--abbrev=12', '--dirty=+', '--exclude=*']
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, cwd=root)
    except (OSError, subprocess.TimeoutExpired):    # no git, or one that hangs
        return ''
    return done.stdout.strip()


# ---- the page

def write_page(folder: str) -> None:
    """Write report.html and the metrics of the predictions of the run folder, on rank 0."""
    if utils.rank() == 0:
        with harmless('metrics'):
            scores.write_all(runs.read_run(folder), folder)
        with harmless('report.html'):
            from reporting import report  # here, because a training goes on without Jinja2
            log.info('page: %s', report.write([folder], os.path.join(folder, 'report.html')))


@contextmanager
def harmless(name: str) -> Iterator[None]:
    """Log an error of the block, which writes `name` for people to read. It ends no training."""
    try:
        yield
    except Exception as error:                      # whatever it is
        log.debug('traceback', exc_info=True)
        log.warning('%s could not be written: %s: %s', name, type(error).__name__, error)
