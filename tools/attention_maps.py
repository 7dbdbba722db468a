"""What each query of a halo attention looks at: the probabilities that the model uses, read out of the layer itself.

A layer that is given indicators of positions in place of its values answers with its probabilities. So this holds for
any implementation of the attention, composed or fused, and there is no second one that could differ.
"""
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import paddle
from paddle import nn

from model.attention import HaloAttention
from model.layers import convolve


@dataclass
class AttentionMap:
    """The attention of one layer to one picture, with the axes of model/attention.py.

    probabilities (N, Hq, Wq, w, w): of each head and query over the w x w window, whose corner lies `halo_size` pixels
    before the block's. They add up to 1 with those of the zeros around the map; of a map that does not divide into blocks
    only the cells inside are known, and the others are 0.
    """

    name: str
    probabilities: paddle.Tensor
    block_size: int
    halo_size: int
    height: int                                     # of the map of keys, in its pixels
    width: int
    stride: int                                     # between queries, in those pixels

    def query_at(self, x, y):
        """The (row, column) of the query nearest to a point of the picture, both coordinates in 0 to 1."""
        rows, columns = self.probabilities.shape[1:3]
        return min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)

    def query_box(self, row, column):
        """Left, top, right, bottom of a query's pixel, in pixels of the map."""
        return column * self.stride, row * self.stride, column * self.stride + 1, row * self.stride + 1

    def block_box(self, row, column):
        """Left, top, right, bottom of the block that a query is in, in pixels of the map."""
        left, top = (i * self.stride // self.block_size * self.block_size for i in (column, row))
        return left, top, left + self.block_size, top + self.block_size

    def window_box(self, row, column):
        """Left, top, right, bottom of what a query sees; may reach beyond the map."""
        left, top, right, bottom = self.block_box(row, column)
        return left - self.halo_size, top - self.halo_size, right + self.halo_size, bottom + self.halo_size


@contextmanager
def replaced(layer, **parts):
    """Let `layer` have other sublayers and attributes for a while."""
    own = {name: getattr(layer, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(layer, name, part)
        yield layer
    finally:
        for name, part in own.items():
            setattr(layer, name, part)


class KeysAndPositions(nn.Layer):
    """The keys of a layer's own `kv`, by `project`, and for values the index of each pixel in a grid of w x w.

    (B, C, H, W) -> (B, N*(d + w*w), H, W).
    The grid repeats; a window of w x w pixels, wherever it lies, holds each of its places once.
    """

    def __init__(self, project, num_heads, d, w):
        super().__init__()
        self.project, self.num_heads, self.d, self.w = project, num_heads, d, w

    def forward(self, x):
        kv = self.project(x)
        B, _, H, W = kv.shape
        keys = kv.reshape([B, self.num_heads, -1, H, W])[:, :, :self.d]                   # (B, N, d, H, W)
        place = (paddle.arange(H) % self.w).unsqueeze(1) * self.w + paddle.arange(W) % self.w    # (H, W)
        place = nn.functional.one_hot(place, self.w ** 2).transpose([2, 0, 1]).astype(kv.dtype)  # (w*w, H, W)
        place = place.expand([B, self.num_heads, *place.shape])                           # (B, N, w*w, H, W)
        return paddle.concat([keys, place], axis=2).reshape([B, -1, H, W])                # (B, N*(d+w*w), H, W)


@paddle.no_grad()
def attention_probabilities(layer, x):
    """The probabilities of a HaloAttention for its input x (B, C, H, W): (B, N, Hq, Wq, w, w), as AttentionMap has them."""
    N, d, block, halo = layer.num_heads, layer.pos_embed.height_rel.shape[1], layer.block_size, layer.halo_size
    w = block + 2 * halo
    # a ring of zeros, as wide as blocks that cover the halo, is what the layer pads with; as part of the map it has places
    ring = 0 if x.shape[2] % block or x.shape[3] % block else -(-halo // block) * block
    operators = layer.operators if x.place.is_cpu_place() else 'composed'    # a GPU's kernels take 128 values of a head at most
    project = partial(convolve, layer, layer.kv)
    with replaced(layer, kv=KeysAndPositions(project, N, d, w), pool=nn.Identity(), operators=operators):
        out = layer(nn.functional.pad(x, [ring] * 4))                                     # (B, N*w*w, ring+Hq+ring, ...)
    B, (height, width) = x.shape[0], out.shape[2:]
    stride = round((x.shape[2] + 2 * ring) / height)
    out = out.reshape([B, N, w, w, height, width]).transpose([0, 1, 4, 5, 2, 3])          # (B, N, ., ., w, w), by place
    rows, columns = (range(ring // stride, count - ring // stride) for count in (height, width))   # Hq, Wq of them
    out = paddle.stack([out[:, :, i].index_select(places(i * stride, block, halo), axis=3) for i in rows], axis=2)
    return paddle.stack([out[:, :, :, j].index_select(places(j * stride, block, halo), axis=4) for j in columns], axis=3)


def places(position, block, halo):
    """Where in the grid the rows (or columns) of the window of a query at `position` lie, in their order: (w,)."""
    w = block + 2 * halo
    return (position // block * block - halo + paddle.arange(w)) % w


@paddle.no_grad()
def attention_maps(model, images):
    """The AttentionMaps of the halo attention layers of a model, in their order, for images (1, 3, H, W); and the logits."""
    layers = {name: layer for name, layer in model.named_sublayers() if isinstance(layer, HaloAttention)}
    inputs = {}
    hooks = [layer.register_forward_pre_hook(lambda layer, x, name=name: inputs.__setitem__(name, x[0]))
             for name, layer in layers.items()]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    maps = []
    for name, layer in layers.items():
        x, probabilities = inputs[name], attention_probabilities(layer, inputs[name])[0]
        maps.append(AttentionMap(name.removesuffix('.self_attn'), probabilities, layer.block_size, layer.halo_size, x.shape[2],
                                 x.shape[3], round(x.shape[2] / probabilities.shape[1])))
    return maps, logits
