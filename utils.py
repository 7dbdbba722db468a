"""What every part needs and no part owns: processor set-up, rank facts and reductions, logging, run folders, safe files, sums."""
import ctypes
import json
import logging
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager

warnings.filterwarnings('ignore', message='No ccache found')                 # said at each import of Paddle
warnings.filterwarnings('ignore', message='When training, we now always track')  # said by each batch norm in each step
_USER_THREADS = os.environ.get('OMP_NUM_THREADS')

import paddle  # noqa: E402  (its import sets OMP_NUM_THREADS to 1 where the user did not)
import paddle.distributed as dist  # noqa: E402

if _USER_THREADS is None:
    os.environ.pop('OMP_NUM_THREADS', None)  # child processes see the user's environment

log = logging.getLogger('halonet')


def tune_cpu(processes=1):
    """Use the processor as well as it can be: call before Paddle computes; `processes` share the machine. No-op on GPU.

    Paddle starts with one thread, and its matrix library takes a path 3 to 4 times slower than need be on AMD processors
    unless MKL_DEBUG_CPU_TYPE is 5. OMP_NUM_THREADS and MKL_DEBUG_CPU_TYPE that the user has set stay.
    """
    if paddle.get_device() != 'cpu':
        return
    if _USER_THREADS is None:
        paddle.base.core.set_num_threads(max(len(os.sched_getaffinity(0)) // processes, 1))
    with open('/proc/cpuinfo', encoding='utf-8') as cpuinfo:
        if 'AuthenticAMD' in cpuinfo.read():
            os.environ.setdefault('MKL_DEBUG_CPU_TYPE', '5')


def die_with_parent():
    """Let the kernel end this process when the one that started it ends, however that ends (Linux; elsewhere no-op)."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


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


def average_buffers(model):
    """Bring the batch-norm statistics of all processes together, so that every rank evaluates and saves the same model."""
    for value in model.state_dict().values():
        if world_size() > 1 and value.stop_gradient:
            all_reduce(value)
            value.scale_(1 / world_size())


def on_rank_0(work, *args):
    """Call `work` on rank 0 while the others wait, however long it takes: gloo gives up on a collective after 30 s."""
    if rank() == 0:
        work(*args)
    if world_size() > 1:
        store = paddle.base.core.create_or_get_global_tcp_store()            # no public way to wait without a time limit
        on_rank_0.calls += 1
        key = f'halonet/on_rank_0/{on_rank_0.calls}'
        store.set(key, b'done') if rank() == 0 else store.wait(key)
        dist.barrier()


on_rank_0.calls = 0


# ---- logging

def setup_logger(folder):
    """Rank 0 speaks on the console; every rank writes its own file in the run folder, with times and tracebacks."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.DEBUG)
    file = logging.FileHandler(os.path.join(folder, 'log.txt' if rank() == 0 else f'log_rank{rank()}.txt'), encoding='utf-8')
    file.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
    log.addHandler(file)
    if rank() == 0:
        console = logging.StreamHandler(sys.stdout)
        console.setLevel(logging.INFO)
        console.setFormatter(logging.Formatter('%(message)s'))
        log.addHandler(console)


@contextmanager
def plain_errors():
    """Turn an error of the user's input into one clear line and exit code 1; the traceback goes to the log file."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        log.debug('traceback', exc_info=True)
        text = f'error: {error}'
        log.error(text) if log.handlers and rank() == 0 else print(text, file=sys.stderr)
        sys.exit(1)


class Metrics:
    """metrics.jsonl of a run folder: one JSON record per logging step and per evaluation, written by rank 0."""

    def __init__(self, folder):
        self.path = os.path.join(folder, 'metrics.jsonl')

    def write(self, **record):
        if rank() == 0:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in record.items()}) + '\n')

    def rewind(self, step):
        """Forget the records after `step`: a resumed run writes them again."""
        if rank() == 0 and os.path.exists(self.path):
            with open(self.path, encoding='utf-8') as file:
                kept = [line for line in file if line.endswith('\n') and json.loads(line)['step'] <= step]
            atomic_write(self.path, lambda file: file.write(''.join(kept).encode()))


# ---- files

def atomic_write(path, write):
    """Make the file `path` by `write(binary file)`: after a crash it is the old one or the new one, never a part."""
    temporary = f'{path}.tmp{os.getpid()}'
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


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


# ---- sums

class Totals:
    """Loss and accuracy of a stretch of batches as sums and a count on the device: divided once, reduced once."""

    def __init__(self):
        self.sums = paddle.zeros([4], 'float64')                             # loss, right at 1, right at 5, images
        self.first_bad = paddle.full([1], float('inf'))                      # step of the first loss that was not finite

    @paddle.no_grad()
    def add(self, losses, logits, labels, step=0):
        """losses (B,), logits (B, K), labels (B,)"""
        top = logits.topk(min(5, logits.shape[1]), axis=1)[1] == labels.unsqueeze(1)   # (B, 5 or K)
        batch = [losses.sum(), top[:, 0].sum(), top.any(axis=1).sum(), paddle.full([], losses.shape[0])]
        self.sums += paddle.stack([value.astype('float64') for value in batch])
        bad = paddle.where(paddle.isfinite(losses).all(), paddle.full([1], float('inf')), paddle.full([1], float(step)))
        self.first_bad = paddle.minimum(self.first_bad, bad)

    def reduce(self):
        """Over all processes: {'loss': mean, 'acc1': percent, 'acc5': percent, 'images': count}."""
        loss, right1, right5, images = all_reduce(self.sums.clone()).tolist()
        if not images:
            raise ValueError('no readable image was evaluated')
        return {'loss': loss / images, 'acc1': 100 * right1 / images, 'acc5': 100 * right5 / images, 'images': int(images)}

    def first_bad_step(self):
        """The first step, on any process, whose loss was not finite."""
        return int(all_reduce(self.first_bad.clone(), dist.ReduceOp.MIN).item())
