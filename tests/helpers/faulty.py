"""main_multi_gpu.py with a fault.

    python -m paddle.distributed.launch tests/helpers/faulty.py FAULT OPTIONS ...
"""
import ctypes
import os
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import utils

import datasets
import main_multi_gpu
from training import checkpoint, optim


def wrap(owner, name, before=None, after=None):
    """Call `before()` ahead of owner.name and return `after(its result)`."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            before()
        result = original(*args, **kwargs)
        return after(result) if after else result
    setattr(owner, name, wrapped)


def nan():
    """The third loss of rank 1 is not a number."""
    calls = []

    def spoil(losses):
        calls.append(1)
        return losses * float('nan') if len(calls) == 3 and utils.rank() == 1 else losses
    wrap(optim, 'cross_entropy', after=spoil)


def slow():
    """Rank 0 needs longer than gloo waits to write the first time, and rank 1 to begin an evaluation."""
    seconds = [33]                                  # left to wait in the first call
    wrap(checkpoint, 'save', before=lambda: time.sleep(seconds.pop() if seconds else 0))
    wrap(datasets.EvalSampler, 'batches', before=lambda: time.sleep(33 if utils.rank() == 1 else 0))


def full():
    """The disk is full for rank 0."""
    def fail():
        raise OSError(28, 'cannot write: No space left on device')
    wrap(checkpoint, 'save', before=fail)


def lost():
    """Rank 1 is killed where rank 0 waits for it, after both have taken part in a step."""
    def end(state):
        if utils.rank() == 1:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return state
    wrap(checkpoint, 'capture', after=end)


def hang():
    """Rank 1 is killed within a step, and rank 0 waits for it for ever, as a collective of NCCL does."""
    def end(losses):
        if utils.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
        ctypes.CDLL(None).pause()
    wrap(optim, 'cross_entropy', after=end)


if __name__ == '__main__':
    {'nan': nan, 'slow': slow, 'full': full, 'lost': lost, 'hang': hang}[sys.argv.pop(1)]()
    main_multi_gpu.main()
