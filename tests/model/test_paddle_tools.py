"""Paddle's own tools on a network: summary and flops, synchronised norms, quantisation."""
import copy

import numpy as np
import paddle
import pytest
import reference as ref
from paddle import nn
from paddle.quantization import PTQ, QAT, QuantConfig
from paddle.quantization.observers import AbsmaxObserver
from paddle.quantization.quanters import FakeQuanterWithAbsMaxObserver

from config import get_config
from halonet import build_halonet, count_parameters

NETWORKS = {
    'halo': ['MODEL.STAGES', ['conv', 'halo*2']],
    'bottleneck attention': ['MODEL.STAGES', ['conv', 'bot'], 'MODEL.HEAD_WIDTH', 24],
    'lambda': ['MODEL.STAGES', ['conv', 'lambda']],
    'squeeze-excite': ['MODEL.CHANNEL_ATTN', 'se', 'MODEL.ACT', 'silu', 'MODEL.GROUP_SIZE', 4],
    'channel attention': ['MODEL.CHANNEL_ATTN', 'eca', 'MODEL.LINEAR_OUT', True],
    'no projection': ['MODEL.PROJECTION', False, 'MODEL.STEM', '3x3', 'MODEL.STEM_POOL', False],
}
IMAGES = ref.seeded_images((4, 3, 32, 32))


def build(name):
    return ref.fill_seeded(
        build_halonet(get_config(None, [*ref.TINY, 'DATA.IMAGE_SIZE', 32, *NETWORKS[name]]))
    )


# ---- counts

@pytest.mark.parametrize('name', NETWORKS)
def test_summary_counts_every_parameter(name, capsys):
    network = build(name)
    counted = paddle.summary(network, (1, 3, 32, 32))
    assert counted['trainable_params'] == count_parameters(network)
    assert counted['total_params'] == sum(parameter.size for parameter in network.parameters())


@pytest.mark.parametrize('name', NETWORKS)
def test_flops_count_every_parameter(name, capsys, monkeypatch):
    # Paddle 3.3.1's fails on [1] with numpy 2.4
    monkeypatch.setattr(
        paddle.Tensor, '__int__', lambda x: x.item()
    )
    network = build(name)
    keys = list(network.state_dict())
    assert paddle.flops(network, [1, 3, 32, 32]) > 0
    total = sum(parameter.size for parameter in network.parameters())
    assert f'Total Params: {total}\n' in capsys.readouterr().out
    assert list(network.state_dict()) == keys


def test_summary_of_halonet_26t():
    network = build_halonet(get_config('configs/halonet_26t_256.yaml'))
    assert paddle.summary(network, (1, 3, 64, 64))['trainable_params'] == 12_480_288


# ---- synchronised norms

@pytest.mark.parametrize('name', NETWORKS)
def test_conversion_to_synchronised_norms_keeps_the_network(name, monkeypatch):
    """With a replacement for the GPU's kernel: the same results, statistics, keys and activations."""
    def kernel(x, mean, variance, weight, bias, is_test, momentum, epsilon, *rest):
        out = nn.functional.batch_norm(x, mean, variance, weight, bias, not is_test, momentum, epsilon)
        return out, None, None, None, None, None

    monkeypatch.setattr(nn.layer.norm._C_ops, 'sync_batch_norm_', kernel)
    plain = build(name)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert not any(isinstance(layer, nn.BatchNorm2D) for layer in converted.sublayers())
    kinds = [[type(layer) for layer in network.sublayers() if isinstance(layer, (nn.ReLU, nn.Silu))]
             for network in (plain, converted)]
    assert kinds[0] == kinds[1] and len(kinds[0]) > 3
    for mode in 'train', 'eval':
        for network in plain, converted:
            getattr(network, mode)()
        results = [ref.run(network, IMAGES) for network in (converted, plain)]
        np.testing.assert_allclose(*results, rtol=0, atol=1e-5 * results[1].std())
    ours, theirs = converted.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for key in theirs:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-5, err_msg=key)


# ---- quantisation

def quantisation(kind, scope):
    """QAT or PTQ with 8 bits for activations and weights, of all layers or of types with quantised layers."""
    method, quanter = {
        'qat': (QAT, FakeQuanterWithAbsMaxObserver(moving_rate=0.9)), 'ptq': (PTQ, AbsmaxObserver()),
    }[kind]
    if scope == 'everything':
        return method(QuantConfig(activation=quanter, weight=quanter))
    config = QuantConfig(activation=None, weight=None)
    config.add_type_config([nn.Conv2D, nn.Linear], activation=quanter, weight=quanter)
    return method(config)


@pytest.mark.parametrize('scope', ['everything', 'types'])
@pytest.mark.parametrize('name', NETWORKS)
def test_post_training_quantisation(name, scope):
    network = build(name).eval()
    expected, method = ref.run(network, IMAGES), quantisation('ptq', scope)
    observed = method.quantize(network)
    assert_all_quantised(network, observed)
    np.testing.assert_allclose(ref.run(observed, IMAGES), expected, rtol=0, atol=1e-4 * expected.std())
    converted = method.convert(observed)
    error = np.abs(ref.run(converted, IMAGES) - expected).max() / expected.std()
    assert 1e-4 < error < 0.2                       # 8 bits, and not float


@pytest.mark.parametrize('scope', ['everything', 'types'])
@pytest.mark.parametrize('name', NETWORKS)
def test_quantisation_aware_training(name, scope):
    network = build(name).train()
    quantised = quantisation('qat', scope).quantize(network)
    assert_all_quantised(network, quantised)
    images = paddle.to_tensor(IMAGES)
    for _ in range(12):                             # the scales are averages over steps
        loss = quantised(images).square().mean()
        loss.backward()
    trained = [value for value in quantised.parameters() if value.grad is not None]
    assert sum(value.size for value in trained) == count_parameters(network) and np.isfinite(loss.item())
    for _ in range(12):
        network(images)                             # its norms see the batch as often
    expected, found = (ref.run(layer.eval(), IMAGES) for layer in (network, quantised))
    assert 1e-4 < (found - expected).std() / expected.std() < 0.3


def assert_all_quantised(network, quantised):
    count = sum(type(layer) is nn.Conv2D for layer in network.sublayers())
    assert (
        count > 5
        and sum(type(layer) is nn.quant.qat.QuantedConv2D for layer in quantised.sublayers()) == count
    )
    assert not any(type(layer) in (nn.Conv2D, nn.Linear) for layer in quantised.sublayers())
