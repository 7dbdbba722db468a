"""The compiled halo attention against Paddle's operators and finite differences, and when each is used."""
from pathlib import Path

from system import paddle_internals

import numpy as np
import paddle
import pytest
from operators import COMPILED, difference, results

import ops
from model import attention
from model.layers import ConvNormAct, compiled, use_operators

ROOT = Path(__file__).resolve().parents[2]
pytestmark = COMPILED

# B, N, d, v, Y, X, block, halo, stride
GRID = [
    (2, 8, 32, 32, 2, 2, 8, 2, 1),    # the layers of halonet_26t, halonet_50ts and others
    (2, 8, 64, 64, 2, 2, 8, 2, 2),
    (1, 4, 32, 32, 4, 4, 8, 3, 1),
    (1, 4, 16, 16, 3, 2, 8, 3, 1),
    (2, 1, 8, 4, 1, 3, 4, 1, 1),      # one head, d != v, not square
    (2, 3, 5, 7, 2, 1, 4, 3, 2),      # widths that are no multiple of a vector
    (1, 2, 20, 12, 2, 2, 6, 0, 3),    # no halo, stride 3
    (1, 1, 3, 33, 2, 2, 1, 1, 1),     # blocks of one pixel
    (1, 2, 4, 4, 1, 1, 20, 2, 1),     # windows wider than a vector
]


def sizes(shape):
    _, N, _, _, _, _, block, halo, stride = shape
    return dict(num_heads=N, block_size=block, halo_size=halo, stride=stride)


def arrays(shape, dtype, H=None, W=None):
    """Seeded q, kv, both tables and a gradient of the output; H and W replace those of whole blocks."""
    B, N, d, v, Y, X, block, halo, stride = shape
    H, W = H or Y * block, W or X * block
    queries, w = (-(-H // stride), -(-W // stride)), block + 2 * halo
    random = np.random.default_rng(0)
    draw = lambda *size: random.standard_normal(size).astype(dtype)  # noqa: E731
    return (
        draw(B, N * d, *queries), draw(B, N * (d + v), H, W), draw(2 * w - 1, d) * d**-0.5,
        draw(2 * w - 1, d) * d**-0.5, draw(B, N * v, *queries),
    )


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-6), ('float64', 1e-12)])
@pytest.mark.parametrize('shape', GRID)
def test_output_and_gradients_equal_the_composed_path(shape, dtype, tolerance):
    kwargs = sizes(shape)
    inputs = arrays(shape, dtype)
    for ours, theirs in zip(
        results(ops.halo_attention, inputs, **kwargs), results(attention.halo_attention, inputs, **kwargs)
    ):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert difference(ours, theirs) < tolerance


def test_empty_feature_map_gives_empty_output_and_zero_gradients():
    q, kv, height_rel, width_rel = (
        paddle.ones(shape) for shape in ([2, 64, 0, 8], [2, 128, 0, 8], [15, 2], [15, 2])
    )
    for x in (q, kv, height_rel, width_rel):
        x.stop_gradient = False
    out = ops.halo_attention(q, kv, height_rel, width_rel, num_heads=32, block_size=4, halo_size=2)
    out.sum().backward()
    assert out.shape == [2, 64, 0, 8] and kv.grad.shape == kv.shape
    assert not height_rel.grad.any() and not width_rel.grad.any()


def test_gradients_equal_finite_differences():
    shape = (1, 2, 3, 4, 2, 1, 4, 1, 2)
    kwargs = sizes(shape)
    *inputs, weight = arrays(shape, 'float64')
    _, *gradients = results(ops.halo_attention, (*inputs, weight), **kwargs)

    def loss(changed, which):
        tensors = [paddle.to_tensor(changed if i == which else x) for i, x in enumerate(inputs)]
        return float((ops.halo_attention(*tensors, **kwargs).numpy() * weight).sum())
    for which, gradient in enumerate(gradients):
        numeric = np.zeros_like(gradient)
        for index in np.ndindex(*gradient.shape):
            step = np.zeros_like(gradient)
            step[index] = 1e-6
            numeric[index] = (loss(inputs[which] + step, which) - loss(inputs[which] - step, which)) / 2e-6
        assert difference(gradient, numeric) < 1e-8


def reference(q, kv, height_rel, width_rel, num_heads, block_size, halo_size, stride):
    """Query by query, for any map: the window ends where the zeros around the map end."""
    d = height_rel.shape[1]
    b, w = block_size // stride, block_size + 2 * halo_size
    v = kv.shape[1] // num_heads - d
    padded = np.pad(kv, [(0, 0), (0, 0), (halo_size, halo_size), (halo_size, halo_size)])
    out = np.zeros((q.shape[0], num_heads * v, *q.shape[2:]))
    for B, head, qy, qx in np.ndindex(q.shape[0], num_heads, *q.shape[2:]):
        y, x = qy // b * block_size, qx // b * block_size
        window = padded[B, head * (d + v):(head + 1) * (d + v), y:y + w, x:x + w]
        query = q[B, head * d:(head + 1) * d, qy, qx]
        rows = height_rel[w - 1 - qy % b:][:window.shape[1]] @ query
        columns = width_rel[w - 1 - qx % b:][:window.shape[2]] @ query
        logits = np.einsum('c,cyx->yx', query, window[:d]) * d ** -0.5 + rows[:, None] + columns
        weights = np.exp(logits - logits.max())
        out[B, head * v:(head + 1) * v, qy, qx] = (window[d:] * weights).sum((1, 2)) / weights.sum()
    return out


@pytest.mark.parametrize('shape, H, W', [
    ((1, 2, 4, 6, 2, 2, 4, 1, 1), 8, 8),
    ((1, 2, 4, 6, 2, 2, 4, 1, 1), 7, 9),
    ((2, 1, 5, 3, 2, 2, 8, 3, 1), 11, 3),
    ((1, 2, 4, 4, 2, 2, 8, 2, 2), 17, 13),
])
def test_feature_map_of_any_size_equals_the_reference(shape, H, W):
    kwargs = sizes(shape)
    inputs = arrays(shape, 'float64', H, W)
    out, *gradients = results(ops.halo_attention, inputs, **kwargs)
    expected = reference(*inputs[:4], **kwargs)
    assert difference(out, expected) < 1e-12
    for ours, composed in zip([out, *gradients], results(attention.halo_attention, inputs, **kwargs)):
        assert difference(ours, composed) < 1e-12
    for which, gradient in enumerate(gradients):         # along one random direction each
        step = np.random.default_rng(which).standard_normal(gradient.shape) * 1e-6
        moved = [[x + sign * step if i == which else x for i, x in enumerate(inputs[:4])] for sign in (1, -1)]
        numeric = ((reference(*moved[0], **kwargs) - reference(*moved[1], **kwargs)) * inputs[4]).sum() / 2
        assert abs((gradient * step).sum() - numeric) < 1e-7 * np.linalg.norm(gradient) * np.linalg.norm(step)


def test_results_are_the_same_for_any_number_of_threads():
    shape = (2, 8, 16, 16, 2, 2, 8, 2, 1)
    kwargs = sizes(shape)
    runs = []
    for threads in (1, 2, 3, 2):
        paddle_internals.set_num_threads(threads)
        runs.append(results(ops.halo_attention, arrays(shape, 'float32'), **kwargs))
    paddle_internals.set_num_threads(1)
    for run in runs[1:]:
        assert all((a == b).all() for a, b in zip(runs[0], run))


@pytest.mark.parametrize('bits', [0x7fc00000, 0xffc00000, 0x7fc00001, 0xffffffff])
def test_nan_propagates(bits):
    q, kv, rows, columns, _ = arrays(GRID[4], 'float32')
    kv[0, 0, 0, 0] = np.array(bits, 'uint32').view('float32')
    q, kv, rows, columns = map(paddle.to_tensor, (q, kv, rows, columns))
    out = ops.halo_attention(q, kv, rows, columns, **sizes(GRID[4]))
    assert out[0].isnan().any() and not out[1].isnan().any()


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(num_heads=3), 'num_heads'), (dict(halo_size=3), 'tables'),
        (dict(block_size=5, halo_size=1), 'tables'),
    ],
)
def test_wrong_arguments_are_named(change, message):
    shape = (2, 2, 8, 8, 2, 2, 4, 2, 1)
    tensors = [paddle.to_tensor(x) for x in arrays(shape, 'float32')[:4]]
    with pytest.raises(OSError, match=message):           # what Paddle makes of a failed PD_CHECK
        ops.halo_attention(*tensors, **{**sizes(shape), **change})


SECOND_DERIVATIVES = {                               # operator -> (its call, the shapes of its inputs)
    'halo_attention': (lambda *x: ops.halo_attention(*x, num_heads=2, block_size=4, halo_size=1),
                       [(1, 8, 8, 8), (1, 16, 8, 8), (11, 4), (11, 4)]),
    'convolution': (ops.convolution, [(2, 3, 8, 8), (4, 3, 3, 3)]),
    'batch_norm_act': (lambda *x: ops.batch_norm_act(*x, 1e-5, 'silu')[0], [(2, 3, 8, 8), (3,), (3,)]),
    'max_pool': (ops.max_pool, [(2, 3, 8, 8)]),
}


@pytest.mark.parametrize('operator, which', [(name, i) for name, (_, shapes) in SECOND_DERIVATIVES.items()
                                             for i in range(len(shapes))])
def test_second_derivatives_are_refused(operator, which):
    call, shapes = SECOND_DERIVATIVES[operator]
    inputs = [paddle.randn(shape) for shape in shapes]
    for x in inputs:
        x.stop_gradient = False
    # the first one is no error
    (first,) = paddle.grad(
        call(*inputs).square().sum(), [inputs[which]], create_graph=True
    )
    with pytest.raises(OSError, match='no second derivatives. MODEL.ATTENTION composed'):
        first.square().sum().backward()


def test_layer_trains_the_same_as_a_static_program_with_any_batch():
    def run(kind, static):
        paddle.seed(0)
        layer = use_operators(attention.HaloAttention(32, 32, 4, 4, 1, stride=2), kind)
        call = layer
        if static:
            call = paddle.jit.to_static(
                layer, full_graph=True, input_spec=[paddle.static.InputSpec([None, 32, 8, 8])]
            )
        found = []
        for B in (2, 3):
            x = paddle.to_tensor(
                np.random.default_rng(B).standard_normal((B, 32, 8, 8)).astype('float32'), stop_gradient=False
            )
            out = call(x)
            (out * out).sum().backward()
            found += [out.numpy(), x.grad.numpy()] + [p.grad.numpy() for p in layer.parameters()]
        return found
    expected = run('composed', static=False)
    for kind, static in [('fused', False), ('fused', True), ('auto', True)]:
        assert max(map(difference, run(kind, static), expected)) < 1e-5


def test_gpu_operator_is_used_only_if_fused_is_set(monkeypatch):
    attend, convolve = attention.HaloAttention(8, 8, 2, 4, 1), ConvNormAct(8, 8, 1)
    monkeypatch.setattr(paddle, 'get_device', lambda: 'gpu:0')
    monkeypatch.setattr(ops, 'load', lambda: ('cpu', 'gpu'))
    assert not compiled(attend, ('cpu', 'gpu'))  # auto: nobody has measured it
    assert compiled(use_operators(attend, 'fused'), ('cpu', 'gpu')) and not compiled(
        use_operators(convolve, 'fused')
    )
    monkeypatch.setattr(ops, 'load', lambda: ('cpu',))
    with pytest.raises(ValueError, match='nvcc'):
        compiled(attend, ('cpu', 'gpu'))
