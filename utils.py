"""Ranks and reductions, logging, run folders, running totals."""
import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Callable, Optional

from system import console, cpu, files, lifeline, paddle_internals
from system.stopping import FAILURE, MISTAKE, MISTAKES, STOPPED, Failure, Stopped, exit_code

import numpy as np
import paddle
import paddle.distributed as dist

log = logging.getLogger('halonet')

PATIENCE = 1800                                     # seconds that the processes wait for one of them
_meetings = itertools.count(1)                      # numbers the calls of `meet`, the same on all ranks


# ---- devices

def gpu_count() -> int:
    """Return the number of GPUs that Paddle can use; CUDA_VISIBLE_DEVICES limits them."""
    return paddle.device.cuda.device_count() if paddle.device.is_compiled_with_cuda() else 0


def device_kinds() -> list[str]:
    """Return the kinds of devices that this build of Paddle can use."""
    kinds = ['cpu']
    if paddle.device.is_compiled_with_cuda():
        kinds.append('gpu')
    if paddle.device.is_compiled_with_xpu():
        kinds.append('xpu')
    return [*kinds, *(paddle.device.get_all_custom_device_type() or [])]


def choose_device(device: str) -> str:
    """Return the kind of device, such as 'gpu' or 'cpu', that DEVICE means here; 'auto' is a GPU or the CPU.

    Raises ValueError for a device that this build of Paddle cannot use, and for a GPU that it does not see.
    """
    gpus = gpu_count()
    if device == 'auto':
        return 'gpu' if gpus else 'cpu'
    kind = device.partition(':')[0]
    if kind == 'gpu' and not gpus:
        raise ValueError(f'-device {device}: Paddle sees no GPU here; use -device cpu, or install '
                         'paddlepaddle-gpu (README) and look at nvidia-smi and CUDA_VISIBLE_DEVICES')
    if kind not in device_kinds():
        raise ValueError(f'-device {device}: this build of Paddle has {", ".join(device_kinds())}; choose '
                         'one of these or auto, or install Paddle for that device')
    return kind


def start(device: str) -> str:
    """Set the device and the threads, and connect the processes of this run. Returns the kind of device."""
    kind = choose_device(device)
    processes = int(os.environ.get('PADDLE_TRAINERS_NUM', 1))
    if processes > 1 and ':' in device:
        raise ValueError(f'-device {device}: each of {processes} processes has a device of its own; '
                         f'use -device {kind}')
    paddle.set_device(kind if device == 'auto' else device)
    if kind == 'cpu':
        os.environ['PADDLE_DISTRI_BACKEND'] = 'gloo'
    if processes > 1:
        dist.init_parallel_env()
        host = lifeline.host(os.environ['PADDLE_TRAINER_ENDPOINTS'].split(','))
        missing = lifeline.connect(rank(), processes, host, broadcast, gather)
        if missing and rank() == 0:
            log.warning('ranks %s cannot reach a port of %s: if one ends while the others wait for it, '
                        'they notice after %d min', missing, host, PATIENCE // 60)
        lifeline.watch(_leave)
    if kind == 'gpu':
        tune_gpu()
    tune_cpu(processes)
    return kind


def _leave(ended: int) -> None:
    """End this process, which hangs since the rank `ended` has ended."""
    report_error(Failure(f'process {ended} has ended, and this one waited for it; its own message tells why'))
    os._exit(FAILURE)                               # the kernel ends the data workers: die_with_parent


def tune_cpu(processes: int = 1) -> None:
    """Let Paddle use all cores, divided among `processes`. Call it before Paddle computes; no-op on a GPU.

    Paddle computes with one thread by default. On AMD processors its matrix library is 3 to 4 times slower
    than possible unless MKL_DEBUG_CPU_TYPE is 5. The user's OMP_NUM_THREADS and MKL_DEBUG_CPU_TYPE are kept.
    """
    if paddle.get_device() != 'cpu':
        return
    cpu.keep_freed_memory()
    if cpu.user_threads() is None:
        paddle_internals.set_num_threads(max(cpu.cores() // processes, 1))
    if cpu.is_amd():
        os.environ.setdefault('MKL_DEBUG_CPU_TYPE', '5')


def tune_gpu() -> None:
    """Set Paddle's flags for fast convolutions and norms on a GPU. Those in the environment are kept.

    cuDNN tries its algorithms for each new shape and takes the fastest one. FLAGS_cudnn_deterministic keeps
    to one whose gradients have the same bits in every run.
    """
    flags: dict[str, Any] = {'FLAGS_cudnn_batchnorm_spatial_persistent': True,
                             'FLAGS_conv_workspace_size_limit': 4096}        # MB, for faster algorithms
    if os.environ.get('FLAGS_cudnn_deterministic', '0').lower() in ('0', 'false', ''):
        flags['FLAGS_cudnn_exhaustive_search'] = True
    paddle.set_flags({name: value for name, value in flags.items() if name not in os.environ})


# ---- ranks and reductions

def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank()


def world_size() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size()


def local_processes() -> int:
    """Return the number of processes of this run on this machine."""
    return int(os.environ.get('PADDLE_LOCAL_SIZE', world_size()))            # the launcher sets it


def all_reduce(tensor: paddle.Tensor, op: Any = dist.ReduceOp.SUM) -> paddle.Tensor:
    """Reduce a tensor over all processes, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=op)
    return tensor


def average(tensors: Iterable[paddle.Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in place."""
    if world_size() > 1:
        for value in tensors:
            all_reduce(value)
            value.scale_(1 / world_size())


def any_rank(*flags: object) -> list[bool]:
    """Return, for each flag, whether it is true on any process, by one all-reduce."""
    values = [bool(flag) for flag in flags]
    if world_size() == 1:
        return values
    reduced = all_reduce(paddle.to_tensor(values, 'int32'), dist.ReduceOp.MAX)
    return [bool(flag) for flag in reduced.tolist()]


def broadcast(value: Any) -> Any:
    """Return the `value` of rank 0 on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any) -> list:
    """Return the values of all ranks, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list = []
    dist.all_gather_object(values, value)
    return values


def on_rank_0(work: Callable, *args: Any) -> Any:
    """Call `work(*args)` on rank 0 and return its result on every rank; the others wait as in `meet`.

    An exception is raised on rank 0. The others raise ValueError if another start would meet the same
    error, else Failure.
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


def meet(failed: int = 0) -> None:
    """Wait until every process calls this, up to PATIENCE. A collective of gloo gives up after 30 s.

    failed: the exit code of a process that has failed.
    Raises ValueError if another process failed by a MISTAKE. Raises Failure if one failed otherwise, has
    ended or does not come in time. Signals are handled while it waits.
    """
    if world_size() == 1:
        return
    store = paddle_internals.process_store()
    here = f'halonet/meet/{next(_meetings)}'
    broken = f'{here}/failed'
    if failed:
        store.add(broken, failed)
    store.add(here, 1)
    start, pause = time.monotonic(), 0.001
    while store.add(here, 0) < world_size():
        ended = lifeline.ended()
        if ended:
            raise Failure(f'process {ended[0]} has ended; its own message tells why')
        if time.monotonic() - start > PATIENCE:
            late = world_size() - store.add(here, 0)
            raise Failure(f'{late} of {world_size()} processes did not come within {PATIENCE} s')
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    code = store.add(broken, 0) - failed            # of the others
    dist.barrier()                                  # rank 0 holds the store until all have read it
    if code:
        kind = ValueError if code == MISTAKE else Failure
        raise kind('another process failed; its message says why')


# ---- logging

def setup_logger(folder: str) -> None:
    """Log to a file of this rank in the run folder, and on rank 0 to the console.

    The file has times and tracebacks.
    """
    log.handlers.clear()
    os.makedirs(folder, exist_ok=True)              # rank 0 has made it, maybe on another machine
    log.propagate = False
    log.setLevel(logging.DEBUG)
    console.prepare()
    name = 'log.txt' if rank() == 0 else f'log_rank{rank()}.txt'
    file = console.LogFile(os.path.join(folder, name), encoding='utf-8')
    file.setFormatter(console.Formatter('%(asctime)s %(message)s'))
    log.addHandler(file)
    if rank() == 0:
        screen = console.Console(sys.stdout)
        screen.setLevel(logging.INFO)
        screen.setFormatter(console.Formatter('%(message)s'))
        log.addHandler(screen)


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with one line and an exit code for a mistake of the user, a failure or a stop.

    The traceback goes to the log file. Rank 0 reports a loss that is not finite for all processes.
    """
    try:
        yield
    except Stopped as stopped:
        log.info('%s', stopped)
        sys.exit(STOPPED)
    except Exception as error:
        log.debug('traceback', exc_info=True)
        if paddle_internals.is_lost_connection(error):
            error = Failure('another process has ended or does not answer; its own message tells why')
        if isinstance(error, MemoryError):
            error = ValueError(out_of_memory(error))
        if not isinstance(error, (ValueError, OSError, FloatingPointError, Failure)):
            raise
        report_error(error)
        sys.exit(exit_code(error))


def report_error(error: Exception) -> None:
    """Show an error in one line: in the log, or on stderr by a rank whose log has no console."""
    if log.handlers and (rank() == 0 or isinstance(error, FloatingPointError)):
        log.error('error: %s', error)               # on the console of rank 0 only
    else:
        prefix = f'rank {rank()}: ' if rank() else ''
        print(console.visible(f'{prefix}error: {error}'), file=sys.stderr, flush=True)


def out_of_memory(error: MemoryError) -> str:
    """Return in one line what is out of memory, and what to do. Paddle raises a MemoryError on a GPU, too."""
    asked = re.search(r'Cannot allocate (\S+) memory on GPU (\d+)', str(error))
    where = f' on GPU {asked[2]}, which cannot give another {asked[1]}' if asked else ''
    return (f'out of memory{where}; lower DATA.BATCH_SIZE and raise TRAIN.ACCUM_ITER by the same factor, '
            'compute stages twice by TRAIN.RECOMPUTE, or use MODEL.ATTENTION fused, which stores no logits')


# ---- run folders

BEFORE_TRAINING = (                                 # files of a run folder that are written first
    'log.txt', 'machine.json', 'machine_eval.json', 'config_eval.yaml', 'class_names.txt', files.LOCK)


def make_run_folder(output: str, save: str, name: str) -> str:
    """Make `output`, or else a new folder `name`-time in `save`. Returns its path on every rank."""
    folder = output
    if rank() == 0:
        try:
            if output:
                os.makedirs(output, exist_ok=True)
            else:
                folder = _make_new_folder(os.path.join(save, f'{name}-{time.strftime("%Y%m%d-%H%M%S")}'))
        except OSError as error:
            raise ValueError(f'cannot make the run folder {output or save}: {error.strerror}; '
                             'choose another with -output') from None
    return broadcast(folder)


def _make_new_folder(stem: str) -> str:
    """Make the folder `stem`, or `stem`-2 and so on if another job has made it. Returns its path."""
    path, number = stem, 1
    while True:
        try:
            os.makedirs(path)
            return path
        except FileExistsError:
            number += 1
            path = f'{stem}-{number}'
            if number == 100:
                raise


def missing_folders(path: str) -> list[str]:
    """Return `path` and its parents as far as they do not exist, the deepest first."""
    missing, path = [], os.path.abspath(path)
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


@contextmanager
def undone_by_mistakes(folder: str, made: Sequence[str]) -> Iterator[None]:
    """Remove a run folder that this start has made if the block ends with a mistake of the user.

    made: the folders that this start has made, the deepest first. Those with anything else in them are kept.
    """
    try:
        yield
    except (*MISTAKES, Failure) as error:
        if made and (isinstance(error, MISTAKES) or rank()):   # rank 0 keeps the log of a failure
            names = [f'log_rank{rank()}.txt'] if rank() else BEFORE_TRAINING
            for name in names:
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, name))
            with suppress(OSError):                 # not empty, or another process was faster
                for path in made:
                    os.rmdir(path)
        raise


@contextmanager
def reserved(folder: str) -> Iterator[None]:
    """Keep other runs out of the run folder during the block: rank 0 holds its lock.

    Raises ValueError on all ranks where another run holds it.
    """
    with ExitStack() as stack:
        on_rank_0(stack.enter_context, files.reserved(folder))
        yield


# ---- totals

class Totals:
    """Loss and accuracy of many batches, as sums and a count on the device: reduced once, divided once."""

    def __init__(self, sums: Sequence[float] = (0, 0, 0, 0), seconds: float = 0.0) -> None:
        self.sums = paddle.to_tensor(np.asarray(sums, 'float64'))   # loss, top-1 and top-5 hits, images
        self.first_bad = paddle.full([1], float('inf'), 'float64')  # index of the first non-finite loss
        self.start = time.perf_counter() - seconds

    @paddle.no_grad()
    def add(self, losses: paddle.Tensor, logits: paddle.Tensor, labels: paddle.Tensor,
            step: int = 0) -> None:
        """Add a batch: losses (B,), logits (B, K), labels (B,)."""
        logits = logits.astype('float32')           # equal numbers of 16 bits would be classes in any order
        top = logits.topk(min(5, logits.shape[1]), axis=1)[1] == labels.unsqueeze(1)  # (B, 5 or K)
        batch = [losses.sum(), top[:, 0].sum(), top.any(axis=1).sum(), paddle.full([], losses.shape[0])]
        self.sums += paddle.stack([value.astype('float64') for value in batch])
        none = paddle.full([1], float('inf'), 'float64')
        index = paddle.full([1], float(step * world_size() + rank()), 'float64')   # by step, then rank
        bad = paddle.where(paddle.isfinite(losses).all(), none, index)
        self.first_bad = paddle.minimum(self.first_bad, bad)

    def reduce(self) -> dict[str, Any]:
        """Return the results of all processes: loss, acc1 and acc5 in percent, number of images."""
        loss, top1, top5, images = all_reduce(self.sums.clone()).tolist()
        if not images:
            raise ValueError('no readable image was evaluated')
        return {'loss': loss / images, 'acc1': 100 * top1 / images, 'acc5': 100 * top5 / images,
                'images': int(images)}

    def first_nonfinite(self) -> Optional[tuple[int, int]]:
        """Return (step, rank) of the first loss of any process that was not finite, or None."""
        index = all_reduce(self.first_bad.clone(), dist.ReduceOp.MIN).item()
        return divmod(int(index), world_size()) if index < float('inf') else None

    def seconds(self) -> float:
        """Return the seconds since the first batch, those of earlier processes included."""
        return time.perf_counter() - self.start

    def state(self) -> dict[str, Any]:
        """Return the totals of this process, for `merged`."""
        return {'sums': self.sums.tolist(), 'seconds': self.seconds()}

    @classmethod
    def merged(cls, states: Sequence[dict[str, Any]]) -> 'Totals':
        """Return the totals of several processes together."""
        sums = np.sum([state['sums'] for state in states], axis=0)
        return cls(sums, max(state['seconds'] for state in states))
