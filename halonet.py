"""HaloNet: a ResNet whose 3x3 convolutions give way to blocked local self-attention.

Vaswani et al. 2021, 'Scaling Local Self-Attention for Parameter Efficient Visual Backbones', arXiv 2103.12731.
Layers, parameter names and arithmetic are those of timm's byoanet, so that its published weights give its logits.

In the shapes below: B batch, C channels, H and W height and width of the feature map in pixels. A side that a stride
does not divide is rounded up: H/stride stands for ceil(H/stride).
"""
import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.distributed.fleet.utils import recompute
from paddle.nn.initializer import Constant, KaimingUniform, Normal

from model import weights
from model.attention import BottleneckAttention, HaloAttention, LambdaLayer, nearest_8
from model.layers import (
    ACTIVATIONS,
    ConvNormAct,
    batch_norms,
    can_fuse,
    convolve,
    max_pool,
    norm_act,
    pixel_mean,
    supported_act,
    use_operators,
)


class SqueezeExcite(nn.Layer):
    """Channels weighted by a small network of their means: (B, C, H, W) -> (B, C, H, W). Hu et al. 2018, arXiv 1709.01507."""

    def __init__(self, width, ratio):
        super().__init__()
        inner = nearest_8(width * ratio)
        self.fc1 = nn.Conv2D(width, inner, 1, weight_attr=Normal(std=math.sqrt(2 / inner)))
        self.fc2 = nn.Conv2D(inner, width, 1, weight_attr=Normal(std=math.sqrt(2 / width)))

    def forward(self, x):
        return x * F.sigmoid(self.fc2(F.relu(self.fc1(pixel_mean(x).unsqueeze([2, 3])))))


class EfficientChannelAttention(nn.Layer):
    """Channels weighted by a convolution over their neighbours' means: (B, C, H, W) -> (B, C, H, W). Wang et al. 2020,
    arXiv 1910.03151."""

    def __init__(self, width):
        super().__init__()
        kernel_size = max(int((math.log2(width) + 1) / 2) // 2 * 2 + 1, 3)  # the odd number at or above half of log2 + 1
        # PyTorch's default, which timm leaves as it is
        self.conv = nn.Conv1D(1, 1, kernel_size, padding=kernel_size // 2, bias_attr=False,
                              weight_attr=KaimingUniform(negative_slope=math.sqrt(5), nonlinearity='leaky_relu'))

    def forward(self, x):
        share = self.conv(pixel_mean(x).unsqueeze(1))                       # (B, 1, C)
        return x * F.sigmoid(share).transpose([0, 2, 1]).unsqueeze(-1)      # (B, C, H, W) times (B, C, 1, 1)


class DropPath(nn.Layer):
    """Stochastic depth: in training drops the whole branch of a sample with probability `rate`."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = F.dropout(paddle.ones_like(x[:, :1, :1, :1]), self.rate)      # (B, 1, 1, 1), 0 or 1 / (1 - rate)
        return x * keep


class Bottleneck(nn.Layer):
    """1x1 convolution, spatial operator, 1x1 convolution, beside a shortcut: (B, C, H, W) -> (B, width, H/stride, W/stride).

    `spatial` maps timm's names to the layers between the two convolutions, in order; `spatial_width` is what they give.
    `shortcut` is None in a block without one.
    """

    operators = 'auto'

    def __init__(self, in_width, inner_width, width, spatial, spatial_width, *, stride=1, act=nn.ReLU, drop_path=0.0,
                 projection=True, linear_out=False):
        super().__init__()
        if stride == 1 and in_width == width:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = ConvNormAct(in_width, width, 1, stride) if projection else None
        self.conv1_1x1 = ConvNormAct(in_width, inner_width, 1, act=act)
        self.spatial = tuple(spatial)
        for name, layer in spatial.items():
            self.add_sublayer(name, layer)
        self.post_act = act() if 'post_attn' in spatial else None            # the activation after that norm
        self.conv3_1x1 = ConvNormAct(spatial_width, width, 1)
        if self.shortcut is not None:
            Constant(0.0)(self.conv3_1x1.bn.weight)           # a new block is its shortcut
        self.drop_path = DropPath(drop_path)
        self.act = nn.Identity() if linear_out else act()

    def forward(self, x):
        out = self.conv1_1x1(x)
        for name in self.spatial:
            layer = getattr(self, name)
            out = norm_act(self, layer, self.post_act, out) if name == 'post_attn' else layer(out)
        shortcut = None if self.shortcut is None else self.shortcut(x)
        if self.can_fuse_end(out, shortcut):
            return self.conv3_1x1.fused(out, self.act, residual=shortcut)
        out = self.drop_path(self.conv3_1x1(out))
        return self.act(out if shortcut is None else out + shortcut)

    def can_fuse_end(self, x, shortcut):
        """True if one compiled operator gives what the last convolution of x, shortcut and activation give."""
        last, drop_path = self.conv3_1x1, self.drop_path
        return (type(last) is ConvNormAct and type(last.act) is nn.Identity and supported_act(last.act)
                and type(drop_path) is DropPath and not drop_path.training
                and can_fuse(self, last.conv, last.bn, self.act, last, drop_path)
                and (shortcut is None or can_add(last.conv, x, shortcut)))


def can_add(conv: nn.Conv2D, x: paddle.Tensor, shortcut: paddle.Tensor) -> bool:
    """True if `shortcut` has the type and shape that the convolution `conv` of x (B, C, H, W) gives."""
    B, _, H, W = x.shape
    stride = conv._stride[0]
    shape = [B, conv.weight.shape[0], -(-H // stride), -(-W // stride)]
    return shortcut.dtype == x.dtype and shortcut.shape == shape


@dataclass(frozen=True)
class Operators:
    """The spatial operators of a network's blocks, and what they have in common. The fields are options of config.MODEL."""
    block_size: int = 8
    halo_size: int = 2
    head_dim: int = 0
    qk_ratio: float = 1.0
    value_ratio: float = 1.0
    lambda_size: int = 13
    group_size: int = 0
    channel_attn: str = 'none'
    se_ratio: float = 1 / 16
    act: str = 'relu'

    def build(self, kind, width, num_heads, stride, map_size):
        """What stands in a block of this kind where a ResNet has its 3x3 convolution: (layers by timm's names, width they give).

        `map_size` is the side of the map that comes in. Raises ValueError for an unknown kind and for unfit widths.
        """
        if kind == 'conv':
            return self.convolution(width, stride), width
        if kind == 'halo':
            layer = HaloAttention(width, width, num_heads, self.block_size, self.halo_size, stride, head_dim=self.head_dim,
                                  qk_ratio=self.qk_ratio, value_ratio=self.value_ratio)
        elif kind == 'bot':
            layer = BottleneckAttention(width, width, num_heads, map_size, stride, head_dim=self.head_dim,
                                        qk_ratio=self.qk_ratio)
        elif kind == 'lambda':
            layer = LambdaLayer(width, width, num_heads, self.lambda_size, stride, head_dim=self.head_dim)
        else:
            raise ValueError(f'MODEL.STAGES: unknown kind of block {kind!r}; known are conv, halo, bot and lambda')
        return {'self_attn': layer, 'post_attn': nn.BatchNorm2D(layer.out_width)}, layer.out_width

    def convolution(self, width, stride):
        groups = width // self.group_size if self.group_size else 1
        if self.group_size and width % self.group_size:
            raise ValueError(f'MODEL.GROUP_SIZE is {self.group_size} and the inner width of a block {width}, no multiple of it')
        attention = {'none': dict, 'se': lambda: {'attn': SqueezeExcite(width, self.se_ratio)},
                     'eca': lambda: {'attn': EfficientChannelAttention(width)}}[self.channel_attn]
        return {'conv2_kxk': ConvNormAct(width, width, 3, stride, ACTIVATIONS[self.act], groups), **attention()}


class Stem(nn.Sequential):
    """The first convolutions: (B, 3, H, W) -> (B, width, H/stride, W/stride), by timm's names for each kind.

    The stride is 4 with `pool`, and for the tiered stem, where without `pool` the last convolution has a stride; else 2.
    """

    operators = 'auto'

    def __init__(self, kind, width, pool, act):
        kernel_size, widths = {'tiered': (3, [3 * width // 8, width // 2, width]), '7x7': (7, [width]), '3x3': (3, [width])}[kind]
        strides = [2] + [1] * (len(widths) - 1)
        if not pool and len(widths) > 1:
            strides[-1] = 2
        layers = [ConvNormAct(before, after, kernel_size, stride, act)
                  for before, after, stride in zip([3] + widths, widths, strides)]
        self.stride = math.prod(strides) * (2 if pool else 1)
        self.single = len(layers) == 1 and not pool
        if self.single:
            super().__init__(*layers[0].named_children())                   # conv, bn and act
        else:
            named = [(f'conv{i + 1}', layer) for i, layer in enumerate(layers)]
            super().__init__(*named, ('pool', nn.MaxPool2D(3, 2, 1) if pool else nn.Identity()))

    def forward(self, x):
        if self.single:
            return norm_act(self, self.bn, self.act, convolve(self, self.conv, x))
        for name, layer in self.named_children():
            x = max_pool(self, layer, x) if name == 'pool' else layer(x)
        return x


class Stage(nn.Sequential):
    """Blocks one after another. With `recompute`, training keeps the inputs of the blocks only, and computes the rest again."""

    recompute = False

    def forward(self, x):
        for block in self:
            again = self.recompute and self.training and paddle.in_dynamic_mode() and not x.stop_gradient
            x = run_again_in_backward(block, x) if again else block(x)
        return x


def run_again_in_backward(block, x):
    """block(x) that keeps no activations: the backward pass computes them again, with the same random numbers."""
    contexts = iter((nullcontext,))

    def run(x):
        with next(contexts, partial(statistics_kept, block))():
            return block(x)

    return recompute(run, x, use_reentrant=False)             # the other way breaks paddle.DataParallel


@contextmanager
def statistics_kept(block):
    """Within, batch norms in `block` leave their running statistics as they are: these have seen the batch already."""
    norms = batch_norms(block).values()
    momenta = [norm._momentum for norm in norms]
    for norm in norms:
        norm._momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm._momentum = momentum


class Head(nn.Layer):
    """Global average pooling, dropout, classifier: (B, C, H, W) -> (B, num_classes); (B, C) with num_classes 0."""

    def __init__(self, width, num_classes, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes, weight_attr=Normal(std=0.01)) if num_classes else nn.Identity()

    def forward(self, x):
        return self.fc(self.dropout(pixel_mean(x)))


class HaloNet(nn.Layer):
    """(B, 3, H, W) images, normalised -> (B, num_classes) logits, or with num_classes 0 the pooled features (B, C).

    stages: the kinds of blocks of each stage, such as [['conv', 'conv'], ['conv', 'halo']]; `widths`, `strides`,
    `num_heads` and `inner_widths` have one entry per stage. Without `inner_widths` the inner width of a block is
    `bottleneck_ratio` times its output width, or with `bottleneck_in` its input width. `image_size` is the side of
    the images where a block has to know it. What else a block needs follows from its place.

    feature_info: for each stage, {'stride': pixels of the image per pixel of its map, 'width': its channels}.
    """

    def __init__(self, *, stages, widths, strides, num_heads, operators, inner_widths=(), bottleneck_ratio=0.25,
                 bottleneck_in=False, projection=True, linear_out=False, stem='tiered', stem_width=64, stem_pool=True,
                 head_width=0, num_classes=1000, dropout=0.0, drop_path=0.0, image_size=256):
        super().__init__()
        act = ACTIVATIONS[operators.act]
        self.stem = Stem(stem, stem_width, stem_pool, act)
        total = sum(map(len, stages))
        drop_rates = iter([drop_path * i / max(total - 1, 1) for i in range(total)])
        self.stages, self.feature_info = nn.LayerList(), []
        in_width, total_stride = stem_width, self.stem.stride
        for i, (kinds, width, stride, heads) in enumerate(zip(stages, widths, strides, num_heads)):
            blocks = []
            for kind in kinds:
                inner = inner_widths[i] if inner_widths else int((in_width if bottleneck_in else width) * bottleneck_ratio)
                spatial, spatial_width = operators.build(kind, inner, heads, stride, map_size=-(-image_size // total_stride))
                blocks.append(Bottleneck(in_width, inner, width, spatial, spatial_width, stride=stride, act=act,
                                         drop_path=next(drop_rates), projection=projection, linear_out=linear_out))
                in_width, total_stride, stride = width, total_stride * stride, 1
            self.stages.append(Stage(*blocks))
            self.feature_info.append({'stride': total_stride, 'width': width})
        self.final_conv = ConvNormAct(in_width, head_width, 1, act=act) if head_width else nn.Identity()
        self.head = Head(head_width or in_width, num_classes, dropout)

    def features(self, x):
        """(B, 3, H, W) -> the map that each stage gives, a list of (B, width, H/stride, W/stride) as in feature_info."""
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x):
        """(B, 3, H, W) -> the last feature map (B, C, H/stride, W/stride), after the final convolution, before pooling."""
        return self.final_conv(self.features(x)[-1])

    def forward(self, x):
        return self.head(self.forward_features(x))

    def set_state_dict(self, state_dict, use_structured_name=True, *, partial=False):
        """As paddle.nn.Layer's, for our own key names and PaddleViT's, and never a silent half success.

        Raises ValueError, with the keys, for a parameter left unset, a key that has no place here or another shape; and
        then loads nothing. With `partial`, loads what fits and returns (missing keys, unexpected keys).
        """
        return weights.load_strictly(self, weights.to_ours(state_dict), partial)

    set_dict = load_dict = set_state_dict


def count_parameters(model):
    """The numbers that training may change, frozen ones too; Paddle counts the running statistics of norms as well."""
    return sum(p.size for name, p in model.named_parameters() if not name.endswith(('._mean', '._variance')))


def parse_stage(text):
    """'conv*2 halo' -> ['conv', 'conv', 'halo']"""
    kinds = []
    for word in text.split():
        kind, star, count = word.partition('*')
        if not kind or star and not (count.isdecimal() and int(count)):
            raise ValueError(f'MODEL.STAGES: {word!r} in {text!r}; write KIND or KIND*N, such as conv*2 halo')
        kinds += [kind] * int(count or 1)
    if not kinds:
        raise ValueError('MODEL.STAGES: a stage needs at least one block')
    return kinds


def freeze(network, parts):
    """Keep the first `parts` of a HaloNet as they are in training too: 1 the stem, 2 also the first stage, and so on.

    Their parameters get no gradient, their norms use and keep the running statistics, and none of their blocks is dropped.
    """
    for part in [network.stem, *network.stages][:parts]:
        for parameter in part.parameters():
            parameter.stop_gradient = True
        freeze_norms(part)
        for layer in part.sublayers():
            if isinstance(layer, DropPath):
                layer.rate = 0.0


def freeze_norms(layer):
    """Let the batch norms in `layer` use and keep their running statistics in training too."""
    for norm in batch_norms(layer).values():
        norm._use_global_stats = True


def build_halonet(config):
    """The HaloNet that a config (see config.get_config) describes, with fresh weights."""
    model = config.MODEL
    if model.NUM_CLASSES < 0:
        raise ValueError('MODEL.NUM_CLASSES is -1, as many classes as the data have; without data it must be a number')
    operators = Operators(
        block_size=model.BLOCK_SIZE, halo_size=model.HALO_SIZE, head_dim=model.HEAD_DIM, qk_ratio=model.QK_RATIO,
        value_ratio=model.VALUE_RATIO, lambda_size=model.LAMBDA_SIZE, group_size=model.GROUP_SIZE,
        channel_attn=model.CHANNEL_ATTN, se_ratio=model.SE_RATIO, act=model.ACT)
    network = HaloNet(
        stages=[parse_stage(stage) for stage in model.STAGES], widths=model.WIDTHS, strides=model.STRIDES, num_heads=model.HEADS,
        operators=operators, inner_widths=model.INNER_WIDTHS, bottleneck_ratio=model.BOTTLENECK_RATIO,
        bottleneck_in=model.BOTTLENECK_IN, projection=model.PROJECTION, linear_out=model.LINEAR_OUT, stem=model.STEM,
        stem_width=model.STEM_WIDTH, stem_pool=model.STEM_POOL, head_width=model.HEAD_WIDTH, num_classes=model.NUM_CLASSES,
        dropout=model.DROPOUT, drop_path=model.DROPPATH, image_size=config.DATA.IMAGE_SIZE)
    use_operators(network, model.ATTENTION)
    if model.FREEZE_NORM:
        freeze_norms(network)
    freeze(network, model.FREEZE)
    for stage in network.stages[:config.TRAIN.RECOMPUTE]:
        stage.recompute = True
    return network
