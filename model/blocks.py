"""The residual block, and the spatial operators and channel attention in it.

In the shapes below: B batch, C channels, H and W height and width of the feature map in pixels. A side that a
stride does not divide is rounded up: H/stride stands for ceil(H/stride).
"""
import math
from dataclasses import dataclass
from typing import Callable, Optional

from system import paddle_internals

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.nn.initializer import Constant, KaimingUniform, Normal

from model.attention import BottleneckAttention, HaloAttention, nearest_8
from model.lambda_layer import LambdaLayer
from model.layers import ACTIVATIONS, ConvNormAct, can_fuse, norm_act, pixel_mean, supported_act
from model.positions import AbsolutePosition


class SqueezeExcite(nn.Layer):
    """Channel attention: scales channels by a small network of their means. (B, C, H, W) -> (B, C, H, W).

    Hu et al. 2018, 'Squeeze-and-Excitation Networks', arXiv 1709.01507.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        inner = nearest_8(width * ratio)
        self.fc1 = nn.Conv2D(width, inner, 1, weight_attr=Normal(std=math.sqrt(2 / inner)))
        self.fc2 = nn.Conv2D(inner, width, 1, weight_attr=Normal(std=math.sqrt(2 / width)))

    def forward(self, x: Tensor) -> Tensor:
        means = pixel_mean(x).unsqueeze([2, 3])                             # (B, C, 1, 1)
        return x * F.sigmoid(self.fc2(F.relu(self.fc1(means))))


class EfficientChannelAttention(nn.Layer):
    """Channel attention: scales channels by a 1D convolution over their means. (B, C, H, W) -> (B, C, H, W).

    Wang et al. 2020, 'ECA-Net', arXiv 1910.03151.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        size = int((math.log2(width) + 1) / 2)
        kernel_size = max(size // 2 * 2 + 1, 3)                             # odd, size or size + 1
        # PyTorch's default initialisation, which timm does not change
        init = KaimingUniform(negative_slope=math.sqrt(5), nonlinearity='leaky_relu')
        self.conv = nn.Conv1D(1, 1, kernel_size, padding=kernel_size // 2, bias_attr=False, weight_attr=init)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.sigmoid(self.conv(pixel_mean(x).unsqueeze(1)))           # (B, 1, C)
        return x * weight.transpose([0, 2, 1]).unsqueeze(-1)                # (B, C, H, W) times (B, C, 1, 1)


class DropPath(nn.Layer):
    """Stochastic depth: in training drops the whole branch of a sample with probability `rate`.

    Huang et al. 2016, 'Deep Networks with Stochastic Depth', arXiv 1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = paddle.ones_like(x[:, :1, :1, :1])                           # (B, 1, 1, 1)
        return x * F.dropout(keep, self.rate)                               # times 0 or 1 / (1 - rate)


class Bottleneck(nn.Layer):
    """The residual block: 1x1 convolution, spatial operator, 1x1 convolution, added to a shortcut.

    (B, C, H, W) -> (B, width, H/stride, W/stride).

    `spatial` is {timm's name: layer} of the layers between the two convolutions, in their order; the last
    gives `spatial_width` channels. `shortcut` is None in a block without one.
    """

    operators = 'auto'

    def __init__(self, in_width: int, inner_width: int, width: int, spatial: dict[str, nn.Layer],
                 spatial_width: int, *, stride: int = 1, act: Callable[[], nn.Layer] = nn.ReLU,
                 drop_path: float = 0.0, projection: bool = True, linear_out: bool = False) -> None:
        super().__init__()
        if stride == 1 and in_width == width:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = ConvNormAct(in_width, width, 1, stride) if projection else None
        self.conv1_1x1 = ConvNormAct(in_width, inner_width, 1, act=act)
        self.spatial = tuple(spatial)
        for name, layer in spatial.items():
            self.add_sublayer(name, layer)
        self.post_act = act() if 'post_attn' in spatial else None           # the activation after that norm
        self.conv3_1x1 = ConvNormAct(spatial_width, width, 1)
        if self.shortcut is not None:
            Constant(0.0)(self.conv3_1x1.bn.weight)                         # a new block returns its shortcut
        self.drop_path = DropPath(drop_path)
        self.act = nn.Identity() if linear_out else act()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1_1x1(x)
        for name in self.spatial:
            layer = getattr(self, name)
            if name == 'post_attn':
                out = norm_act(self, layer, self.post_act, out)
            else:
                out = layer(out)
        shortcut = None if self.shortcut is None else self.shortcut(x)
        if self.can_fuse_end(out, shortcut):
            return self.conv3_1x1.fused(out, self.act, residual=shortcut)
        out = self.drop_path(self.conv3_1x1(out))
        if shortcut is not None:
            out = out + shortcut
        return self.act(out)

    def can_fuse_end(self, x: Tensor, shortcut: Optional[Tensor]) -> bool:
        """True if one compiled operator gives what the last convolution of x, the shortcut and `act` give."""
        last, drop_path = self.conv3_1x1, self.drop_path
        return (type(last) is ConvNormAct and type(last.act) is nn.Identity and supported_act(last.act)
                and type(drop_path) is DropPath and not drop_path.training
                and can_fuse(self, last.conv, last.bn, self.act, last, drop_path)
                and (shortcut is None or can_add(last.conv, x, shortcut)))


def can_add(conv: nn.Conv2D, x: Tensor, shortcut: Tensor) -> bool:
    """True if `shortcut` has the type and shape that the convolution `conv` of x (B, C, H, W) gives."""
    B, _, H, W = x.shape
    stride = paddle_internals.stride_of(conv)
    shape = [B, conv.weight.shape[0], -(-H // stride), -(-W // stride)]
    return shortcut.dtype == x.dtype and shortcut.shape == shape


@dataclass(frozen=True)
class Operators:
    """Builds the spatial operators of a network's blocks. The fields are options of config.MODEL."""
    block_size: int = 8
    halo_size: int = 2
    head_dim: int = 0
    qk_ratio: float = 1.0
    value_ratio: float = 1.0
    lambda_size: int = 13
    window: str = 'block'
    positions: str = 'relative'
    halo_stride: str = 'query'
    group_size: int = 0
    channel_attn: str = 'none'
    se_ratio: float = 1 / 16
    act: str = 'relu'

    def build(self, kind: str, width: int, num_heads: int, stride: int,
              map_size: tuple[int, int]) -> tuple[dict[str, nn.Layer], int]:
        """Return ({timm's name: layer}, output width) of the layers that replace a ResNet's 3x3 convolution.

        `map_size` is the (height, width) of the input feature map in pixels. Raises ValueError for an unknown
        kind and for widths that the heads or groups do not divide.
        """
        if kind == 'conv':
            return self.convolution(width, stride), width
        if kind == 'halo':
            layer = HaloAttention(
                width, width, num_heads, self.block_size, self.halo_size, stride,
                head_dim=self.head_dim, qk_ratio=self.qk_ratio, value_ratio=self.value_ratio,
                window=self.window, relative=self.positions == 'relative', pooled=self.halo_stride == 'pool')
        elif kind == 'bot':
            layer = BottleneckAttention(width, width, num_heads, map_size, stride, head_dim=self.head_dim,
                                        qk_ratio=self.qk_ratio)
        elif kind == 'lambda':
            layer = LambdaLayer(width, width, num_heads, self.lambda_size, stride, head_dim=self.head_dim)
        else:
            raise ValueError(f'MODEL.STAGES: unknown kind of block {kind!r}; '
                             'known are conv, halo, bot and lambda')
        layers = {'self_attn': layer, 'post_attn': nn.BatchNorm2D(layer.out_width)}
        if kind == 'halo' and self.positions == 'absolute':
            layers = {'position': AbsolutePosition(), **layers}
        return layers, layer.out_width

    def convolution(self, width: int, stride: int) -> dict[str, nn.Layer]:
        """Return {timm's name: layer} of a 3x3 convolution and its channel attention, if it has one."""
        group_size = self.group_size or width               # 0: one group
        if width % group_size:
            raise ValueError(f'MODEL.GROUP_SIZE is {group_size} and the inner width of a block {width}, '
                             'no multiple of it')
        groups = width // group_size
        layers: dict[str, nn.Layer] = {
            'conv2_kxk': ConvNormAct(width, width, 3, stride, ACTIVATIONS[self.act], groups)}
        if self.channel_attn == 'se':
            layers['attn'] = SqueezeExcite(width, self.se_ratio)
        elif self.channel_attn == 'eca':
            layers['attn'] = EfficientChannelAttention(width)
        return layers
