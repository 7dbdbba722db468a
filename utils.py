"""What every part needs and no part owns: processor set-up, rank facts and reductions, logging, run folders, sums."""
import ctypes
import io
import itertools
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from system import paddle_import  # isort: skip  (first: it prepares for Paddle's import)

import numpy as np
import paddle
import paddle.distributed as dist

from system import console, files, lifeline
from system.console import visible
from system.files import atomic_write, remove_temporary  # noqa: F401  (used as utils.atomic_write)

log = logging.getLogger('halonet')

MISTAKE, FAILURE, STOPPED = 2, 1, 75        # exit codes: starting again meets the same error, may help, goes on (EX_TEMPFAIL)
MISTAKES = (ValueError, FloatingPointError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError,
            PermissionError)
LOST = re.compile('/third_party/gloo/|/core/distributed/store/')      # in errors about a partner that is gone
PATIENCE = 1800                             # seconds that one process may work while the others wait for it
_meetings = itertools.count(1)              # numbers of the calls of `meet`, the same on all ranks


class Failure(RuntimeError):
    """Something broke that a new start may mend, told in one line: a process that died, a disk that went away."""


class Stopped(Exception):
    """The run was asked to stop, and has: what it did is saved."""


def tune_cpu(processes=1):
    """Use the processor as well as it can be: call before Paddle computes; `processes` share the machine. No-op on GPU.

    Paddle starts with one thread, and its matrix library takes a path 3 to 4 times slower than need be on AMD processors
    unless MKL_DEBUG_CPU_TYPE is 5. OMP_NUM_THREADS and MKL_DEBUG_CPU_TYPE that the user has set stay.
    """
    if paddle.get_device() != 'cpu':
        return
    keep_freed_memory()
    if paddle_import.USER_THREADS is None:
        paddle.base.core.set_num_threads(max(len(os.sched_getaffinity(0)) // processes, 1))
    with open('/proc/cpuinfo', encoding='utf-8') as cpuinfo:
        if 'AuthenticAMD' in cpuinfo.read():
            os.environ.setdefault('MKL_DEBUG_CPU_TYPE', '5')


def keep_freed_memory():
    """Let the C library keep what tensors gave back for the next ones (glibc; elsewhere no-op).

    By itself it returns every large block to the kernel, which hands it out again page by page, cleared: a third of a
    training step's time.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt:
        mallopt(-4, 0)                              # M_MMAP_MAX: no blocks of their own for large tensors
        mallopt(-8, 1)                              # M_ARENA_MAX: nor other heaps for other threads
        mallopt(-1, 2 ** 31 - 1)                    # M_TRIM_THRESHOLD: give back no end of the heap that is smaller than this


class Stop:
    """Whether this process was asked to stop: `requested` is '' or, once `listen` was called, the name of a signal."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    requested, interrupts = '', 0

    def listen(self):
        """Take note of SIGTERM and SIGINT instead of ending; a second SIGINT ends the process at once.

        A thread waits for them and all others block them, those started later too: a signal that interrupts a system call
        breaks Paddle's TCP store. Call it before any such thread starts.
        """
        for signum in self.SIGNALS:
            signal.signal(signum, self._note)       # for threads that are there already
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        threading.Thread(target=self._wait, daemon=True).start()
        return self

    def _wait(self):
        while True:
            self._note(signal.sigwait(self.SIGNALS))

    def _note(self, signum, frame=None):
        self.interrupts += signum == signal.SIGINT
        if self.interrupts > 1:
            os._exit(128 + signum)                  # the kernel ends the data workers (lifeline.die_with_parent)
        self.requested = self.requested or signal.Signals(signum).name

    @classmethod
    def unlisten(cls):
        """In a forked process: be ended by these signals again, but not by those that came before."""
        for signum in cls.SIGNALS:
            signal.signal(signum, signal.SIG_IGN)   # drops what is pending
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, cls.SIGNALS)


# ---- ranks and reductions

def rank():
    return dist.get_rank()


def world_size():
    return dist.get_world_size()


def gpu_count():
    """GPUs that Paddle can use; CUDA_VISIBLE_DEVICES limits them."""
    return paddle.device.cuda.device_count() if paddle.device.is_compiled_with_cuda() else 0


def choose_device(device):
    """'auto', 'gpu' or 'cpu' -> 'gpu' or 'cpu'. Raises ValueError where a GPU is asked for and there is none."""
    if device == 'gpu' and not gpu_count():
        raise ValueError('-device gpu: Paddle sees no GPU here; use -device cpu, or install paddlepaddle-gpu (README) and '
                         'look at nvidia-smi and CUDA_VISIBLE_DEVICES')
    return device if device != 'auto' else 'gpu' if gpu_count() else 'cpu'


def start(device):
    """Take the chosen device, join the other processes if there are any, and set the processor up. Returns 'gpu' or 'cpu'."""
    device = choose_device(device)
    paddle.set_device(device)
    if device == 'cpu':
        os.environ['PADDLE_DISTRI_BACKEND'] = 'gloo'
    processes = int(os.environ.get('PADDLE_TRAINERS_NUM', 1))
    if processes > 1:
        dist.init_parallel_env()
        host = lifeline.host(os.environ['PADDLE_TRAINER_ENDPOINTS'].split(','))
        missing = lifeline.connect(rank(), processes, host, broadcast, gather)
        if missing and not rank():
            log.warning('ranks %s cannot reach a port of %s: if one ends while the others wait for it, they notice after %d min',
                        missing, host, PATIENCE // 60)
    tune_cpu(processes)
    return device


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """`tensor` reduced over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=op)
    return tensor


def broadcast(value):
    """Rank 0's `value`, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def average(tensors):
    """Give every tensor its mean over all processes, in place."""
    if world_size() > 1:
        for value in tensors:
            all_reduce(value)
            value.scale_(1 / world_size())


def any_rank(*flags):
    """For each flag, whether it is true on any process: one all-reduce."""
    if world_size() == 1:
        return [bool(flag) for flag in flags]
    return [bool(flag) for flag in all_reduce(paddle.to_tensor([bool(f) for f in flags], 'int32'), dist.ReduceOp.MAX).tolist()]


def gather(value):
    """Every rank's `value`, in the order of the ranks, on every rank."""
    values = []
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values or [value]


def on_rank_0(work, *args):
    """What `work(*args)` returns on rank 0, on every rank; the others wait up to PATIENCE, as in `meet`.

    What it raises is raised on rank 0; on the others Failure, or ValueError where a new start would meet the same error.
    """
    result, error = None, None
    if rank() == 0:
        try:
            result = work(*args)
        except Exception as raised:
            error = raised
    meet(failed=exit_code(error) if error else 0)
    if error:
        raise error
    return broadcast(result)


def exit_code(error: Exception) -> int:
    """MISTAKE for an error that another start would meet again, else FAILURE."""
    return MISTAKE if isinstance(error, MISTAKES) else FAILURE


def meet(failed=0):
    """Wait until every process is here, up to PATIENCE: gloo gives up on a collective after 30 s, this does not.

    Raises Failure where one of them has `failed`, has ended or does not come, and ValueError where it has failed by a MISTAKE:
    `failed` is its exit code. The waiting lets signals through.
    """
    if world_size() == 1:
        return
    store = paddle.base.core.create_or_get_global_tcp_store()                # no public way to wait without a time limit
    meeting = next(_meetings)
    here, broken = f'halonet/meet/{meeting}', f'halonet/meet/{meeting}/failed'
    if failed:
        store.add(broken, failed)
    store.add(here, 1)
    start, pause = time.monotonic(), 0.001
    while store.add(here, 0) < world_size():
        if lifeline.ended():
            raise Failure(f'process {lifeline.ended()[0]} has ended; what it said itself tells why')
        if time.monotonic() - start > PATIENCE:
            raise Failure(f'{world_size() - store.add(here, 0)} of {world_size()} processes did not come within {PATIENCE} s')
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    code = store.add(broken, 0) - failed            # of the others
    dist.barrier()                                  # rank 0 holds the store: it stays until everybody has read
    if code:
        raise (ValueError if code == MISTAKE else Failure)('another process failed; its message says why')


# ---- logging

class _OneComplaint:
    """Makes a log handler report one error of writing, a full disk or a closed pipe, in one line on stderr."""

    complained = False

    def handleError(self, record):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        if not self.complained:
            self.complained = True
            name = getattr(self, 'baseFilename', 'console')
            with suppress(OSError):                 # stderr may be the same pipe
                print(f'warning: {name}: cannot write: {error.strerror}; the run goes on, its log has gaps', file=sys.stderr)


class LogFile(_OneComplaint, logging.FileHandler):
    """A log file that keeps no line back: one that the disk has no room for is lost, and the next one is tried."""

    def _open(self):
        return io.TextIOWrapper(open(self.baseFilename, 'ab', buffering=0), encoding='utf-8', errors='backslashreplace',
                                write_through=True)


class Console(_OneComplaint, logging.StreamHandler):
    """The log on a terminal, or in whatever reads it."""


class Formatter(logging.Formatter):
    """Formats records so that names of files do not control the terminal."""

    def format(self, record):
        return visible(super().format(record))


def setup_logger(folder):
    """Rank 0 speaks on the console; every rank writes its own file in the run folder, with times and tracebacks."""
    log.handlers.clear()
    os.makedirs(folder, exist_ok=True)              # rank 0 has made it, maybe on another machine
    log.propagate = False
    log.setLevel(logging.DEBUG)
    console.prepare()
    file = LogFile(os.path.join(folder, 'log.txt' if rank() == 0 else f'log_rank{rank()}.txt'), encoding='utf-8')
    file.setFormatter(Formatter('%(asctime)s %(message)s'))
    log.addHandler(file)
    if rank() == 0:
        screen = Console(sys.stdout)
        screen.setLevel(logging.INFO)
        screen.setFormatter(Formatter('%(message)s'))
        log.addHandler(screen)


@contextmanager
def plain_errors():
    """End the program for an error of the user's input, a failure or a stop with one clear line and its exit code.

    The traceback goes to the log file. A loss that is not finite stops all processes, and rank 0 says so for them.
    """
    try:
        yield
    except Stopped as stopped:
        log.info('%s', stopped)
        sys.exit(STOPPED)
    except Exception as error:
        log.debug('traceback', exc_info=True)
        if LOST.search(str(error)):
            error = Failure('another process has ended or does not answer; what it said itself tells why')
        if not isinstance(error, (ValueError, OSError, FloatingPointError, Failure)):
            raise
        if log.handlers and (rank() == 0 or isinstance(error, FloatingPointError)):
            log.error('error: %s', error)           # on the console of rank 0 only
        else:
            print(visible(f'rank {rank()}: error: {error}' if rank() else f'error: {error}'), file=sys.stderr)
        sys.exit(exit_code(error))


# ---- run folders

def make_run_folder(output, save, name):
    """Rank 0 makes `output`, or a new folder `name`-time below `save`; every rank gets its path."""
    folder = output
    if rank() == 0:
        try:
            if output:
                os.makedirs(output, exist_ok=True)
            stem = os.path.join(save, f'{name}-{time.strftime("%Y%m%d-%H%M%S")}')
            for folder_name in () if output else [stem] + [f'{stem}-{i}' for i in range(2, 100)]:
                try:
                    os.makedirs(folder_name)        # fails where another job was given the same second
                    folder = folder_name
                    break
                except FileExistsError:
                    continue
        except OSError as error:
            raise ValueError(f'cannot make the run folder {output or save}: {error.strerror}; '
                             'choose another with -output') from None
    return broadcast(folder)


BEFORE_TRAINING = ('log.txt', 'machine.json', 'machine_eval.json', 'config_eval.yaml', 'class_names.txt', files.LOCK)


def missing_folders(path: str) -> list[str]:
    """Return `path` and its parents as far as they do not exist, the deepest first."""
    missing, path = [], os.path.abspath(path)
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


@contextmanager
def undone_by_mistakes(folder: str, made: list[str]):
    """Remove the run folder if the block ends with a mistake of the user, and this start has made it.

    made: the folders that this start has made, the deepest first. Those that hold anything else are kept.
    """
    try:
        yield
    except (*MISTAKES, Failure) as error:
        if made and (isinstance(error, MISTAKES) or rank()):                 # rank 0 keeps the log of a failure
            for name in [f'log_rank{rank()}.txt'] if rank() else BEFORE_TRAINING:
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, name))
            with suppress(OSError):                 # something is left in it, or another process was faster
                for path in made:
                    os.rmdir(path)
        raise


@contextmanager
def reserved(folder: str) -> Iterator[None]:
    """Keep other runs out of the run folder for the time of the block: rank 0 holds its lock.

    Raises ValueError on rank 0, and Failure on the others, where another run holds it.
    """
    with ExitStack() as stack:
        on_rank_0(stack.enter_context, files.reserved(folder))
        yield


# ---- sums

class Totals:
    """Loss and accuracy of a stretch of batches as sums and a count on the device: divided once, reduced once."""

    def __init__(self, sums=(0, 0, 0, 0), seconds=0.0):
        self.sums = paddle.to_tensor(np.asarray(sums, 'float64'))            # loss, right at 1, right at 5, images
        self.first_bad = paddle.full([1], float('inf'), 'float64')           # the first loss that was not finite
        self.start = time.perf_counter() - seconds

    @paddle.no_grad()
    def add(self, losses, logits, labels, step=0):
        """losses (B,), logits (B, K), labels (B,)"""
        top = logits.topk(min(5, logits.shape[1]), axis=1)[1] == labels.unsqueeze(1)   # (B, 5 or K)
        batch = [losses.sum(), top[:, 0].sum(), top.any(axis=1).sum(), paddle.full([], losses.shape[0])]
        self.sums += paddle.stack([value.astype('float64') for value in batch])
        place = paddle.full([1], float(step * world_size() + rank()), 'float64')  # in the order of steps, then ranks
        bad = paddle.where(paddle.isfinite(losses).all(), paddle.full([1], float('inf'), 'float64'), place)
        self.first_bad = paddle.minimum(self.first_bad, bad)

    def reduce(self):
        """Over all processes: {'loss': mean, 'acc1': percent, 'acc5': percent, 'images': count}."""
        loss, right1, right5, images = all_reduce(self.sums.clone()).tolist()
        if not images:
            raise ValueError('no readable image was evaluated')
        return {'loss': loss / images, 'acc1': 100 * right1 / images, 'acc5': 100 * right5 / images, 'images': int(images)}

    def bad_place(self):
        """(step, rank) of the first loss that was not finite, on any process; None while all are."""
        place = all_reduce(self.first_bad.clone(), dist.ReduceOp.MIN).item()
        return divmod(int(place), world_size()) if place < float('inf') else None

    def seconds(self):
        return time.perf_counter() - self.start

    def state(self):
        """This process's part, for `merged`."""
        return {'sums': self.sums.tolist(), 'seconds': self.seconds()}

    @classmethod
    def merged(cls, states):
        """The Totals of several processes together."""
        return cls(np.sum([state['sums'] for state in states], axis=0), max(state['seconds'] for state in states))
