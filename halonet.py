"""HaloNet: a ResNet with blocked local self-attention instead of some of its 3x3 convolutions.

Vaswani et al. 2021, 'Scaling Local Self-Attention for Parameter Efficient Visual Backbones', arXiv
2103.12731. Layers, parameter names and arithmetic are those of timm's byoanet, so its published weights
give its logits.

In the shapes below: B batch, C channels, H and W height and width of the feature map in pixels. A side that a
stride does not divide is rounded up: H/stride stands for ceil(H/stride).
"""
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Callable, Optional, Union

from system import paddle_internals, sizes

import paddle
from paddle import Tensor, nn
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
    """The first convolutions, with timm's names: (B, in_channels, H, W) -> (B, width, H/stride, W/stride).

    kind: 'tiered' (three 3x3 convolutions), '7x7' or '3x3' (one); a 3x3 max pool of stride 2 follows with
    `pool`. The stride is 4 with `pool`. Without it, it is 4 for the tiered stem, as its last convolution
    has stride 2, else 2.
    """

    operators = 'auto'

    def __init__(self, kind: str, width: int, pool: bool, act: Callable[[], nn.Layer],
                 in_channels: int = 3) -> None:
        kinds = {'tiered': (3, [3 * width // 8, width // 2, width]), '7x7': (7, [width]), '3x3': (3, [width])}
        kernel_size, widths = kinds[kind]
        strides = [2] + [1] * (len(widths) - 1)
        if not pool and len(widths) > 1:
            strides[-1] = 2
        layers = []
        for in_width, out_width, stride in zip([in_channels] + widths, widths, strides):
            layers.append(ConvNormAct(in_width, out_width, kernel_size, stride, act))
        self.stride = math.prod(strides)
        self.info = {'stride': self.stride, 'width': width}                 # before the pool
        if pool:
            self.stride *= 2
        self.single = len(layers) == 1 and not pool
        if self.single:
            super().__init__(*layers[0].named_children())                   # conv, bn and act
        else:
            named = [(f'conv{i + 1}', layer) for i, layer in enumerate(layers)]
            super().__init__(*named, ('pool', nn.MaxPool2D(3, 2, 1) if pool else nn.Identity()))

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)[1]

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feature maps before and after the max pooling, which may be the same."""
        if self.single:
            x = norm_act(self, self.bn, self.act, convolve(self, self.conv, x))
            return x, x
        for name, layer in self.named_children():
            if name != 'pool':
                x = layer(x)
        return x, max_pool(self, self.pool, x)


class Stage(nn.Sequential):
    """Blocks one after another. With `recompute`, training keeps only their inputs for the backward pass."""

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            needs_gradient = self.training and paddle.in_dynamic_mode() and not x.stop_gradient
            if self.recompute and needs_gradient:
                x = run_again_in_backward(block, x)
            else:
                x = block(x)
        return x


def run_again_in_backward(block: nn.Layer, x: Tensor) -> Tensor:
    """Compute block(x) and keep no activations: the backward pass repeats it with the same random numbers."""
    passes = 0

    def run(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes == 1:
            return block(x)
        with statistics_kept(block):
            return block(x)

    return recompute(run, x, use_reentrant=False)             # the reentrant kind breaks paddle.DataParallel


@contextmanager
def statistics_kept(block: nn.Layer) -> Iterator[None]:
    """Within, batch norms in `block` keep their running statistics: these have already seen the batch."""
    norms = batch_norms(block).values()
    momenta = [paddle_internals.norm_settings(norm).momentum for norm in norms]
    for norm in norms:
        paddle_internals.set_momentum(norm, 1.0)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            paddle_internals.set_momentum(norm, momentum)


class Head(nn.Layer):
    """Global average pooling, dropout, classifier: (B, C, H, W) -> (B, num_classes), or (B, C) if it is 0."""

    def __init__(self, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.dropout = nn.Dropout(dropout)
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Replace the classifier by a new one, or for 0 by none."""
        self.fc = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.width, num_classes, weight_attr=Normal(std=0.01))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(pixel_mean(x)))


class HaloNet(nn.Layer):
    """Normalised images (B, in_channels, H, W) -> logits (B, num_classes), or for 0 pooled features (B, C).

    stages: the kinds of blocks of each stage, such as [['conv', 'conv'], ['conv', 'halo']]. `widths`,
    `strides`, `num_heads` and `inner_widths` have one entry per stage. Without `inner_widths` the inner
    width of a block is `bottleneck_ratio` times its output width, or with `bottleneck_in` times its input
    width. `image_size` is the side of the images, or (height, width), for blocks that depend on it.
    Everything else about a block follows from its position.

    feature_info: for each stage, {'stride': image pixels per pixel of its feature map, 'width': its
    channels}.
    """

    def __init__(self, *, stages: Sequence[Sequence[str]], widths: Sequence[int], strides: Sequence[int],
                 num_heads: Sequence[int], operators: Operators, inner_widths: Sequence[int] = (),
                 bottleneck_ratio: float = 0.25, bottleneck_in: bool = False, projection: bool = True,
                 linear_out: bool = False, stem: str = 'tiered', stem_width: int = 64, stem_pool: bool = True,
                 head_width: int = 0, num_classes: int = 1000, dropout: float = 0.0, drop_path: float = 0.0,
                 image_size: sizes.Size = 256, in_channels: int = 3) -> None:
        super().__init__()
        act = ACTIVATIONS[operators.act]
        image_height, image_width = sizes.sides(image_size)
        self.stem = Stem(stem, stem_width, stem_pool, act, in_channels)
        self.stages = nn.LayerList()
        self.feature_info: list[dict[str, int]] = []
        last = max(sum(map(len, stages)) - 1, 1)            # index of the last block, which drop_path is for
        index, in_width, total_stride = 0, stem_width, self.stem.stride
        for i, (kinds, width, stride, heads) in enumerate(zip(stages, widths, strides, num_heads)):
            blocks = []
            for kind in kinds:
                if inner_widths:
                    inner_width = inner_widths[i]
                elif bottleneck_in:
                    inner_width = int(in_width * bottleneck_ratio)
                else:
                    inner_width = int(width * bottleneck_ratio)
                map_size = -(-image_height // total_stride), -(-image_width // total_stride)
                spatial, spatial_width = operators.build(kind, inner_width, heads, stride, map_size)
                blocks.append(Bottleneck(
                    in_width, inner_width, width, spatial, spatial_width, stride=stride, act=act,
                    drop_path=drop_path * index / last, projection=projection, linear_out=linear_out))
                index, in_width, total_stride, stride = index + 1, width, total_stride * stride, 1
            self.stages.append(Stage(*blocks))
            self.feature_info.append({'stride': total_stride, 'width': width})
        self.final_conv = ConvNormAct(in_width, head_width, 1, act=act) if head_width else nn.Identity()
        self.head = Head(head_width or in_width, num_classes, dropout)

    def features(self, x: Tensor) -> list[Tensor]:
        """Images -> the feature map of each stage, (B, width, H/stride, W/stride): see feature_info."""
        return self.maps_of_stages(self.stem(x))

    def maps_of_stages(self, x: Tensor) -> list[Tensor]:
        """Feature map of the stem -> that of each stage."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_intermediates(self, x: Tensor, indices: Union[int, Sequence[int], None] = None, *,
                              intermediates_only: bool = False
                              ) -> Union[list[Tensor], tuple[Tensor, list[Tensor]]]:
        """Images -> (feature map before the pooling, feature maps), or the latter alone; named as in timm.

        Map 0 is that of the stem before any max pooling, map i that of stage i. The last is after the final
        convolution, if there is one. `indices` chooses some, n means the last n, and None all. Raises
        IndexError for an index that there is not.
        """
        maps = self.intermediates(x)
        found = [maps[number] for number in map_numbers(len(maps), indices)]
        return found if intermediates_only else (maps[-1], found)

    def intermediates(self, x: Tensor) -> list[Tensor]:
        """Images -> all feature maps of `forward_intermediates`."""
        before_pool, x = self.stem.maps(x)
        *maps, last = self.maps_of_stages(x)
        return [before_pool, *maps, self.final_conv(last)]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one for so many classes, or for 0 by none."""
        self.head.reset(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> the feature map before the pooling of the head: (B, C, H/stride, W/stride)."""
        return self.final_conv(self.features(x)[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def set_state_dict(self, state_dict: Mapping[str, Any], use_structured_name: bool = True, *,
                       partial: bool = False) -> tuple[list[str], list[str]]:
        """Load a state dict with our key names, PaddleViT's or timm's. Strict, unlike paddle.nn.Layer's.

        Raises ValueError, with the keys, for a parameter without a value, an unknown key or another
        shape, and then loads nothing. With `partial`, loads what fits. Returns (missing keys, unexpected
        keys).
        """
        return weights.load_strictly(self, weights.to_ours(state_dict), partial)

    set_dict = load_dict = set_state_dict


class FeatureMaps(nn.Layer):
    """A HaloNet that returns feature maps: images -> list of (B, width, H/stride, W/stride).

    `indices` are those of HaloNet.forward_intermediates. `feature_info` has for each map {'stride': image
    pixels per pixel of the map, 'width': its channels}.
    """

    def __init__(self, network: HaloNet, indices: Optional[Sequence[int]] = None) -> None:
        super().__init__()
        self.network = network
        infos = [network.stem.info, *network.feature_info]
        infos[-1] = {**infos[-1], 'width': network.head.width}
        self.numbers = map_numbers(len(infos), indices)
        self.feature_info = [infos[number] for number in self.numbers]
        network.reset_classifier(0)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.network.intermediates(x)
        return [maps[number] for number in self.numbers]


def map_numbers(count: int, indices: Union[int, Sequence[int], None]) -> list[int]:
    """Return the numbers of the feature maps that `indices` choose of `count`, sorted. Raises IndexError."""
    if indices is None:
        return list(range(count))
    if not isinstance(indices, int):
        return sorted({range(count)[index] for index in indices})
    if not 1 <= indices <= count:
        raise IndexError(f'the last {indices} of {count} feature maps')
    return list(range(count))[-indices:]


def count_parameters(model: nn.Layer) -> int:
    """Count the numbers that training can change, frozen ones included, running statistics of norms excluded.

    Paddle registers the running statistics as parameters too.
    """
    return sum(p.size for name, p in model.named_parameters() if not name.endswith(('._mean', '._variance')))


def parse_stage(text: str) -> list[str]:
    """Parse the kinds of a stage's blocks: 'conv*2 halo' -> ['conv', 'conv', 'halo']. Raises ValueError."""
    kinds = []
    for word in text.split():
        kind, star, count = word.partition('*')
        if not kind or star and not (count.isdecimal() and int(count)):
            raise ValueError(f'MODEL.STAGES: {word!r} in {text!r}; write KIND or KIND*N, such as conv*2 halo')
        kinds += [kind] * int(count or 1)
    if not kinds:
        raise ValueError('MODEL.STAGES: a stage needs at least one block')
    return kinds


def freeze(network: HaloNet, parts: int) -> None:
    """Freeze the first `parts` of a HaloNet: 1 the stem, 2 also the first stage, and so on.

    In training, too, their parameters get no gradient, their batch norms use and keep the running
    statistics, and none of their blocks is dropped.
    """
    for part in [network.stem, *network.stages][:parts]:
        for parameter in part.parameters():
            parameter.stop_gradient = True
        freeze_norms(part)
        for layer in part.sublayers():
            if isinstance(layer, DropPath):
                layer.rate = 0.0


def freeze_norms(network: nn.Layer) -> None:
    """Let all batch norms use and keep their running statistics in training, too."""
    for norm in batch_norms(network).values():
        paddle_internals.freeze_statistics(norm)


def build_halonet(config: Any) -> HaloNet:
    """Build the HaloNet that a config of config.get_config describes, with new random weights.

    Raises ValueError for options that do not fit together.
    """
    model = config.MODEL
    if model.NUM_CLASSES < 0:
        raise ValueError('MODEL.NUM_CLASSES is -1, as many classes as the data have; '
                         'without data it must be a number')
    operators = Operators(
        block_size=model.BLOCK_SIZE, halo_size=model.HALO_SIZE, head_dim=model.HEAD_DIM,
        qk_ratio=model.QK_RATIO, value_ratio=model.VALUE_RATIO, lambda_size=model.LAMBDA_SIZE,
        window=model.WINDOW, positions=model.POSITIONS, halo_stride=model.HALO_STRIDE,
        group_size=model.GROUP_SIZE, channel_attn=model.CHANNEL_ATTN, se_ratio=model.SE_RATIO, act=model.ACT)
    network = HaloNet(
        stages=[parse_stage(stage) for stage in model.STAGES], widths=model.WIDTHS, strides=model.STRIDES,
        num_heads=model.HEADS, operators=operators, inner_widths=model.INNER_WIDTHS,
        bottleneck_ratio=model.BOTTLENECK_RATIO, bottleneck_in=model.BOTTLENECK_IN,
        projection=model.PROJECTION, linear_out=model.LINEAR_OUT,
        stem=model.STEM, stem_width=model.STEM_WIDTH, stem_pool=model.STEM_POOL,
        head_width=model.HEAD_WIDTH, num_classes=model.NUM_CLASSES, dropout=model.DROPOUT,
        drop_path=model.DROPPATH, image_size=config.DATA.IMAGE_SIZE,
        in_channels=config.DATA.CHANNELS)
    use_operators(network, model.ATTENTION)
    if model.FREEZE_NORM:
        freeze_norms(network)
    freeze(network, model.FREEZE)
    for stage in network.stages[:config.TRAIN.RECOMPUTE]:
        stage.recompute = True
    return network
