"""Halo attention by scaled_dot_product_attention: equal to the composed one, and fit for FlashAttention."""
import sys

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import reference as ref
from operators import difference, results

from config import get_config
from halonet import build_halonet
from model import attention
from model.layers import use_operators

# B, N, d, v, H, W, block, halo, stride
SHAPES = [
    (2, 8, 32, 32, 16, 16, 8, 2, 1),    # layers of halonet_26t
    (1, 8, 64, 64, 16, 16, 8, 2, 2),
    (1, 2, 16, 16, 16, 24, 8, 3, 1),
    (2, 1, 8, 4, 4, 12, 4, 1, 1),       # d != v, not square
    (1, 1, 3, 33, 2, 2, 1, 1, 1),       # values wider than the channels of a query
    (1, 2, 20, 12, 12, 12, 6, 0, 3),    # no halo, as bottleneck attention
    (1, 1, 2, 2, 9, 12, 3, 4, 1),       # a halo wider than the block
    (2, 3, 5, 7, 11, 6, 4, 3, 1),       # maps that do not divide into blocks
    (1, 2, 4, 4, 13, 17, 8, 2, 2),
    (1, 2, 6, 6, 3, 1, 4, 2, 1),        # smaller than a block
]
MODEL = [*ref.TINY, 'MODEL.STAGES', ['conv halo', 'bot lambda'], 'MODEL.HEADS', [2, 2], 'DATA.IMAGE_SIZE', 48]


def arguments(shape, dtype):
    """Seeded arrays of q, kv, both tables and a gradient of the output; the sizes as keywords."""
    B, N, d, v, H, W, block, halo, stride = shape
    queries, random = (-(-H // stride), -(-W // stride)), np.random.default_rng(0)
    table = 2 * (block + 2 * halo) - 1, d
    shapes = [(B, N * d, *queries), (B, N * (d + v), H, W), table, table, (B, N * v, *queries)]
    arrays = [random.standard_normal(shape).astype(dtype) for shape in shapes]
    return arrays, dict(num_heads=N, block_size=block, halo_size=halo, stride=stride)


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-6), ('float64', 1e-12)])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_output_and_gradients_equal_the_composed_attention(shape, dtype, tolerance):
    inputs, sizes = arguments(shape, dtype)
    ours = results(attention.sdpa_halo_attention, inputs, **sizes)
    theirs = results(attention.halo_attention, inputs, **sizes)
    for found, expected in zip(ours, theirs):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert difference(found, expected) < tolerance


def build(kind, opts=MODEL):
    return ref.fill_seeded(build_halonet(get_config(None, [*opts, 'MODEL.ATTENTION', kind])))


@pytest.mark.parametrize('size', [48, None], ids=['halo, bottleneck and lambda', 'any size'])
def test_model_trains_as_the_composed_one_also_as_a_static_program(size):
    images, found = paddle.to_tensor(ref.seeded_images((3, 3, 48, 48))), []
    for kind, static in ('composed', False), ('sdpa', False), ('sdpa', True):
        model = build(kind, MODEL if size else ref.TINY).train()
        call = model
        if static:
            spec = [paddle.static.InputSpec([None, 3, size, size], 'float32')]
            call = paddle.jit.to_static(model.forward, full_graph=True, input_spec=spec)
        call(images).square().sum().backward()
        found.append(
            {key: value.grad.numpy() for key, value in model.named_parameters() if not value.stop_gradient})
    expected, *others = found
    for ours in others:
        for key, value in expected.items():
            np.testing.assert_allclose(ours[key], value, atol=1e-4 * abs(value).max(), err_msg=key)


def test_saved_program_gives_the_logits(tmp_path):
    model, images = build('sdpa').eval(), ref.seeded_images((2, 3, 48, 48))
    spec = [paddle.static.InputSpec([None, 3, 48, 48], 'float32')]
    paddle.jit.save(model, str(tmp_path / 'net'), input_spec=spec)
    loaded = paddle.jit.load(str(tmp_path / 'net'))
    for logits in ref.run(model, images), ref.run(loaded, images):
        np.testing.assert_allclose(logits, ref.run(build('composed').eval(), images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_flash_attention_would_take_the_arguments(shape, monkeypatch):
    """Paddle's own conditions, under autocast; float64 stands for half precision, which a CPU cannot add."""
    paddle_sdpa, calls = sys.modules['paddle.nn.functional.sdpa'], []
    einsum, sdpa = paddle.einsum, F.scaled_dot_product_attention

    def autocast_einsum(equation, *tensors):
        return einsum(equation, *(x.astype('float64') for x in tensors))

    def record(q, k, v, **options):
        calls.append((q, k, v, options))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(paddle, 'einsum', autocast_einsum)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', record)
    (q, kv, *tables, _), sizes = arguments(shape, 'float64')
    tensors = [paddle.to_tensor(x) for x in (q, kv, *(table.astype('float32') for table in tables))]
    out = attention.sdpa_halo_attention(*tensors, **sizes)
    assert difference(out.numpy(), attention.halo_attention(*tensors, **sizes).numpy()) < 1e-12

    (q, k, v, options), = calls
    params = paddle_sdpa.SDPParams(
        q.shape, k.shape, v.shape, None, 0.0, False, options.get('scale'), False, (q.dtype, k.dtype, v.dtype),
        (q.place, k.place, v.place))
    monkeypatch.setattr(paddle_sdpa, 'check_all_tensors_on_device', lambda params: True)
    monkeypatch.setattr(paddle_sdpa, 'check_flash_attention_hardware_support', lambda device: True)
    monkeypatch.setattr(paddle_sdpa, '_config', {'flash_attn': {'support_dtypes': (paddle.float64,)}})
    assert paddle_sdpa.can_use_flash_attention(params)
    assert q.shape[2] == k.shape[2] == v.shape[2] and k.shape[1] == v.shape[1]


@pytest.mark.parametrize('kind', ['halo_attention', 'sdpa_halo_attention'])
def test_no_operator_is_used_whose_gradient_adds_in_any_order_on_a_gpu(kind):
    (*inputs, _), sizes = arguments(SHAPES[7], 'float32')

    def call(q, kv, height_rel, width_rel):
        return getattr(attention, kind)(q, kv, height_rel, width_rel, **sizes)

    spec = [paddle.static.InputSpec(x.shape, 'float32') for x in inputs]
    program = paddle.jit.to_static(call, full_graph=True, input_spec=spec).concrete_program.main_program
    names = {operator.name() for operator in program.global_block().ops}
    assert 'pd_op.unfold' in names and not [
        name for name in names if any(word in name for word in ('gather', 'index', 'take', 'embedding'))]


def test_the_other_layers_use_paddles_operators(monkeypatch):
    monkeypatch.setattr(attention.ops, 'load', lambda: pytest.fail('compiled operators were asked for'))
    layer = use_operators(attention.HaloAttention(8, 8, 2, 4, 1), 'sdpa')
    assert layer(paddle.ones([1, 8, 8, 8])).shape == [1, 8, 8, 8]
