"""The lambda layer, with the axes of model/attention.py."""
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.nn.initializer import Normal, Uniform

from model.attention import mean_pool, projection, query_width
from model.layers import convolve, norm_act


class PositionLambdas(nn.Conv3D):
    """Position lambdas: a linear function of the neighbours of each pixel. v (B, v, H, W) -> (B, v, d, H, W).

    Its parameters are those of timm's convolution over (side, side, 1), which treats the channels of v
    separately. A 2D convolution computes the same, faster.
    """

    def __init__(self, d: int, side: int) -> None:
        super().__init__(1, d, (side, side, 1), weight_attr=Normal(std=d ** -0.5),
                         bias_attr=Uniform(-1 / side, 1 / side))

    def forward(self, v: Tensor) -> Tensor:
        _, width, H, W = v.shape
        kernel = self.weight.squeeze(-1)                                    # (d, 1, side, side)
        v = v.reshape([-1, 1, H, W])                                        # (B*v, 1, H, W)
        out = F.conv2d(v, kernel, self.bias, padding=kernel.shape[-1] // 2)  # (B*v, d, H, W)
        return out.reshape([-1, width, out.shape[1], H, W])


def in_32_bits(x: Tensor) -> Tensor:
    """Return `x` in float32 if it has 16 bits."""
    return x.astype('float32') if x.dtype in (paddle.float16, paddle.bfloat16) else x


class LambdaLayer(nn.Layer):
    """Lambda layer: applies a linear function per pixel to its query. (B, C, H, W) -> (B, width, H', W').

    Bello 2021, 'LambdaNetworks', arXiv 2102.08602, with the positions as a convolution of `side` x `side`
    pixels. H' = ceil(H/stride), by pooling. Keys of width d and values of width v = width / N are common
    to all heads.
    """

    operators = 'auto'

    def __init__(self, in_width: int, width: int, num_heads: int, side: int, stride: int = 1, *,
                 head_dim: int = 0) -> None:
        super().__init__()
        d = query_width(width, num_heads, head_dim or 16, 1.0)              # 16 is timm's
        self.num_heads = num_heads
        self.d, self.v = d, width // num_heads
        self.out_width = width
        self.qkv = projection(in_width, num_heads * d + d + self.v)
        self.norm_q = nn.BatchNorm2D(num_heads * d)
        self.norm_v = nn.BatchNorm2D(self.v)
        self.no_act = nn.Identity()
        self.conv_lambda = PositionLambdas(d, side)
        self.pool = mean_pool(stride)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2], x.shape[3]
        q, k, v = convolve(self, self.qkv, x).split([self.num_heads * self.d, self.d, self.v], axis=1)
        q = norm_act(self, self.norm_q, self.no_act, q)                     # (B, N*d, H, W)
        q = q.reshape([-1, self.num_heads, self.d, H * W])                  # (B, N, d, H*W)
        k = F.softmax(k.reshape([-1, self.d, H * W]), axis=-1)              # (B, d, H*W)
        v = norm_act(self, self.norm_v, self.no_act, v)                     # (B, v, H, W)
        with paddle.amp.auto_cast(enable=False):    # rounded to 16 bits, these products lose the gradients
            q, k, v = in_32_bits(q), in_32_bits(k), in_32_bits(v)
            content = v.reshape([-1, self.v, H * W]).matmul(k, transpose_y=True)     # (B, v, d)
            position = self.conv_lambda(v).reshape([-1, self.v, self.d, H * W])      # (B, v, d, H*W)
            lambdas = position + content.unsqueeze(-1)                               # (B, v, d, H*W)
            out = paddle.einsum('bndm,bvdm->bnvm', q, lambdas)                       # (B, N, v, H*W)
        return self.pool(out.reshape([-1, self.out_width, H, W]))
