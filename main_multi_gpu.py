"""Train or evaluate a HaloNet on several devices of this machine, or of several machines.

    python main_multi_gpu.py -cfg FILE -data_path DIR [-eval -pretrained FILE] ...

Starts -nprocs processes, or one per visible GPU (CUDA_VISIBLE_DEVICES chooses), or one on a CPU.
`python -m paddle.distributed.launch main_multi_gpu.py ...` starts them on several machines.
"""
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from system import lifeline, packages  # noqa: F401  packages reports a missing one
from system.stopping import FAILURE, STOPPED, Stop

from yacs.config import CfgNode

from config import parse_args
from training import dry_run

GRACE = 10                                          # seconds that the others get after one has failed
VISIBLE = 'CUDA_VISIBLE_DEVICES'
POLL = 0.2                                          # seconds between two looks at a request to stop


def train(config: CfgNode, stop: Stop) -> None:
    """Train or evaluate in this process."""
    from training import engine  # late, as it imports Paddle: -h and mistakes answer at once
    engine.main(config, stop)


def train_spawned(config: CfgNode) -> None:
    """Train or evaluate in a process that `start_processes` has spawned."""
    lifeline.die_with_parent()
    multiprocessing.set_start_method('fork', force=True)    # or data workers would import Paddle again
    try:
        train(config, Stop().listen())
    except Exception:
        traceback.print_exc()
        sys.exit(FAILURE)


def start_processes(config: CfgNode, stop: Stop) -> None:
    """Train or evaluate in as many processes as the config asks for, and exit with their code."""
    import utils

    import paddle.distributed as dist
    with utils.plain_errors():
        device = utils.choose_device(config.DEVICE)
        count = count_processes(config.NPROCS, device)
    if count == 1:
        return train(config, stop)
    if VISIBLE in os.environ:                       # Paddle's spawn splits it at commas only
        os.environ[VISIBLE] = os.environ[VISIBLE].replace(' ', '')
    backend = 'nccl' if device == 'gpu' else 'gloo'
    context = dist.spawn(train_spawned, (config,), nprocs=count, join=False, backend=backend)
    supervise(context.processes, stop)
    sys.exit(exit_code_of(context.processes, stop))


def count_processes(nprocs: int, device: str) -> int:
    """Return how many processes to start: NPROCS, or for 0 one per visible GPU and one on a CPU.

    Raises ValueError for more processes than GPUs, or several on another kind of device.
    """
    import utils
    if device not in ('cpu', 'gpu') and nprocs > 1:
        raise ValueError(f'-nprocs {nprocs}: this program starts one process on a device of kind {device}; '
                         'several are started by python -m paddle.distributed.launch main_multi_gpu.py ...')
    if device != 'gpu':
        return nprocs or 1
    gpus = utils.gpu_count()
    if nprocs > gpus:
        visible = os.environ.get(VISIBLE)
        chosen = f' ({VISIBLE} is {visible!r})' if visible is not None else ''
        raise ValueError(f'-nprocs {nprocs}: Paddle sees {gpus} GPU(s) here{chosen}, and each process needs '
                         f'its own; use -nprocs {gpus} or less, or leave it out for all of them')
    return nprocs or gpus


def supervise(processes: Sequence[BaseProcess], stop: Stop) -> None:
    """Wait for all processes to end.

    All are asked to stop, once, on a request to stop or when one has failed. Those that still run GRACE
    seconds after the first failure are killed.
    """
    asked = False
    deadline = None
    while alive := [process for process in processes if process.is_alive()]:
        wait([process.sentinel for process in alive], timeout=POLL)
        failed = [process for process in processes if process.exitcode]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE
            if not stop.requested:
                report_killed(processes)
        if (failed or stop.requested) and not asked:
            asked = True
            for process in alive:
                process.terminate()                 # SIGTERM: a terminal sends SIGINT to all
        if deadline is not None and time.monotonic() > deadline:
            for process in alive:
                process.kill()


def report_killed(processes: Sequence[BaseProcess]) -> None:
    """Print which processes a signal has ended: they could not say so themselves."""
    for rank, process in enumerate(processes):
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            print(f'error: process {rank} was ended by {name}; if nobody did that, look at the free '
                  'memory (dmesg)', file=sys.stderr)


def exit_code_of(processes: Sequence[BaseProcess], stop: Stop) -> int:
    """Return 0 if all processes have ended well, else the exit code of the first one that failed."""
    codes = [process.exitcode or 0 for process in processes]
    for code in codes:
        if code > 0:
            return code
    if not any(codes):
        return 0
    return STOPPED if stop.requested else FAILURE   # by signals: on request, before they could listen


def main() -> None:
    """Run the program; its exit codes are those of system.stopping."""
    launched = 'PADDLE_TRAINER_ID' in os.environ
    if launched:
        lifeline.die_with_parent()                  # a killed launcher leaves its processes behind
    config = parse_args()
    dry_run.main(config)
    stop = Stop().listen()
    if launched:
        train(config, stop)
    else:
        start_processes(config, stop)


if __name__ == '__main__':
    main()
