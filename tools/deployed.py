"""A HaloNet as inference runtimes like it: batch norms folded, and windows by one lookup where the map's size is known.

The same function as the model's own evaluation up to rounding; weights are folded in float64.
"""
import numpy as np
import paddle
from paddle import nn

from model.attention import HaloAttention


def deployed(model):
    """Fold the batch norms of `model`, built with MODEL.ATTENTION composed, into its weights. It is for evaluation only then."""
    for layer in model.sublayers(include_self=True):
        parts = dict(layer.named_children())
        if isinstance(parts.get('conv'), nn.Conv2D) and isinstance(parts.get('bn'), nn.BatchNorm2D):
            scale, shift = affine(layer.bn)
            layer.conv = convolution(layer.conv, layer.conv.weight.numpy() * scale[:, None, None, None], shift)
            layer.bn = nn.Identity()
        if isinstance(parts.get('self_attn'), HaloAttention):
            scale, shift = affine(layer.post_attn)
            scale_values(layer.self_attn, scale)
            layer.post_attn = Shift(shift)
    model.eval()


def look_windows_up(model):
    """Give `model`, whose maps then have a known size when it is traced, WindowLookup for its HaloAttention."""
    for layer in model.sublayers():
        if isinstance(getattr(layer, 'self_attn', None), HaloAttention):
            layer.self_attn = WindowLookup(layer.self_attn)
    model.eval()


def affine(norm):
    """A batch norm as (scale, shift) of each channel, in float64."""
    weight, bias, mean, variance = (value.numpy().astype('float64')
                                    for value in (norm.weight, norm.bias, norm._mean, norm._variance))
    scale = weight / np.sqrt(variance + norm._epsilon)
    return scale, bias - mean * scale


def convolution(conv, weight, bias=None):
    """A convolution as `conv`, with other weights (and output channels) and a bias or none."""
    made = nn.Conv2D(conv._in_channels, len(weight), conv._kernel_size, conv._stride, conv._padding,
                     dilation=conv._dilation, groups=conv._groups, padding_mode=conv._padding_mode,
                     bias_attr=None if bias is not None else False)
    made.weight.set_value(weight.astype('float32'))
    if bias is not None:
        made.bias.set_value(bias.astype('float32'))
    return made


def matrix(weight):
    """A 1x1 convolution's weights (outputs, C) as a layer that takes channels last: (..., C) -> (..., outputs)."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias_attr=False)
    made.weight.set_value(weight.T.astype('float32'))
    return made


def scale_values(attn, scale):
    """Let a HaloAttention give `scale` (N*v,) times its output: that is linear in the values."""
    d, heads = attn.pos_embed.height_rel.shape[1], attn.num_heads
    weight = attn.kv.weight.numpy().astype('float64')                       # (N*(d+v), C, 1, 1)
    heads_first = weight.reshape(heads, -1, weight.shape[1])                # (N, d+v, C)
    heads_first[:, d:] *= scale.reshape(heads, -1, 1)
    attn.kv.weight.set_value(weight.astype('float32'))


class Shift(nn.Layer):
    """A number added to each channel: what is left of a batch norm."""

    def __init__(self, shift):
        super().__init__()
        self.shift = self.create_parameter([1, len(shift), 1, 1], is_bias=True)
        self.shift.set_value(shift.astype('float32').reshape(1, -1, 1, 1))

    def forward(self, x):
        return x + self.shift


class WindowLookup(nn.Layer):
    """HaloAttention for maps of a known size, its letters as in model/attention.py, with P = Y*X.

    Channels come last, as runtimes keep them, so that a pixel's head is a row of numbers and blocks, windows and padding
    are one lookup of rows each: nothing is cut and transposed.
    """

    def __init__(self, attn):
        super().__init__()
        self.heads, self.block, self.halo, self.stride, self.pool = (attn.num_heads, attn.block_size, attn.halo_size,
                                                                     attn.stride, attn.pool)
        d, w, b = attn.pos_embed.height_rel.shape[1], attn.block_size + 2 * attn.halo_size, attn.block_size // attn.stride
        kv = attn.kv.weight.numpy().reshape([self.heads, -1, attn.kv.weight.shape[1]])      # (N, d+v, C)
        self.q = matrix(attn.q.weight.numpy()[:, :, 0, 0])
        self.k = matrix(kv[:, :d].reshape([-1, kv.shape[2]]) * np.float64(d) ** -0.5)
        self.v = matrix(kv[:, d:].reshape([-1, kv.shape[2]]))
        offset = np.arange(w) - np.arange(b)[:, None] + w - 1                # (b, w)
        for name in ('height_rel', 'width_rel'):
            table = getattr(attn.pos_embed, name).numpy()[offset]            # (b, w, d)
            self.register_buffer(name, paddle.to_tensor(table.transpose(0, 2, 1).copy()))       # (b, d, w)

    def forward(self, x):
        H, W, N = x.shape[2], x.shape[3], self.heads
        Y, X, b, w = -(-H // self.block), -(-W // self.block), self.block // self.stride, self.block + 2 * self.halo
        h, width = -(-H // self.stride), -(-W // self.stride)
        x = x.transpose([0, 2, 3, 1])                                                            # (B, H, W, C)
        queries = lookup(Y, X, b, b, 0, h, width, N)
        q = self.rows(self.q(x[:, ::self.stride, ::self.stride]), queries)
        q = q.reshape([-1, Y * X * N, b, b, q.shape[-1]])                                        # (B, P*N, b, b, d)
        windows = lookup(Y, X, self.block, w, self.halo, H, W, N)
        k = self.rows(self.k(x), windows).reshape([-1, Y * X * N, w * w, q.shape[-1]])           # (B, P*N, w*w, d)
        value = self.rows(self.v(x), windows)
        value = value.reshape([-1, Y * X * N, w * w, value.shape[-1]])                           # (B, P*N, w*w, v)
        position = q.matmul(self.height_rel).unsqueeze(-1)                                       # (B, P*N, b, b, w, 1)
        columns = q.transpose([0, 1, 3, 2, 4]).matmul(self.width_rel).transpose([0, 1, 3, 2, 4])
        position = (position + columns.unsqueeze(-2)).reshape([-1, Y * X * N, b * b, w * w])
        hidden = beyond(Y, X, self.block, w, self.halo, H, W, N)
        if hidden.any():
            position = position + paddle.to_tensor(np.where(hidden, -np.inf, 0).astype('float32'))
        q = q.reshape([-1, Y * X * N, b * b, q.shape[-1]])
        out = nn.functional.softmax(q.matmul(k, transpose_y=True) + position).matmul(value)     # (B, P*N, b*b, v)
        out = out.reshape([-1, Y * X * N * b * b, out.shape[-1]])
        back = np.full(h * width * N + 1, -1)
        back[queries] = np.arange(Y * X * N * b * b)                  # rows of padding share the last
        out = out.gather(paddle.to_tensor(back[:-1]), axis=1).reshape([-1, h, width, N * out.shape[-1]])
        return self.pool(out.transpose([0, 3, 1, 2]))

    def rows(self, x, index):
        """x (B, H, W, N*d) -> its rows (B, len(index), d) at pixel * N + head; row H*W*N is zero."""
        size = x.shape[1] * x.shape[2] * self.heads
        x = x.reshape([-1, size, x.shape[3] // self.heads])
        if index.max() == size:
            x = nn.functional.pad(x, [0, 0, 0, 1, 0, 0])
        return x.gather(paddle.to_tensor(index), axis=1)


def lookup(Y, X, step, side, before, H, W, N):
    """Row numbers pixel * N + head of squares of `side` pixels, `step` apart, the first `before` pixels beyond the corner of
    a map of H x W pixels: (Y*X*N*side*side,); H*W*N for a pixel beyond the map."""
    y = np.arange(Y)[:, None] * step + np.arange(side) - before             # (Y, side)
    x = np.arange(X)[:, None] * step + np.arange(side) - before             # (X, side)
    y, x = y[:, None, None, :, None], x[None, :, None, None, :]             # (Y, 1, 1, side, 1), (1, X, 1, 1, side)
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return np.where(inside, (y * W + x) * N + np.arange(N)[:, None, None], H * W * N).flatten()


def beyond(Y, X, step, w, halo, H, W, N):
    """Which keys of the windows lie further beyond the map than the halo, and take no part: (P*N, 1, w*w)."""
    y = np.arange(Y)[:, None] * step + np.arange(w) - halo >= H + halo      # (Y, w)
    x = np.arange(X)[:, None] * step + np.arange(w) - halo >= W + halo
    hidden = y[:, None, :, None] | x[None, :, None, :]                      # (Y, X, w, w)
    return np.repeat(hidden.reshape(Y * X, 1, w * w), N, axis=0)
