"""Train or evaluate a HaloNet on several devices of this machine, or on those of `python -m paddle.distributed.launch`.

    python main_multi_gpu.py -cfg FILE -data_path DIR [-eval -pretrained FILE] ...

Starts one process per visible GPU (CUDA_VISIBLE_DEVICES chooses), or -nprocs processes; on CPU one, or -nprocs.
"""
import os
import signal
import sys

from config import parse_args


def worker(config):
    from engine import main
    main(config)


def child(config):
    import utils
    signal.signal(signal.SIGTERM, signal.SIG_DFL)   # in place of Paddle's handler, which prints a C++ trace
    utils.die_with_parent()
    worker(config)


def start_processes(config):
    """Run `worker` in as many processes as the config asks for; the exit code is that of the first one that fails."""
    import paddle.distributed as dist

    import utils
    with utils.plain_errors():
        device = utils.choose_device(config.DEVICE)
    count = config.NPROCS or (utils.gpu_count() if device == 'gpu' else 1)
    if count == 1:
        return worker(config)
    backend = 'nccl' if device == 'gpu' else 'gloo'
    context = dist.spawn(child, (config,), nprocs=count, join=False, backend=backend)

    def pass_on(signum, frame):                     # or the children would outlive a parent that is told to stop
        for process in context.processes:
            os.kill(process.pid, signum)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, pass_on)
    try:
        while not context.join(timeout=1):
            pass
    except Exception as error:
        codes = [process.exitcode for process in context.processes if process.exitcode]
        sys.exit(next((code for code in codes if code > 0), str(error)))


def main():
    config = parse_args()                           # before Paddle is imported: -h and mistakes answer at once
    launched = 'PADDLE_TRAINER_ID' in os.environ
    worker(config) if launched else start_processes(config)


if __name__ == '__main__':
    main()
