"""Count what a GPU would have to wait for: copies from the host, and reads of results by the host."""
import functools
from collections import Counter
from contextlib import contextmanager

import paddle

COPIES = 'to_tensor', 'set_value'
READS = 'item', 'numpy', 'tolist', '__float__', '__int__', '__bool__', '__index__', '__array__'


@contextmanager
def counted():
    """Count the calls of COPIES and READS within the block, {name: calls}; calls within a call count once."""
    counts, within = Counter(), []

    def count(name, original):
        @functools.wraps(original)
        def counting(*args, **kwargs):
            if within or name == 'set_value' and isinstance(args[1], paddle.Tensor):
                return original(*args, **kwargs)
            counts[name] += 1
            within.append(name)
            try:
                return original(*args, **kwargs)
            finally:
                within.pop()
        return counting

    originals = []
    for owner, names in ((paddle, COPIES[:1]), (paddle.Tensor, (*COPIES[1:], *READS))):
        for name in names:
            originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, count(name, getattr(owner, name)))
    try:
        yield counts
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def copies(counts):
    return sum(counts[name] for name in COPIES)


def reads(counts):
    return sum(counts[name] for name in READS)
