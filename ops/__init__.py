"""Operators compiled from the C++ and CUDA source beside this file, on first use or by `python -m ops`.

`load()` returns the devices that they exist for: all of them for a CPU, halo attention for a GPU, too. On
a CPU they take float32 and float64, and give the same result and gradients bit for bit in every run and
for any number of threads. On a GPU they take float32, float16 and bfloat16. Call the other functions only
after `load()`.

In the shapes below: B batch, C channels, H and W height and width in pixels, O output channels of a
convolution.
"""
import functools
import logging
from typing import Optional

from system.paddle_internals import norm_settings, norm_statistics, register_operators, run_operator

from paddle import Tensor, nn

from ops.build import BuildError, gpu_arch, library

logger = logging.getLogger('halonet.ops')

ACTIVATIONS = 'identity', 'relu', 'silu'            # in the order of their numbers in activation.h


@functools.lru_cache(None)
def load() -> tuple[str, ...]:
    """Compile the operators unless the cache has them, and register them.

    Returns the devices that they exist for: ('cpu',), or ('cpu', 'gpu') if a GPU is the device at the
    first call. Without a working compiler it logs one notice and returns ().
    """
    arch = gpu_arch()
    try:
        register_operators(library(arch))
    except (BuildError, OSError, RuntimeError) as error:
        logger.warning("no compiled operators, only Paddle's slower ones: %s", error)
        return ()
    return ('cpu', 'gpu') if arch else ('cpu',)


def halo_attention(q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, *,
                   num_heads: int, block_size: int, halo_size: int, stride: int = 1) -> Tensor:
    """Compute model.attention.halo_attention by one operator that keeps neither windows nor probabilities.

    The operator derives the stride from the sizes of q and kv; `stride` is for callers of either
    function. It takes the tables in the type of q, while mixed precision leaves them in float32.
    """
    if height_rel.dtype != q.dtype:
        height_rel, width_rel = height_rel.astype(q.dtype), width_rel.astype(q.dtype)
    return run_operator('halo_attention', q, kv, height_rel, width_rel, num_heads, block_size, halo_size)[0]


def convolution(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Compute a convolution with half padding and no bias.

    x (B, C, H, W), weight (O, C, k, k) with an odd k -> (B, O, H/stride, W/stride), rounded up.
    """
    needs_gradient = not x.stop_gradient
    return run_operator('convolution', x, weight, stride, needs_gradient)[0]


def convolution_norm_act(x: Tensor, weight: Tensor, norm: nn.BatchNorm2D, *, stride: int, act: str,
                         residual: Optional[Tensor] = None) -> Tensor:
    """Compute act(norm(convolution of x) + residual), `norm` by its running statistics. Has no gradient."""
    mean, variance = norm_statistics(norm)
    epsilon = norm_settings(norm).epsilon
    return run_operator('convolution_norm_act', x, weight, norm.weight, norm.bias, mean, variance, residual,
                        stride, epsilon, ACTIVATIONS.index(act))[0]


def batch_norm_act(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, act: str
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """Compute act(batch norm of x by its own statistics): x (B, C, H, W), weight and bias (C,).

    -> (the same shape as x, mean (C,), biased variance (C,)); the last two carry no gradient.
    """
    out, mean, variance = run_operator('batch_norm_act', x, weight, bias, epsilon, ACTIVATIONS.index(act))
    return out, mean.detach(), variance.detach()


def max_pool(x: Tensor) -> Tensor:
    """Compute the maximum over windows of 3x3 pixels, 2 apart, with half padding.

    x (B, C, H, W) -> (B, C, H/2, W/2), rounded up.
    """
    return run_operator('max_pool', x)[0]
