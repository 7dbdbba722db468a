"""The layers that every block is made of, and the choice between Paddle's operators and the compiled ones of ops/.

In the shapes below: B batch, C channels, H and W height and width of the feature map in pixels. A side that a stride
does not divide is rounded up: H/stride stands for ceil(H/stride).
"""
import math

import paddle
from paddle import nn
from paddle.nn.initializer import Normal

import ops

ACTIVATIONS = {'relu': nn.ReLU, 'silu': nn.Silu}
COMPILED_ACTIVATIONS = {nn.Identity: 'identity', nn.ReLU: 'relu', nn.Silu: 'silu'}


def compiled(layer):
    """Whether a layer is to use the compiled operators, by its attribute `operators`: fused, composed (of Paddle's operators)
    or auto, the better of those that serve. A program for inference is traced with Paddle's, to run where ours are not.

    Raises ValueError where fused cannot be had.
    """
    kind, device = layer.operators, paddle.get_device().split(':')[0]
    if kind == 'composed' or device == 'gpu' and 'gpu' not in layer.compiled_for:
        return False
    if kind == 'auto' and not (device == 'cpu' and (layer.training or paddle.in_dynamic_mode())):
        return False
    if device in ops.load():
        return True
    if kind == 'fused':
        raise ValueError('MODEL.ATTENTION is fused, which needs a C++ compiler, on a GPU nvcc as well (the log says what is '
                         'amiss); auto and composed need neither')
    return False


def use_operators(network, kind):
    """Set `operators` of a network and of all layers in it that have compiled ones."""
    for layer in network.sublayers(include_self=True):
        if hasattr(layer, 'operators'):
            layer.operators = kind
    return network


def replaceable(act):
    """Whether a compiled operator can do an activation's work: it has that one, and nobody changed or watches the layer."""
    return type(act) in COMPILED_ACTIVATIONS and not altered(act)


def altered(layer):
    """Whether a hook sees what goes into a layer or comes out of it, or this one layer has got another `forward`."""
    return bool(layer._forward_pre_hooks or layer._forward_post_hooks or 'forward' in vars(layer))


def pixel_mean(x):
    """(B, C, H, W) -> (B, C). One axis at a time: on a CPU, Paddle's gradient of a mean over both takes 40 times as long."""
    return x.mean(3).mean(2)


class Convolution(nn.Conv2D):
    """Convolution with half padding and no bias: (B, C, H, W) -> (B, width, H/stride, W/stride)."""

    operators, compiled_for = 'auto', ('cpu',)

    def __init__(self, in_width, width, kernel_size, stride=1, groups=1, init=None):
        super().__init__(in_width, width, kernel_size, stride, kernel_size // 2, groups=groups, weight_attr=init, bias_attr=False)
        self.stride = stride

    def forward(self, x):
        if self._groups == 1 and self.bias is None and compiled(self):
            return ops.convolution(x, self.weight, self.stride)
        return super().forward(x)


def batch_norms(network):
    """{name: layer} of the batch norms in a network, those that SYNC_BN made of ours among them."""
    return {name: layer for name, layer in network.named_sublayers() if isinstance(layer, (nn.BatchNorm2D, nn.SyncBatchNorm))}


def running_statistics(network):
    """{key: tensor} of those entries of the state dict that a process's own batches change: batch norms', unless frozen."""
    return {f'{name}.{key}': getattr(norm, key) for name, norm in batch_norms(network).items() if not norm._use_global_stats
            for key in ('_mean', '_variance')}


def lacks_statistics(x):
    """Whether a map (B, C, H, W) has no pixels at all, or one, so that there are no statistics. (Paddle then keeps the running
    ones.) In a program it is not known."""
    return paddle.in_dynamic_mode() and x.size <= x.shape[1]


class BatchNormAct(nn.BatchNorm2D):
    """Batch norm, then the activation."""

    operators, compiled_for = 'auto', ('cpu',)

    def __init__(self, width, act):
        super().__init__(width)
        self.act = act()

    def forward(self, x):
        if (not self.training or self._use_global_stats or lacks_statistics(x)
                or not replaceable(self.act) or not compiled(self)):
            return self.act(super().forward(x))
        out, mean, variance = ops.batch_norm_act(x, self.weight, self.bias, self._epsilon, COMPILED_ACTIVATIONS[type(self.act)])
        for running, new in (self._mean, mean), (self._variance, variance):
            paddle.assign(running * self._momentum + new * (1 - self._momentum), running)
        return out


class ConvNormAct(nn.Layer):
    """Convolution with half padding, batch norm, activation: (B, C, H, W) -> (B, width, H/stride, W/stride)."""

    def __init__(self, in_width, width, kernel_size, stride=1, act=nn.Identity, groups=1):
        super().__init__()
        normal = Normal(std=math.sqrt(2 / (kernel_size ** 2 * width // groups)))
        self.conv = Convolution(in_width, width, kernel_size, stride, groups, init=normal)
        self.bn = BatchNormAct(width, act)

    def forward(self, x):
        return self.at_once(x, self.bn.act) if self.is_one_operator() else self.bn(self.conv(x))

    def is_one_operator(self, *followers):
        """Whether one compiled operator serves: the norm is by running statistics, nobody wants gradients, and the layers are as
        they were made, as are the `followers`, layers that the operator then stands for as well."""
        if not paddle.in_dynamic_mode() or paddle.is_grad_enabled():
            return False
        conv, norm = self.conv, self.bn             # Paddle looks for a layer's layers and parameters in Python, each time
        return (type(conv) is Convolution and type(norm) is BatchNormAct and replaceable(norm.act)
                and (norm._use_global_stats or norm._use_global_stats is None and not norm.training)
                and conv._groups == 1 and conv.bias is None
                and not any(map(altered, (conv, norm, *followers))) and compiled(conv))

    def at_once(self, x, act, residual=None):
        """act(norm(convolution of x) + residual) by one operator."""
        conv = self.conv
        return ops.convolution_norm_act(x, conv.weight, self.bn, stride=conv.stride, act=COMPILED_ACTIVATIONS[type(act)],
                                        residual=residual)


class MaxPool(nn.MaxPool2D):
    """The maximum over windows of 3x3 pixels: (B, C, H, W) -> (B, C, H/2, W/2)."""

    operators, compiled_for = 'auto', ('cpu',)

    def __init__(self):
        super().__init__(3, 2, 1)

    def forward(self, x):
        return ops.max_pool(x) if compiled(self) else super().forward(x)
