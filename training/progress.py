"""The progress lines of training and evaluation, and the fraction of time spent waiting for data."""
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional, TextIO

from system import console, cpu
import utils
from utils import log

import paddle
import paddle.distributed as dist
from tqdm import tqdm

import datasets
from training.checkpoint import Progress

WAIT_TO_WARN = 0.2                                  # fraction of time waiting for data that gets a warning,
#                                                     and increase of it that gets another
SECONDS_TO_JUDGE = 10                               # shorter stretches say little: data processes start
BAR = '{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}'


# ---- bars

class Bar(tqdm):
    """The progress line of a training, with `status()` at its end; `disable=True` shows nothing."""

    monitor_interval = 0                            # no thread: data processes are forked

    def __init__(self, status: Callable[[], str], **options: Any) -> None:
        self.status = status
        super().__init__(bar_format=BAR + '  ETA {remaining}  {status}', dynamic_ncols=True,
                         smoothing=0, **options)    # 0: the mean speed, evaluations included

    @property
    def format_dict(self) -> dict:
        return {**super().format_dict, 'status': self.status()}


class EvaluationBar(tqdm):
    """The progress line of an evaluation, in batches. It leaves nothing behind."""

    monitor_interval = 0                            # as in Bar

    def __init__(self, **options: Any) -> None:
        super().__init__(
            bar_format=BAR + ' batches  ETA {remaining}', leave=False, dynamic_ncols=True, **options)


def evaluation_batches(loader: datasets.Loader, split: str,
                       terminal: Optional[TextIO] = None) -> Generator[tuple, None, None]:
    """Yield the batches of an evaluation. Rank 0 shows its progress if stderr is a terminal."""
    terminal = terminal or sys.stderr
    shown = utils.rank() == 0 and terminal.isatty()
    bar = EvaluationBar(desc=split, total=len(loader), file=terminal, disable=not shown)
    with lines_above_bars(shown), bar:
        for batch in loader.epoch(0):
            yield batch
            bar.update()


@contextmanager
def lines_above_bars(shown: bool) -> Iterator[None]:
    """Write the console's log lines above the progress lines within the block, if these are `shown`."""
    handlers = [handler for handler in log.handlers if shown and isinstance(handler, console.Console)]
    streams = [handler.setStream(AboveBar(handler.stream)) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, streams):
            handler.setStream(stream)


class AboveBar:
    """A stream for a log handler that writes its lines above the progress line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        with Bar.external_write_mode(file=self.stream):
            self.stream.write(text)
            self.stream.flush()

    def flush(self) -> None:
        self.stream.flush()


# ---- watching a training

class Monitor:
    """Watches a training: the progress line of rank 0 in a terminal, and each rank's waiting for data.

    A stretch goes from the start of an epoch or the last report to the next report, as in
    metrics.jsonl.
    """

    def __init__(self, *, epochs: int, steps_per_epoch: int, num_workers: int,
                 terminal: Optional[TextIO] = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.epochs, self.total = epochs, epochs * steps_per_epoch
        self.num_workers, self.clock = num_workers, clock
        self.terminal = terminal or sys.stderr
        self.visible = utils.rank() == 0 and self.terminal.isatty()
        self.bar = Bar(self.status, disable=True)
        self.loss, self.lr = float('nan'), 0.0
        self.speed, self.waiting = 0.0, 0.0         # of the last stretch: images/s and fraction of time
        self.start, self.wait, self.images = clock(), 0.0, 0                 # of this stretch
        self.judged_wait, self.judged_seconds, self.warned = 0.0, 0.0, 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the progress line within the block, and end it however the block ends."""
        with lines_above_bars(self.visible):
            try:
                yield
            finally:
                self.bar.close()

    def batches(self, batches: Iterable[tuple], progress: Progress) -> Iterator[tuple]:
        """Yield the batches of an epoch; the time until each one comes is waiting for data."""
        if self.visible and self.bar.disable:
            self.bar = Bar(self.status, total=self.total, initial=progress.step, file=self.terminal)
        self.bar.set_description_str(f'epoch {progress.epoch + 1}/{self.epochs}', refresh=False)
        self._new_stretch()
        batches = iter(batches)
        while True:
            before = self.clock()
            batch = next(batches, None)
            self.wait += self.clock() - before
            if batch is None:
                return
            yield batch

    def step(self, lr: float, images: int) -> None:
        """Count an optimizer step on so many images of this process."""
        self.lr = lr
        self.images += images * utils.world_size()
        self.bar.update()

    def report(self, loss: float, images_per_s: float, seconds: float) -> float:
        """End a stretch of so many seconds.

        Returns the fraction of them spent waiting for data, on the rank that waited longest.
        """
        wait = utils.all_reduce(paddle.to_tensor([self.wait], 'float32'), dist.ReduceOp.MAX).item()
        self.loss, self.speed, self.waiting = loss, images_per_s, min(wait / seconds, 1.0)
        self._judge(wait, seconds)
        self._new_stretch()
        return self.waiting

    def _new_stretch(self) -> None:
        self.start, self.wait, self.images = self.clock(), 0.0, 0

    def _judge(self, wait: float, seconds: float) -> None:
        """Warn where reading data limits the speed, and again where that has become much worse."""
        self.judged_wait += wait
        self.judged_seconds += seconds
        if self.judged_seconds < SECONDS_TO_JUDGE:
            return
        fraction = self.judged_wait / self.judged_seconds
        self.judged_wait = self.judged_seconds = 0.0
        if fraction >= self.warned + WAIT_TO_WARN:
            self.warned = fraction
            log.warning('%.0f %% of the time is spent waiting for data: %s', 100 * fraction,
                        advice(self.num_workers, utils.world_size(), cpu.cores()))

    def status(self) -> str:
        """Return the end of the progress line: speed, loss, learning rate, waiting for data, memory.

        Speed and waiting are of the present stretch once it is long enough, else of the last one.
        """
        seconds = self.clock() - self.start
        speed, waiting = self.speed, self.waiting
        if self.images and seconds > 2:             # no images: an evaluation, say
            speed, waiting = self.images / seconds, self.wait / seconds
        parts = []
        if speed:                                   # not in the first seconds of a run
            parts.append(f'{speed:.0f} images/s')
        if not math.isnan(self.loss):               # it leaves the device at reports only
            parts.append(f'loss {self.loss:.4f}')
        parts.append(f'lr {self.lr:.2e}')
        if speed:
            parts.append(f'data wait {waiting:.0%}')
        return '  '.join([*parts, memory()])


def advice(num_workers: int, processes: int, cores: int) -> str:
    """Return what to do where reading data limits the speed."""
    cheaper = 'make reading cheaper (a local disk, images stored at about the size that is used)'
    if (num_workers + 1) * processes >= cores:
        return f'all {cores} cores are in use, so {cheaper}'
    return (f'raise DATA.NUM_WORKERS ({num_workers} for each of {processes} process(es) now, '
            f'{cores} cores), or {cheaper}')


def memory() -> str:
    """Return as text the most memory allocated on a GPU, or what this process holds now."""
    if paddle.get_device().startswith('gpu'):
        used = paddle.device.cuda.max_memory_allocated()
    else:
        with open('/proc/self/statm', encoding='ascii') as file:
            pages = int(file.read().split()[1])
        used = pages * os.sysconf('SC_PAGE_SIZE')
    return f'{used / 2 ** 30:.1f} GB'
