"""Multiply-adds of a HaloNet, counted layer by layer from the sizes of its feature maps."""
import math

from paddle import nn

from halonet import Stage, Stem
from model.attention import BottleneckAttention, HaloAttention, LambdaLayer
from model.blocks import Bottleneck, EfficientChannelAttention, SqueezeExcite
from model.layers import ConvNormAct


def side_after(layer, size):
    """The side of a convolution's or pooling's map: this network rounds up."""
    stride = getattr(layer, '_stride', None) or getattr(layer, 'stride', 1)
    return -(-size // (stride[0] if isinstance(stride, (list, tuple)) else stride))


def convolution(layer, H, W):
    H, W = side_after(layer, H), side_after(layer, W)
    return math.prod(layer.weight.shape) * H * W, H, W


def chain(layers, H, W):
    """(multiply-adds, height, width) after layers, one after another."""
    total = 0
    for layer in layers:
        count, H, W = multiply_adds(layer, H, W)
        total += count
    return total, H, W


def bottleneck(block, H, W):
    main, height, width = chain([block.conv1_1x1, *(getattr(block, name) for name in block.spatial), block.conv3_1x1], H, W)
    shortcut = multiply_adds(block.shortcut, H, W)[0] if block.shortcut is not None else 0
    return main + shortcut, height, width


def halo(layer, H, W):
    block, w, stride = layer.block_size, layer.block_size + 2 * layer.halo_size, layer.stride
    projections = multiply_adds(layer.q, H, W)[0] + multiply_adds(layer.kv, H, W)[0]
    queries = -(-H // block) * -(-W // block) * (block // stride) ** 2       # those that fill the last blocks are computed too
    d = layer.q.weight.shape[0]                                             # of all heads
    products = queries * (w * w * (d + layer.out_width) + 2 * (2 * w - 1) * d)        # positions as timm takes them: all rows
    H, W = -(-H // stride), -(-W // stride)
    return projections + products, side_after(layer.pool, H), side_after(layer.pool, W)


def whole_map(layer, H, W):
    side = layer.map_size
    products = side ** 2 * (side ** 2 * (layer.qk_width + layer.out_width) + 2 * (2 * side - 1) * layer.qk_width)
    return multiply_adds(layer.qkv, H, W)[0] + products, side_after(layer.pool, H), side_after(layer.pool, W)


def lambdas(layer, H, W):
    position = math.prod(layer.conv_lambda.weight.shape) * layer.v          # for each value by itself
    content, applied = layer.d * layer.v, layer.num_heads * layer.d * layer.v
    products = H * W * (position + content + applied)
    return multiply_adds(layer.qkv, H, W)[0] + products, side_after(layer.pool, H), side_after(layer.pool, W)


COUNTED = {                                         # class -> (layer, H, W) -> (multiply-adds, height, width)
    nn.Conv2D: convolution,
    ConvNormAct: lambda layer, H, W: multiply_adds(layer.conv, H, W),
    Stem: lambda layer, H, W: chain(layer.children(), H, W),
    Stage: lambda layer, H, W: chain(layer.children(), H, W),
    Bottleneck: bottleneck,
    HaloAttention: halo,
    BottleneckAttention: whole_map,
    LambdaLayer: lambdas,
    SqueezeExcite: lambda layer, H, W: (math.prod(layer.fc1.weight.shape) + math.prod(layer.fc2.weight.shape), H, W),
    EfficientChannelAttention: lambda layer, H, W: (math.prod(layer.conv.weight.shape), H, W),
    nn.MaxPool2D: lambda layer, H, W: (0, -(-H // 2), -(-W // 2)),
}


def multiply_adds(layer, H, W):
    """(multiply-adds of one image, height, width of the map that comes out) of a layer for a map of H x W that goes in."""
    return COUNTED.get(type(layer), lambda layer, H, W: (0, H, W))(layer, H, W)


def total_multiply_adds(model, H, W):
    """Multiply-adds of a HaloNet for one image of H x W pixels."""
    total = chain([model.stem, *model.stages, model.final_conv], H, W)[0]
    return total + (math.prod(model.head.fc.weight.shape) if isinstance(model.head.fc, nn.Linear) else 0)
