"""Train or evaluate a HaloNet on several devices of this machine, or on those of `python -m paddle.distributed.launch`.

    python main_multi_gpu.py -cfg FILE -data_path DIR [-eval -pretrained FILE] ...

Starts one process per visible GPU (CUDA_VISIBLE_DEVICES chooses), or -nprocs processes; on CPU one, or -nprocs.
"""
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback

from system import packages  # noqa: F401  isort: skip  (first: it reports a missing package)
from config import parse_args
from system import lifeline

GRACE = 10                                          # seconds that the others get to leave when a process has failed


def worker(config):
    from training.engine import main
    main(config)


def child(config):
    import utils
    lifeline.die_with_parent()
    multiprocessing.set_start_method('fork', force=True)    # spawned here, data workers would each import Paddle anew
    try:
        worker(config)
    except Exception:
        traceback.print_exc()
        sys.exit(utils.FAILURE)


def start_processes(config):
    """Run `worker` in as many processes as the config asks for; the exit code is that of the first one that fails."""
    import utils  # isort: skip  (first: it prepares for Paddle's import)
    import paddle.distributed as dist
    with utils.plain_errors():
        device = utils.choose_device(config.DEVICE)
    count = config.NPROCS or (utils.gpu_count() if device == 'gpu' else 1)
    if count == 1:
        return worker(config)
    stop = utils.Stop().listen()
    context = dist.spawn(child, (config,), nprocs=count, join=False, backend='nccl' if device == 'gpu' else 'gloo')
    supervise(context.processes, stop)
    codes = [process.exitcode for process in context.processes]
    if any(codes):
        killed = stop.requested and max(codes) <= 0    # before they could listen
        sys.exit(utils.STOPPED if killed else next((code for code in codes if code > 0), utils.FAILURE))


def supervise(processes, stop):
    """Wait for all processes; pass a wish to stop on, and end the others when one has failed."""
    told, deadline = False, float('inf')
    while alive := [process for process in processes if process.is_alive()]:
        multiprocessing.connection.wait([process.sentinel for process in alive], timeout=0.2)
        failed = [process for process in processes if process.exitcode]
        if stop.requested and not told or failed and deadline == float('inf'):
            told = True
            for process in alive:
                process.terminate()                 # SIGTERM also for SIGINT, which a terminal sends to all by itself
        if failed and deadline == float('inf'):
            deadline = time.monotonic() + GRACE
            for process in failed:
                if process.exitcode < 0 and not stop.requested:
                    print(f'error: process {processes.index(process)} was ended by '
                          f'{signal.Signals(-process.exitcode).name}; if nobody did that, look at the free memory (dmesg)',
                          file=sys.stderr)
        if time.monotonic() > deadline:
            for process in alive:
                process.kill()


def main():
    if 'PADDLE_TRAINER_ID' in os.environ:
        lifeline.die_with_parent()                  # the launcher leaves its processes behind when it is killed
    config = parse_args()                           # before Paddle is imported: -h and mistakes answer at once
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))    # for utils.Stop; Paddle's handler may hang
    if 'PADDLE_TRAINER_ID' not in os.environ:
        return start_processes(config)
    worker(config)


if __name__ == '__main__':
    main()
elif __name__ == '__mp_main__':
    import utils  # noqa: F401  in a process that was spawned, before what it unpickles imports Paddle
