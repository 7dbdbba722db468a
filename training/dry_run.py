"""The dry run of -check: a few steps in a child process, what they took, and what the whole run would take.

The child is the same command with ORDER in its environment, and training/measure.py does its work. If it
is killed for want of memory, this process can still say so. Needs no Paddle.
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple

from system import lifeline, memory
from system.stopping import FAILURE, MISTAKE

from yacs.config import CfgNode

ORDER = 'HALONET_CHECK'                             # environment of the child: its folder and batch, as JSON
FACTS = 'facts.json'                                # in that folder, by measure.py
INTERRUPTED = 130                                   # exit status after Ctrl-C
LOOK = 0.2                                          # seconds between two looks at the memory
RESERVE = 0.03                                      # of all memory; a child that leaves less is killed
PRECISION = 16                                      # the largest batch is found to a part of this of itself
OUT_OF_MEMORY = 'out of memory'                     # in the error of a process that has too little

Facts = Mapping[str, Any]                           # of measure.py, by name


def main(config: CfgNode) -> None:
    """Do the dry run and end the program, if the config asks for one. The child gets on with its work."""
    if not config.CHECK and not config.CHECK_BATCH:
        return
    if ORDER in os.environ:
        lifeline.die_with_parent()
        return
    for signum in (signal.SIGTERM, signal.SIGINT):  # a shell starts what is in the background without SIGINT
        signal.signal(signum, end)
    parent = existing_folder(config.OUTPUT or config.SAVE)
    batch_size = config.DATA.BATCH_SIZE
    if config.EVAL:
        batch_size = config.DATA.BATCH_SIZE_EVAL or batch_size
    sys.exit(check(parent, batch_size, with_search=config.CHECK_BATCH))


def end(signum: int, frame: FrameType | None) -> None:
    """End this program by an exception, which removes its files and its child."""
    raise KeyboardInterrupt


def order() -> tuple[str, int]:
    """Return what `start` has ordered: the folder, and the batch size, which is 0 for that of the config."""
    folder, batch_size = json.loads(os.environ[ORDER])
    return folder, batch_size


def check(parent: str, batch_size: int, with_search: bool) -> int:
    """Do the dry run in a folder that is made below `parent`, and print the result. Returns the exit code.

    with_search: look for the largest batch as well, from `batch_size` on.
    """
    rank = int(os.environ.get('PADDLE_TRAINER_ID', 0))
    if with_search and 'PADDLE_TRAINER_ID' in os.environ:
        print('error: -check_batch starts the processes itself: use main_multi_gpu.py -nprocs N',
              file=sys.stderr)
        return MISTAKE
    try:
        with tempfile.TemporaryDirectory(prefix='.check-', dir=parent) as folder:
            done = start(folder, shown=True)
            if done.facts and rank == 0:
                print(report(done.facts, shutil.disk_usage(folder).free), flush=True)
            if with_search and (done.facts or done.is_out_of_memory):
                print(search(batch_size, done, folder))
                return 0
            return done.code
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f'error: {parent}: {error.strerror}; choose another folder with -output', file=sys.stderr)
        return MISTAKE


def existing_folder(path: str) -> str:
    """Return a folder, or the nearest one above it that exists: the check writes where the run would."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


# ---- the child

class Done(NamedTuple):
    """How a child has ended."""

    code: int
    facts: Facts                                    # of measure.py, and host_bytes; empty if it has failed
    error: str                                      # its last line with an error

    @property
    def is_out_of_memory(self) -> bool:
        """True if the child had too little memory."""
        return OUT_OF_MEMORY in self.error


def start(folder: str, batch_size: int = 0, shown: bool = False) -> Done:
    """Do the steps of a check in a child, which writes to `folder`. `shown`: its lines go to the console."""
    environment = {**os.environ, ORDER: json.dumps([os.path.join(folder, f'run_{batch_size}'), batch_size])}
    process = subprocess.Popen([sys.executable, *sys.argv], env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, errors='replace', start_new_session=True)
    watch = MemoryWatch(process)
    watch.start()
    error = ''
    try:
        for line in process.stdout or ():
            if 'error' in line:
                error = line.strip()
            if shown:
                print(line, end='', flush=True)
        code = process.wait()
    finally:
        kill(process)
    if code == -signal.SIGKILL:
        error = f'error: the process was killed: {OUT_OF_MEMORY}; lower DATA.BATCH_SIZE or DATA.NUM_WORKERS'
        if shown:
            print(error, file=sys.stderr)
    if code:
        return Done(code if code > 0 else FAILURE, {}, error)
    with open(os.path.join(folder, f'run_{batch_size}', FACTS), encoding='utf-8') as file:
        return Done(0, {**json.load(file), 'host_bytes': watch.most}, '')


class MemoryWatch(threading.Thread):
    """Measures the most host memory that a child and its processes use.

    It kills the child while there is a little memory left: the kernel might choose another program.
    """

    def __init__(self, process: subprocess.Popen) -> None:
        super().__init__(daemon=True)
        self.process = process
        self.most = 0                               # bytes so far

    def run(self) -> None:
        while self.process.poll() is None:
            self.most = max(self.most, memory.used_in_session(self.process.pid))
            if memory.available() < RESERVE * memory.total():
                kill(self.process)
            time.sleep(LOOK)


def kill(process: subprocess.Popen) -> None:
    """Kill a child and the processes that it has started, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- the largest batch

def search(batch_size: int, done: Done, folder: str) -> str:
    """Find the largest batch per process that fits, and return it in words.

    `done` is how a child with `batch_size` has ended.
    """
    def fits(size: int) -> bool:
        tried = start(folder, size)
        shutil.rmtree(os.path.join(folder, f'run_{size}'), ignore_errors=True)
        found = memory_line(tried.facts) if tried.facts else tried.error.partition(';')[0]
        print(f'  batch {size:5}: {found}', flush=True)
        return bool(tried.facts)

    print('the largest batch, by trying:', flush=True)
    if done.facts:
        images = done.facts.get('train_images', done.facts['eval_images'])
        most = max(images // done.facts['processes'], batch_size)
        found = largest(fits, batch_size, most)
    else:
        most = batch_size - 1
        found = largest(fits, 0, most)
    if not found:
        return 'not even one image per process fits'
    return f'the largest batch per process that fits: {found} images, of at most {most}'


def largest(fits: Callable[[int], bool], good: int, most: int) -> int:
    """Return the largest number up to `most` that fits, to a part of PRECISION; `good` fits, or is 0.

    It doubles the number until one does not fit, then bisects.
    """
    bad = most + 1
    if good:
        while good < most and bad > most:
            size = min(2 * good, most)
            if fits(size):
                good = size
            else:
                bad = size
    while bad - good > max(1, good // PRECISION):
        size = (good + bad) // 2
        if fits(size):
            good = size
        else:
            bad = size
    return good


# ---- the report

def report(facts: Facts, free_disk: int) -> str:
    """Return what a check has found, as lines."""
    lines = [
        f'{facts["model"]}, {facts["device"]} x {facts["processes"]}, {facts["precision"]}, '
        f'images of {facts["image_size"]} pixels',
        f'  memory       {memory_line(facts)}',
    ]
    if 'train_images' in facts:
        lines += training_lines(facts, free_disk)
    lines.append(f'  evaluation   {number(facts["eval_speed"])} images/s; {facts["eval_images"]} images take '
                 f'{duration(evaluation_seconds(facts))}')
    if 'train_images' in facts:
        lines.append(f'  whole run    {duration(run_seconds(facts))} for {facts["epochs"]} epochs with '
                     f'{facts["evaluations"]} evaluations, without checkpoints')
    return '\n'.join(lines)


def training_lines(facts: Facts, free_disk: int) -> list[str]:
    """Return the lines about the speed of the training and about its files."""
    model, data = facts['model_speed'], facts['data_speed']
    limit = 'reading the data limits it' if data < model else 'the model limits it'
    needed = disk(facts)
    room = f'{gigabytes(free_disk)} GB are free'
    if needed > free_disk:
        room += ': TOO LITTLE; lower SAVE_KEEP or choose another folder with -output'
    return [
        f'  training     {number(speed(facts))} images/s: {limit} (the model alone {number(model)}, '
        f'reading alone {number(data)})',
        f'  an epoch     {duration(facts["train_images"] / speed(facts))} for {facts["train_images"]} images '
        f'in {facts["steps_per_epoch"]} steps of {facts["images_per_step"]}',
        f'  disk         {gigabytes(needed)} GB: {facts["checkpoints"]} checkpoints of '
        f'{gigabytes(facts["checkpoint_bytes"])} GB and the weights; {room}',
    ]


def memory_line(facts: Facts) -> str:
    """Return in words how much memory the processes took."""
    host = f'{gigabytes(facts["host_bytes"])} of {gigabytes(memory.total())} GB'
    if not facts['gpu_bytes']:
        return host
    gpu = f'{gigabytes(facts["gpu_bytes"])} of {gigabytes(facts["gpu_total"])} GB'
    return f'{gpu} of a GPU; on the host {host}'


def speed(facts: Facts) -> float:
    """Return the images/s of a long training: what was measured, or less if reading alone is slower."""
    return min(facts['train_speed'], facts['data_speed'])


def evaluation_seconds(facts: Facts) -> float:
    """Return the seconds of one evaluation of the whole list."""
    return facts['eval_images'] / facts['eval_speed']


def run_seconds(facts: Facts) -> float:
    """Return the seconds of all epochs and evaluations, those of averaged weights included."""
    training = facts['epochs'] * facts['train_images'] / speed(facts)
    return training + facts['evaluations'] * evaluation_seconds(facts)


def disk(facts: Facts) -> int:
    """Return the bytes of the checkpoints, with one more while it is written, and of the weights."""
    return (facts['checkpoints'] + 1) * facts['checkpoint_bytes'] + facts['weight_bytes']


def number(speed: float) -> str:
    """Return a speed with three significant digits, or as a whole number."""
    return f'{speed:.0f}' if speed >= 100 else f'{speed:.3g}'


def gigabytes(size: float) -> str:
    """Return a number of bytes in GB, with two significant digits below 1."""
    value = size / 2 ** 30
    return f'{value:.1f}' if value >= 1 else f'{value:.2g}'


def duration(seconds: float) -> str:
    """Return a duration in words: '75 h', '2 h 05 min', '48 min' or '7.5 s'."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f'{number(seconds)} s'
    if minutes < 60:
        return f'{minutes} min'
    if minutes < 24 * 60:
        return f'{minutes // 60} h {minutes % 60:02} min'
    return f'{minutes / 60:.0f} h'
