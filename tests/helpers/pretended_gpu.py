"""A GPU that is only pretended: what the code asks Paddle about it is answered, and the CPU computes."""
from contextlib import contextmanager
from types import SimpleNamespace

import utils

import paddle
from paddle.amp import grad_scaler


class Tracer:
    """Paddle's tracer as the scaler of the loss sees it on a GPU."""
    _expected_place = SimpleNamespace(is_gpu_place=lambda: True)


@contextmanager
def float32_autocast(enable=True, level='O1', dtype='float16'):
    """Stand for paddle.amp.auto_cast: name the dtype, as the scaler asks for it, and compute in float32."""
    before = grad_scaler.amp_global_state().amp_dtype
    grad_scaler.amp_global_state().amp_dtype = dtype if enable else before
    yield


def pretend_gpu(monkeypatch, capability=(8, 0)):
    """Let a run in this process take its device for a GPU of this compute capability."""
    monkeypatch.setattr(utils, 'start', lambda device: 'gpu')
    monkeypatch.setattr(grad_scaler, '_dygraph_tracer', Tracer)
    monkeypatch.setattr(paddle.amp, 'auto_cast', float32_autocast)
    monkeypatch.setattr(paddle.version, 'cuda', lambda: '12.6')
    monkeypatch.setattr(paddle.version, 'cudnn', lambda: '9.5')
    cuda = paddle.device.cuda
    monkeypatch.setattr(cuda, 'get_device_name', lambda: 'pretended GPU')
    monkeypatch.setattr(cuda, 'get_device_capability', lambda: capability)
    monkeypatch.setattr(cuda, 'get_device_properties', lambda: SimpleNamespace(total_memory=80 * 2 ** 30))
