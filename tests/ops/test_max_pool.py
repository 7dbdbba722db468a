"""The compiled pool of the stem against Paddle's, to the bit."""
from system import paddle_internals

import numpy as np
import paddle
import pytest
from operators import COMPILED
from paddle import nn

from model.layers import max_pool

pytestmark = COMPILED


class Pool(nn.Layer):
    """A stem's pool, by layers.max_pool."""

    def __init__(self, kind):
        super().__init__()
        self.operators, self.pool = kind, nn.MaxPool2D(3, 2, 1)

    def forward(self, x):
        return max_pool(self, self.pool, x)


def pooled(kind, x):
    """Result and gradient of x."""
    x = paddle.to_tensor(x, stop_gradient=False)
    out = Pool(kind)(x)
    out.backward(
        paddle.to_tensor(np.random.default_rng(1).standard_normal(out.shape).astype(x.numpy().dtype))
    )
    return out.numpy(), x.grad.numpy()


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize(
    'shape',
    [
        (2, 3, 16, 16), (1, 2, 1, 1), (1, 1, 2, 1), (3, 2, 7, 5), (1, 4, 33, 66), (2, 2, 30, 31),
        (1, 1, 3, 130),
    ],
)
def test_equals_paddle(shape, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    for values in (x, np.maximum(x, 0), np.round(x)):                       # also equal pixels
        for ours, theirs in zip(pooled('fused', values), pooled('composed', values)):
            assert (ours == theirs).all()


def test_nan_and_infinity_propagate():
    x = np.zeros((1, 1, 6, 6), 'float32')
    x[0, 0, 3, 3] = np.nan
    out, gradient = pooled('fused', x)
    assert np.isnan(out[0, 0]).tolist() == [[False] * 3, [False, True, True], [False, True, True]]
    assert np.isfinite(gradient).all()
    assert (pooled('fused', np.full((1, 1, 5, 4), -np.inf))[0] == -np.inf).all()


def test_empty_batch_and_any_number_of_threads():
    assert Pool('fused')(paddle.zeros([0, 3, 8, 7])).shape == [0, 3, 4, 4]
    x = np.random.default_rng(0).standard_normal((2, 5, 20, 18)).astype('float32')
    try:
        for threads in (1, 3):
            paddle_internals.set_num_threads(threads)
            for a, b in zip(pooled('fused', x), pooled('composed', x)):
                assert (a == b).all()
    finally:
        paddle_internals.set_num_threads(2)
