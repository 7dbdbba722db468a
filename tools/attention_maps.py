"""Read the attention probabilities of halo attention layers out of the layers themselves.

A layer whose values are one-hot codes of positions returns its probabilities. So this works for every
implementation of the attention, composed or fused, and there is no second one that could differ.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

import paddle
from paddle import nn

from model.attention import HaloAttention, window_index
from model.layers import convolve

Box = tuple[int, int, int, int]                     # left, top, right, bottom


@dataclass
class AttentionMap:
    """The attention of one layer to one image, with the axes of model/attention.py.

    probabilities (N, Hq, Wq, w, w): of each head and query over the w x w window, whose corner lies
    `halo_size` pixels before the block's. They sum to 1, the zeros that pad the feature map included. If
    the feature map does not divide into blocks, only the probabilities inside are known, and the others
    are 0.
    """

    name: str
    probabilities: paddle.Tensor
    block_size: int
    halo_size: int
    height: int                                     # of the feature map of keys, pixels
    width: int
    stride: int                                     # from one query to the next, in those pixels

    def query_at(self, x: float, y: float) -> tuple[int, int]:
        """Return the (row, column) of the query nearest to a point of the image; x and y lie in 0 to 1."""
        rows, columns = self.probabilities.shape[1:3]
        return min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)

    def query_box(self, row: int, column: int) -> Box:
        """Return the box of a query's pixel in the feature map."""
        return column * self.stride, row * self.stride, column * self.stride + 1, row * self.stride + 1

    def block_box(self, row: int, column: int) -> Box:
        """Return the box of a query's block in the feature map."""
        left = column * self.stride // self.block_size * self.block_size
        top = row * self.stride // self.block_size * self.block_size
        return left, top, left + self.block_size, top + self.block_size

    def window_box(self, row: int, column: int) -> Box:
        """Return the box of a query's window; parts of it may lie outside the feature map."""
        left, top, right, bottom = self.block_box(row, column)
        return left - self.halo_size, top - self.halo_size, right + self.halo_size, bottom + self.halo_size


@contextmanager
def replaced(layer: nn.Layer, **parts: Any) -> Iterator[nn.Layer]:
    """Replace sublayers and attributes of `layer` within the block."""
    own = {name: getattr(layer, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(layer, name, part)
        yield layer
    finally:
        for name, part in own.items():
            setattr(layer, name, part)


class KeysAndPositions(nn.Layer):
    """A layer's own keys, by `project`, with one-hot positions instead of the values.

    (B, C, H, W) -> (B, N*(d + w*w), H, W). A position is that of a pixel in a grid of w x w, which
    repeats. A window of w x w pixels anywhere holds each position once.
    """

    def __init__(self, project: Callable, num_heads: int, d: int, w: int):
        super().__init__()
        self.project, self.num_heads, self.d, self.w = project, num_heads, d, w

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        kv = self.project(x)
        B, _, H, W = kv.shape
        keys = kv.reshape([B, self.num_heads, -1, H, W])[:, :, :self.d]             # (B, N, d, H, W)
        row, column = paddle.arange(H) % self.w, paddle.arange(W) % self.w
        position = row.unsqueeze(1) * self.w + column                                     # (H, W)
        position = nn.functional.one_hot(position, self.w ** 2)                     # (H, W, w*w)
        position = position.transpose([2, 0, 1]).astype(kv.dtype)                   # (w*w, H, W)
        position = position.expand([B, self.num_heads, *position.shape])            # (B, N, w*w, H, W)
        return paddle.concat([keys, position], axis=2).reshape([B, -1, H, W])       # (B, N*(d+w*w), H, W)


@paddle.no_grad()
def attention_probabilities(layer: HaloAttention, x: paddle.Tensor) -> paddle.Tensor:
    """Return the probabilities of a HaloAttention for its input x (B, C, H, W): (B, N, Hq, Wq, w, w).

    AttentionMap describes them.
    """
    N, d = layer.num_heads, layer.pos_embed.height_rel.shape[1]
    block, halo = layer.block_size, layer.halo_size
    w = block + 2 * halo
    # The layer pads with zeros. As further blocks of the feature map they have positions too
    divides = x.shape[2] % block == 0 and x.shape[3] % block == 0
    ring = -(-halo // block) * block if divides and layer.window != 'inside' else 0
    operators = layer.operators
    if not x.place.is_cpu_place():                  # the kernels of a GPU take values of up to 128 numbers
        operators = 'composed'
    codes = KeysAndPositions(partial(convolve, layer, layer.kv), N, d, w)
    with replaced(layer, kv=codes, pool=nn.Identity(), operators=operators):
        out = layer(nn.functional.pad(x, [ring] * 4))                          # (B, N*w*w, ring+Hq+ring, ...)
    B, (height, width) = x.shape[0], out.shape[2:]
    stride = round((x.shape[2] + 2 * ring) / height)
    out = out.reshape([B, N, w, w, height, width])
    out = out.transpose([0, 1, 4, 5, 2, 3])                                         # (B, N, ., ., w, w)
    # From the order of the grid into that of each query's window, without the ring
    rows, columns = [], []
    for i in range(ring // stride, height - ring // stride):
        index = grid_positions(i * stride, block, halo)
        rows.append(out[:, :, i].index_select(index, axis=3))
    out = paddle.stack(rows, axis=2)                                                # (B, N, Hq, ., w, w)
    for j in range(ring // stride, width - ring // stride):
        index = grid_positions(j * stride, block, halo)
        columns.append(out[:, :, :, j].index_select(index, axis=4))
    return paddle.stack(columns, axis=3)                                            # (B, N, Hq, Wq, w, w)


def grid_positions(pixel: int, block: int, halo: int) -> paddle.Tensor:
    """Return the rows (or columns) of the grid in the window of a query at `pixel`, in their order: (w,)."""
    windows = window_index(pixel // block + 1, block, halo) - halo
    return windows[-1] % (block + 2 * halo)


@paddle.no_grad()
def attention_maps(model: nn.Layer, images: paddle.Tensor) -> tuple[list[AttentionMap], paddle.Tensor]:
    """Return the AttentionMap of each HaloAttention of a model for images (1, C, H, W), and the logits."""
    layers = {name: layer for name, layer in model.named_sublayers() if isinstance(layer, HaloAttention)}
    inputs = {}

    def keep_input(name: str, layer: nn.Layer, arguments: tuple) -> None:
        inputs[name] = arguments[0]

    hooks = [layer.register_forward_pre_hook(partial(keep_input, name)) for name, layer in layers.items()]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    maps = []
    for name, layer in layers.items():
        height, width = inputs[name].shape[2:]
        probabilities = attention_probabilities(layer, inputs[name])[0]
        stride = round(height / probabilities.shape[1])
        maps.append(AttentionMap(
            name=name.removesuffix('.self_attn'), probabilities=probabilities, block_size=layer.block_size,
            halo_size=layer.halo_size, height=height, width=width, stride=stride))
    return maps, logits
