"""Train or evaluate a HaloNet on one device: python main_single_gpu.py -cfg FILE -data_path DIR [-eval -pretrained FILE] ..."""
import signal
import sys

from system import packages  # noqa: F401  isort: skip  (first: it reports a missing package)
from config import parse_args


def main():
    config = parse_args()                           # before Paddle is imported: -h and mistakes answer at once
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))    # for utils.Stop; Paddle's handler may hang
    if config.NPROCS > 1:
        print('main_single_gpu.py runs one process; -nprocs is for main_multi_gpu.py', file=sys.stderr)
    from training.engine import main
    main(config)


if __name__ == '__main__':
    main()
