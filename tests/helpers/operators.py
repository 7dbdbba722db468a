"""Run a compiled operator and its gradient, and compare results; a mark for tests that need the operators."""
import numpy as np
import paddle
import pytest

import ops

COMPILED = pytest.mark.skipif(
    paddle.get_device() != 'cpu' or not ops.load(), reason='no C++ compiler, or not a CPU')


def results(attend, inputs, **kwargs):
    """Output and gradients of `attend`."""
    *tensors, gradient = [paddle.to_tensor(x.astype(inputs[0].dtype), stop_gradient=False) for x in inputs]
    out = attend(*tensors, **kwargs)
    out.backward(gradient)
    return [out.numpy()] + [x.grad.numpy() for x in tensors]


def difference(a, b):
    """Norm of a - b over the norm of b, both in float64."""
    distance = np.linalg.norm((a.astype('float64') - b).ravel())
    return distance / max(np.linalg.norm(b.astype('float64').ravel()), 1e-30)
