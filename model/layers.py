"""The layers of every block, and the choice between Paddle's operators and the compiled ones of ops/.

The network consists of Paddle's own layers (Conv2D, BatchNorm2D, MaxPool2D, ...), so that Paddle's tools
know them. The blocks around them run one compiled operator instead of one or more layers, if the result
is the same.

In the shapes below: B batch, C channels, H and W height and width of the feature map in pixels. A side that a
stride does not divide is rounded up: H/stride stands for ceil(H/stride).
"""
import math
from collections.abc import Iterable
from typing import Callable, Optional

from system import paddle_internals

import paddle
from paddle import Tensor, nn
from paddle.nn.initializer import Initializer, Normal

import ops

ACTIVATIONS = {'relu': nn.ReLU, 'silu': nn.Silu}
COMPILED_ACTIVATIONS = {nn.Identity: 'identity', nn.ReLU: 'relu', nn.Silu: 'silu'}
FLOATS = paddle.float32, paddle.float64              # the types that the compiled operators take on a CPU
FORWARD = {kind: kind.forward for kind in (nn.Conv2D, nn.BatchNorm2D, nn.MaxPool2D, *COMPILED_ACTIVATIONS)}


def choice(owner: nn.Layer) -> str:
    """Return the operators that a layer uses, by its attribute `operators`: fused, composed or sdpa."""
    return auto_choice(owner) if owner.operators == 'auto' else owner.operators


def auto_choice(owner: nn.Layer) -> str:
    """Return what auto stands for: fused on a CPU with the compiled operators, composed elsewhere.

    A static program for inference is traced with Paddle's, because it may run where ours do not exist.
    """
    for_inference = not (owner.training or paddle.in_dynamic_mode())
    if paddle.get_device() != 'cpu' or for_inference or 'cpu' not in ops.load():
        return 'composed'
    return 'fused'


def compiled(owner: nn.Layer, devices: Iterable[str] = ('cpu',)) -> bool:
    """True if the compiled operators that exist for `devices` are to be used in the layer `owner`.

    Raises ValueError if its attribute `operators` is fused and they cannot be compiled.
    """
    device = paddle.get_device().split(':')[0]
    if choice(owner) != 'fused' or device == 'gpu' and 'gpu' not in devices:
        return False
    if device not in ops.load():
        raise ValueError('MODEL.ATTENTION is fused, which needs a C++ compiler, on a GPU nvcc as well '
                         '(the log says what is amiss); auto, composed and sdpa need neither')
    return True


def use_operators(network: nn.Layer, kind: str) -> nn.Layer:
    """Set `operators` of a network and of all layers in it that choose between operators."""
    for layer in network.sublayers(include_self=True):
        if hasattr(layer, 'operators'):
            layer.operators = kind
    return network


def operators_of(network: nn.Layer) -> str:
    """Return the `choice` of a network, whose layers have all been given the same."""
    return next(choice(layer) for layer in network.sublayers() if hasattr(layer, 'operators'))


# ---- when one compiled operator gives the same result as the layers

def unchanged(*layers: nn.Layer) -> bool:
    """True if none of the layers has a hook or another `forward` than its class had."""
    for layer in layers:
        kind = type(layer)
        replaced = 'forward' in vars(layer) or kind.forward is not FORWARD.get(kind, kind.forward)
        if replaced or paddle_internals.has_hooks(layer):
            return False
    return True


def supported_convolution(conv: nn.Layer) -> bool:
    """True if `conv` is what ops.convolution computes.

    That is a square kernel with half padding of zeros and one stride, without groups, dilation and bias.
    """
    if type(conv) is not nn.Conv2D or not unchanged(conv):
        return False
    settings = paddle_internals.convolution_settings(conv)
    stride = settings.stride
    *_, height, width = conv.weight.shape
    half = height // 2
    return (conv.bias is None and conv.weight.dtype in FLOATS
            and settings.operator == 'conv2d' and settings.groups == 1 and settings.dilation == [1, 1]
            and isinstance(stride, list) and stride == 2 * stride[:1]                # twice the same
            and height == width == 2 * half + 1 and settings.zero_padding == [half, half]
            and settings.data_format == 'NCHW')


def supported_norm(norm: nn.Layer) -> bool:
    """True if `norm` is what the compiled operators compute: a batch norm with a weight and a bias."""
    if type(norm) is not nn.BatchNorm2D or not unchanged(norm):
        return False
    return (norm.weight is not None and norm.bias is not None and norm.weight.dtype in FLOATS
            and paddle_internals.norm_settings(norm).data_format == 'NCHW')


def supported_act(act: nn.Layer) -> bool:
    """True if the compiled operators have this activation."""
    return type(act) in COMPILED_ACTIVATIONS and unchanged(act)


def supported_pool(pool: nn.Layer) -> bool:
    """True if `pool` is what ops.max_pool computes: windows of 3x3 pixels, 2 apart, with half padding."""
    return (type(pool) is nn.MaxPool2D and unchanged(pool)
            and pool.ksize == 3 and pool.stride == 2 and pool.padding == 1
            and not pool.ceil_mode and not pool.return_mask and pool.data_format == 'NCHW')


def in_inference(norm: nn.BatchNorm2D) -> bool:
    """True if no gradients are recorded, nothing is traced, and `norm` uses its running statistics."""
    return (paddle_internals.uses_running_statistics(norm)
            and paddle.in_dynamic_mode() and not paddle.is_grad_enabled())


def can_fuse(owner: nn.Layer, conv: nn.Layer, norm: nn.Layer, act: nn.Layer, *skipped: nn.Layer) -> bool:
    """True if one compiled operator gives what `conv`, `norm` and `act` give in inference.

    `skipped` are layers around them that the operator replaces as well. `owner` decides as in `compiled`.
    """
    return (type(norm) is nn.BatchNorm2D and in_inference(norm)
            and supported_convolution(conv) and supported_norm(norm) and supported_act(act)
            and unchanged(*skipped) and compiled(owner))


def can_normalise(owner: nn.Layer, norm: nn.Layer, act: nn.Layer, x: Tensor) -> bool:
    """True if one compiled operator gives what `norm`, by the statistics of the batch x, and `act` give."""
    return (norm.training and supported_norm(norm) and not paddle_internals.has_frozen_statistics(norm)
            and not lacks_statistics(x) and supported_act(act) and compiled(owner))


def lacks_statistics(x: Tensor) -> bool:
    """True if a channel of x (B, C, H, W) has at most one value, so its variance is undefined.

    Paddle then keeps the running statistics. Always False while tracing.
    """
    return paddle.in_dynamic_mode() and x.size <= x.shape[1]


# ---- layers by one operator each, compiled where that gives the same result

def convolve(owner: nn.Layer, conv: nn.Layer, x: Tensor) -> Tensor:
    """conv(x): (B, C, H, W) -> (B, width, H/stride, W/stride)."""
    if supported_convolution(conv) and compiled(owner):
        return ops.convolution(x, conv.weight, paddle_internals.stride_of(conv))
    return conv(x)


def norm_act(owner: nn.Layer, norm: nn.Layer, act: nn.Layer, x: Tensor) -> Tensor:
    """act(norm(x)), x (B, C, H, W). Training by the batch's statistics takes one compiled operator."""
    if not can_normalise(owner, norm, act, x):
        return act(norm(x))
    momentum, epsilon, _ = paddle_internals.norm_settings(norm)
    running_mean, running_variance = paddle_internals.norm_statistics(norm)
    name = COMPILED_ACTIVATIONS[type(act)]
    out, mean, variance = ops.batch_norm_act(x, norm.weight, norm.bias, epsilon, name)
    for running, new in (running_mean, mean), (running_variance, variance):
        paddle.assign(running * momentum + new * (1 - momentum), running)
    return out


def max_pool(owner: nn.Layer, pool: nn.Layer, x: Tensor) -> Tensor:
    """pool(x): (B, C, H, W) -> (B, C, H/2, W/2) for a pool with a stride of 2."""
    return ops.max_pool(x) if supported_pool(pool) and compiled(owner) else pool(x)


def pixel_mean(x: Tensor) -> Tensor:
    """Average over pixels: (B, C, H, W) -> (B, C).

    One axis at a time: on a CPU, Paddle's gradient of a mean over both takes 40 times as long.
    """
    return x.mean(3).mean(2)


def conv2d(in_width: int, width: int, kernel_size: int, stride: int = 1, groups: int = 1,
           init: Optional[Initializer] = None) -> nn.Conv2D:
    """Make a convolution with half padding and no bias: (B, C, H, W) -> (B, width, H/stride, W/stride)."""
    return nn.Conv2D(in_width, width, kernel_size, stride, kernel_size // 2, groups=groups, weight_attr=init,
                     bias_attr=False)


class ConvNormAct(nn.Layer):
    """Convolution with half padding, batch norm, activation.

    (B, C, H, W) -> (B, width, H/stride, W/stride).
    """

    operators = 'auto'

    def __init__(self, in_width: int, width: int, kernel_size: int, stride: int = 1,
                 act: Callable[[], nn.Layer] = nn.Identity, groups: int = 1) -> None:
        super().__init__()
        normal = Normal(std=math.sqrt(2 / (kernel_size ** 2 * width // groups)))
        self.conv = conv2d(in_width, width, kernel_size, stride, groups, init=normal)
        self.bn = nn.BatchNorm2D(width)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, act = self.conv, self.bn, self.act      # Paddle looks these up in Python each time
        if can_fuse(self, conv, norm, act):
            return self.fused(x, act)
        return norm_act(self, norm, act, convolve(self, conv, x))

    def fused(self, x: Tensor, act: nn.Layer, residual: Optional[Tensor] = None) -> Tensor:
        """act(norm(convolution of x) + residual) by one compiled operator."""
        conv = self.conv
        return ops.convolution_norm_act(x, conv.weight, self.bn, stride=paddle_internals.stride_of(conv),
                                        act=COMPILED_ACTIVATIONS[type(act)], residual=residual)


def batch_norms(network: nn.Layer) -> dict[str, nn.Layer]:
    """Return {name: layer} of the batch norms in a network, synchronised ones included."""
    kinds = nn.BatchNorm2D, nn.SyncBatchNorm
    return {name: layer for name, layer in network.named_sublayers() if isinstance(layer, kinds)}


def running_statistics(network: nn.Layer) -> dict[str, Tensor]:
    """Return {key: tensor} of the state dict's entries that a process's own batches change.

    These are the running statistics of batch norms, unless they are frozen.
    """
    statistics = {}
    for name, norm in batch_norms(network).items():
        if not paddle_internals.has_frozen_statistics(norm):
            mean, variance = paddle_internals.norm_statistics(norm)
            statistics[f'{name}._mean'] = mean
            statistics[f'{name}._variance'] = variance
    return statistics


def synchronise_norms(network: nn.Layer) -> None:
    """Make every batch norm compute the statistics of all processes. Paddle has no such kernel for CPU.

    Norms with frozen statistics stay as they are: Paddle's convert_sync_batchnorm would unfreeze them.
    """
    for norm in batch_norms(network).values():
        if not paddle_internals.has_frozen_statistics(norm):
            paddle_internals.synchronise(norm)


def check_synchronised(norm: nn.Layer, rank: int, processes: int) -> None:
    """Normalise ones on rank 0 and zeros elsewhere by a new `norm` of one channel. It must see all of them.

    Raises ValueError where it sees its own process alone: Paddle's may do so without a word.
    """
    norm.train()
    norm(paddle.full([1, 1, 1, 2], float(rank == 0)))
    kept = paddle_internals.norm_settings(norm).momentum
    mean = norm.state_dict()['_mean'].item() / (1 - kept)
    if abs(mean - 1 / processes) > 1e-3 / processes:
        raise ValueError(f'TRAIN.SYNC_BN: the mean over {processes} processes should be {1 / processes:.4f} '
                         f'and is {mean:.4f}: Paddle does not synchronise batch norms here; set '
                         'TRAIN.SYNC_BN False')


class Traced(nn.Layer):
    """A network that runs as a static program, which paddle.jit.to_static traces for each new input shape.

    It has the parameters of the network. The network itself is not changed: evaluation runs it in eager mode.
    """

    def __init__(self, network: nn.Layer) -> None:
        super().__init__()
        self.network = network
        # Paddle's default on a GPU, CINN, compiles for minutes
        self.program = paddle.jit.to_static(network.forward, full_graph=True, backend=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.program(x)
