"""Positions for attention: relative tables, none, and sines of rows and columns.

Axes: B batch, C channels, H and W height and width of the feature map in pixels, d width of a query head.
"""
import paddle
from paddle import Tensor, nn
from paddle.nn.initializer import Normal


class RelativePosition(nn.Layer):
    """Two learnt tables of vectors, for vertical and for horizontal offsets between query and key.

    `height` and `width` are those of the window in pixels.
    """

    def __init__(self, height: int, width: int, head_dim: int) -> None:
        super().__init__()
        normal = Normal(std=head_dim ** -0.5)
        self.height_rel = self.create_parameter([2 * height - 1, head_dim], default_initializer=normal)
        self.width_rel = self.create_parameter([2 * width - 1, head_dim], default_initializer=normal)

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return both tables, (2 height - 1, d) and (2 width - 1, d). They are the same for all queries q.

        Paddle's summary, flops and quantisation need layers that are called with an input.
        """
        return self.height_rel, self.width_rel


class NoPosition(nn.Layer):
    """Two tables of zeros in place of `RelativePosition`: the logits depend on the content alone."""

    def __init__(self, height: int, width: int, head_dim: int) -> None:
        super().__init__()
        for name, side in (('height_rel', height), ('width_rel', width)):
            self.register_buffer(name, paddle.zeros([2 * side - 1, head_dim]), persistable=False)

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return both tables, (2 height - 1, d) and (2 width - 1, d)."""
        return self.height_rel, self.width_rel


class AbsolutePosition(nn.Layer):
    """Add sines and cosines of each pixel's row and column: (B, C, H, W) -> (B, C, H, W). No parameters.

    A quarter of the channels each has sine and cosine of the row, and of the column, at wavelengths from 2 pi
    to 20000 pi pixels (Vaswani et al. 2017, 'Attention Is All You Need', arXiv 1706.03762, for each axis).
    Channels that are left over get nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        C, H, W = x.shape[1], x.shape[2], x.shape[3]
        waves = C // 4
        frequency = 10000.0 ** (-paddle.arange(waves, dtype='float32') / waves)              # (C/4,)
        rows = frequency.unsqueeze(1) * paddle.arange(H, dtype='float32')                    # (C/4, H)
        columns = frequency.unsqueeze(1) * paddle.arange(W, dtype='float32')                 # (C/4, W)
        rows = paddle.concat([rows.sin(), rows.cos()]).unsqueeze(-1).tile([1, 1, W])         # (C/2, H, W)
        columns = paddle.concat([columns.sin(), columns.cos()]).unsqueeze(1).tile([1, H, 1])
        places = [rows, columns, paddle.zeros([C - 4 * waves, H, W])]
        return x + paddle.concat(places).astype(x.dtype)
