"""A change to any layer counts at the next forward: compiled operators give the results of Paddle's."""
import copy

import numpy as np
import paddle
import pytest
import reference as ref
from operators import COMPILED
from paddle import nn

from config import get_config
from halonet import build_halonet
from model.attention import HaloAttention
from model.layers import ConvNormAct, can_fuse, use_operators

pytestmark = COMPILED

OF_PADDLE = {*vars(nn.Layer()), 'operators', 'name', '_name'}              # what no operator depends on


def block(*stages, size=8):
    """A block of each given kind, by the names of the layers that it is made of, with seeded weights."""
    config = get_config(
        None,
        [
            *ref.TINY, 'MODEL.STAGES', [' '.join(stages)], 'MODEL.WIDTHS', [16], 'MODEL.STRIDES', [1],
            'MODEL.HEADS', [2], 'DATA.IMAGE_SIZE', size * 4,
        ],
    )
    return ref.fill_seeded(build_halonet(config)).stages[0]


def stem():
    return ref.fill_seeded(build_halonet(get_config(None, ref.TINY))).stem


CASES = {  # name -> (network, path of the layer that is changed, input)
    'conv': (lambda: block('conv'), '0.conv1_1x1.conv', (2, 8, 8, 8)),
    'conv of 3x3': (lambda: block('conv'), '0.conv2_kxk.conv', (2, 8, 8, 8)),
    'last conv': (lambda: block('conv'), '0.conv3_1x1.conv', (2, 8, 8, 8)),
    'norm': (lambda: block('conv'), '0.conv1_1x1.bn', (2, 8, 8, 8)),
    'last norm': (lambda: block('conv'), '0.conv3_1x1.bn', (2, 8, 8, 8)),
    'norm after attention': (lambda: block('halo'), '0.post_attn', (2, 8, 8, 8)),
    'activation': (lambda: block('conv'), '0.conv1_1x1.act', (2, 8, 8, 8)),
    'last activation': (lambda: block('conv'), '0.act', (2, 8, 8, 8)),
    'activation after attention': (lambda: block('halo'), '0.post_act', (2, 8, 8, 8)),
    'drop path': (lambda: block('conv'), '0.drop_path', (2, 8, 8, 8)),
    'convolution, norm and activation': (lambda: block('conv'), '0.conv1_1x1', (2, 8, 8, 8)),
    'halo attention': (lambda: block('halo'), '0.self_attn', (2, 8, 8, 8)),
    'its queries': (lambda: block('halo'), '0.self_attn.q', (2, 8, 8, 8)),
    'its tables': (lambda: block('halo'), '0.self_attn.pos_embed', (2, 8, 8, 8)),
    'bottleneck attention': (lambda: block('bot'), '0.self_attn', (2, 8, 8, 8)),
    'lambda': (lambda: block('lambda'), '0.self_attn', (2, 8, 8, 8)),
    'its norm': (lambda: block('lambda'), '0.self_attn.norm_v', (2, 8, 8, 8)),
    'pool': (stem, 'pool', (2, 3, 16, 16)),
}


def layer_at(network, path):
    for name in path.split('.'):
        network = getattr(network, name)
    return network


def attributes(layer):
    return {
        key: value
        for key, value in vars(layer).items()
        if key not in OF_PADDLE and not isinstance(value, paddle.Tensor)
    }


def others(value):
    """Other values for an attribute that is `value` now."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1, 1000 * value]
    if isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value):
        return [
            [2 * item + 2 for item in value], [*value[:1], *(item + 1 for item in value[1:])],
            tuple(value),
        ]
    if isinstance(value, str):
        return [
            text for text in ('NHWC', 'NCL', 'reflect', 'SAME', 'VALID', 'depthwise_conv2d') if text != value
        ]
    return [True, False] if value is None else []


def outcome(network, shape):
    """The results in evaluation, with gradients recorded, and in training; or that one was refused."""
    x, found = paddle.to_tensor(ref.seeded_images(shape)), []
    for training, recorded in (False, False), (False, True), (True, True):
        network.train() if training else network.eval()
        try:
            with paddle.set_grad_enabled(recorded):
                found.append(network(x).numpy())
        except Exception as error:
            found.append(error)
    return found + [value.numpy() for value in network.state_dict().values()]


def assert_equal_outcomes(network, shape):
    paths = {kind: use_operators(copy.deepcopy(network), kind) for kind in ('fused', 'composed')}
    for ours, theirs in zip(*(outcome(path, shape) for path in paths.values())):
        assert isinstance(ours, Exception) == isinstance(theirs, Exception), (ours, theirs)
        if not isinstance(ours, Exception):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize('name', CASES)
def test_changed_attribute_changes_the_fused_result(name):
    make, path, shape = CASES[name]
    network = make()
    for key, value in attributes(layer_at(network, path)).items():
        for other in others(value):
            changed = copy.deepcopy(network)
            setattr(layer_at(changed, path), key, other)
            assert_equal_outcomes(changed, shape)


class Mean(nn.Layer):
    """A shortcut whose result has one pixel, which is added to all."""

    def forward(self, x):
        return x.mean([2, 3], keepdim=True).tile([1, 2, 1, 1])


class Double(nn.Layer):
    """A shortcut of another type."""

    def forward(self, x):
        return x.tile([1, 2, 1, 1]).astype('float64')


def parameter(layer, shape, dtype='float32'):
    value = paddle.create_parameter(shape, dtype)
    value.set_value(np.random.default_rng(0).standard_normal(shape).astype(dtype))
    return value


CHANGES = {  # name -> what is done to a block
    'a bias': lambda block: setattr(block.conv1_1x1.conv, 'bias', parameter(block, [4])),
    'a weight of float64': lambda block: block.conv1_1x1.conv.to(dtype='float64'),
    'a larger kernel': lambda block: setattr(block.conv1_1x1.conv, 'weight', parameter(block, [4, 8, 3, 3])),
    'a kernel that is no square': lambda block: setattr(
        block.conv2_kxk.conv, 'weight', parameter(block, [4, 4, 3, 5])
    ),
    'an even kernel': lambda block: setattr(block.conv2_kxk.conv, 'weight', parameter(block, [4, 4, 2, 2])),
    'fewer channels': lambda block: setattr(block.conv1_1x1.conv, 'weight', parameter(block, [2, 8, 1, 1])),
    'no weight of the norm': lambda block: setattr(block.conv1_1x1.bn, 'weight', None),
    'no bias of the norm': lambda block: setattr(block.conv3_1x1.bn, 'bias', None),
    'a shortcut of one pixel': lambda block: setattr(block, 'shortcut', Mean()),
    'a shortcut of float64': lambda block: setattr(block, 'shortcut', Double()),
    'no shortcut': lambda block: setattr(block, 'shortcut', None),
    'reflected padding': lambda block: setattr(
        block.conv2_kxk, 'conv', nn.Conv2D(4, 4, 3, padding=1, padding_mode='reflect')
    ),
    'a weight norm': lambda block: nn.utils.weight_norm(block.conv2_kxk.conv),
    'a hook on the input': lambda block: block.conv2_kxk.conv.register_forward_pre_hook(
        lambda layer, x: 2 * x[0]
    ),
    'a hook on the result': lambda block: block.conv1_1x1.act.register_forward_post_hook(
        lambda layer, x, out: 2 * out
    ),
    'a hook on the end': lambda block: block.conv3_1x1.register_forward_post_hook(
        lambda layer, x, out: 2 * out
    ),
    'a hook on the dropped branch': lambda block: block.drop_path.register_forward_post_hook(
        lambda layer, x, out: 2 * out
    ),
}


@pytest.mark.parametrize('name', CHANGES)
def test_changed_layer_changes_the_fused_result(name):
    network = block('conv')
    CHANGES[name](network[0])
    assert_equal_outcomes(network, (2, 8, 8, 8))


@pytest.mark.parametrize('training', [False, True])
def test_norm_of_another_type_is_refused(training):
    """Paddle's batch norm takes the bytes of a float64 for two numbers."""
    network = use_operators(ConvNormAct(4, 4, 1), 'fused')
    network.bn.to(dtype='float64')
    network.train() if training else network.eval()
    with paddle.no_grad(), pytest.raises(OSError, match='dtype'):
        network(paddle.ones([1, 4, 8, 8]))


def test_replaced_forward_of_a_class_is_called(monkeypatch):
    for kind in nn.ReLU, nn.Conv2D, nn.BatchNorm2D:
        with monkeypatch.context() as patch:
            patch.setattr(kind, 'forward', lambda layer, x, forward=kind.forward: 2 * forward(layer, x))
            assert_equal_outcomes(block('conv'), (2, 8, 8, 8))


@pytest.mark.parametrize(
    'key, value', [('block_size', 8), ('halo_size', 2), ('num_heads', 4), ('num_heads', 1), ('stride', 2)]
)
def test_sizes_that_do_not_fit_are_refused_by_both_operators(key, value):
    for kind in 'fused', 'composed':
        layer = use_operators(HaloAttention(8, 8, 2, 4, 1).eval(), kind)
        setattr(layer, key, value)
        with pytest.raises(ValueError):
            layer(paddle.randn([1, 8, 8, 8]))


def test_changed_layer_is_exported(tmp_path):
    network = use_operators(block('conv', 'halo').eval(), 'auto')
    network[0].conv2_kxk.conv._dilation = [2, 2]
    network[0].conv2_kxk.conv._updated_padding = [2, 2]
    network[1].conv1_1x1.conv._stride = [2, 2]
    network[1].shortcut = nn.MaxPool2D(1, 2)
    x = paddle.to_tensor(ref.seeded_images((2, 8, 16, 16)))
    paddle.jit.save(
        network, str(tmp_path / 'net'), input_spec=[paddle.static.InputSpec([None, 8, 16, 16], 'float32')]
    )
    with paddle.no_grad():
        expected = network(x).numpy()
    assert expected.shape == (2, 16, 8, 8)
    np.testing.assert_allclose(paddle.jit.load(str(tmp_path / 'net'))(x).numpy(), expected, rtol=0, atol=1e-5)


def test_unchanged_layers_are_fused():
    network = use_operators(ConvNormAct(8, 8, 3, act=nn.ReLU).eval(), 'fused')
    with paddle.no_grad():
        assert can_fuse(network, network.conv, network.bn, network.act)
        assert not can_fuse(use_operators(network, 'composed'), network.conv, network.bn, network.act)
