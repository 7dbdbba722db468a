"""HaloNet: a ResNet whose 3x3 convolutions give way to blocked local self-attention.

Vaswani et al. 2021, 'Scaling Local Self-Attention for Parameter Efficient Visual Backbones', arXiv 2103.12731.
Layers, parameter names and arithmetic are those of timm's byoanet, so that its published weights give its logits.

In the shapes below: B batch, C channels, H and W height and width of the feature map in pixels. A side that a stride
does not divide is rounded up: H/stride stands for ceil(H/stride).
"""
import math
from contextlib import contextmanager, nullcontext
from functools import partial

import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute
from paddle.nn.initializer import Normal

from model import weights
from model.blocks import Bottleneck, DropPath, Operators
from model.layers import (
    ACTIVATIONS,
    ConvNormAct,
    batch_norms,
    convolve,
    max_pool,
    norm_act,
    pixel_mean,
    use_operators,
)


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
