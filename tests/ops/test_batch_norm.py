"""The compiled batch norm with its activation against Paddle's, in float64, and finite differences."""
from system import paddle_internals

import numpy as np
import paddle
import pytest
from operators import COMPILED
from paddle import nn

import ops
from model.layers import norm_act, use_operators

pytestmark = COMPILED
ACTS = {'identity': nn.Identity, 'relu': nn.ReLU, 'silu': nn.Silu}


class NormAct(nn.Layer):
    """A batch norm and an activation, by layers.norm_act."""

    operators = 'auto'

    def __init__(self, width, act):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2D(width), act()

    def forward(self, x):
        return norm_act(self, self.norm, self.act, x)


def norm(width, act, dtype, kind):
    """A NormAct with seeded weights and running statistics, in training."""
    layer = use_operators(NormAct(width, ACTS[act]), kind)
    layer.to(dtype=dtype)
    random = np.random.default_rng(0)
    for name, value in layer.state_dict().items():
        value.set_value(
            random.uniform(0.5, 1.5, value.shape).astype(dtype) * (-1 if name == 'norm.bias' else 1)
        )
    layer.train()
    return layer


def run(layer, x, gradient):
    """Output, running statistics and gradients."""
    x = paddle.to_tensor(x, stop_gradient=False)
    out = layer(x)
    out.backward(paddle.to_tensor(gradient))
    values = [
        out, layer.norm._mean, layer.norm._variance, x.grad, layer.norm.weight.grad, layer.norm.bias.grad,
    ]
    return [value.numpy().astype('float64') for value in values]


@pytest.mark.parametrize('act', ACTS)
@pytest.mark.parametrize(
    'shape', [(4, 24, 16, 16), (3, 5, 7, 3), (1, 2, 1, 5), (16, 3, 33, 30), (1, 6, 1, 1)]
)
def test_equals_paddle(shape, act):
    random = np.random.default_rng(1)
    x, gradient = (3 + 2 * random.standard_normal(shape), random.standard_normal(shape))
    theirs = run(norm(shape[1], act, 'float64', 'composed'), x, gradient)
    for dtype, tolerance in (('float64', 1e-12), ('float32', 3e-6)):
        ours = run(norm(shape[1], act, dtype, 'fused'), x.astype(dtype), gradient.astype(dtype))
        for i, (a, b) in enumerate(zip(ours, theirs)):
            # Paddle's momentum is a float32 in any case
            bound = (
                max(tolerance, 1e-7) if i in (1, 2) else tolerance
            )
            assert np.linalg.norm(a - b) <= bound * max(np.linalg.norm(b), 1)


@pytest.mark.parametrize('act', ACTS)
def test_nan_and_infinity_propagate(act):
    x = np.zeros((2, 3, 4, 4), 'float32')
    x[1, 2, 3, 0] = np.nan
    out, *_, gradient, _, _ = run(norm(3, act, 'float32', 'fused'), x, np.ones_like(x))
    assert np.isnan(out[:, 2]).all() and np.isnan(gradient[:, 2]).all() and np.isfinite(out[:, :2]).all()


@pytest.mark.parametrize('act', ACTS)
def test_gradients_equal_finite_differences(act):
    random = np.random.default_rng(2)
    inputs = [random.standard_normal(shape) for shape in [(2, 2, 3, 3), (2,), (2,)]]
    weight = random.standard_normal((2, 2, 3, 3))

    def loss(arrays):
        tensors = [paddle.to_tensor(x, stop_gradient=False) for x in arrays]
        return (ops.batch_norm_act(*tensors, 1e-5, act)[0] * paddle.to_tensor(weight)).sum(), tensors
    total, tensors = loss(inputs)
    total.backward()
    for which, tensor in enumerate(tensors):
        for index in np.ndindex(*tensor.shape):
            moved = [[x.copy() for x in inputs] for _ in range(2)]
            moved[0][which][index] += 1e-6
            moved[1][which][index] -= 1e-6
            numeric = (loss(moved[0])[0] - loss(moved[1])[0]).item() / 2e-6
            assert abs(tensor.grad[index].item() - numeric) < 1e-7


def test_variance_is_exact_with_a_large_mean():
    x = (1000 + np.random.default_rng(0).standard_normal((4, 3, 9, 9))).astype('float32')
    _, mean, variance = ops.batch_norm_act(
        paddle.to_tensor(x), paddle.ones([3]), paddle.zeros([3]), 1e-5, 'relu'
    )
    np.testing.assert_allclose(mean.numpy(), x.astype('float64').mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(variance.numpy(), x.astype('float64').var((0, 2, 3)), rtol=1e-4)


def test_empty_batch_keeps_the_statistics():
    layer = norm(3, 'relu', 'float32', 'fused')
    before = [value.numpy() for value in (layer.norm._mean, layer.norm._variance)]
    assert layer(paddle.zeros([0, 3, 4, 4])).shape == [0, 3, 4, 4]
    for old, new in zip(before, (layer.norm._mean, layer.norm._variance)):
        assert (old == new.numpy()).all()


def test_results_are_the_same_for_any_number_of_threads():
    random = np.random.default_rng(0)
    x, gradient = (random.standard_normal((4, 24, 16, 16)).astype('float32') for _ in range(2))
    runs = []
    for threads in (1, 2, 3, 2):
        paddle_internals.set_num_threads(threads)
        runs.append(run(norm(24, 'silu', 'float32', 'fused'), x, gradient))
    assert all((a == b).all() for other in runs[1:] for a, b in zip(runs[0], other))
