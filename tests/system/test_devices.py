"""Which device a run takes. Other kinds than CPU are pretended."""
import utils

import paddle
import pytest
from exact_runs import run
from runs import records


@pytest.fixture
def chosen(monkeypatch):
    """The devices that Paddle was given; it has a kind npu besides the CPU, and one GPU."""
    devices = []
    monkeypatch.setattr(paddle, 'set_device', devices.append)
    monkeypatch.setattr(paddle.device, 'get_all_custom_device_type', lambda: ['npu'])
    monkeypatch.setattr(paddle.device, 'is_compiled_with_cuda', lambda: True)
    monkeypatch.setattr(utils, 'gpu_count', lambda: 1)
    monkeypatch.setattr(utils, 'tune_gpu', lambda: None)
    return devices


@pytest.mark.parametrize('device, given, kind', [
    ('auto', 'gpu', 'gpu'), ('gpu', 'gpu', 'gpu'), ('gpu:1', 'gpu:1', 'gpu'), ('cpu', 'cpu', 'cpu'),
    ('npu', 'npu', 'npu'), ('npu:3', 'npu:3', 'npu')])
def test_device_is_passed_on(chosen, device, given, kind):
    assert utils.start(device) == kind and chosen == [given]


@pytest.mark.parametrize('device', ['xpu', 'GPU', 'tpu:0', ''])
def test_device_that_paddle_was_not_built_for_is_refused(chosen, device):
    with pytest.raises(ValueError, match=f'-device {device}: this build of Paddle has cpu, gpu, npu; choose'):
        utils.start(device)
    assert chosen == []


def test_number_of_a_device_is_refused_for_several_processes(chosen, monkeypatch):
    monkeypatch.setenv('PADDLE_TRAINERS_NUM', '2')
    with pytest.raises(ValueError, match='-device gpu:1: each of 2 processes has a device of its own'):
        utils.start('gpu:1')


def test_training_on_another_device(images, tmp_path, chosen, monkeypatch):
    """Here the CPU computes. The attention is composed, as on any device without operators of ours."""
    monkeypatch.setattr(paddle, 'get_device', lambda: 'npu:0')
    run(images, tmp_path, 'DEVICE', 'npu')
    assert chosen == ['npu'] and records(tmp_path, 'val')
    machine = (tmp_path / 'machine.json').read_text()
    assert '"device": "npu x 1"' in machine and '"attention": "composed"' in machine
    with pytest.raises(ValueError, match='MODEL.ATTENTION is fused, which needs'):
        run(images, tmp_path / 'fused', 'DEVICE', 'npu', 'MODEL.ATTENTION', 'fused')
