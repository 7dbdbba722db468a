"""Operators compiled from the source beside this file on first use or by `python -m ops`: all for a CPU, the attention for a GPU.

`load()` says where they can be had; there the others may be called. On a CPU they work in float32 and float64 and give the same
result and gradients bit for bit in every run and for any number of threads; on a GPU in float32, float16 and bfloat16.
"""
import functools
import logging

from system import paddle_import  # noqa: F401  isort: skip  (first: it prepares for Paddle's import)

from paddle import _C_ops
from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op

from ops.build import BuildError, gpu_arch, library

logger = logging.getLogger('halonet.ops')

ACTIVATIONS = 'identity', 'relu', 'silu'            # in the order of their numbers in activation.h


@functools.lru_cache(None)
def load():
    """Compiles the operators unless the cache has them and registers them: the devices that they serve, ('cpu',) or, where a GPU
    is the device at the first call, ('cpu', 'gpu'); () after one logged notice where there is no compiler."""
    arch = gpu_arch()
    try:
        load_op_meta_info_and_register_op(library(arch))
    except (BuildError, OSError, RuntimeError) as error:
        logger.warning("no compiled operators, only Paddle's slower ones: %s", error)
        return ()
    return ('cpu', 'gpu') if arch else ('cpu',)


def halo_attention(q, kv, height_rel, width_rel, *, num_heads, block_size, halo_size, stride=1):
    """attention.halo_attention by one operator that keeps neither windows nor probabilities.

    The operator takes `stride` from the sizes of q and kv, and the tables in the type of q (mixed precision leaves them in
    float32).
    """
    if height_rel.dtype != q.dtype:
        height_rel, width_rel = height_rel.astype(q.dtype), width_rel.astype(q.dtype)
    return _C_ops._run_custom_op('halo_attention', q, kv, height_rel, width_rel, num_heads, block_size, halo_size)[0]


def convolution(x, weight, stride=1):
    """A convolution with half padding, no bias: x (B, C, H, W), weight (O, C, k, k) -> (B, O, H/stride, W/stride), rounded up."""
    return _C_ops._run_custom_op('convolution', x, weight, stride, not x.stop_gradient)[0]


def convolution_norm_act(x, weight, norm, *, stride, act, residual=None):
    """act(norm(convolution of x) + residual), norm being a BatchNorm2D with its running statistics. It has no gradient."""
    return _C_ops._run_custom_op('convolution_norm_act', x, weight, norm.weight, norm.bias, norm._mean, norm._variance, residual,
                                 stride, norm._epsilon, ACTIVATIONS.index(act))[0]


def batch_norm_act(x, weight, bias, epsilon, act):
    """act(batch norm of x by its own statistics), act being identity, relu or silu; x (B, C, H, W), weight and bias (C,).

    -> (the same shape as x, mean (C,), biased variance (C,)); the last two carry no gradient.
    """
    out, mean, variance = _C_ops._run_custom_op('batch_norm_act', x, weight, bias, epsilon, ACTIVATIONS.index(act))
    return out, mean.detach(), variance.detach()


def max_pool(x):
    """The maximum over windows of 3x3 pixels, two apart, with half padding: x (B, C, H, W) -> (B, C, H/2, W/2), rounded up."""
    return _C_ops._run_custom_op('max_pool', x)[0]
