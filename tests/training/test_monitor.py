"""What is shown and kept of a training: progress line, TensorBoard logs, waiting for data, predictions, machine."""
import contextlib
import io
import json
import logging
import os
import re
import shutil
import struct
import sys

import numpy as np
import paddle
import pytest
from runs import TINY, make_images, options, program, records
from tensorboardX.proto import event_pb2

import utils
from config import get_config
from reporting import report
from training import checkpoint, engine, monitor
from training.engine import Progress

CURVED = ['TRAIN.EMA_DECAY', 0.9, 'TRAIN.NUM_EPOCHS', 4, 'SAVE_KEEP', 10]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images') / 'data')


def run(images, output, *opts):
    return engine.run(get_config(None, [*TINY, 'DATA.DATA_PATH', images, 'OUTPUT', str(output), *opts]))


@pytest.fixture(scope='module')
def full_run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('full') / 'run'
    run(images, folder, *CURVED)
    return folder


# ---- records

def test_metrics_rewind_to_a_step_and_its_evaluations(tmp_path):
    metrics = monitor.Metrics(tmp_path)
    for epoch in (1, 2):
        for step in (2 * epoch - 1, 2 * epoch):
            metrics.write(epoch=epoch, step=step, split='train', loss=1 / 3)
        metrics.write(epoch=epoch, step=2 * epoch, split='val', loss=0.5)
    lines = open(metrics.path, encoding='utf-8').read().splitlines(keepends=True)
    assert lines[0] == '{"epoch": 1, "step": 1, "split": "train", "loss": 0.33333333}\n'
    with open(metrics.path, 'a', encoding='utf-8') as file:
        file.write('{"step": 4, "lo')                # a kill in the middle of a line
    for step, epochs, kept in ((9, 9, 6), (4, 2, 6), (4, 1, 5), (3, 1, 4), (2, 1, 3), (2, 0, 2), (0, 0, 0)):
        metrics.rewind(step, epochs)
        assert open(metrics.path, encoding='utf-8').read() == ''.join(lines[:kept])


def test_a_damaged_metrics_file_is_named(tmp_path):
    (tmp_path / 'metrics.jsonl').write_bytes(b'{"epoch": 1, "step": 1, "split": "train"}\n\xff\x00\n')
    with pytest.raises(ValueError, match='metrics.jsonl:2: not a record'):
        monitor.Metrics(tmp_path).rewind(5, 5)


# ---- waiting for data

class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def loader(self, seconds, count, size=4):
        """Batches that take `seconds` each to come."""
        for _ in range(count):
            self.now += seconds
            yield paddle.zeros([size, 1]), None, None


def make_monitor(clock, **changes):
    return monitor.Monitor(**{'epochs': 2, 'steps_per_epoch': 10, 'num_workers': 1, 'clock': clock, **changes})


def stretch(watch, clock, wait, work, steps=5):
    """An epoch of `steps` steps with one report at its end; returns the share."""
    start = clock.now
    for _ in watch.batches(clock.loader(wait, steps), Progress()):
        clock.now += work
        watch.step(0.1, 4)
    return watch.report(1.0, 4 * steps / (clock.now - start), clock.now - start)


def test_waiting_is_the_time_until_a_batch_comes():
    clock = Clock()
    watch = make_monitor(clock)
    assert stretch(watch, clock, wait=3, work=1) == pytest.approx(0.75)
    assert stretch(watch, clock, wait=0, work=1) == 0
    assert stretch(watch, clock, wait=1, work=3) == pytest.approx(0.25)      # nothing of the stretches before


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(monitor.log, 'warning', lambda text, *args: said.append(text % args))
    return said


def test_a_bottleneck_is_told_once_and_again_when_it_is_much_worse(warnings):
    clock = Clock()
    watch = make_monitor(clock)
    for wait in (1, 1, 4.2, 4.3, 2, 5, 6, 6.5, 9, 0, 9):                     # of 10 s a step, five steps
        stretch(watch, clock, wait, 10 - wait)
    assert [text[:text.index('%') + 1] for text in warnings] == ['42 %', '65 %', '90 %']
    assert all('of the time is spent waiting for data: ' in text for text in warnings)


def test_short_stretches_are_judged_together(warnings):
    clock = Clock()
    watch = make_monitor(clock)
    stretch(watch, clock, 0.9, 0.1)                                          # 5 s
    assert warnings == []
    stretch(watch, clock, 0.3, 0.9)                                          # 6 s more: 6 of 11 s
    assert warnings[0].startswith('55 %')


def test_the_line_says_no_speed_before_there_is_one():
    clock = Clock()
    watch = make_monitor(clock)
    for _ in watch.batches(clock.loader(0.1, 1), Progress()):
        clock.now += 0.5
        watch.step(0.1, 4)
        assert watch.status().startswith('lr 1.00e-01  ')                    # not 0 images/s
    watch.report(1.0, 6.7, 0.6)
    assert watch.status().startswith('7 images/s  loss 1.0000  lr 1.00e-01  data wait 17%  ')


def test_advice_fits_the_machine():
    assert 'raise DATA.NUM_WORKERS (2 for each of 4 process(es) now, 64 cores)' in monitor.advice(2, 4, 64)
    assert 'NUM_WORKERS' not in monitor.advice(3, 4, 16) and 'all 16 cores are in use' in monitor.advice(3, 4, 16)


# ---- the progress line

class Terminal(io.StringIO):
    """A terminal as far as a program can tell; `screen()` is what one would see on it."""

    encoding = 'utf-8'

    def isatty(self):
        return True

    def screen(self):
        lines = ['']
        for line in self.getvalue().split('\n'):
            shown = ''
            for part in line.split('\r'):
                shown = part + shown[len(part):]                             # written over what stood there
            lines.append(shown.rstrip())
        return lines[1:]


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    terminal = Terminal()
    monkeypatch.setattr(monitor.Bar, '__init__', quick_bar(monitor.Bar.__init__))
    monkeypatch.setattr(monitor, 'write_report', lambda folder: None)
    utils.setup_logger(tmp_path)
    utils.log.handlers[-1].setStream(terminal)
    yield terminal
    utils.log.handlers.clear()


def quick_bar(init):
    """Drawn at every step, not ten times a second."""
    return lambda self, status, **more: init(self, status, mininterval=0, miniters=1, ncols=110, **more)


def test_the_line_and_the_log_do_not_garble_each_other(terminal, tmp_path):
    clock = Clock()
    watch = make_monitor(clock, epochs=16, steps_per_epoch=44, terminal=terminal)
    with watch.watch(tmp_path):
        for i, _ in enumerate(watch.batches(clock.loader(0.25, 6), Progress(epoch=2, step=88))):
            clock.now += 0.75
            watch.step(0.002, 4)
            utils.log.info('line %d of the log', i)
        bar = terminal.screen()[-1]
        watch.report(0.9431, 4.0, 6.0)
        clock.now += 100                                                     # an evaluation
        utils.log.warning('the last one')
        later = terminal.screen()[-1]
    assert [line for line in terminal.screen() if 'log' in line] == [f'line {i} of the log' for i in range(6)]
    assert 'the last one' in terminal.screen() and len(terminal.screen()) == 9   # six, one, the bar, what follows it
    assert bar.startswith('epoch 3/16  13% |') and '| 94/704  ETA ' in bar
    assert '  4 images/s  lr 2.00e-03  data wait 25%  ' in bar and bar.endswith(' GB') and 'loss' not in bar
    assert '  4 images/s  loss 0.9431  lr 2.00e-03  data wait 25%  ' in later
    assert terminal in [getattr(handler, 'stream', None) for handler in utils.log.handlers]    # as it was


def test_an_error_ends_the_line_first(terminal, tmp_path):
    watch = make_monitor(Clock(), terminal=terminal)
    with utils_error(), watch.watch(tmp_path):
        for _ in watch.batches(Clock().loader(1, 3), Progress()):
            watch.step(0.1, 4)
            raise ValueError('what went wrong')
    bar, error, rest = terminal.screen()
    assert bar.startswith('epoch 1/2   5% |') and (error, rest) == ('error: what went wrong', '')


def utils_error():
    class Stop:
        def __enter__(self):
            pass

        def __exit__(self, kind, error, trace):
            utils.log.error('error: %s', error)
            return True
    return Stop()


def test_files_and_ci_get_plain_lines(images, tmp_path):
    done = program('main_single_gpu.py', '-data_path', images, '-output', tmp_path, *options(TINY))
    assert '\r' not in done.stdout and 'ETA' not in done.stdout + done.stderr and 'epoch 1/2  step 1/4  loss' in done.stdout


def test_an_evaluation_moves_a_line_of_its_own(terminal):
    class Loader(list):
        def epoch(self, epoch):
            yield from self
    batches = []
    for batch in monitor.evaluation_batches(Loader('abcd'), 'val_ema', terminal):
        batches.append(batch)
        utils.log.warning('left out: %s', batch)
    assert ''.join(batches) == 'abcd'
    assert re.findall(r'val_ema +(\d+)% \|.*?\| (\d/4) batches  ETA ', terminal.getvalue())[-1] == ('75', '3/4')
    screen = [line for line in terminal.screen() if line]
    assert screen == [f'left out: {batch}' for batch in batches], 'the line garbles the log, or stays behind'


def test_an_evaluation_that_fails_ends_its_line_first(terminal):
    class Loader(list):
        def epoch(self, epoch):
            yield from self
    with pytest.raises(ValueError), contextlib.closing(monitor.evaluation_batches(Loader('abcd'), 'val', terminal)) as batches:
        next(batches)
        raise ValueError
    assert [line for line in terminal.screen() if line] == []


@pytest.mark.parametrize('steps_per_epoch, freq, expected', [
    (56, 50, [56]), (44, 50, [44]), (101, 50, [50, 101]), (80, 50, [50, 80]), (150, 50, [50, 100, 150]), (75, 50, [50, 75]),
    (4, 1, [1, 2, 3, 4]), (5, 2, [2, 4, 5]), (1, 50, [1])])
def test_an_epoch_ends_with_one_line(steps_per_epoch, freq, expected):
    due = [step for step in range(1, steps_per_epoch + 1) if engine.is_report_due(step, steps_per_epoch, freq)]
    assert due == expected


def test_the_log_names_the_data_the_splits_and_the_page(images, full_run):
    lines = [line.split(' ', 2)[2] for line in (full_run / 'log.txt').read_text(encoding='utf-8').splitlines()]
    assert f'{images}: 20 images to train on' in lines and 'imagenet2012' not in ''.join(lines)
    assert lines[-1] == f'page: {full_run}/report.html'
    last = records(full_run, 'val_ema')[-1]
    assert lines[-5].startswith(f'val_ema  acc@1 {last["acc1"]:.2f}  acc@5 ') and lines[-6].startswith('val  acc@1 ')


# ---- TensorBoard

def read_events(folder):
    """{(step, tag): value} as TensorBoard reads the event files of a folder: a session's start drops later steps."""
    kept = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), 'rb') as file:
            while head := file.read(12):
                event = event_pb2.Event.FromString(file.read(struct.unpack('<Q', head[:8])[0]))
                file.read(4)
                if event.HasField('session_log'):
                    kept = {key: value for key, value in kept.items() if key[0] < event.step}
                for value in event.summary.value:
                    assert (event.step, value.tag) not in kept
                    kept[event.step, value.tag] = value.simple_value
    return kept


def same_as_the_records(folder):
    splits = {record['split'] for record in records(folder)}
    assert splits == {'train', 'val', 'val_ema'} == set(os.listdir(folder / 'tensorboard'))
    for split in splits:
        expected = {(record['step'], tag): value for record in records(folder, split) for tag, value in record.items()
                    if tag in monitor.SCALARS and value is not None}
        found = read_events(folder / 'tensorboard' / split)
        assert found.keys() == expected.keys() and len(found) >= 4 * 4
        assert all(found[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-8) for key in found)


def test_tensorboard_gets_the_records(full_run):
    same_as_the_records(full_run)
    assert {tag for _, tag in read_events(full_run / 'tensorboard' / 'train')} == {*monitor.SCALARS}


def test_a_resumed_run_takes_the_place_of_later_steps(images, full_run, tmp_path):
    shutil.copytree(full_run, tmp_path / 'run')
    for path in checkpoint.steps(tmp_path / 'run')[:2]:
        os.remove(path)
    os.remove(tmp_path / 'run' / 'final.pdparams')
    run(images, tmp_path / 'run', *CURVED, 'MODEL.RESUME', 'auto')
    same_as_the_records(tmp_path / 'run')
    assert len(os.listdir(tmp_path / 'run' / 'tensorboard' / 'train')) == 2


# ---- what is kept

def predictions(folder, split='val'):
    with np.load(folder / f'predictions_{split}.npz') as file:
        return dict(file)


def test_predictions_are_of_the_last_evaluation(full_run, images):
    labels = [int(line.split()[1]) for line in open(os.path.join(images, 'val_list.txt'), encoding='utf-8')]
    for split in ('val', 'val_ema'):
        found, last = predictions(full_run, split), records(full_run, split)[-1]
        assert found['index'].tolist() == list(range(11)) and found['label'].tolist() == labels
        assert 100 * (found['top1'] == found['label']).mean() == pytest.approx(last['acc1'])
        assert -np.log(found['label_probability'].astype('float64')).mean() == pytest.approx(last['loss'], rel=1e-5)
        assert (found['probability'] >= found['label_probability']).all()
        assert ((found['probability'] == found['label_probability']) == (found['top1'] == found['label'])).all()


def test_predictions_of_two_processes_are_those_of_one(full_run, images, tmp_path):
    program('main_multi_gpu.py', '-data_path', images, '-eval', '-nprocs', 2, '-pretrained', full_run / 'final',
            '-output', tmp_path, *options(TINY))
    one, two = predictions(full_run), predictions(tmp_path, 'eval')
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=1e-4)
    assert (tmp_path / 'report.html').exists()


def test_images_that_are_left_out_have_no_prediction(full_run, images, tmp_path):
    shutil.copytree(images, tmp_path / 'data')
    (tmp_path / 'data' / 'val' / '5.png').write_bytes(b'')
    run(str(tmp_path / 'data'), tmp_path / 'run', 'EVAL', True, 'DATA.ON_ERROR', 'skip',
        'MODEL.PRETRAINED', str(full_run / 'final'))
    assert predictions(tmp_path / 'run', 'eval')['index'].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert monitor.commit() == ''


def test_small_numbers_keep_their_digits(tmp_path):
    monitor.Metrics(str(tmp_path)).write(step=0, split='train', lr=1.2345678e-9)
    assert json.loads((tmp_path / 'metrics.jsonl').read_text())['lr'] == 1.2345678e-9


def test_the_machine_is_recorded(full_run):
    facts = json.loads((full_run / 'machine.json').read_text())
    assert facts['device'] == 'cpu x 1' and facts['paddle'] == paddle.__version__ and facts['folder'] == os.getcwd()
    assert facts['cores'] >= 1 and facts['python'] == sys.version.split()[0]


@pytest.mark.parametrize('name', ['machine', 'write_predictions', 'report'])
def test_what_is_kept_for_people_never_fails_a_training(images, tmp_path, monkeypatch, name):
    def fails(*args):
        raise RuntimeError('no such luck')
    monkeypatch.setattr(*((report, 'write') if name == 'report' else (monitor, name)), fails)
    run(images, tmp_path)
    assert (tmp_path / 'final.pdparams').exists()
    assert (tmp_path / 'log.txt').read_text().count('could not be written: RuntimeError: no such luck') == 1
    assert logging.getLogger('halonet').handlers and not list(tmp_path.glob('*.tmp*'))
