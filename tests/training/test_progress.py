"""The progress lines of training and evaluation, and the warning about waiting for data."""
import contextlib
import io
import re

import utils

import paddle
import pytest
from runs import TINY, options, program

from training import engine, progress
from training.checkpoint import Progress

# ---- waiting for data

class Clock:
    """A clock that a test sets."""

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
    defaults = {'epochs': 2, 'steps_per_epoch': 10, 'num_workers': 1, 'clock': clock}
    return progress.Monitor(**{**defaults, **changes})


def stretch(watch, clock, wait, work, steps=5):
    """Run an epoch of `steps` steps and report at its end. Returns the fraction of time spent waiting."""
    start = clock.now
    for _ in watch.batches(clock.loader(wait, steps), Progress()):
        clock.now += work
        watch.step(0.1, 4)
    return watch.report(1.0, 4 * steps / (clock.now - start), clock.now - start)


def test_data_wait_is_the_time_until_a_batch_comes():
    clock = Clock()
    watch = make_monitor(clock)
    assert stretch(watch, clock, wait=3, work=1) == pytest.approx(0.75)
    assert stretch(watch, clock, wait=0, work=1) == 0
    assert stretch(watch, clock, wait=1, work=3) == pytest.approx(0.25)      # nothing of the stretches before


@pytest.fixture
def warnings(monkeypatch):
    logged = []
    monkeypatch.setattr(progress.log, 'warning', lambda text, *args: logged.append(text % args))
    return logged


def test_data_wait_is_warned_of_once_and_again_when_much_worse(warnings):
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


def test_progress_line_omits_an_unknown_speed():
    clock = Clock()
    watch = make_monitor(clock)
    for _ in watch.batches(clock.loader(0.1, 1), Progress()):
        clock.now += 0.5
        watch.step(0.1, 4)
        assert watch.status().startswith('lr 1.00e-01  ')                    # not 0 images/s
    watch.report(1.0, 6.7, 0.6)
    assert watch.status().startswith('7 images/s  loss 1.0000  lr 1.00e-01  data wait 17%  ')


def test_advice_fits_the_machine():
    assert 'raise DATA.NUM_WORKERS (2 for each of 4 process(es) now, 64 cores)' in progress.advice(2, 4, 64)
    advice = progress.advice(3, 4, 16)
    assert 'NUM_WORKERS' not in advice and 'all 16 cores are in use' in advice


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
    monkeypatch.setattr(progress.Bar, '__init__', quick_bar(progress.Bar.__init__))
    utils.setup_logger(tmp_path)
    utils.log.handlers[-1].setStream(terminal)
    yield terminal
    utils.log.handlers.clear()


def quick_bar(init):
    """Drawn at every step, not ten times a second."""
    return lambda self, status, **more: init(self, status, mininterval=0, miniters=1, ncols=110, **more)


def test_log_lines_go_above_the_progress_line(terminal):
    clock = Clock()
    watch = make_monitor(clock, epochs=16, steps_per_epoch=44, terminal=terminal)
    with watch.shown():
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
    assert 'the last one' in terminal.screen() and len(terminal.screen()) == 9   # six, one, the bar, the rest
    assert bar.startswith('epoch 3/16  13% |') and '| 94/704  ETA ' in bar
    assert '  4 images/s  lr 2.00e-03  data wait 25%  ' in bar and bar.endswith(' GB') and 'loss' not in bar
    assert '  4 images/s  loss 0.9431  lr 2.00e-03  data wait 25%  ' in later
    assert terminal in [getattr(handler, 'stream', None) for handler in utils.log.handlers]    # as it was


def test_error_ends_the_progress_line_first(terminal):
    watch = make_monitor(Clock(), terminal=terminal)
    with utils_error(), watch.shown():
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


def test_no_progress_line_without_a_terminal(images, tmp_path):
    done = program('main_single_gpu.py', '-data_path', images, '-output', tmp_path, *options(TINY))
    assert '\r' not in done.stdout and 'ETA' not in done.stdout + done.stderr
    assert 'epoch 1/2  step 1/4  loss' in done.stdout


def test_evaluation_has_its_own_progress_line(terminal):
    class Loader(list):
        def epoch(self, epoch):
            yield from self
    batches = []
    for batch in progress.evaluation_batches(Loader('abcd'), 'val_ema', terminal):
        batches.append(batch)
        utils.log.warning('left out: %s', batch)
    assert ''.join(batches) == 'abcd'
    drawn = re.findall(r'val_ema +(\d+)% \|.*?\| (\d/4) batches  ETA ', terminal.getvalue())
    assert drawn[-1] == ('75', '3/4')
    screen = [line for line in terminal.screen() if line]
    assert screen == [f'left out: {batch}' for batch in batches], 'the line garbles the log, or stays behind'


def test_failed_evaluation_ends_its_progress_line_first(terminal):
    class Loader(list):
        def epoch(self, epoch):
            yield from self
    batches = progress.evaluation_batches(Loader('abcd'), 'val', terminal)
    with pytest.raises(ValueError), contextlib.closing(batches):
        next(batches)
        raise ValueError
    assert [line for line in terminal.screen() if line] == []


@pytest.mark.parametrize('steps_per_epoch, freq, expected', [
    (56, 50, [56]), (44, 50, [44]), (101, 50, [50, 101]), (80, 50, [50, 80]), (150, 50, [50, 100, 150]),
    (75, 50, [50, 75]), (4, 1, [1, 2, 3, 4]), (5, 2, [2, 4, 5]), (1, 50, [1])])
def test_epoch_ends_with_one_report(steps_per_epoch, freq, expected):
    steps = range(1, steps_per_epoch + 1)
    due = [step for step in steps if engine.is_report_due(step, steps_per_epoch, freq)]
    assert due == expected
