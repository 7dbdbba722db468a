"""Every model of configs/ is traced, saved, exported to Paddle and to ONNX, and trained as a static program.

With one block of each kind in each stage: tracing more of the same takes minutes.
"""
import os
from pathlib import Path

from tools import export

import numpy as np
import paddle
import pytest
import reference as ref

from config import get_config
from halonet import build_halonet, parse_stage
from model.layers import Traced

ROOT = Path(__file__).resolve().parents[2]
QUICK = {'haloregnetz_b_224'}  # with blocks that have no shortcut, groups and channel attention
CONFIGS = [pytest.param(path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow)
           for path in sorted(ROOT.glob('configs/*.yaml')) if not path.name.startswith('_')]


def options(name):
    """The config file of a model, and the options that make it small."""
    path = str(ROOT / 'configs' / f'{name}.yaml')
    stages = [' '.join(dict.fromkeys(parse_stage(stage))) for stage in get_config(path).MODEL.STAGES]
    return path, ['MODEL.STAGES', stages, 'DATA.IMAGE_SIZE', 64, 'MODEL.NUM_CLASSES', 10]


def build(name):
    path, opts = options(name)
    return ref.fill_seeded(build_halonet(get_config(path, [*opts, 'MODEL.DROPPATH', 0.0])))


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape and np.isfinite(theirs).all()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize('name', CONFIGS)
def test_traced_and_saved_as_it_is(name, tmp_path):
    network, images = build(name).eval(), ref.seeded_images((2, 3, 64, 64))
    paddle.jit.save(
        network, str(tmp_path / 'net'), input_spec=[paddle.static.InputSpec([None, 3, 64, 64], 'float32')]
    )
    assert_close(ref.run(paddle.jit.load(str(tmp_path / 'net')), images), ref.run(network, images))


@pytest.mark.parametrize('name', CONFIGS)
def test_exported(name, tmp_path):
    for package in export.NEEDED:
        pytest.importorskip(package, reason=f'{package} is not installed (requirements-export.txt)')
    weights, output = str(tmp_path / 'w.pdparams'), str(tmp_path / 'out')
    network = build(name)
    paddle.save(network.state_dict(), weights)
    path, opts = options(name)
    args = export.parser().parse_args(
        ['-cfg', path, '-pretrained', weights, '-output', output, '-device', 'cpu', '-opts', *map(str, opts)]
    )
    assert export.main(args) == 0
    images = ref.seeded_images((2, 3, 64, 64))
    expected = ref.run(network.eval(), images)
    assert_close(export.runtimes.paddle_inference(output)(images), expected)
    assert_close(export.runtimes.onnxruntime(os.path.join(output, 'model.onnx'))(images), expected)


@pytest.mark.parametrize('name', CONFIGS)
def test_trained_one_step_as_a_static_program(name):
    images, labels = paddle.to_tensor(ref.seeded_images((2, 3, 64, 64))), paddle.to_tensor([1, 2])
    steps = []
    for wrap in Traced, lambda network: network:
        network = build(name).train()
        optimizer = paddle.optimizer.Momentum(0.01, parameters=network.parameters())
        loss = paddle.nn.functional.cross_entropy(wrap(network)(images), labels)
        loss.backward()
        missing = [
            key for key, value in network.named_parameters() if not value.stop_gradient and value.grad is None
        ]
        assert missing == []
        optimizer.step()
        steps.append((loss.item(), ref.arrays(network)))
    (loss, values), (eager_loss, eager_values) = steps
    assert loss == pytest.approx(eager_loss, rel=1e-4)
    for key, value in eager_values.items():
        error = np.linalg.norm(values[key] - value) / max(np.linalg.norm(value), 1e-3)
        assert error < 1e-2, key
