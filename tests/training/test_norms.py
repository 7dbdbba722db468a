"""Batch norms that see the images of all processes, and statistics that are averaged over them."""
import utils

import numpy as np
import paddle
import pytest
from exact_runs import run
from runs import TINY, make_images

import halonet
from config import get_config
from halonet import build_halonet
from model import layers


def test_synchronised_norms_compute_the_same(monkeypatch):
    """With a stand-in for the GPU's kernel: the same output, parameters and names, activations among it."""
    def kernel(x, mean, variance, weight, bias, is_test, momentum, epsilon, *rest):
        y = paddle.nn.functional.batch_norm(x, mean, variance, weight, bias, not is_test, momentum, epsilon)
        return y, *[None] * 5
    monkeypatch.setattr(paddle.nn.layer.norm._C_ops, 'sync_batch_norm_', kernel)
    config = get_config(None, TINY)
    plain, model = build_halonet(config), build_halonet(config)
    model.set_state_dict(plain.state_dict())
    layers.synchronise_norms(model)
    assert sum(isinstance(layer, paddle.nn.SyncBatchNorm) for layer in model.sublayers()) == 9
    x = paddle.randn([2, 3, 16, 16])
    for mode in ('train', 'eval'):
        getattr(plain, mode)(), getattr(model, mode)()
        np.testing.assert_allclose(model(x), plain(x), atol=1e-6)
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), plain.state_dict().items()):
        assert name == other
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_every_norm_is_synchronised():
    stages = ['MODEL.STAGES', ['conv lambda', 'halo bot'], 'MODEL.HEADS', [2, 2]]
    model = build_halonet(get_config(None, [*TINY, *stages]))
    layers.synchronise_norms(model)
    norms = [layer for layer in model.sublayers() if 'BatchNorm' in type(layer).__name__]
    assert len(norms) > 10 and all(isinstance(norm, paddle.nn.SyncBatchNorm) for norm in norms)
    with halonet.statistics_kept(model):
        assert {norm._momentum for norm in norms} == {1.0}
    assert {norm._momentum for norm in norms} == {0.9}


def test_frozen_statistics_are_not_averaged(monkeypatch):
    """A third of three times a number is not always that number."""
    model = build_halonet(get_config(None, [*TINY, 'MODEL.FREEZE', 1]))
    before = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    monkeypatch.setattr(utils, 'world_size', lambda: 3)
    monkeypatch.setattr(utils, 'all_reduce', lambda value: value.set_value(value * 3 + 1))
    utils.average(layers.running_statistics(model).values())
    after = model.state_dict()
    changed = {key for key in before if not np.array_equal(after[key].numpy(), before[key])}
    statistics = {key for key in before if key.endswith(('._mean', '._variance'))}
    assert changed == {key for key in statistics if not key.startswith('stem.')}


def test_synchronised_norms_need_a_gpu(tmp_path, capsys):
    opts = ['TRAIN.SYNC_BN', True, 'TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0]
    run(make_images(tmp_path / 'data'), tmp_path / 'run', *opts)
    assert 'TRAIN.SYNC_BN needs GPUs' in capsys.readouterr().out


@pytest.mark.parametrize('rank', [0, 1, 2])
def test_local_norm_is_refused_as_synchronised_one(rank):
    with pytest.raises(ValueError, match='the mean over 3 processes should be 0.3333 and is'):
        layers.check_synchronised(paddle.nn.BatchNorm2D(1), rank, 3)


@pytest.mark.parametrize('rank', [0, 1, 2])
def test_global_norm_is_accepted(rank):
    class Global(paddle.nn.BatchNorm2D):
        """Sees the images of three processes."""
        def forward(self, x):
            assert (x == (rank == 0)).all()
            return super().forward(paddle.concat([paddle.full_like(x, value) for value in (1, 0, 0)]))
    layers.check_synchronised(Global(1), rank, 3)
