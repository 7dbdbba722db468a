"""Multiply-adds of a HaloNet, counted layer by layer from the sizes of its feature maps."""
import math
from collections.abc import Iterable

from system import paddle_internals

from paddle import nn

from halonet import Stage, Stem
from model.attention import BottleneckAttention, HaloAttention
from model.blocks import Bottleneck, EfficientChannelAttention, SqueezeExcite
from model.lambda_layer import LambdaLayer
from model.layers import ConvNormAct
from model.positions import NoPosition

Count = tuple[int, int, int]                        # multiply-adds of one image; output height and width


def multiply_adds(layer: nn.Layer, H: int, W: int) -> Count:
    """Return (multiply-adds, height, width of the output) of a layer for an input of H x W pixels.

    Norms, activations and pools count as 0.
    """
    count = COUNTS.get(type(layer))
    return count(layer, H, W) if count else (0, H, W)


def total_multiply_adds(model: nn.Layer, H: int, W: int) -> int:
    """Return the multiply-adds of a HaloNet for one image of H x W pixels."""
    total = chain([model.stem, *model.stages, model.final_conv], H, W)[0]
    if isinstance(model.head.fc, nn.Linear):
        total += weights(model.head.fc)
    return total


def weights(layer: nn.Layer) -> int:
    """Return the number of weights in the kernel or matrix of a layer."""
    return math.prod(layer.weight.shape)


def side_after(layer: nn.Layer, size: int) -> int:
    """Return the output side of a convolution or a pool for an input side: this network rounds up."""
    if isinstance(layer, nn.Conv2D):
        stride = paddle_internals.stride_of(layer)
    else:
        stride = getattr(layer, 'stride', 1)        # an Identity stands where nothing is pooled
    return -(-size // stride)


def chain(layers: Iterable[nn.Layer], H: int, W: int) -> Count:
    """Count layers one after another."""
    total = 0
    for layer in layers:
        count, H, W = multiply_adds(layer, H, W)
        total += count
    return total, H, W


# ---- one kind of layer each

def convolution(layer: nn.Conv2D, H: int, W: int) -> Count:
    H, W = side_after(layer, H), side_after(layer, W)
    return weights(layer) * H * W, H, W


def conv_norm_act(layer: ConvNormAct, H: int, W: int) -> Count:
    return multiply_adds(layer.conv, H, W)


def children(layer: nn.Layer, H: int, W: int) -> Count:
    return chain(layer.children(), H, W)


def max_pool(layer: nn.MaxPool2D, H: int, W: int) -> Count:
    return 0, -(-H // 2), -(-W // 2)


def squeeze_excite(layer: SqueezeExcite, H: int, W: int) -> Count:
    return weights(layer.fc1) + weights(layer.fc2), H, W


def channel_attention(layer: EfficientChannelAttention, H: int, W: int) -> Count:
    return weights(layer.conv), H, W


def bottleneck(block: Bottleneck, H: int, W: int) -> Count:
    spatial = [getattr(block, name) for name in block.spatial]
    total, height, width = chain([block.conv1_1x1, *spatial, block.conv3_1x1], H, W)
    if block.shortcut is not None:
        total += multiply_adds(block.shortcut, H, W)[0]
    return total, height, width


def halo(layer: HaloAttention, H: int, W: int) -> Count:
    block, stride = layer.block_size, layer.stride
    window = block + 2 * layer.halo_size
    projections = multiply_adds(layer.q, H, W)[0] + multiply_adds(layer.kv, H, W)[0]
    blocks = -(-H // block) * -(-W // block)        # the last ones are filled up, and computed whole
    queries = blocks * (block // stride) ** 2
    d = layer.q.weight.shape[0]                     # width of the queries, all heads together
    content = window * window * (d + layer.out_width)
    positions = 2 * (2 * window - 1) * d            # as timm computes them: with all rows of both tables
    if isinstance(layer.pos_embed, NoPosition):
        positions = 0
    total = projections + queries * (content + positions)
    H, W = -(-H // stride), -(-W // stride)
    return total, side_after(layer.pool, H), side_after(layer.pool, W)


def global_attention(layer: BottleneckAttention, H: int, W: int) -> Count:
    height, width = layer.map_size
    pixels = height * width
    content = pixels * (layer.qk_width + layer.out_width)
    positions = (2 * height - 1 + 2 * width - 1) * layer.qk_width
    projections = multiply_adds(layer.qkv, H, W)[0]
    total = projections + pixels * (content + positions)
    return total, side_after(layer.pool, H), side_after(layer.pool, W)


def lambda_layer(layer: LambdaLayer, H: int, W: int) -> Count:
    positions = weights(layer.conv_lambda) * layer.v     # the convolution runs for each value channel
    content = layer.d * layer.v
    applied = layer.num_heads * layer.d * layer.v
    projections = multiply_adds(layer.qkv, H, W)[0]
    products = H * W * (positions + content + applied)
    return projections + products, side_after(layer.pool, H), side_after(layer.pool, W)


COUNTS = {
    nn.Conv2D: convolution,
    nn.MaxPool2D: max_pool,
    ConvNormAct: conv_norm_act,
    Stem: children,
    Stage: children,
    Bottleneck: bottleneck,
    HaloAttention: halo,
    BottleneckAttention: global_attention,
    LambdaLayer: lambda_layer,
    SqueezeExcite: squeeze_excite,
    EfficientChannelAttention: channel_attention,
}
