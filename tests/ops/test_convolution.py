"""The compiled convolution, alone and with what follows it in an evaluation, against Paddle's in float64."""
from system import paddle_internals

import numpy as np
import paddle
import pytest
import reference as ref
from operators import COMPILED, difference, results
from paddle import nn

import ops
from config import get_config
from halonet import build_halonet
from model.layers import COMPILED_ACTIVATIONS, ConvNormAct, can_fuse, use_operators

pytestmark = COMPILED


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-6), ('float64', 1e-12)])
@pytest.mark.parametrize(
    'B, C, width, k, H, W, stride',
    [
        (2, 64, 128, 1, 16, 16, 1), (2, 64, 64, 1, 16, 16, 2), (3, 5, 7, 1, 3, 5, 1),
        (1, 300, 70, 1, 9, 13, 2), (2, 130, 600, 1, 7, 7, 3), (2, 3, 24, 3, 33, 32, 2),
        (2, 24, 32, 3, 12, 70, 1), (9, 64, 20, 3, 8, 8, 1), (2, 130, 140, 3, 16, 9, 2),
        (1, 2, 3, 3, 5, 5, 3), (2, 3, 16, 7, 20, 21, 2), (1, 4, 5, 7, 3, 2, 1), (2, 5, 2, 5, 1, 1, 2),
        (2, 5, 2, 3, 1, 9, 4), (1, 70, 140, 1, 30, 29, 1), (1, 130, 140, 3, 24, 26, 1),
        (1, 70, 20, 1, 50, 49, 2),
        (1, 8, 12, 3, 49, 51, 2),  # panels
        (2, 24, 32, 3, 33, 70, 1), (1, 128, 128, 3, 16, 18, 1), (3, 16, 17, 3, 1, 1, 1),
        (2, 64, 20, 3, 2, 5, 1),  # by winograd.h
    ],
)
def test_convolution_equals_paddle(B, C, width, k, H, W, stride, dtype, tolerance):
    random = np.random.default_rng(0)
    shapes = [(B, C, H, W), (width, C, k, k), (B, width, -(-H // stride), -(-W // stride))]
    inputs = [random.standard_normal(shape).astype(dtype) for shape in shapes]
    theirs = results(
        paddle.nn.functional.conv2d, [x.astype('float64') for x in inputs], stride=stride, padding=k // 2
    )
    for a, b in zip(results(ops.convolution, inputs, stride=stride), theirs):
        assert a.dtype == inputs[0].dtype and a.shape == b.shape and difference(a, b) < tolerance


def test_weights_get_a_gradient_if_the_input_needs_none():
    x, weight = paddle.randn([2, 3, 8, 8]), paddle.randn([4, 3, 3, 3])
    weight.stop_gradient = False
    gradients = []
    for constant in (True, False):
        x.stop_gradient = constant
        ops.convolution(x, weight, 2).sum().backward()
        gradients.append(weight.grad.numpy())
        assert constant == (x.grad is None)
        weight.clear_grad()
    assert (gradients[0] == gradients[1]).all()


@pytest.mark.parametrize('shape', [(0, 3, 8, 8), (2, 3, 0, 8)])
@pytest.mark.parametrize('k, stride', [(1, 1), (3, 2)])
def test_empty_input_gives_empty_output_and_zero_gradients(shape, k, stride):
    x, weight = paddle.zeros(shape), paddle.ones([4, 3, k, k])
    x.stop_gradient = weight.stop_gradient = False
    out = ops.convolution(x, weight, stride)
    out.backward(paddle.ones(out.shape))
    assert out.shape == [shape[0], 4, *(-(-side // stride) for side in shape[2:])]
    assert x.grad.shape == x.shape and (weight.grad.numpy() == 0).all()
    with paddle.no_grad():
        assert ConvNormAct(3, 4, k, stride).eval()(x).shape == out.shape


def test_results_are_the_same_for_any_number_of_threads():
    random = np.random.default_rng(0)
    x, out = (random.standard_normal((2, channels, 30, 28)).astype('float32') for channels in (70, 40))
    runs = []
    for threads in (1, 2, 3, 2):
        paddle_internals.set_num_threads(threads)
        runs.append([])
        for k in (1, 3):
            weight = np.random.default_rng(0).standard_normal((40, 70, k, k)).astype('float32')
            runs[-1] += results(ops.convolution, (x, weight, out))
    paddle_internals.set_num_threads(1)
    for run in runs[1:]:
        assert all((a == b).all() for a, b in zip(runs[0], run))


def fuses(layer):
    return can_fuse(layer, layer.conv, layer.bn, layer.act)


def evaluation_layer(act, dtype, C=5, **kwargs):
    """A seeded ConvNormAct of C to 21 channels for evaluation."""
    layer = ConvNormAct(C, 21, 3, act=act, **kwargs)
    layer.to(dtype=dtype)
    random = np.random.default_rng(0)
    for key, value in layer.state_dict().items():
        value.set_value(
            random.uniform(0.5 if key.endswith('_variance') else -1, 1, value.shape).astype(dtype)
        )
    layer.eval()
    return layer


@pytest.mark.parametrize(
    'C, H, W, stride', [(5, 9, 13, 1), (5, 9, 13, 2), (5, 32, 40, 1), (16, 9, 13, 1), (16, 32, 40, 1)]
)
@pytest.mark.parametrize('act', COMPILED_ACTIVATIONS)
def test_fused_convolution_norm_and_activation_equal_paddle(act, C, H, W, stride):
    random = np.random.default_rng(1)
    images, added = (
        random.standard_normal((2, C, H, W)),
        random.standard_normal((2, 21, -(-H // stride), -(-W // stride))),
    )
    for dtype, tolerance in ('float32', 1e-6), ('float64', 1e-12):
        layer, x, residual = (
            evaluation_layer(act, dtype, C, stride=stride), images.astype(dtype), added.astype(dtype),
        )
        with paddle.no_grad():
            assert fuses(layer)
            plain = layer(paddle.to_tensor(x))
            joined = layer.fused(paddle.to_tensor(x), layer.act, paddle.to_tensor(residual))
            layer = evaluation_layer(act, 'float64', C, stride=stride)
            norm = nn.functional.conv2d(
                paddle.to_tensor(x.astype('float64')), layer.conv.weight, stride=stride, padding=1
            )
            norm = nn.functional.batch_norm(
                norm, layer.bn._mean, layer.bn._variance, layer.bn.weight, layer.bn.bias
            )
            assert difference(plain.numpy(), act()(norm).numpy()) < tolerance
            assert (
                difference(joined.numpy(), act()(norm + paddle.to_tensor(residual.astype('float64'))).numpy())
                < tolerance
            )


@pytest.mark.parametrize('x, weight', [([1, 0, 4, 4], [8, 0, 1, 1]), ([1, 4, 4, 4], [0, 4, 3, 3])])
def test_convolutions_without_channels_are_refused(x, weight):
    with pytest.raises(Exception, match='O, C and the stride must be positive'):
        ops.convolution(paddle.ones(x), paddle.ones(weight))


def test_layers_are_fused_only_without_hooks_and_gradients():
    layer = evaluation_layer(nn.ReLU, 'float32')
    assert not fuses(layer)                          # gradients may be wanted
    with paddle.no_grad():
        assert fuses(layer)
        for watched in layer.conv, layer.bn, layer.act:
            hook = watched.register_forward_post_hook(lambda *_: None)
            assert not fuses(layer)
            hook.remove()
        layer.train()
        assert not fuses(layer)                      # the statistics are the batch's
        layer.bn._use_global_stats = True
        assert fuses(layer)
        assert not fuses(use_operators(layer, 'composed'))


class Twice(nn.Layer):
    """A layer that somebody put around, or in the place of, one of a block's."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class Clipped(nn.ReLU):
    def forward(self, x):
        return nn.functional.relu6(x)


def biased(conv):
    conv.bias = conv.create_parameter([conv.weight.shape[0]], is_bias=True)
    conv.bias.set_value(paddle.ones_like(conv.bias))
    return conv


def doubled(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def by_batch(norm):
    norm._use_global_stats = False
    return norm


@pytest.mark.parametrize(
    'path, change',
    [
        ('conv1_1x1.conv', biased), ('conv1_1x1.conv', doubled), ('conv1_1x1.bn', doubled),
        ('conv1_1x1.act', doubled), ('conv1_1x1', doubled), ('conv3_1x1', doubled),
        ('drop_path', doubled), ('act', doubled), ('conv1_1x1.bn', by_batch), ('conv1_1x1.conv', Twice),
        ('conv1_1x1.conv', lambda conv: nn.Conv2D(64, 64, 1)), ('conv1_1x1.bn', Twice),
        ('conv1_1x1.act', lambda act: nn.GELU()), ('conv1_1x1.act', lambda act: Clipped()),
        ('conv3_1x1', Twice), ('conv3_1x1.act', lambda act: nn.ReLU()), ('drop_path', Twice),
        ('act', lambda act: nn.GELU()), ('act', lambda act: Clipped()),
    ],
)
def test_replaced_layers_of_a_block_are_called(path, change):
    models = [
        ref.fill_seeded(build_halonet(get_config('configs/halonet_26t_256.yaml', ['MODEL.ATTENTION', kind])))
        for kind in ('fused', 'composed')
    ]
    images = paddle.to_tensor(ref.seeded_images((2, 64, 16, 16)))
    *parents, name = path.split('.')
    outs = []
    for block in (model.stages[0][0] for model in models):
        layer = block
        for parent in parents:
            layer = getattr(layer, parent)
        paddle.seed(0)
        setattr(layer, name, change(getattr(layer, name)))
        with paddle.no_grad():
            outs.append([block.eval()(images).numpy(), block.train()(images).numpy()])
    for ours, theirs in zip(*outs):
        assert abs(ours - theirs).max() < 1e-5 * theirs.std()


def test_hooks_and_drop_path_of_a_block_are_called():
    block = ref.fill_seeded(
        build_halonet(get_config('configs/halonet_26t_256.yaml', ['MODEL.ATTENTION', 'fused']))
    ).stages[0][1]
    x, calls = paddle.to_tensor(ref.seeded_images((8, 256, 8, 8))), []
    inner, last = block.conv1_1x1, block.conv3_1x1
    watched = [
        inner, inner.conv, inner.bn, inner.act, last, last.conv, last.bn, last.act, block.drop_path,
        block.act,
    ]
    for layer in watched:
        hook = layer.register_forward_post_hook(lambda *_: calls.append(1))
        for training in False, True:
            block.train() if training else block.eval()
            with paddle.no_grad():
                block(x)
        hook.remove()
    assert len(calls) == 2 * len(watched)
    block.eval()
    block.drop_path.rate = 0.5
    block.drop_path.train()  # as for an ensemble of one network's dropped branches
    with paddle.no_grad():
        assert any((a == b).all() for a, b in zip(block(x).numpy(), block.act(x).numpy()))


# with groups, silu, blocks without shortcut
@pytest.mark.parametrize(
    'name', ['halonet_26t_256', 'haloregnetz_b_224']
)
def test_evaluation_gives_the_logits_of_paddles_operators(name):
    models = [
        ref.fill_seeded(build_halonet(get_config(f'configs/{name}.yaml', ['MODEL.ATTENTION', kind]))).eval()
        for kind in ('fused', 'composed')
    ]
    images = paddle.to_tensor(ref.seeded_images((1, 3, 128, 128)))
    calls = []
    with paddle.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, 'convolution_norm_act', lambda *args, fused=ops.convolution_norm_act, **kwargs:
                      calls.append(1) or fused(*args, **kwargs))
        ours, theirs = (model(images).numpy() for model in models)
    assert len(calls) > 20 and abs(ours - theirs).max() < 1e-5 * theirs.std()
