"""The model in training against timm's figures, against a plain attention, and in the ways it is used."""
from contextlib import contextmanager
from functools import partial

from tools.deployed import look_windows_up

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import reference as ref

from config import get_config
from halonet import build_halonet, parse_stage
from model import lambda_layer
from model.attention import HaloAttention, halo_attention, sdpa_halo_attention
from model.blocks import Bottleneck, DropPath
from model.positions import AbsolutePosition

MODELS = ['halonet_26t_256', 'halonet_50ts_256']


def build(name, *opts):
    return build_halonet(get_config(f'configs/{name}.yaml', opts))


def build_tiny(*opts):
    return build_halonet(get_config(None, [*ref.TINY, *opts]))


@pytest.fixture(autouse=True)
def repo_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


# ---- timm's figures

@pytest.mark.parametrize('steps', [2, pytest.param(6, marks=pytest.mark.slow)])
def test_training_trajectory(steps):
    """The losses of timm: AdamW (lr 1e-4, weight decay 0.05 on matrices and kernels), label smoothing
    0.1, one batch of 8, all layers in train mode."""
    model = ref.fill_seeded(build('halonet_26t_256'))
    model.train()
    decays = {key: p.ndim > 1 and not key.endswith('_rel') for key, p in model.named_parameters()}
    groups = [
        {
            'params': [p for key, p in model.named_parameters() if decays[key] == decay],
            'weight_decay': 0.05 * decay,
        }
        for decay in (True, False)
    ]
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=groups)
    images = paddle.to_tensor(ref.seeded_images((8, 3, 256, 256)))
    labels = paddle.to_tensor(np.random.default_rng([0, 9]).integers(0, 1000, 8))
    targets = F.label_smooth(F.one_hot(labels, 1000), epsilon=0.1)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), targets, soft_label=True)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(ref.TIMM_LOSSES[0], rel=1e-5)
    assert losses[1] == pytest.approx(ref.TIMM_LOSSES[1], rel=1e-3)
    assert losses == pytest.approx(ref.TIMM_LOSSES[:steps], rel=0.01)


# ---- attention

def attention_inputs(B=2, N=2, d=4, v=4, block=4, halo=1, stride=1, H=8, W=8):
    rng, w = np.random.default_rng(0), block + 2 * halo
    shapes = (
        (B, N * d, -(-H // stride), -(-W // stride)), (B, N * (d + v), H, W), (2 * w - 1, d),
        (2 * w - 1, d),
    )
    sizes = {'num_heads': N, 'block_size': block, 'halo_size': halo, 'stride': stride}
    return [rng.normal(size=shape) for shape in shapes], sizes


CASES = [
    {},
    {'H': 8, 'W': 12},
    {'H': 12, 'W': 4, 'B': 1, 'N': 1},
    {'stride': 2},
    {'stride': 4, 'halo': 3, 'W': 12},              # one query in a block
    {'halo': 0},
    {'block': 2, 'halo': 3, 'H': 6, 'W': 4},        # a halo wider than the block
    {'block': 3, 'halo': 1, 'H': 6, 'W': 9, 'B': 1},
    {'v': 6, 'N': 3},
    {'d': 2, 'v': 8, 'stride': 2, 'halo': 2, 'H': 4, 'W': 8},
    {'d': 5, 'v': 1, 'B': 3, 'H': 4, 'W': 4},
    # maps that do not divide into blocks
    {'H': 7, 'W': 9},
    {'H': 8, 'W': 5, 'N': 1},                       # one side fits
    {'H': 3, 'W': 1, 'halo': 2},                    # smaller than a block
    {'H': 7, 'W': 5, 'stride': 2},                  # odd sides: ceil(side / 2) queries
    {'H': 3, 'W': 6, 'stride': 4, 'halo': 3},
    {'H': 6, 'W': 9, 'stride': 2, 'v': 6, 'halo': 2},
    {'H': 5, 'W': 6, 'halo': 0},
    {'H': 5, 'W': 4, 'block': 3, 'halo': 5, 'B': 1},  # a halo that covers more than the map
]


@pytest.mark.parametrize('attend', [halo_attention, sdpa_halo_attention])
@pytest.mark.parametrize(
    'case', CASES, ids=lambda case: ','.join(f'{k}{v}' for k, v in case.items()) or 'plain'
)
def test_attention_equals_a_loop(case, attend):
    inputs, sizes = attention_inputs(**case)
    out = attend(*map(paddle.to_tensor, inputs), **sizes).numpy()
    expected = ref.naive_halo_attention(*inputs, **sizes)
    assert out.shape == expected.shape and out.dtype == np.float64
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('window', ['inside', 'query'])
@pytest.mark.parametrize('attend', [halo_attention, sdpa_halo_attention])
@pytest.mark.parametrize(
    'case', CASES, ids=lambda case: ','.join(f'{k}{v}' for k, v in case.items()) or 'plain'
)
def test_windows_of_the_paper_equal_a_loop(case, attend, window):
    inputs, sizes = attention_inputs(**case)
    tensors = [paddle.to_tensor(array, stop_gradient=False) for array in inputs]
    out = attend(*tensors, **sizes, window=window)
    expected = ref.naive_halo_attention(*inputs, **sizes, window=window)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)
    (out * out).sum().backward()                    # a query that sees nothing would give NaN
    assert all(np.isfinite(tensor.grad.numpy()).all() for tensor in tensors)


@pytest.mark.parametrize('attend', [halo_attention, sdpa_halo_attention])
@pytest.mark.parametrize(
    'case', [{'W': 4}, {'stride': 2, 'd': 3, 'v': 1}, {'H': 3, 'W': 1}, {'H': 3, 'W': 4, 'stride': 2}],
    ids=['plain', 'strided', 'ragged', 'ragged and strided'],
)
def test_attention_gradient_equals_finite_differences_of_a_loop(case, attend):
    inputs, sizes = attention_inputs(
        **{'B': 1, 'N': 2, 'd': 2, 'v': 2, 'block': 2, 'halo': 1, 'H': 2, 'W': 2} | case
    )
    tensors = [paddle.to_tensor(a, stop_gradient=False) for a in inputs]
    out = attend(*tensors, **sizes)
    weight = np.random.default_rng(1).normal(size=out.shape)
    (out * paddle.to_tensor(weight)).sum().backward()
    for array, tensor in zip(inputs, tensors):
        expected = np.zeros_like(array)
        for place in np.ndindex(*array.shape):
            value, ends = array[place], []
            for array[place] in (value - 1e-5, value + 1e-5):
                ends.append((ref.naive_halo_attention(*inputs, **sizes) * weight).sum())
            array[place], expected[place] = value, (ends[1] - ends[0]) / 2e-5
        np.testing.assert_allclose(tensor.grad.numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('block, stride, size', [(4, 1, 8), (4, 2, 8), (3, 2, 6), (4, 2, 7), (3, 2, 5)],
                         ids=['plain', 'strided queries', 'pooled', 'odd', 'odd and pooled'])
def test_attention_layer(block, stride, size):
    """1x1 projections, queries at every stride-th pixel; a mean over all pixels if the stride does not
    divide the block."""
    layer = HaloAttention(6, 8, num_heads=2, block_size=block, halo_size=1, stride=stride)
    x = np.random.default_rng(0).normal(size=(2, 6, size, size))
    q, kv = (
        np.einsum('bchw,kc->bkhw', x, p.weight.numpy()[:, :, 0, 0].astype('float64'))
        for p in (layer.q, layer.kv)
    )
    pooled = block % stride != 0
    q = q if pooled else q[:, :, ::stride, ::stride]
    expected = ref.naive_halo_attention(
        q, kv, layer.pos_embed.height_rel.numpy(), layer.pos_embed.width_rel.numpy(), num_heads=2,
        block_size=block, halo_size=1, stride=1 if pooled else stride,
    )
    if pooled:                                      # at the edge the mean is of what there is
        places = range(0, size, stride)
        expected = np.stack(
            [[expected[:, :, y : y + stride, x : x + stride].mean((2, 3)) for x in places] for y in places]
        )
        expected = expected.transpose(2, 3, 0, 1)
    np.testing.assert_allclose(ref.run(layer, x.astype('float32')), expected, rtol=0, atol=2e-6)


# ---- shapes and wrong uses

def test_any_fitting_size():
    model = build_tiny().eval()
    images = ref.seeded_images((2, 3, 32, 64))
    assert ref.run(model, images).shape == (2, 10)
    assert list(model.forward_features(paddle.to_tensor(images)).shape) == [2, 32, 4, 8]


@pytest.mark.parametrize('heads', [0, 3, -2])
def test_heads_that_do_not_divide_the_width_are_refused(heads):
    with pytest.raises(
        ValueError, match=rf'width 8 cannot have {heads} heads.*MODEL\.HEADS|MODEL\.HEADS is \[0, {heads}\]'
    ):
        build_tiny('MODEL.HEADS', [0, heads])


def test_unknown_kind_of_block_is_refused():
    with pytest.raises(ValueError, match=r"MODEL\.STAGES.*'hallo'.*conv, halo, bot and lambda"):
        build_tiny('MODEL.STAGES', ['conv', 'conv hallo'])


@pytest.mark.parametrize('text, kinds', [
    ('conv', ['conv']), ('conv*2', ['conv', 'conv']), ('  conv*3  halo ', ['conv', 'conv', 'conv', 'halo']),
    ('conv halo conv halo', ['conv', 'halo'] * 2), ('halo*12', ['halo'] * 12)])
def test_parse_stage(text, kinds):
    assert parse_stage(text) == kinds


@pytest.mark.parametrize('text', [
    '', '  ', 'conv*0', 'conv*-1', 'conv*two', 'conv*1.5', 'conv*', 'conv *2', '*2', 'conv*2*2', 'conv*²'])
def test_malformed_stage_is_refused(text):
    with pytest.raises(ValueError, match=r'MODEL\.STAGES'):
        parse_stage(text)


@pytest.mark.parametrize(
    'stem, pool, kernels, side',
    [
        ('tiered', True, [(24, 3), (32, 3), (64, 3)], 8), ('7x7', True, [(64, 7)], 8),
        ('3x3', False, [(64, 3)], 16),
    ],
)
def test_stem(stem, pool, kernels, side):
    model = build_tiny('MODEL.STEM', stem, 'MODEL.STEM_WIDTH', 64, 'MODEL.STEM_POOL', pool)
    weights = [p for key, p in model.stem.named_parameters() if key.endswith('conv.weight')]
    assert [(p.shape[0], p.shape[-1]) for p in weights] == kernels
    assert list(model.stem(paddle.zeros([1, 3, 32, 32])).shape) == [1, 64, side, side]


def test_activation_and_dropout_options():
    images = ref.seeded_images((4, 3, 32, 32))
    relu, silu = (ref.fill_seeded(build_tiny('MODEL.ACT', act)).eval() for act in ('relu', 'silu'))
    assert np.abs(ref.run(relu, images) - ref.run(silu, images)).max() > 0.1
    features = relu.forward_features(paddle.to_tensor(images)).numpy()
    assert features.min() == 0
    model = build_tiny('MODEL.DROPOUT', 0.5)
    x = paddle.ones([1, 32, 2, 2])
    assert not np.array_equal(model.head(x).numpy(), model.head(x).numpy())
    model.eval()
    assert np.array_equal(model.head(x).numpy(), model.head(x).numpy())


# ---- fresh weights

def expected_deviation(key, shape):
    """As in timm: conv N(0, 2 / fan out); q, kv N(0, 1 / fan in); tables N(0, 1 / head width);
    classifier N(0, 0.01^2)."""
    if key.endswith('_rel'):
        return shape[1] ** -0.5
    if key.endswith(('q.weight', 'kv.weight')):
        return shape[1] ** -0.5
    if len(shape) == 4:
        return (2 / (shape[0] * shape[2] * shape[3])) ** 0.5
    assert key == 'head.fc.weight'
    return 0.01


@pytest.mark.parametrize(
    'make', [*(partial(build, name) for name in MODELS), partial(HaloAttention, 400, 128, 4, 4, 1)],
    ids=['26t', '50ts', 'layer of unequal widths'],
)
def test_initialisation(make):
    for key, parameter in make().named_parameters():
        value = parameter.numpy().astype('float64')
        if value.ndim == 1:                         # norms, the classifier's bias
            one = key.endswith(('weight', '_variance')) and not key.endswith('conv3_1x1.bn.weight')
            assert (value == one).all(), key
        else:
            std = expected_deviation(key, value.shape)
            assert value.std() == pytest.approx(std, rel=5 / (2 * value.size) ** 0.5), key
            assert abs(value.mean()) < 5 * std / value.size ** 0.5, key
            assert np.abs(value).max() < 7 * std, key


def test_new_blocks_return_their_shortcuts():
    model = build_tiny()
    blocks = [layer for layer in model.sublayers() if isinstance(layer, Bottleneck)]
    assert len(blocks) == 3
    for block, width in zip(blocks, (8, 16, 32)):
        x = paddle.randn([2, width, 8, 8])
        for block.training in (True, False):
            assert np.array_equal(block(x).numpy(), F.relu(block.shortcut(x)).numpy())


# ---- stochastic depth, frozen norms

def test_drop_path_drops_samples_and_keeps_the_mean():
    samples, rate = 5000, 0.4
    x = paddle.to_tensor(np.random.default_rng(0).uniform(1, 2, (samples, 2, 3, 1)).astype('float32'))
    layer = DropPath(rate)
    factor = (layer(x) / x).numpy().reshape(samples, -1)
    assert (np.ptp(factor, axis=1) < 1e-6).all()                      # a sample is dropped or kept as a whole
    kept = factor[:, 0] > 0
    np.testing.assert_allclose(factor[kept], 1 / (1 - rate), rtol=1e-5)
    assert abs(kept.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / samples) ** 0.5
    assert 0.4 < (kept[1:] == kept[:-1]).mean() < 0.65                # samples are independent: expected 0.52
    layer.eval()
    assert np.array_equal(layer(x).numpy(), x.numpy())


def test_drop_path_rates_rise_linearly_to_the_last_block():
    model = build_tiny('MODEL.DROPPATH', 0.2)
    assert [block.drop_path.rate for stage in model.stages for block in stage] == pytest.approx([0, 0.1, 0.2])
    images = paddle.to_tensor(ref.seeded_images((8, 3, 32, 32)))
    ref.fill_seeded(model)
    assert not np.array_equal(model(images).numpy(), model(images).numpy())
    model.eval()
    assert np.array_equal(model(images).numpy(), model(images).numpy())
    one_block = {'STAGES': ['conv'], 'WIDTHS': [16], 'STRIDES': [1], 'HEADS': [0], 'DROPPATH': 0.2}
    model = build_tiny(*(item for key, value in one_block.items() for item in (f'MODEL.{key}', value)))
    assert model.stages[0][0].drop_path.rate == 0


@pytest.mark.parametrize('frozen', [True, False])
def test_frozen_norms(frozen):
    model = ref.fill_seeded(build_tiny('MODEL.FREEZE_NORM', frozen))
    images = ref.seeded_images((4, 3, 32, 32))
    before, evaluated = ref.arrays(model), ref.run(model.eval(), images)
    model.train()
    trained, after = ref.run(model, images), ref.arrays(model)
    statistics = [key for key in before if key.endswith(('_mean', '_variance'))]
    assert len(statistics) == 2 * 14
    assert all(np.array_equal(before[key], after[key]) == frozen for key in statistics)
    assert np.allclose(evaluated, trained, rtol=0, atol=1e-5) == frozen


def test_every_parameter_has_a_gradient():
    model = ref.fill_seeded(build_tiny('MODEL.FREEZE_NORM', True))
    model(paddle.to_tensor(ref.seeded_images((2, 3, 32, 32)))).square().sum().backward()
    trainable = {key: p.grad for key, p in model.named_parameters() if p.trainable}
    assert len(trainable) == len(model.state_dict()) - 2 * 14
    assert [key for key, grad in trainable.items() if grad is None or not grad.abs().sum() > 0] == []


# ---- static graphs

@pytest.mark.parametrize('kind', ['fused', 'composed'])
def test_training_under_to_static_with_any_batch(kind):
    images, gradients = paddle.to_tensor(ref.seeded_images((3, 3, 32, 32))), []
    for spec in None, [paddle.static.InputSpec([None, 3, None, None], 'float32')]:
        model = ref.fill_seeded(build_halonet(get_config(None, [*ref.TINY, 'MODEL.ATTENTION', kind]))).train()
        call = paddle.jit.to_static(model.forward, full_graph=True, input_spec=spec) if spec else model
        call(images).square().sum().backward()
        gradients.append(
            {name: value.grad.numpy() for name, value in model.named_parameters() if not value.stop_gradient}
        )
    for name, expected in gradients[0].items():
        np.testing.assert_allclose(
            gradients[1][name], expected, atol=1e-4 * abs(expected).max(), err_msg=name
        )


def test_static_program_equals_eager_mode():
    model = ref.fill_seeded(build_tiny()).eval()
    images = ref.seeded_images((2, 3, 32, 32))
    eager = ref.run(model, images)
    static = ref.run(paddle.jit.to_static(model, full_graph=True), images)
    np.testing.assert_allclose(static, eager, rtol=1e-5, atol=1e-5)


def test_exported_model_takes_any_batch(tmp_path):
    model = ref.fill_seeded(build_tiny()).eval()
    batches = {n: ref.seeded_images((n, 3, 32, 32)) for n in (1, 2, 5)}
    eager = {n: ref.run(model, images) for n, images in batches.items()}
    paddle.jit.save(
        model, str(tmp_path / 'net'), input_spec=[paddle.static.InputSpec([None, 3, 32, 32], 'float32')]
    )
    loaded = paddle.jit.load(str(tmp_path / 'net'))
    for n, images in batches.items():
        np.testing.assert_allclose(ref.run(loaded, images), eager[n], rtol=1e-5, atol=1e-5)


def test_products_of_lambda_layers_stay_in_float32_under_autocast(monkeypatch):
    """bfloat16 would leave their gradients few right digits. It is recorded whether autocast is on."""
    on, products = [], []

    @contextmanager
    def auto_cast(enable=True, **_):
        on.append(enable)
        yield
        on.pop()

    def recorded(name, function):
        def call(*args, **kwargs):
            products.append((name, on[-1], {x.dtype for x in args if isinstance(x, paddle.Tensor)}))
            return function(*args, **kwargs)
        return call

    layer = lambda_layer.LambdaLayer(8, 16, 2, 3)
    norm_act = lambda_layer.norm_act
    monkeypatch.setattr(lambda_layer, 'norm_act', lambda *args: norm_act(*args).astype('bfloat16'))
    monkeypatch.setattr(paddle.amp, 'auto_cast', auto_cast)
    monkeypatch.setattr(paddle, 'einsum', recorded('einsum', paddle.einsum))
    monkeypatch.setattr(paddle.Tensor, 'matmul', recorded('matmul', paddle.Tensor.matmul))
    monkeypatch.setattr(lambda_layer.F, 'conv2d', recorded('conv2d', lambda_layer.F.conv2d))
    with paddle.amp.auto_cast(True):
        out = layer(paddle.randn([2, 8, 4, 4]))
    assert out.dtype == paddle.float32
    inside = [(enabled, kinds) for name, enabled, kinds in products]
    assert {name for name, enabled, _ in products if not enabled} == {'einsum', 'matmul', 'conv2d'}
    assert all(kinds == {paddle.float32} for enabled, kinds in inside if not enabled)


# ---- the paper's alternatives

ALTERNATIVES = [['MODEL.WINDOW', 'inside'], ['MODEL.WINDOW', 'query'], ['MODEL.POSITIONS', 'none'],
                ['MODEL.POSITIONS', 'absolute'], ['MODEL.HALO_STRIDE', 'pool']]
SMALL = ['MODEL.STAGES', ['halo*2', 'halo'], 'MODEL.WIDTHS', [32, 64], 'MODEL.STRIDES', [1, 2],
         'MODEL.HEADS', [2, 4], 'MODEL.STEM_WIDTH', 16, 'MODEL.BLOCK_SIZE', 4, 'MODEL.HALO_SIZE', 1,
         'MODEL.NUM_CLASSES', 5, 'DATA.IMAGE_SIZE', 36]


@pytest.mark.parametrize('options', ALTERNATIVES, ids=lambda options: '_'.join(options).lower())
def test_alternatives_change_the_network_and_work_in_every_way(options):
    """Composed, by Paddle's attention, by compiled operators and as a lookup: the same logits; all learn."""
    images = paddle.to_tensor(ref.seeded_images((2, 3, 36, 36)))
    networks = {}
    for way in ('composed', 'sdpa', 'fused'):
        networks[way] = build_halonet(get_config(None, [*SMALL, *options, 'MODEL.ATTENTION', way]))
        networks[way].set_state_dict(ref.fill_seeded(networks['composed']).state_dict())
        networks[way].eval()
    expected = networks['composed'](images).numpy()
    scale = 1e-5 * np.abs(expected).max()
    for way in ('sdpa', 'fused'):
        np.testing.assert_allclose(networks[way](images).numpy(), expected, rtol=0, atol=scale)
    look_windows_up(networks['sdpa'])
    np.testing.assert_allclose(networks['sdpa'](images).numpy(), expected, rtol=0, atol=scale)

    plain = build_halonet(get_config(None, SMALL))
    fits = networks['composed'].state_dict()
    plain.set_state_dict({**ref.fill_seeded(plain).state_dict(), **fits})
    assert np.abs(plain.eval()(images).numpy() - expected).max() > 100 * scale

    network = networks['composed'].train()
    network(images).sum().backward()
    learnt = [parameter for parameter in network.parameters() if not parameter.stop_gradient]
    assert all(parameter.grad is not None for parameter in learnt)


def test_absolute_positions_are_sines_of_rows_and_columns():
    x = np.random.default_rng(0).normal(size=(2, 10, 3, 5)).astype('float32')
    added = AbsolutePosition()(paddle.to_tensor(x)).numpy() - x
    waves = [1.0, 10000.0 ** -0.5]                  # 10 // 4 frequencies
    for y, column in np.ndindex(3, 5):
        row = [np.sin(y * wave) for wave in waves] + [np.cos(y * wave) for wave in waves]
        col = [np.sin(column * wave) for wave in waves] + [np.cos(column * wave) for wave in waves]
        np.testing.assert_allclose(added[:, :, y, column], [row + col + [0, 0]] * 2, rtol=0, atol=1e-6)
