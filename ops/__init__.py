"""The fused halo attention operator: compiled from the C++ source beside this file on first use, or by `python -m ops`.

`load()` says whether it can be had; `halo_attention` has the arguments and the result of halonet.halo_attention.
"""
import functools
import logging

import paddle
from paddle import _C_ops
from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op

from ops.build import BuildError, library

logger = logging.getLogger('halonet.ops')


@functools.lru_cache(None)
def load():
    """Compiles the operator unless the cache has it, and registers it with Paddle: True, or False after one logged notice."""
    try:
        load_op_meta_info_and_register_op(library())
    except (BuildError, OSError, RuntimeError) as error:
        logger.warning('no fused halo attention, so the slower one composed of Paddle operators serves: %s', error)
        return False
    return True


def halo_attention(q, kv, height_rel, width_rel, *, num_heads, block_size, halo_size):
    """halonet.halo_attention by one operator, on CPU, in float32 or float64; call it only where `load()` is true.

    H and W need not be multiples of the block: a window then ends where the zeros around the map do, `halo_size` pixels
    outside it. The result and the gradients are the same bit for bit in every run and for any number of threads.
    """
    return _C_ops._run_custom_op('halo_attention', q, kv, height_rel, width_rel, num_heads, block_size, halo_size)[0]
