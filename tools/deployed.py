"""Rewrite a HaloNet for inference runtimes: batch norms folded, halo windows as one lookup, whole programs.

The outputs equal those of the model in evaluation up to rounding. Weights are folded in float64.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from system import paddle_internals

import numpy as np
import paddle
from paddle import nn

from model.attention import HIDDEN, HaloAttention, window_index, window_mask

# ---- from pixels to probabilities

class FromPixels(nn.Layer):
    """A model that takes pixels: uint8 (B, H, W, C) -> what `model` makes of the normalised (B, C, H, W).

    mean and std are of each channel, or one for all, in [0, 1].
    """

    def __init__(self, model: nn.Layer, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer('mean', paddle.to_tensor(mean, 'float32').reshape([-1, 1, 1]) * 255)
        self.register_buffer('std', paddle.to_tensor(std, 'float32').reshape([-1, 1, 1]) * 255)

    def forward(self, pixels: paddle.Tensor) -> paddle.Tensor:
        images = pixels.astype('float32').transpose([0, 3, 1, 2])
        return self.model((images - self.mean) / self.std)


class Probabilities(nn.Layer):
    """A model that gives probabilities (B, K), or with `top` the largest and their labels, (B, top) both."""

    def __init__(self, model: nn.Layer, top: int = 0) -> None:
        super().__init__()
        self.model, self.top = model, top

    def forward(self, images: paddle.Tensor) -> paddle.Tensor | tuple[paddle.Tensor, paddle.Tensor]:
        probabilities = paddle.nn.functional.softmax(self.model(images), axis=-1)
        return probabilities.topk(self.top, axis=-1) if self.top else probabilities


# ---- folding batch norms

def deployed(model: nn.Layer) -> None:
    """Fold the batch norms of `model` into its weights, in place, for evaluation.

    The model must be built with MODEL.ATTENTION composed.
    """
    for layer in model.sublayers(include_self=True):
        parts = dict(layer.named_children())
        if isinstance(parts.get('conv'), nn.Conv2D) and isinstance(parts.get('bn'), nn.BatchNorm2D):
            scale, shift = affine(layer.bn)
            weight = layer.conv.weight.numpy() * scale[:, None, None, None]
            layer.conv = convolution(layer.conv, weight, shift)
            layer.bn = nn.Identity()
        if isinstance(parts.get('self_attn'), HaloAttention):
            scale, shift = affine(layer.post_attn)
            scale_values(layer.self_attn, scale)
            layer.post_attn = Shift(shift)
    model.eval()


def affine(norm: nn.BatchNorm2D) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch norm in evaluation as (scale, shift) of each channel, (C,) each, in float64."""
    mean, variance = paddle_internals.norm_statistics(norm)
    _, epsilon, _ = paddle_internals.norm_settings(norm)
    scale = float64(norm.weight) / np.sqrt(float64(variance) + epsilon)
    return scale, float64(norm.bias) - float64(mean) * scale


def float64(value: paddle.Tensor) -> np.ndarray:
    """Return a tensor as an array of float64."""
    return value.numpy().astype('float64')


def convolution(conv: nn.Conv2D, weight: np.ndarray, bias: np.ndarray) -> nn.Conv2D:
    """Make a convolution with the settings of `conv` from `weight` (K, C, h, w) and `bias` (K,)."""
    settings = paddle_internals.convolution_settings(conv)
    folded = nn.Conv2D(
        settings.in_channels, len(weight), settings.kernel_size, settings.stride, settings.padding,
        dilation=settings.dilation, groups=settings.groups, padding_mode=settings.padding_mode)
    folded.weight.set_value(weight.astype('float32'))
    folded.bias.set_value(bias.astype('float32'))
    return folded


def scale_values(attn: HaloAttention, scale: np.ndarray) -> None:
    """Multiply the output of a HaloAttention by `scale` (N*v,). The output is linear in the values."""
    d, heads = attn.pos_embed.height_rel.shape[1], attn.num_heads
    weight = float64(attn.kv.weight)                                        # (N*(d+v), C, 1, 1)
    heads_first = weight.reshape(heads, -1, weight.shape[1])                # (N, d+v, C)
    heads_first[:, d:] *= scale.reshape(heads, -1, 1)
    attn.kv.weight.set_value(weight.astype('float32'))


class Shift(nn.Layer):
    """Add a number to each channel: the rest of a batch norm whose scale is folded elsewhere."""

    def __init__(self, shift: np.ndarray):
        super().__init__()
        self.shift = self.create_parameter([1, len(shift), 1, 1], is_bias=True)
        self.shift.set_value(shift.astype('float32').reshape(1, -1, 1, 1))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x + self.shift


# ---- halo windows as a lookup

def look_windows_up(model: nn.Layer) -> None:
    """Replace each HaloAttention of `model` by a WindowLookup, whose image size is fixed when traced."""
    for layer in model.sublayers():
        if isinstance(getattr(layer, 'self_attn', None), HaloAttention):
            layer.self_attn = WindowLookup(layer.self_attn)
    model.eval()


@dataclass(frozen=True)
class Windows:
    """Square windows that cover a feature map, row by row: Y rows of X windows.

    Blocks are windows without a halo.
    """

    height: int                                     # of the feature map, pixels
    width: int
    step: int                                       # from one window to the next
    halo: int = 0                                   # pixels of a window on each side of its block

    @property
    def side(self) -> int:
        """Return the side of a window in pixels."""
        return self.step + 2 * self.halo

    @property
    def count(self) -> int:
        """The number of windows, Y*X."""
        return len(self.rows()) * len(self.columns())

    def rows(self) -> np.ndarray:
        """Return the row of each pixel of a window, (Y, side), from -halo on."""
        return self._along(self.height)

    def columns(self) -> np.ndarray:
        """Return the column of each pixel of a window, (X, side)."""
        return self._along(self.width)

    def _along(self, size: int) -> np.ndarray:
        return window_index(-(-size // self.step), self.step, self.halo, np.arange) - self.halo

    def row_numbers(self, heads: int) -> np.ndarray:
        """Number the rows of all pixels and heads, pixel * N + head, in the order of the windows.

        Returns (Y*X*N*side*side,). A pixel outside the feature map has the number H*W*N.
        """
        y = self.rows()[:, None, None, :, None]                             # (Y, 1, 1, side, 1)
        x = self.columns()[None, :, None, None, :]                          # (1, X, 1, 1, side)
        head = np.arange(heads)[:, None, None]                              # (N, 1, 1)
        inside = (y >= 0) & (y < self.height) & (x >= 0) & (x < self.width)
        pixel = y * self.width + x
        return np.where(inside, pixel * heads + head, self.height * self.width * heads).flatten()

    def mask(self, window: str, stride: int, heads: int) -> np.ndarray:
        """Return the sum of `window_mask` along both axes: (Y*X*N, 1 or b*b, side*side) float32."""
        along = partial(window_mask, window, block_size=self.step, halo_size=self.halo, stride=stride,
                        hidden=-np.inf if window == 'block' else HIDDEN, library=np)
        y = along(len(self.rows()), self.height)                            # (Y, b or 1, side)
        x = along(len(self.columns()), self.width)                          # (X, b or 1, side)
        mask = y[:, None, :, None, :, None] + x[None, :, None, :, None]     # (Y, X, ., ., side, side)
        mask = mask.reshape(self.count, -1, self.side ** 2).astype('float32')
        return np.repeat(mask, heads, axis=0)


class WindowLookup(nn.Layer):
    """HaloAttention for feature maps of a fixed size, with the letters of model/attention.py and P = Y*X.

    Channels come last, as runtimes store them, so that a pixel's head is a row of numbers. Blocks,
    windows and padding are one lookup of rows each; no feature map is cut and transposed.
    """

    def __init__(self, attn: HaloAttention):
        super().__init__()
        self.heads, self.pool, self.seen = attn.num_heads, attn.pool, attn.window
        self.block, self.halo, self.stride = attn.block_size, attn.halo_size, attn.stride
        self.block_queries = self.block // self.stride                      # b
        self.window = self.block + 2 * self.halo                            # w
        d = attn.pos_embed.height_rel.shape[1]
        kv = attn.kv.weight.numpy().reshape([self.heads, -1, attn.kv.weight.shape[1]])      # (N, d+v, C)
        self.q = linear(attn.q.weight.numpy()[:, :, 0, 0])
        self.k = linear(kv[:, :d].reshape([-1, kv.shape[2]]) * np.float64(d) ** -0.5)
        self.v = linear(kv[:, d:].reshape([-1, kv.shape[2]]))
        key, query = np.arange(self.window), np.arange(self.block_queries)
        offset = key - query[:, None] + self.window - 1                     # (b, w)
        for name in ('height_rel', 'width_rel'):
            table = getattr(attn.pos_embed, name).numpy()[offset]           # (b, w, d)
            self.register_buffer(name, paddle.to_tensor(table.transpose(0, 2, 1).copy()))   # (b, d, w)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """Map (B, C, H, W) to (B, N*v, ceil(H/stride), ceil(W/stride))."""
        H, W, N, b, w = x.shape[2], x.shape[3], self.heads, self.block_queries, self.window
        height, width = -(-H // self.stride), -(-W // self.stride)
        blocks = Windows(height, width, step=b)
        windows = Windows(H, W, step=self.block, halo=self.halo)
        P = windows.count

        x = x.transpose([0, 2, 3, 1])                                       # (B, H, W, C)
        queries = blocks.row_numbers(N)
        q = self.take_rows(self.q(x[:, ::self.stride, ::self.stride]), queries)
        q = q.reshape([-1, P * N, b, b, q.shape[-1]])                       # (B, P*N, b, b, d)
        keys = windows.row_numbers(N)
        k = self.take_rows(self.k(x), keys).reshape([-1, P * N, w * w, q.shape[-1]])        # (B, P*N, w*w, d)
        value = self.take_rows(self.v(x), keys)
        value = value.reshape([-1, P * N, w * w, value.shape[-1]])          # (B, P*N, w*w, v)

        bias = self.position_logits(q)                                      # (B, P*N, b*b, w*w)
        mask = windows.mask(self.seen, self.stride, N)
        if mask.any():
            bias = bias + paddle.to_tensor(mask)
        q = q.reshape([-1, P * N, b * b, q.shape[-1]])                      # (B, P*N, b*b, d)
        out = nn.functional.softmax(q.matmul(k, transpose_y=True) + bias).matmul(value)     # (B, P*N, b*b, v)

        out = out.reshape([-1, P * N * b * b, out.shape[-1]])
        row_of = np.full(height * width * N + 1, -1)               # the last is for padding
        row_of[queries] = np.arange(P * N * b * b)
        out = out.gather(paddle.to_tensor(row_of[:-1]), axis=1)             # (B, height*width*N, v)
        out = out.reshape([-1, height, width, N * out.shape[-1]])
        return self.pool(out.transpose([0, 3, 1, 2]))

    def position_logits(self, q: paddle.Tensor) -> paddle.Tensor:
        """Return the logits of the relative positions: (B, P*N, b, b, d) -> (B, P*N, b*b, w*w)."""
        rows = q.matmul(self.height_rel).unsqueeze(-1)                      # (B, P*N, b, b, w, 1)
        columns = q.transpose([0, 1, 3, 2, 4]).matmul(self.width_rel)       # (B, P*N, b, b, w), transposed
        columns = columns.transpose([0, 1, 3, 2, 4]).unsqueeze(-2)          # (B, P*N, b, b, 1, w)
        return (rows + columns).reshape([-1, q.shape[1], self.block_queries ** 2, self.window ** 2])

    def take_rows(self, x: paddle.Tensor, numbers: np.ndarray) -> paddle.Tensor:
        """Look up rows: x (B, H, W, N*d), numbers as Windows.row_numbers -> (B, len(numbers), d).

        The row H*W*N is zero.
        """
        size = x.shape[1] * x.shape[2] * self.heads
        x = x.reshape([-1, size, x.shape[3] // self.heads])
        if numbers.max() == size:
            x = nn.functional.pad(x, [0, 0, 0, 1, 0, 0])
        return x.gather(paddle.to_tensor(numbers), axis=1)


def linear(weight: np.ndarray) -> nn.Linear:
    """Make a 1x1 convolution's weight (K, C) a layer for channels last: (..., C) -> (..., K)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias_attr=False)
    layer.weight.set_value(weight.T.astype('float32'))
    return layer
