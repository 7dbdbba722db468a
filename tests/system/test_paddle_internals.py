"""system/paddle_internals.py: name what a new Paddle has lost. Each function has a check, named after it."""
import ctypes
import inspect
import math
import os
import signal

from system import paddle_internals

import numpy as np
import paddle
import pytest
from paddle import nn
from pretended_gpu import pretend_gpu

X = np.arange(2 * 3 * 4 * 4, dtype='float32').reshape(2, 3, 4, 4)


def check_has_hooks():
    layer = nn.ReLU()
    assert not paddle_internals.has_hooks(layer)
    for register in (layer.register_forward_pre_hook, layer.register_forward_post_hook):
        hook = register(lambda *_: None)
        assert paddle_internals.has_hooks(layer)
        hook.remove()
    assert not paddle_internals.has_hooks(layer)


def check_convolution_settings():
    conv = nn.Conv2D(6, 4, (3, 5), (2, 1), (1, 2), dilation=1, groups=2)
    assert paddle_internals.convolution_settings(conv) == (
        6, [3, 5], [2, 1], [1, 1], (1, 2), 'zeros', 2, 'NCHW', [1, 2], 'conv2d')
    other = paddle_internals.convolution_settings(nn.Conv2D(4, 4, 3, dilation=2, padding='SAME', groups=4))
    assert other.dilation == [2, 2] and other.zero_padding is None and other.operator == 'depthwise_conv2d'
    mirrored = paddle_internals.convolution_settings(nn.Conv2D(4, 4, 3, padding=1, padding_mode='reflect'))
    assert mirrored.zero_padding is None and mirrored.padding_mode == 'reflect'
    assert paddle_internals.convolution_settings(nn.Conv2D(1, 1, 3, data_format='NHWC')).data_format == 'NHWC'


def check_stride_of():
    conv = nn.Conv2D(3, 1, 1, 3)
    assert paddle_internals.stride_of(conv) == 3
    conv._stride = [2, 2]                           # Paddle reads it at each call
    assert conv(paddle.to_tensor(X)).shape == [2, 1, 2, 2]


def check_norm_settings():
    norm = nn.BatchNorm2D(3, momentum=0.75, epsilon=0.25)
    assert paddle_internals.norm_settings(norm) == (0.75, 0.25, 'NCHW')


def check_set_momentum():
    norm = nn.BatchNorm2D(3)
    paddle_internals.set_momentum(norm, 0.5)
    norm(paddle.to_tensor(X))
    np.testing.assert_allclose(norm.state_dict()['_mean'], 0.5 * X.mean((0, 2, 3)))


def check_norm_statistics():
    norm = nn.BatchNorm2D(3)
    mean, variance = paddle_internals.norm_statistics(norm)
    norm(paddle.to_tensor(X))                       # changes the same tensors
    for key, value in ('_mean', mean), ('_variance', variance):
        np.testing.assert_array_equal(norm.state_dict()[key], value)
    assert mean.numpy().any()


def check_uses_running_statistics():
    norm = nn.BatchNorm2D(3)
    assert not paddle_internals.uses_running_statistics(norm)
    norm.eval()
    assert paddle_internals.uses_running_statistics(norm)
    norm = nn.BatchNorm2D(3, use_global_stats=False)
    norm.eval()
    assert not paddle_internals.uses_running_statistics(norm)
    np.testing.assert_allclose(norm(paddle.to_tensor(X)).mean([0, 2, 3]), np.zeros(3), atol=1e-5)


def check_has_frozen_statistics():
    for given in (None, False, True):
        norm = nn.BatchNorm2D(3, use_global_stats=given)
        assert paddle_internals.has_frozen_statistics(norm) is bool(given)


def check_freeze_statistics():
    norm = nn.BatchNorm2D(3)
    paddle_internals.freeze_statistics(norm)
    assert paddle_internals.has_frozen_statistics(norm) and paddle_internals.uses_running_statistics(norm)
    out = norm(paddle.to_tensor(X))
    np.testing.assert_allclose(out, X, rtol=1e-4)   # mean 0 and variance 1, as they were made
    assert not norm.state_dict()['_mean'].numpy().any()


def check_synchronise():
    norm, made = nn.BatchNorm2D(3), nn.SyncBatchNorm(3)
    keys = list(norm.state_dict())
    paddle_internals.synchronise(norm)
    assert type(norm) is nn.SyncBatchNorm and list(norm.state_dict()) == keys == list(made.state_dict())
    assert not vars(made).keys() - vars(norm).keys()


def check_RMSProp():
    parameter = paddle.create_parameter([1], 'float32', default_initializer=nn.initializer.Constant(1.0))
    optimizer = paddle_internals.RMSProp(0.1, rho=0.9, epsilon=0.0, parameters=[parameter])
    (2.0 * parameter).backward()
    optimizer.step()
    assert parameter.item() == pytest.approx(1 - 0.1 * 2 / (0.9 * 1 + 0.1 * 4) ** 0.5)


def check_GradScaler():
    """As on a GPU: a step with an infinite gradient is skipped, counted, and halves the scale."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend_gpu(monkeypatch)
        scaler = paddle_internals.GradScaler(init_loss_scaling=8.0)
        parameter = paddle.create_parameter([1], 'float32', default_initializer=nn.initializer.Constant(1.0))
        optimizer = paddle.optimizer.SGD(0.5, parameters=[parameter])
        for factor in (float('inf'), 1.0):
            with paddle.amp.auto_cast(dtype='float16'):
                scaler.scale(parameter.sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.clear_grad()
            assert scaler.skipped == 1 and scaler.scale_factor() == 4.0
            assert parameter.item() == (1.0 if math.isinf(factor) else 0.5)


class Numbers(paddle.io.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return np.int64([os.getpid()])


def check_shut_down_workers():
    handler = signal.getsignal(signal.SIGCHLD)
    reader = iter(paddle.io.DataLoader(Numbers(), batch_size=1, num_workers=1))
    worker = next(reader)[0].item()
    signal.signal(signal.SIGCHLD, handler)
    os.kill(worker, 0)
    paddle_internals.shut_down_workers(reader, 5)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def check_set_num_threads():
    openmp = ctypes.CDLL(paddle_internals.openmp_library())
    before = openmp.omp_get_max_threads()
    try:
        for threads in (3, 1):
            paddle_internals.set_num_threads(threads)
            assert openmp.omp_get_max_threads() == threads
    finally:
        paddle_internals.set_num_threads(before)


def check_process_store():
    assert callable(paddle.base.core.create_or_get_global_tcp_store)     # it waits for others if it is called
    assert {'add', 'set', 'wait'} <= set(dir(paddle.base.core.TCPStore))


def check_is_lost_connection():
    lost = RuntimeError('[/paddle/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer')
    assert paddle_internals.is_lost_connection(lost)
    for number, expected in (2, True), (3, True), (6, True), (1, False), (5, False):
        nccl = OSError(f'(External) NCCL error({number}), see the manual of NCCL. (at /paddle/phi/x.cc:1)')
        assert paddle_internals.is_lost_connection(nccl) == expected
    assert not paddle_internals.is_lost_connection(ValueError('a file lies in /third_party/images'))


def check_register_operators():
    with pytest.raises((RuntimeError, ValueError, OSError), match='none.so'):
        paddle_internals.register_operators('/none.so')


def check_run_operator():
    with pytest.raises((RuntimeError, ValueError, IndexError, KeyError), match='no_such_operator'):
        paddle_internals.run_operator('no_such_operator', paddle.ones([1]))


def check_operator_includes():
    for header in ('paddle/extension.h', 'Python.h'):
        folders = paddle_internals.operator_includes()
        assert any(os.path.isfile(os.path.join(folder, header)) for folder in folders)


def check_library_folders():
    folders = paddle_internals.library_folders()
    assert any(os.path.isfile(os.path.join(folder, 'libpaddle.so')) for folder in folders)


def check_openmp_library():
    name = paddle_internals.openmp_library()
    assert name is None or any(os.path.isfile(os.path.join(folder, name))
                               for folder in paddle_internals.library_folders())


CHECKS = {name.removeprefix('check_'): check for name, check in list(globals().items())
          if name.startswith('check_')}


@pytest.mark.parametrize('name', CHECKS)
def test_paddle_still_has(name):
    try:
        CHECKS[name]()
    except Exception as error:
        pytest.fail(f'paddle_internals.{name} does not work with Paddle {paddle.__version__}: {error!r}')


def test_every_function_has_a_check():
    classes = paddle_internals.RMSProp, paddle_internals.GradScaler
    own = {name for name, value in vars(paddle_internals).items()
           if not name.startswith('_') and getattr(value, '__module__', '') == paddle_internals.__name__
           and (inspect.isfunction(value) or value in classes)}
    assert own == CHECKS.keys()
