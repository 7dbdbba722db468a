"""What a person watches while it trains or evaluates: the progress line, the share of time spent waiting for data."""
import os
import sys
import time
from contextlib import contextmanager

from system import console, cpu
import utils
from utils import log

import paddle
import paddle.distributed as dist
from tqdm import tqdm

from training import records

WAIT_TO_WARN = 0.2                                  # share of time waiting for data that deserves a warning; and, above the
#                                                     last one, another
SECONDS_TO_JUDGE = 10                               # shorter stretches say little: data processes start, the first step is slow


class Bar(tqdm):
    """tqdm's line with `status()` at its end; `disable=True` is the bar that is not there."""

    monitor_interval = 0                            # no thread of its own: data processes are forked

    def __init__(self, status, **options):
        self.status = status
        super().__init__(bar_format='{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}  ETA {remaining}  {status}',
                         smoothing=0, dynamic_ncols=True, **options)         # 0: the mean speed, evaluations included

    @property
    def format_dict(self):
        return {**super().format_dict, 'status': self.status()}


class EvaluationBar(tqdm):
    """tqdm's line for the batches of an evaluation; it leaves nothing behind."""

    monitor_interval = 0                            # as in Bar

    def __init__(self, **options):
        super().__init__(bar_format='{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} batches  ETA {remaining}',
                         leave=False, dynamic_ncols=True, **options)


def evaluation_batches(loader, split, terminal=None):
    """Yield the batches of an evaluation; rank 0 shows in a terminal, and only there, how far it is."""
    terminal = terminal or sys.stderr
    shown = utils.rank() == 0 and terminal.isatty()
    with lines_beside_bars(shown), EvaluationBar(desc=split, total=len(loader), file=terminal, disable=not shown) as bar:
        for batch in loader.epoch(0):
            yield batch
            bar.update()


@contextmanager
def lines_beside_bars(shown):
    """Within, log lines for the console go above the progress lines, if these are `shown`."""
    handlers = [handler for handler in log.handlers if shown and isinstance(handler, console.Console)]
    streams = [handler.setStream(BesideBar(handler.stream)) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, streams):
            handler.setStream(stream)


class BesideBar:
    """A stream for a log handler: lines go above the bar, and neither garbles the other."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with Bar.external_write_mode(file=self.stream):
            self.stream.write(text)
            self.stream.flush()

    def flush(self):
        self.stream.flush()


class Monitor:
    """Watches a training run: the progress line of rank 0 in a terminal, and the waiting for data of every rank.

    A stretch goes from the start of an epoch or the last report to the next report, as in metrics.jsonl.
    """

    def __init__(self, *, epochs, steps_per_epoch, num_workers, terminal=None, clock=time.perf_counter):
        self.epochs, self.total, self.num_workers, self.clock = epochs, epochs * steps_per_epoch, num_workers, clock
        self.terminal = terminal or sys.stderr
        self.shown = utils.rank() == 0 and self.terminal.isatty()
        self.bar = Bar(self.status, disable=True)
        self.loss, self.lr, self.speed, self.share = float('nan'), 0.0, 0.0, 0.0
        self.start, self.wait, self.images = clock(), 0.0, 0
        self.judged_wait, self.judged_seconds, self.warned = 0.0, 0.0, 0.0

    @contextmanager
    def watch(self, folder):
        """Around the training: ends the progress line and writes the run's page, however the training ends."""
        try:
            with lines_beside_bars(self.shown):
                try:
                    yield
                finally:
                    self.bar.close()
        finally:
            records.write_report(folder)

    def batches(self, batches, progress):
        """The batches of an epoch; the time until each one comes is waiting for data."""
        if self.shown and self.bar.disable:
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

    def step(self, lr, images):
        """An optimizer step is done, on so many images of this process."""
        self.lr, self.images = lr, self.images + images * utils.world_size()
        self.bar.update()

    def report(self, loss, images_per_s, seconds):
        """End a stretch. Returns the share of its `seconds` that was spent waiting for data, on the rank that waited most."""
        wait = utils.all_reduce(paddle.to_tensor([self.wait], 'float32'), dist.ReduceOp.MAX).item()
        self.loss, self.speed, self.share = loss, images_per_s, min(wait / seconds, 1.0)
        self._judge(wait, seconds)
        self._new_stretch()
        return self.share

    def _new_stretch(self):
        self.start, self.wait, self.images = self.clock(), 0.0, 0

    def _judge(self, wait, seconds):
        """Warn where the data and not the model sets the pace, and again where it has become much worse."""
        self.judged_wait, self.judged_seconds = self.judged_wait + wait, self.judged_seconds + seconds
        if self.judged_seconds < SECONDS_TO_JUDGE:
            return
        share = self.judged_wait / self.judged_seconds
        self.judged_wait = self.judged_seconds = 0.0
        if share >= self.warned + WAIT_TO_WARN:
            self.warned = share
            log.warning('%.0f %% of the time is spent waiting for data: %s', 100 * share,
                        advice(self.num_workers, utils.world_size(), cpu.cores()))

    def status(self):
        """The end of the progress line; speed and waiting are of the running stretch once that says something."""
        seconds = self.clock() - self.start
        live = self.images and seconds > 2          # no images: an evaluation, say
        speed, share = (self.images / seconds, self.wait / seconds) if live else (self.speed, self.share)
        loss = f'loss {self.loss:.4f}  ' if self.loss == self.loss else ''   # it leaves the device at reports only
        if not speed:                               # the first seconds of a run
            return f'{loss}lr {self.lr:.2e}  {memory()}'
        return f'{speed:.0f} images/s  {loss}lr {self.lr:.2e}  data wait {share:.0%}  {memory()}'


def advice(num_workers, processes, cores):
    """What to do where reading is the bottleneck."""
    cheaper = 'make reading cheaper (a local disk, images stored at about the size that is used)'
    if (num_workers + 1) * processes >= cores:
        return f'all {cores} cores are in use, so {cheaper}'
    return f'raise DATA.NUM_WORKERS ({num_workers} for each of {processes} process(es) now, {cores} cores), or {cheaper}'


def memory():
    """The most that was allocated on the GPU, or on CPU what this process holds now (its data processes not counted)."""
    if paddle.get_device() != 'cpu':
        return f'{paddle.device.cuda.max_memory_allocated() / 2 ** 30:.1f} GB'
    with open('/proc/self/statm', encoding='ascii') as file:
        return f'{int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 30:.1f} GB'
