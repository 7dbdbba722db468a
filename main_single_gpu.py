"""Train or evaluate a HaloNet on one device.

    python main_single_gpu.py -cfg FILE -data_path DIR [-eval -pretrained FILE] ...
"""
import sys

from system import packages  # noqa: F401  reports a missing one
from system.stopping import Stop

from config import parse_args
from training import dry_run


def main() -> None:
    """Run the program; its exit codes are those of system.stopping."""
    config = parse_args()
    dry_run.main(config)
    stop = Stop().listen()
    if config.NPROCS > 1:
        print('main_single_gpu.py runs one process; -nprocs is for main_multi_gpu.py', file=sys.stderr)
    from training import engine  # late, as it imports Paddle: -h and mistakes answer at once
    engine.main(config, stop)


if __name__ == '__main__':
    main()
