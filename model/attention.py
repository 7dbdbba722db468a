"""The attention layers in place of 3x3 convolutions: halo attention and bottleneck attention.

Layers, parameter names and arithmetic are those of timm, so its published weights give its logits.

Axes, used in every shape below:
    B batch   C channels   N heads   d width of a query or key head   v width of a value head
    H, W height and width of the feature map, in pixels
    Y, X rows and columns of the grid of blocks; the last ones may extend outside the feature map
    b side of a block of queries (block / stride)   w side of its window of keys and values (block + 2 * halo)
"""
import math
from collections.abc import Callable
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.nn.initializer import Normal

import ops
from model.layers import choice, compiled, conv2d, convolve
from model.positions import NoPosition, RelativePosition

HIDDEN = -2000.0        # hides a key as -inf does: exp(HIDDEN) is 0. Unlike -inf, products with it are finite
WINDOWS = ('block', 'inside', 'query')              # which keys a query sees: see `window_mask`


def halo_attention(q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, *, num_heads: int,
                   block_size: int, halo_size: int, stride: int = 1, window: str = 'block') -> Tensor:
    """Let every query attend to the keys of its block and of `halo_size` pixels around it.

    q (B, N*d, ceil(H/stride), ceil(W/stride)), kv (B, N*(d+v), H, W) with keys before values in each
    head, tables of relative positions (2w-1, d) -> (B, N*v, ceil(H/stride), ceil(W/stride)). `block_size`
    counts pixels of kv; `stride` divides it.

    Three facts keep this equal to timm and to the published weights. Only the content logits are scaled.
    The zeros that pad the feature map take part in the softmax (the paper's 'non-masked' attention). The
    queries of a strided block are numbered 0, 1, 2, ... although they are `stride` pixels apart.

    A feature map that does not divide into blocks is padded to them. Padding further outside the map than
    the halo gets no attention. `window` may hide more keys: see `window_mask`.
    """
    height, width = q.shape[2], q.shape[3]
    q, k, value, rows, columns = split_into_blocks(
        q, kv, height_rel, width_rel, num_heads=num_heads, block_size=block_size, halo_size=halo_size,
        stride=stride, window=window, hidden=-math.inf if window == 'block' else HIDDEN)
    logits = (q * q.shape[-1] ** -0.5).matmul(k, transpose_y=True)          # (B*N, Y*X, b*b, w*w)
    logits = logits + (rows + columns).flatten(4).flatten(2, 3)
    out = F.softmax(logits, axis=-1).matmul(value)                          # (B*N, Y*X, b*b, v)
    return join_blocks(out, num_heads, block_size // stride, height, width)


def sdpa_halo_attention(q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, *, num_heads: int,
                        block_size: int, halo_size: int, stride: int = 1, window: str = 'block') -> Tensor:
    """Compute `halo_attention` by Paddle's scaled_dot_product_attention, which has FlashAttention on a GPU.

    The logits of positions are products as well. A query gets 2w more channels: its logits of the w rows
    and of the w columns. A key gets ones in the channels of its own row and column, and zeros in the others.

    FlashAttention takes heads of one width D, a multiple of 8: zeros fill queries, keys and values up to it.
    Paddle 3.3.1 takes it without the argument `scale` only, so its scale D ** -0.5 is cancelled here.
    """
    height, width = q.shape[2], q.shape[3]
    q, k, value, rows, columns = split_into_blocks(
        q, kv, height_rel, width_rel, num_heads=num_heads, block_size=block_size, halo_size=halo_size,
        stride=stride, window=window, hidden=HIDDEN)
    d, v, w = q.shape[-1], value.shape[-1], rows.shape[-2]
    D = -(-max(d + 2 * w, v) // 8) * 8
    rows, columns = rows.squeeze(-1).flatten(2, 3), columns.squeeze(-2).flatten(2, 3)  # (B*N, Y*X, b*b, w)
    q = widen(paddle.concat([q * d ** -0.5, rows, columns], axis=-1) * D ** 0.5, D)     # (B*N, Y*X, b*b, D)
    places = key_places(w, D - d).astype(k.dtype) + paddle.zeros_like(k[..., :1])   # (B*N, Y*X, w*w, D-d)
    k = paddle.concat([k, places], axis=-1)                                 # (B*N, Y*X, w*w, D)
    q, k, value = [x.transpose([0, 2, 1, 3]) for x in (q, k, widen(value, D))]
    out = F.scaled_dot_product_attention(q, k, value)                       # (B*N, b*b, Y*X, D)
    return join_blocks(out.transpose([0, 2, 1, 3])[..., :v], num_heads, block_size // stride, height, width)


def widen(x: Tensor, channels: int) -> Tensor:
    """Return x (., ., ., C) with zeros up to so many channels."""
    missing = channels - x.shape[-1]
    return F.pad(x, [0, 0, 0, 0, 0, 0, 0, missing]) if missing else x


def key_places(w: int, channels: int) -> Tensor:
    """Return a one in channels y and w + x of the key in row y and column x, else 0: (w*w, channels)."""
    one = paddle.eye(2 * w, channels)
    return one[:w].repeat_interleave(w, axis=0) + one[w:].tile([w, 1])


def split_into_blocks(q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, *, num_heads: int,
                      block_size: int, halo_size: int, stride: int, window: str, hidden: float
                      ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and both position logits by block, for the arguments of `halo_attention`.

    -> (B*N, Y*X, b*b, d), (B*N, Y*X, w*w, d), (B*N, Y*X, w*w, v), and the logits of `position_logits`, which
    are `hidden` for the keys that `window_mask` hides.
    """
    d, w, b = height_rel.shape[1], block_size + 2 * halo_size, block_size // stride
    v = kv.shape[1] // num_heads - d
    H, W = kv.shape[2], kv.shape[3]
    Y, X = (H + block_size - 1) // block_size, (W + block_size - 1) // block_size
    ragged = not (divides(block_size, H) and divides(block_size, W))

    far = halo_size                                                         # padding at the far edges
    if ragged:
        far += block_size - 1                                               # enough for the last window
        q = F.pad(q, [0, b - 1, 0, b - 1])[:, :, :Y * b, :X * b]            # (B, N*d, Y*b, X*b)
    q = q.reshape([-1, d, Y, b, X, b]).transpose([0, 2, 4, 3, 5, 1])        # (B*N, Y, X, b, b, d)
    q = q.reshape([-1, Y * X, b * b, d])                                    # (B*N, Y*X, b*b, d)
    # rows, then columns. On a GPU the gradient of an index would add in any order; this one has one order
    kv = F.unfold(kv.reshape([1, -1, H, W]), [w, 1], [block_size, 1], [halo_size, 0, far, 0])
    kv = kv.reshape([1, -1, Y, W])                                          # (1, B*N*(d+v)*w, Y, W)
    kv = F.unfold(kv, [1, w], [1, block_size], [0, halo_size, 0, far])      # (1, B*N*(d+v)*w*w, Y*X)
    kv = kv.reshape([-1, d + v, w * w, Y * X]).transpose([0, 3, 2, 1])      # (B*N, Y*X, w*w, d+v)
    k, value = kv.split([d, v], axis=-1)

    rows, columns = position_logits(q, height_rel, width_rel, b, w)         # (B*N, Y*X, b, b, w, 1 or 1, w)
    if ragged or window != 'block':
        sizes = {'block_size': block_size, 'halo_size': halo_size, 'stride': stride}
        mask = window_mask(window, Y, H, hidden=hidden, **sizes).astype(rows.dtype)    # (Y, b or 1, w)
        rows = rows + mask.unsqueeze(1).tile([1, X, 1, 1]).reshape([Y * X, -1, 1, w, 1])
        mask = window_mask(window, X, W, hidden=hidden, **sizes).astype(rows.dtype)    # (X, b or 1, w)
        columns = columns + mask.tile([Y, 1, 1]).reshape([Y * X, 1, -1, 1, w])
    return q, k, value, rows, columns


def join_blocks(out: Tensor, num_heads: int, b: int, height: Any, width: Any) -> Tensor:
    """Put the outputs of blocks together: (B*N, Y*X, b*b, v) -> (B, N*v, height, width)."""
    v, Y, X = out.shape[-1], (height + b - 1) // b, (width + b - 1) // b
    out = out.reshape([-1, Y, X, b, b, v]).transpose([0, 5, 1, 3, 2, 4])    # (B*N, v, Y, b, X, b)
    out = out.reshape([-1, num_heads * v, Y * b, X * b])                    # (B, N*v, Y*b, X*b)
    if not (divides(b, height) and divides(b, width)):
        out = out[:, :, :height, :width]
    return out


def divides(block_size: int, size: Any) -> bool:
    """True if a side of `size` pixels divides into blocks. False if the size is unknown while tracing."""
    return isinstance(size, int) and size >= 0 and size % block_size == 0


def window_index(blocks: Any, block_size: int, halo_size: int, arange: Callable = paddle.arange) -> Any:
    """Return the rows (or columns) of the padded feature map that the window of each block sees: (blocks, w).

    Row `halo_size` is the first one of the feature map itself. `arange` is numpy's for an array instead
    of a tensor.
    """
    first = arange(blocks).reshape([-1, 1]) * block_size                    # (blocks, 1)
    return first + arange(block_size + 2 * halo_size)


def window_mask(window: str, blocks: Any, size: Any, *, block_size: int, halo_size: int, stride: int,
                hidden: float, library: Any = paddle) -> Any:
    """Return `hidden` for the keys that a query does not see along one axis of `size` pixels, else 0.

    It is added to the logits: (blocks, b, w), or (blocks, 1, w) where the queries of a block see the same.
    `library` is numpy for an array instead of a tensor.

    block    the window of the block, with the zeros of the halo outside the feature map: the paper's choice
    inside   of that window, only what is inside the feature map: the paper's 'masked' padding
    query    only keys at most `halo_size` pixels from the query, as in Ramachandran et al. 2019, 'Stand-Alone
             Self-Attention in Vision Models', arXiv 1906.05909; zeros take part
    """
    key = window_index(blocks, block_size, halo_size, library.arange)[:, None]               # (blocks, 1, w)
    seen = key < size + 2 * halo_size
    if window == 'inside':
        seen = library.logical_and(key >= halo_size, key < size + halo_size)
    elif window == 'query':
        query = library.arange(halo_size, halo_size + block_size, stride)[:, None]           # (b, 1)
        distance = library.arange(block_size + 2 * halo_size) - query                        # (b, w)
        seen = library.logical_and(seen, abs(distance) <= halo_size)
    return library.where(seen, 0.0, hidden)


def position_logits(q: Tensor, height_rel: Tensor, width_rel: Tensor, b: int, w: int
                    ) -> tuple[Tensor, Tensor]:
    """Return the logits of relative rows and of relative columns. A key's logit is the sum of both.

    q (B*N, Y*X, b*b, d), tables (2w-1, d) -> (B*N, Y*X, b, b, w, 1) and (B*N, Y*X, b, b, 1, w).
    """
    d, P = q.shape[-1], q.shape[1]
    q = q.reshape([-1, P, b, b, d])                                         # (B*N, Y*X, b, b, d)
    rows = paddle.einsum('gpyxd,yjd->gpyxj', q, offsets(height_rel, b, w)).unsqueeze(-1)
    columns = paddle.einsum('gpyxd,xjd->gpyxj', q, offsets(width_rel, b, w)).unsqueeze(-2)
    return rows, columns                                    # (B*N, Y*X, b, b, w, 1), (B*N, Y*X, b, b, 1, w)


def offsets(table: Tensor, b: int, w: int) -> Tensor:
    """Return the vectors for query i and key j, rows j - i + w - 1 of the table: (2w-1, d) -> (b, w, d).

    An index would give the same. On a GPU its gradient would add in any order.
    """
    rows = F.unfold(table.t().unsqueeze([0, -1]), [w, 1])                   # (1, d*w, w): w rows from each on
    rows = rows.reshape([-1, w, w]).transpose([2, 1, 0])                    # (w, w, d)
    return rows[w - b:].flip(0)                                             # (b, w, d), query 0 was the last


def query_width(width: int, num_heads: int, head_dim: int, qk_ratio: float) -> int:
    """Return the width of a query or key head: `head_dim`, or if it is 0, `qk_ratio` * width / num_heads.

    Raises ValueError if the heads do not divide the width.
    """
    if num_heads < 1 or width % num_heads:
        raise ValueError(f'an attention of width {width} cannot have {num_heads} heads: '
                         'MODEL.HEADS must be a divisor of the inner width in each stage with attention')
    if head_dim:
        return head_dim
    if qk_ratio == 1:
        return width // num_heads
    return nearest_8(width * qk_ratio) // num_heads


def nearest_8(width: float) -> int:
    """Return the nearest multiple of 8, at least 8: how timm rounds widths."""
    return max(int(width + 4) // 8 * 8, 8)


def projection(in_width: int, width: int, stride: int = 1) -> nn.Conv2D:
    """Make a 1x1 convolution to queries, keys or values.

    (B, C, H, W) -> (B, width, ceil(H/stride), ceil(W/stride)).
    """
    # timm truncates at -2 and 2, 16 or more standard deviations at 64 channels: the same as a plain normal
    return conv2d(in_width, width, 1, stride, init=Normal(std=in_width ** -0.5))


def mean_pool(stride: int) -> nn.Layer:
    """Make an average pool over stride x stride pixels, over fewer at the far edges."""
    return nn.AvgPool2D(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()


def attend(owner: nn.Layer, q: Tensor, kv: Tensor, tables: tuple[Tensor, Tensor], *, num_heads: int,
           block_size: int, halo_size: int, stride: int = 1, window: str = 'block') -> Tensor:
    """Compute `halo_attention` by the operators that the layer `owner` uses.

    The compiled one is used only if it gives the same.

    `tables` are those of vertical and of horizontal relative positions. Raises ValueError if they or q do not
    fit the sizes.
    """
    height_rel, width_rel = tables
    rows, d = 2 * (block_size + 2 * halo_size) - 1, height_rel.shape[1]
    vertical, horizontal = height_rel.shape[0], width_rel.shape[0]
    if not vertical == horizontal == rows:
        raise ValueError(f'attention with block_size {block_size} and halo_size {halo_size} needs tables of '
                         f'{rows} relative positions; these have {vertical} and {horizontal}')
    if q.shape[1] != num_heads * d:
        raise ValueError(f'{num_heads} heads of width {d} need {num_heads * d} channels of queries; '
                         f'these have {q.shape[1]}')
    sizes = {'num_heads': num_heads, 'block_size': block_size, 'halo_size': halo_size, 'stride': stride}
    if choice(owner) == 'sdpa':
        return sdpa_halo_attention(q, kv, height_rel, width_rel, window=window, **sizes)
    same = window == 'block' and has_stride(q, kv, block_size, stride)
    if same and compiled(owner, ('cpu', 'gpu')):
        return ops.halo_attention(q, kv, height_rel, width_rel, **sizes)
    return halo_attention(q, kv, height_rel, width_rel, window=window, **sizes)


def has_stride(q: Tensor, kv: Tensor, block_size: int, stride: int) -> bool:
    """True if `stride` is the one that the compiled operator finds from the sides of q and kv.

    Sides that are unknown in tracing pass.
    """
    sides = zip(q.shape[2:], kv.shape[2:])
    known = [(queries, side) for queries, side in sides if isinstance(side, int) and side >= 0]
    return block_size % stride == 0 and all(queries == -(-side // stride) for queries, side in known)


class HaloAttention(nn.Layer):
    """Blocked local self-attention with a halo.

    (B, C, H, W) -> (B, value width, ceil(H/stride), ceil(W/stride)).

    The value width is value_ratio * width. A stride takes every `stride`-th pixel as a query. With `pooled`,
    or if the stride does not divide the block, all pixels are queries and the result is average-pooled, as in
    timm. `window` is one of WINDOWS. Without `relative`, the layer knows no positions.

    Raises ValueError if the heads do not divide the widths.
    """

    operators = 'auto'

    def __init__(self, in_width: int, width: int, num_heads: int, block_size: int, halo_size: int,
                 stride: int = 1, *, head_dim: int = 0, qk_ratio: float = 1.0, value_ratio: float = 1.0,
                 window: str = 'block', relative: bool = True, pooled: bool = False) -> None:
        super().__init__()
        d = query_width(width, num_heads, head_dim, qk_ratio)
        self.out_width = int(width * value_ratio)
        if self.out_width < 1 or self.out_width % num_heads:
            raise ValueError(f'values of width {self.out_width} (MODEL.VALUE_RATIO {value_ratio} of {width}) '
                             f'cannot have {num_heads} heads; choose a ratio that gives a multiple of them')
        self.num_heads, self.window = num_heads, window
        self.block_size, self.halo_size = block_size, halo_size
        self.stride = 1 if pooled or block_size % stride else stride
        self.q = projection(in_width, num_heads * d, self.stride)
        self.kv = projection(in_width, num_heads * d + self.out_width)
        window_size = block_size + 2 * halo_size
        positions = RelativePosition if relative else NoPosition
        self.pos_embed = positions(window_size, window_size, d)
        self.pool = mean_pool(stride // self.stride)

    def forward(self, x: Tensor) -> Tensor:
        q, kv = convolve(self, self.q, x), convolve(self, self.kv, x)
        out = attend(self, q, kv, self.pos_embed(q), num_heads=self.num_heads, block_size=self.block_size,
                     halo_size=self.halo_size, stride=self.stride, window=self.window)
        return self.pool(out)


class BottleneckAttention(nn.Layer):
    """Self-attention over a whole feature map: (B, C, H, W) -> (B, width, ceil(H/stride), ceil(W/stride)).

    Srinivas et al. 2021, 'Bottleneck Transformers for Visual Recognition', arXiv 2101.11605: halo
    attention with one block and no halo. `map_size` is the largest (height, width) of a map. A stride
    pools the result. Raises ValueError for a larger map.
    """

    operators = 'auto'

    def __init__(self, in_width: int, width: int, num_heads: int, map_size: tuple[int, int],
                 stride: int = 1, *, head_dim: int = 0, qk_ratio: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.map_size, self.out_width = num_heads, map_size, width
        self.qk_width = num_heads * query_width(width, num_heads, head_dim, qk_ratio)
        self.qkv = projection(in_width, 2 * self.qk_width + width)
        self.pos_embed = RelativePosition(*map_size, self.qk_width // num_heads)
        self.pool = mean_pool(stride)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2], x.shape[3]
        if not all(isinstance(side, int) and side > 0 for side in (H, W)):
            raise ValueError('a model with bottleneck attention is traced and exported for one image size: '
                             'give its height and width in the InputSpec (only the batch may be None)')
        height, width = self.map_size
        if H > height or W > width:
            raise ValueError(f'a feature map of {H}x{W} exceeds the {height}x{width} that bottleneck '
                             'attention was built for; build the model with the DATA.IMAGE_SIZE that it is '
                             'to take')
        qkv = convolve(self, self.qkv, x)
        q, k, value = qkv.split([self.qk_width, self.qk_width, self.out_width], axis=1)
        k = k.reshape([-1, self.qk_width // self.num_heads, H, W])          # (B*N, d, H, W)
        value = value.reshape([-1, self.out_width // self.num_heads, H, W])  # (B*N, v, H, W)
        kv = paddle.concat([k, value], axis=1)                              # (B*N, d+v, H, W)
        kv = kv.reshape([-1, self.qk_width + self.out_width, H, W])         # (B, N*(d+v), H, W)
        side = max(height, width)                   # of a square block, whose tables are equally long
        height_rel, width_rel = self.pos_embed(q)
        tables = longer_table(height_rel, side - height), longer_table(width_rel, side - width)
        out = attend(self, q, kv, tables, num_heads=self.num_heads, block_size=side, halo_size=0)
        return self.pool(out)


def longer_table(table: Tensor, offsets: int) -> Tensor:
    """Return a table of relative positions (2w-1, d) with zeros for so many more offsets at both ends."""
    return F.pad(table, [offsets, offsets, 0, 0]) if offsets else table
