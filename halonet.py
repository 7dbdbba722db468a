"""HaloNet: a ResNet whose 3x3 convolutions give way to blocked local self-attention.

Vaswani et al. 2021, 'Scaling Local Self-Attention for Parameter Efficient Visual Backbones', arXiv 2103.12731.
Layers, parameter names and arithmetic are those of timm's byoanet, so that its published weights give its logits.

Axes, used in every shape below:
    B batch   C channels   N heads   d width of a query or key head   v width of a value head
    H, W height and width of the feature map, in pixels
    Y, X rows and columns of the grid of blocks
    b side of a block of queries (block / stride)   w side of its window of keys and values (block + 2 * halo)
"""
import math

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Constant, Normal

import ops
import weights

ACTIVATIONS = {'relu': nn.ReLU, 'silu': nn.Silu}


def halo_attention(q, kv, height_rel, width_rel, *, num_heads, block_size, halo_size):
    """Every query attends to the keys of its block and of `halo_size` pixels around it.

    q (B, N*d, H/stride, W/stride), kv (B, N*(d+v), H, W) with keys before values in each head, tables of relative
    positions (2w-1, d) -> (B, N*v, H/stride, W/stride). `block_size` counts pixels of kv and divides H and W.

    Three facts keep this equal to timm and to the published weights: only the content logits are scaled; the zeros
    that pad the map take part in the softmax (the paper's 'non-masked' attention); and the queries of a strided block
    are numbered 0, 1, 2, ... although they lie `stride` pixels apart.
    """
    d, w = height_rel.shape[1], block_size + 2 * halo_size
    Y, X = kv.shape[2] // block_size, kv.shape[3] // block_size
    b = q.shape[2] // Y
    v = kv.shape[1] // num_heads - d

    q = q.reshape([-1, d, Y, b, X, b]).transpose([0, 2, 4, 3, 5, 1])        # (B*N, Y, X, b, b, d)
    q = q.reshape([-1, Y * X, b * b, d])                                    # (B*N, Y*X, b*b, d)
    kv = F.pad(kv, [halo_size] * 4)                                         # (B, N*(d+v), H+2*halo, W+2*halo)
    kv = kv.reshape([-1, d + v, *kv.shape[2:]])                             # (B*N, d+v, H+2*halo, W+2*halo)
    kv = kv.gather(window_index(Y, block_size, w), axis=2)                  # (B*N, d+v, Y*w, W+2*halo)
    kv = kv.gather(window_index(X, block_size, w), axis=3)                  # (B*N, d+v, Y*w, X*w)
    kv = kv.reshape([-1, d + v, Y, w, X, w]).transpose([0, 2, 4, 3, 5, 1])  # (B*N, Y, X, w, w, d+v)
    k, value = kv.reshape([-1, Y * X, w * w, d + v]).split([d, v], axis=-1)  # (B*N, Y*X, w*w, d or v)

    logits = (q * d ** -0.5).matmul(k, transpose_y=True)                    # (B*N, Y*X, b*b, w*w)
    logits = logits + position_logits(q, height_rel, width_rel, b, w)
    out = F.softmax(logits, axis=-1).matmul(value)                          # (B*N, Y*X, b*b, v)
    out = out.reshape([-1, Y, X, b, b, v]).transpose([0, 5, 1, 3, 2, 4])    # (B*N, v, Y, b, X, b)
    return out.reshape([-1, num_heads * v, Y * b, X * b])                   # (B, N*v, H/stride, W/stride)


def window_index(blocks, block_size, w):
    """Which padded rows (or columns) the windows of a row of blocks hold, one window after another: (blocks*w,)."""
    return (paddle.arange(blocks).unsqueeze(1) * block_size + paddle.arange(w)).flatten()


def position_logits(q, height_rel, width_rel, b, w):
    """Logits of the relative positions: q (B*N, Y*X, b*b, d), tables (2w-1, d) -> (B*N, Y*X, b*b, w*w)."""
    d, P = q.shape[-1], q.shape[1]
    offset = (paddle.arange(w) - paddle.arange(b).unsqueeze(1) + w - 1).flatten()  # key j seen from query i: j - i + w - 1
    rows = height_rel.gather(offset).reshape([b, w, d])                      # (b, w, d)
    columns = width_rel.gather(offset).reshape([b, w, d])                    # (b, w, d)
    q = q.reshape([-1, P, b, b, d])                                          # (B*N, Y*X, b, b, d)
    rows = paddle.einsum('gpyxd,yjd->gpyxj', q, rows).unsqueeze(-1)          # (B*N, Y*X, b, b, w, 1)
    columns = paddle.einsum('gpyxd,xjd->gpyxj', q, columns).unsqueeze(-2)    # (B*N, Y*X, b, b, 1, w)
    return (rows + columns).reshape([-1, P, b * b, w * w])                   # (B*N, Y*X, b*b, w*w)


def attention_operator(kind):
    """What MODEL.ATTENTION names: halo_attention above (composed), the compiled operator of the same arguments (fused), or
    the better of those that work here (auto). Raises RuntimeError where fused cannot be had."""
    if kind == 'composed' or kind == 'auto' and paddle.get_device() != 'cpu':
        return halo_attention
    if paddle.get_device() == 'cpu' and ops.load():
        return ops.halo_attention
    if kind == 'fused':
        raise RuntimeError('MODEL.ATTENTION is fused, which needs a CPU as the device and a C++ compiler; '
                           'auto and composed need neither')
    return halo_attention


class RelativePosition(nn.Layer):
    """Two tables of learnt vectors, one for vertical and one for horizontal offsets between query and key."""

    def __init__(self, window_size, head_dim):
        super().__init__()
        normal = Normal(std=head_dim ** -0.5)
        shape = [2 * window_size - 1, head_dim]
        self.height_rel = self.create_parameter(shape, default_initializer=normal)
        self.width_rel = self.create_parameter(shape, default_initializer=normal)


class Projection(nn.Conv2D):
    """1x1 convolution, no bias, compiled where the attention is: (B, C, H, W) -> (B, width, H/stride, W/stride)."""

    def __init__(self, in_width, width, stride, attention):
        # timm draws from a normal cut at -2 and 2: so many deviations out that it is a plain normal
        super().__init__(in_width, width, 1, stride, weight_attr=Normal(std=in_width ** -0.5), bias_attr=False)
        self.stride, self.attention = stride, attention

    def forward(self, x):
        if attention_operator(self.attention) is halo_attention:
            return super().forward(x)
        return ops.pointwise_convolution(x, self.weight, self.stride)


class HaloAttention(nn.Layer):
    """Blocked local self-attention with a halo: (B, C, H, W) -> (B, width, H/stride, W/stride).

    A stride takes every `stride`-th pixel as a query. Where the stride does not divide the block, all pixels are
    queries and the result is average-pooled, as in timm. Raises ValueError where H or W is no multiple of the block.
    `attention` is auto, fused or composed: see attention_operator.
    """

    def __init__(self, in_width, width, num_heads, block_size, halo_size, stride=1, attention='auto'):
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f'an attention of width {width} cannot have {num_heads} heads: '
                             'MODEL.HEADS must be a divisor of the inner width in each stage with attention')
        self.num_heads, self.block_size, self.halo_size, self.attention = num_heads, block_size, halo_size, attention
        pool = stride > 1 and block_size % stride != 0
        self.q = Projection(in_width, width, 1 if pool else stride, attention)
        self.kv = Projection(in_width, 2 * width, 1, attention)
        self.pos_embed = RelativePosition(block_size + 2 * halo_size, width // num_heads)
        self.pool = nn.AvgPool2D(stride, stride) if pool else nn.Identity()

    def forward(self, x):
        if x.shape[2] % self.block_size or x.shape[3] % self.block_size:
            raise ValueError(f'a feature map of {x.shape[2]}x{x.shape[3]} does not divide into blocks of {self.block_size}; '
                             'use an image size that is a multiple of block size times total stride '
                             '(256 for blocks of 8 in a network of stride 32)')
        attend = attention_operator(self.attention)
        out = attend(self.q(x), self.kv(x), self.pos_embed.height_rel, self.pos_embed.width_rel,
                     num_heads=self.num_heads, block_size=self.block_size, halo_size=self.halo_size)
        return self.pool(out)


class BatchNormAct(nn.BatchNorm2D):
    """Batch norm, then the activation."""

    def __init__(self, width, act):
        super().__init__(width)
        self.act = act()

    def forward(self, x):
        return self.act(super().forward(x))


class ConvNormAct(nn.Layer):
    """Convolution with half padding and no bias, batch norm, activation: (B, C, H, W) -> (B, width, H/stride, W/stride)."""

    def __init__(self, in_width, width, kernel_size, stride=1, act=nn.Identity):
        super().__init__()
        normal = Normal(std=math.sqrt(2 / (kernel_size ** 2 * width)))
        self.conv = nn.Conv2D(in_width, width, kernel_size, stride, kernel_size // 2, weight_attr=normal, bias_attr=False)
        self.bn = BatchNormAct(width, act)

    def forward(self, x):
        return self.bn(self.conv(x))


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

    `spatial` maps timm's names to the layers between the two convolutions, in order.
    """

    def __init__(self, in_width, inner_width, width, spatial, stride=1, act=nn.ReLU, drop_path=0.0):
        super().__init__()
        changes = stride != 1 or in_width != width
        self.shortcut = ConvNormAct(in_width, width, 1, stride) if changes else nn.Identity()
        self.conv1_1x1 = ConvNormAct(in_width, inner_width, 1, act=act)
        self.spatial = tuple(spatial)
        for name, layer in spatial.items():
            self.add_sublayer(name, layer)
        self.conv3_1x1 = ConvNormAct(inner_width, width, 1)
        Constant(0.0)(self.conv3_1x1.bn.weight)               # a new block is its shortcut
        self.drop_path = DropPath(drop_path)
        self.act = act()

    def forward(self, x):
        out = self.conv1_1x1(x)
        for name in self.spatial:
            out = getattr(self, name)(out)
        out = self.drop_path(self.conv3_1x1(out))
        return self.act(out + self.shortcut(x))


class Stem(nn.Sequential):
    """The first convolutions: (B, 3, H, W) -> (B, width, H/2, W/2), or H/4, W/4 with `pool`."""

    def __init__(self, kind, width, pool, act):
        kernel_size, widths = {'tiered': (3, [3 * width // 8, width // 2, width]), '7x7': (7, [width]), '3x3': (3, [width])}[kind]
        layers = [(f'conv{i + 1}', ConvNormAct(before, after, kernel_size, stride=2 if i == 0 else 1, act=act))
                  for i, (before, after) in enumerate(zip([3] + widths, widths))]
        super().__init__(*layers, ('pool', nn.MaxPool2D(3, 2, 1) if pool else nn.Identity()))


class Head(nn.Layer):
    """Global average pooling, dropout, classifier: (B, C, H, W) -> (B, num_classes)."""

    def __init__(self, width, num_classes, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes, weight_attr=Normal(std=0.01))

    def forward(self, x):
        return self.fc(self.dropout(x.mean([2, 3])))


class HaloNet(nn.Layer):
    """(B, 3, H, W) images, normalised -> (B, num_classes) logits.

    stages: the kinds of blocks of each stage, such as [['conv', 'conv'], ['conv', 'halo']]; `widths`, `strides` and
    `num_heads` have one entry per stage. What else a block needs follows from its place.
    """

    def __init__(self, *, stages, widths, strides, num_heads, bottleneck_ratio=0.25, block_size=8, halo_size=2, stem='tiered',
                 stem_width=64, stem_pool=True, act='relu', num_classes=1000, dropout=0.0, drop_path=0.0, attention='auto'):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.block_size, self.halo_size, self.attention = block_size, halo_size, attention
        self.stem = Stem(stem, stem_width, stem_pool, self.act)
        drop_rates = iter([drop_path * i / max(sum(map(len, stages)) - 1, 1) for i in range(sum(map(len, stages)))])
        self.stages = nn.LayerList()
        in_width = stem_width
        for kinds, width, stride, heads in zip(stages, widths, strides, num_heads):
            blocks = []
            for i, kind in enumerate(kinds):
                inner, block_stride = int(width * bottleneck_ratio), stride if i == 0 else 1
                blocks.append(Bottleneck(in_width, inner, width, self.spatial(kind, inner, heads, block_stride), block_stride,
                                         self.act, next(drop_rates)))
                in_width = width
            self.stages.append(nn.Sequential(*blocks))
        self.head = Head(in_width, num_classes, dropout)

    def spatial(self, kind, width, num_heads, stride):
        """The layers that stand in a block of this kind where a ResNet has its 3x3 convolution, by timm's names."""
        if kind == 'conv':
            return {'conv2_kxk': ConvNormAct(width, width, 3, stride, self.act)}
        if kind == 'halo':
            return {'self_attn': HaloAttention(width, width, num_heads, self.block_size, self.halo_size, stride, self.attention),
                    'post_attn': BatchNormAct(width, self.act)}
        raise ValueError(f'MODEL.STAGES: unknown kind of block {kind!r}; known are conv and halo')

    def forward_features(self, x):
        """(B, 3, H, W) -> the last feature map (B, C, H/stride, W/stride), before pooling."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, x):
        return self.head(self.forward_features(x))

    def set_state_dict(self, state_dict, use_structured_name=True, *, partial=False):
        """As paddle.nn.Layer's, for our own key names and PaddleViT's, and never a silent half success.

        Raises ValueError, with the keys, for a parameter left unset, a key that has no place here or another shape; and
        then loads nothing. With `partial`, loads what fits and returns (missing keys, unexpected keys).
        """
        return weights.load_state_dict(self, state_dict, super().set_state_dict, partial=partial)

    set_dict = load_dict = set_state_dict


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


def build_halonet(config):
    """The HaloNet that a config (see config.get_config) describes, with fresh weights."""
    model = config.MODEL
    network = HaloNet(
        stages=[parse_stage(stage) for stage in model.STAGES], widths=model.WIDTHS, strides=model.STRIDES, num_heads=model.HEADS,
        bottleneck_ratio=model.BOTTLENECK_RATIO, block_size=model.BLOCK_SIZE, halo_size=model.HALO_SIZE, stem=model.STEM,
        stem_width=model.STEM_WIDTH, stem_pool=model.STEM_POOL, act=model.ACT, num_classes=model.NUM_CLASSES,
        dropout=model.DROPOUT, drop_path=model.DROPPATH, attention=model.ATTENTION)
    if model.FREEZE_NORM:
        for layer in network.sublayers():
            if isinstance(layer, nn.BatchNorm2D):
                layer._use_global_stats = True
    return network
