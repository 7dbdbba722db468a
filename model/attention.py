"""The attention layers that take a 3x3 convolution's place: halo attention, bottleneck attention, the lambda layer.

Layers, parameter names and arithmetic are those of timm, so that its published weights give its logits.

Axes, used in every shape below:
    B batch   C channels   N heads   d width of a query or key head   v width of a value head
    H, W height and width of the feature map, in pixels
    Y, X rows and columns of the grid of blocks; the last ones may reach beyond the map
    b side of a block of queries (block / stride)   w side of its window of keys and values (block + 2 * halo)
"""
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Normal, Uniform

import ops
from model.layers import compiled, conv2d, convolve, norm_act


def halo_attention(q, kv, height_rel, width_rel, *, num_heads, block_size, halo_size, stride=1):
    """Every query attends to the keys of its block and of `halo_size` pixels around it.

    q (B, N*d, ceil(H/stride), ceil(W/stride)), kv (B, N*(d+v), H, W) with keys before values in each head, tables of
    relative positions (2w-1, d) -> (B, N*v, ceil(H/stride), ceil(W/stride)). `block_size` counts pixels of kv; `stride`
    divides it.

    Three facts keep this equal to timm and to the published weights: only the content logits are scaled; the zeros
    that pad the map take part in the softmax (the paper's 'non-masked' attention); and the queries of a strided block
    are numbered 0, 1, 2, ... although they lie `stride` pixels apart. A map that does not divide into blocks is padded
    to them; of that, what lies further beyond the map than the halo takes no part.
    """
    d, w, b = height_rel.shape[1], block_size + 2 * halo_size, block_size // stride
    v = kv.shape[1] // num_heads - d
    height, width, H, W = q.shape[2], q.shape[3], kv.shape[2], kv.shape[3]
    Y, X = (H + block_size - 1) // block_size, (W + block_size - 1) // block_size
    ragged = not (fits(H, block_size) and fits(W, block_size))

    if ragged:
        q = F.pad(q, [0, b - 1, 0, b - 1])[:, :, :Y * b, :X * b]            # (B, N*d, Y*b, X*b)
    q = q.reshape([-1, d, Y, b, X, b]).transpose([0, 2, 4, 3, 5, 1])        # (B*N, Y, X, b, b, d)
    q = q.reshape([-1, Y * X, b * b, d])                                    # (B*N, Y*X, b*b, d)
    far = halo_size + (block_size - 1 if ragged else 0)                     # enough for the last window
    kv = F.pad(kv, [halo_size, far, halo_size, far])                        # (B, N*(d+v), halo+H+far, halo+W+far)
    kv = kv.reshape([-1, d + v, kv.shape[2], kv.shape[3]])                  # (B*N, d+v, halo+H+far, halo+W+far)
    kv = kv.gather(window_index(Y, block_size, w), axis=2)                  # (B*N, d+v, Y*w, halo+W+far)
    kv = kv.gather(window_index(X, block_size, w), axis=3)                  # (B*N, d+v, Y*w, X*w)
    kv = kv.reshape([-1, d + v, Y, w, X, w]).transpose([0, 2, 4, 3, 5, 1])  # (B*N, Y, X, w, w, d+v)
    k, value = kv.reshape([-1, Y * X, w * w, d + v]).split([d, v], axis=-1)  # (B*N, Y*X, w*w, d or v)

    logits = (q * d ** -0.5).matmul(k, transpose_y=True)                    # (B*N, Y*X, b*b, w*w)
    rows, columns = position_logits(q, height_rel, width_rel, b, w)         # (B*N, Y*X, b, b, w, 1) and (..., 1, w)
    if ragged:
        beyond = hide_beyond(Y, H, block_size, halo_size).astype(rows.dtype)           # (Y, w)
        rows = rows + beyond.unsqueeze(1).tile([1, X, 1]).reshape([Y * X, 1, 1, w, 1])
        beyond = hide_beyond(X, W, block_size, halo_size).astype(rows.dtype)           # (X, w)
        columns = columns + beyond.tile([Y, 1]).reshape([Y * X, 1, 1, 1, w])
    logits = logits + (rows + columns).reshape([-1, Y * X, b * b, w * w])
    out = F.softmax(logits, axis=-1).matmul(value)                          # (B*N, Y*X, b*b, v)
    out = out.reshape([-1, Y, X, b, b, v]).transpose([0, 5, 1, 3, 2, 4])    # (B*N, v, Y, b, X, b)
    out = out.reshape([-1, num_heads * v, Y * b, X * b])                    # (B, N*v, Y*b, X*b)
    return out[:, :, :height, :width] if ragged else out                    # (B, N*v, ceil(H/stride), ceil(W/stride))


def fits(size, block_size):
    """Whether a side divides into blocks; not where its size is known when an exported model runs, and not before."""
    return isinstance(size, int) and size >= 0 and size % block_size == 0


def window_index(blocks, block_size, w):
    """Which padded rows (or columns) the windows of a row of blocks hold, one window after another: (blocks*w,)."""
    return (paddle.arange(blocks).unsqueeze(1) * block_size + paddle.arange(w)).flatten()


def hide_beyond(blocks, size, block_size, halo_size):
    """What to add to the logits along one axis of `size` pixels: -inf further beyond it than the halo, else 0; (blocks, w)."""
    w = block_size + 2 * halo_size
    seen = window_index(blocks, block_size, w) < size + 2 * halo_size        # counted from the first pixel of the halo
    return seen.astype('float32').log().reshape([blocks, w])                 # log 1 is 0, log 0 is -inf


def position_logits(q, height_rel, width_rel, b, w):
    """Logits of the relative positions, of rows and of columns, which add up to those of a key.

    q (B*N, Y*X, b*b, d), tables (2w-1, d) -> (B*N, Y*X, b, b, w, 1) and (B*N, Y*X, b, b, 1, w).
    """
    d, P = q.shape[-1], q.shape[1]
    offset = (paddle.arange(w) - paddle.arange(b).unsqueeze(1) + w - 1).flatten()  # key j seen from query i: j - i + w - 1
    rows = height_rel.gather(offset).reshape([b, w, d])                      # (b, w, d)
    columns = width_rel.gather(offset).reshape([b, w, d])                    # (b, w, d)
    q = q.reshape([-1, P, b, b, d])                                          # (B*N, Y*X, b, b, d)
    rows = paddle.einsum('gpyxd,yjd->gpyxj', q, rows).unsqueeze(-1)          # (B*N, Y*X, b, b, w, 1)
    columns = paddle.einsum('gpyxd,xjd->gpyxj', q, columns).unsqueeze(-2)    # (B*N, Y*X, b, b, 1, w)
    return rows, columns


def query_width(width, num_heads, head_dim, qk_ratio):
    """Width of a query or key head: `head_dim`, or where it is 0 its share of `qk_ratio` times the width.

    Raises ValueError where the heads do not divide the width.
    """
    if num_heads < 1 or width % num_heads:
        raise ValueError(f'an attention of width {width} cannot have {num_heads} heads: '
                         'MODEL.HEADS must be a divisor of the inner width in each stage with attention')
    return head_dim or (width if qk_ratio == 1 else nearest_8(width * qk_ratio)) // num_heads


def nearest_8(width):
    """The nearest multiple of 8, at least 8: how timm rounds widths."""
    return max(int(width + 4) // 8 * 8, 8)


def projection(in_width, width, stride=1):
    """1x1 convolution to queries, keys or values: (B, C, H, W) -> (B, width, ceil(H/stride), ceil(W/stride))."""
    # timm draws from a normal cut at -2 and 2: so many deviations out that it is a plain one
    return conv2d(in_width, width, 1, stride, init=Normal(std=in_width ** -0.5))


def mean_pool(stride):
    """The mean of each stride x stride square; of what there is of it at the far edges."""
    return nn.AvgPool2D(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()


class RelativePosition(nn.Layer):
    """Two tables of learnt vectors, one for vertical and one for horizontal offsets between query and key."""

    def __init__(self, window_size, head_dim):
        super().__init__()
        normal = Normal(std=head_dim ** -0.5)
        shape = [2 * window_size - 1, head_dim]
        self.height_rel = self.create_parameter(shape, default_initializer=normal)
        self.width_rel = self.create_parameter(shape, default_initializer=normal)

    def forward(self, q):
        """Return both tables, (2w-1, d) each. They are the same for all queries q.

        Paddle's summary, flops and quantisation need layers that are called with an input.
        """
        return self.height_rel, self.width_rel


def attend(owner: nn.Layer, q: paddle.Tensor, kv: paddle.Tensor, tables: tuple, *, num_heads: int, block_size: int,
           halo_size: int, stride: int = 1) -> paddle.Tensor:
    """Compute `halo_attention`, with the compiled operator if `owner` may use it and it gives the same.

    `tables` are those of vertical and of horizontal relative positions. Raises ValueError if they or q do not
    fit the sizes.
    """
    height_rel, width_rel = tables
    rows, d = 2 * (block_size + 2 * halo_size) - 1, height_rel.shape[1]
    if not height_rel.shape[0] == width_rel.shape[0] == rows:
        raise ValueError(f'attention with block_size {block_size} and halo_size {halo_size} needs tables of {rows} '
                         f'relative positions; these have {height_rel.shape[0]} and {width_rel.shape[0]}')
    if q.shape[1] != num_heads * d:
        raise ValueError(f'{num_heads} heads of width {d} need {num_heads * d} channels of queries; '
                         f'these have {q.shape[1]}')
    same = has_stride(q, kv, block_size, stride) and compiled(owner, ('cpu', 'gpu'))
    operator = ops.halo_attention if same else halo_attention
    return operator(q, kv, height_rel, width_rel, num_heads=num_heads, block_size=block_size, halo_size=halo_size,
                    stride=stride)


def has_stride(q: paddle.Tensor, kv: paddle.Tensor, block_size: int, stride: int) -> bool:
    """True if `stride` is the one that the compiled operator finds from the sides of q and kv.

    Sides that are unknown in tracing pass.
    """
    sides = zip(q.shape[2:], kv.shape[2:])
    known = [(queries, side) for queries, side in sides if isinstance(side, int) and side >= 0]
    return block_size % stride == 0 and all(queries == -(-side // stride) for queries, side in known)


class HaloAttention(nn.Layer):
    """Blocked local self-attention with a halo: (B, C, H, W) -> (B, value width, ceil(H/stride), ceil(W/stride)).

    The value width is value_ratio * width. A stride takes every `stride`-th pixel as a query. Where the stride does not
    divide the block, all pixels are queries and the result is average-pooled, as in timm.
    """

    operators = 'auto'

    def __init__(self, in_width, width, num_heads, block_size, halo_size, stride=1, *, head_dim=0, qk_ratio=1.0,
                 value_ratio=1.0):
        super().__init__()
        d = query_width(width, num_heads, head_dim, qk_ratio)
        self.out_width = int(width * value_ratio)
        if self.out_width < 1 or self.out_width % num_heads:
            raise ValueError(f'values of width {self.out_width} (MODEL.VALUE_RATIO {value_ratio} of {width}) cannot have '
                             f'{num_heads} heads; choose a ratio that gives a multiple of them')
        pooled = block_size % stride != 0
        self.num_heads, self.block_size, self.halo_size, self.stride = num_heads, block_size, halo_size, 1 if pooled else stride
        self.q = projection(in_width, num_heads * d, self.stride)
        self.kv = projection(in_width, num_heads * d + self.out_width)
        self.pos_embed = RelativePosition(block_size + 2 * halo_size, d)
        self.pool = mean_pool(stride if pooled else 1)

    def forward(self, x):
        q, kv = convolve(self, self.q, x), convolve(self, self.kv, x)
        out = attend(self, q, kv, self.pos_embed(q), num_heads=self.num_heads, block_size=self.block_size,
                     halo_size=self.halo_size, stride=self.stride)
        return self.pool(out)


class BottleneckAttention(nn.Layer):
    """Self-attention over a whole map of at most map_size x map_size: (B, C, H, W) -> (B, width, ceil(H/stride), ceil(W/stride)).

    Srinivas et al. 2021, 'Bottleneck Transformers for Visual Recognition', arXiv 2101.11605: halo attention with one
    block and no halo. A stride pools the result. Raises ValueError for a larger map.
    """

    operators = 'auto'

    def __init__(self, in_width, width, num_heads, map_size, stride=1, *, head_dim=0, qk_ratio=1.0):
        super().__init__()
        self.num_heads, self.map_size, self.out_width = num_heads, map_size, width
        self.qk_width = num_heads * query_width(width, num_heads, head_dim, qk_ratio)
        self.qkv = projection(in_width, 2 * self.qk_width + width)
        self.pos_embed = RelativePosition(map_size, self.qk_width // num_heads)
        self.pool = mean_pool(stride)

    def forward(self, x):
        H, W = x.shape[2], x.shape[3]
        if not all(isinstance(side, int) and side > 0 for side in (H, W)):
            raise ValueError('a model with bottleneck attention is traced and exported for one image size: give its height and '
                             'width in the InputSpec (only the batch may be None)')
        if max(H, W) > self.map_size:
            raise ValueError(f'a feature map of {H}x{W} exceeds the {self.map_size}x{self.map_size} that bottleneck attention '
                             'was built for; build the model with the DATA.IMAGE_SIZE that it is to take')
        qkv = convolve(self, self.qkv, x)
        q, k, value = qkv.split([self.qk_width, self.qk_width, self.out_width], axis=1)
        k = k.reshape([-1, self.qk_width // self.num_heads, H, W])          # (B*N, d, H, W)
        value = value.reshape([-1, self.out_width // self.num_heads, H, W])  # (B*N, v, H, W)
        kv = paddle.concat([k, value], axis=1)                              # (B*N, d+v, H, W)
        kv = kv.reshape([-1, self.qk_width + self.out_width, H, W])         # (B, N*(d+v), H, W)
        out = attend(self, q, kv, self.pos_embed(q), num_heads=self.num_heads, block_size=self.map_size, halo_size=0)
        return self.pool(out)


class PositionLambdas(nn.Conv3D):
    """The linear functions of the surroundings of each pixel: v (B, v, H, W) -> (B, v, d, H, W).

    Its parameters are those of timm's convolution over (side, side, 1), which treats each channel of v on its
    own. A 2D convolution computes the same, faster.
    """

    def __init__(self, d, side):
        super().__init__(1, d, (side, side, 1), weight_attr=Normal(std=d ** -0.5),
                         bias_attr=Uniform(-1 / side, 1 / side))

    def forward(self, v):
        kernel, (_, width, H, W) = self.weight.squeeze(-1), v.shape           # (d, 1, side, side)
        v = v.reshape([-1, 1, H, W])                                        # (B*v, 1, H, W)
        out = F.conv2d(v, kernel, self.bias, padding=kernel.shape[-1] // 2)  # (B*v, d, H, W)
        return out.reshape([-1, width, out.shape[1], H, W])


class LambdaLayer(nn.Layer):
    """The map, and the surroundings of each pixel, as a linear function of its query: (B, C, H, W) -> (B, width, H', W').

    Bello 2021, 'LambdaNetworks', arXiv 2102.08602, with the positions as a convolution of `side` x `side` pixels.
    H' = ceil(H/stride), by pooling. All heads share keys of width d and values of width v = width / N.
    """

    operators = 'auto'

    def __init__(self, in_width, width, num_heads, side, stride=1, *, head_dim=0):
        super().__init__()
        d = query_width(width, num_heads, head_dim or 16, 1.0)              # 16 is timm's
        self.num_heads, self.d, self.v, self.out_width = num_heads, d, width // num_heads, width
        self.qkv = projection(in_width, num_heads * d + d + self.v)
        self.norm_q = nn.BatchNorm2D(num_heads * d)
        self.norm_v = nn.BatchNorm2D(self.v)
        self.no_act = nn.Identity()
        self.conv_lambda = PositionLambdas(d, side)
        self.pool = mean_pool(stride)

    def forward(self, x):
        H, W = x.shape[2], x.shape[3]
        q, k, v = convolve(self, self.qkv, x).split([self.num_heads * self.d, self.d, self.v], axis=1)
        q = norm_act(self, self.norm_q, self.no_act, q).reshape([-1, self.num_heads, self.d, H * W])     # (B, N, d, H*W)
        k = F.softmax(k.reshape([-1, self.d, H * W]), axis=-1)              # (B, d, H*W)
        v = norm_act(self, self.norm_v, self.no_act, v)                     # (B, v, H, W)
        content = v.reshape([-1, self.v, H * W]).matmul(k, transpose_y=True)     # (B, v, d)
        position = self.conv_lambda(v).reshape([-1, self.v, self.d, H * W])      # (B, v, d, H*W)
        out = paddle.einsum('bndm,bvdm->bnvm', q, position + content.unsqueeze(-1))        # (B, N, v, H*W)
        return self.pool(out.reshape([-1, self.out_width, H, W]))
