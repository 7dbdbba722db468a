"""Paddle's internals that this project uses: one function each, so that a new Paddle is followed here alone.

Each docstring names the public way, or says that there is none. tests/system/test_paddle_internals.py
checks all of them and names what a new Paddle has lost.
"""
import os
import re
import sysconfig
from typing import Any, NamedTuple, Optional

from system import paddle_import  # noqa: F401  before Paddle

import paddle
from paddle import nn
from paddle.utils.cpp_extension import extension_utils

# ---- layers


def has_hooks(layer: nn.Layer) -> bool:
    """True if a hook is registered to run before or after the layer's `forward`. There is no public way."""
    return bool(layer._forward_pre_hooks or layer._forward_post_hooks)


class ConvolutionSettings(NamedTuple):
    """The arguments that a Conv2D was made with, and what Paddle derives from them."""
    in_channels: int
    kernel_size: list                               # height and width
    stride: list
    dilation: list
    padding: Any                                    # as it was given
    padding_mode: str
    groups: int
    data_format: str
    zero_padding: Optional[list]                    # of zeros: rows, columns; None for another kind
    operator: str                                   # Paddle's: conv2d or depthwise_conv2d


def convolution_settings(conv: nn.Conv2D) -> ConvolutionSettings:
    """Return the settings of a convolution. Paddle shows them in repr(conv) only."""
    explicit = conv._padding_algorithm == 'EXPLICIT' and conv._padding_mode == 'zeros'
    return ConvolutionSettings(
        in_channels=conv._in_channels, kernel_size=conv._kernel_size, stride=conv._stride,
        dilation=conv._dilation, padding=conv._padding, padding_mode=conv._padding_mode, groups=conv._groups,
        data_format=conv._data_format, zero_padding=conv._updated_padding if explicit else None,
        operator=conv._op_type)


def stride_of(conv: nn.Conv2D) -> int:
    """Return the vertical stride of a convolution. There is no public way."""
    return conv._stride[0]


class NormSettings(NamedTuple):
    """The arguments that a BatchNorm2D was made with."""
    momentum: float                                 # the fraction of the running statistics that a step keeps
    epsilon: float
    data_format: str


def norm_settings(norm: nn.BatchNorm2D) -> NormSettings:
    """Return the settings of a batch norm. Paddle shows them in repr(norm) only."""
    return NormSettings(norm._momentum, norm._epsilon, norm._data_format)


def set_momentum(norm: nn.BatchNorm2D, momentum: float) -> None:
    """Set the fraction of the running statistics that a training step keeps. Public when the norm is made."""
    norm._momentum = momentum


def norm_statistics(norm: nn.BatchNorm2D) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Return the running mean and variance of a batch norm, (C,) each. The public way is state_dict(), a
    copy of its dict at each call."""
    return norm._mean, norm._variance


def uses_running_statistics(norm: nn.BatchNorm2D) -> bool:
    """True if a batch norm computes with its running statistics, in its present mode."""
    if norm._use_global_stats is None:
        return not norm.training
    return norm._use_global_stats


def has_frozen_statistics(norm: nn.BatchNorm2D) -> bool:
    """True if a batch norm uses and keeps its running statistics in training, too."""
    return bool(norm._use_global_stats)


def freeze_statistics(norm: nn.BatchNorm2D) -> None:
    """Let a batch norm use and keep its running statistics in training, too. Public when the norm is made."""
    norm._use_global_stats = True


def synchronise(norm: nn.BatchNorm2D) -> None:
    """Make a batch norm compute the statistics of all processes. The names of its parameters stay.

    The public way, SyncBatchNorm.convert_sync_batchnorm, converts norms with frozen statistics too, and
    forgets that they are frozen.
    """
    norm.__class__ = nn.SyncBatchNorm               # both classes have the same attributes


# ---- training

class RMSProp(paddle.optimizer.RMSProp):
    """RMSProp as in TensorFlow: epsilon inside the root, learning rate inside the momentum, mean square
    starting at 1. Paddle starts at 0, which makes the first steps huge; there is no public way to set
    it."""

    def _add_accumulator(self, name: str, param: paddle.Tensor, *args: Any, **kwargs: Any) -> Any:
        if name == self._mean_square_acc_str:
            kwargs['fill_value'] = 1.0
        return super()._add_accumulator(name, param, *args, **kwargs)


class GradScaler(paddle.amp.GradScaler):
    """Paddle's scaling of the loss, without the line that it prints on every process at an overflow.

    That line is a TypeError since NumPy 2.4. `skipped` counts the steps that were left out. There is no
    public way to learn of them.
    """

    skipped = 0
    _incr_count: int
    _decr_count: int
    _scale: paddle.Tensor

    def _update(self) -> None:
        if not self._cache_found_inf:
            super()._update()
            return
        self.skipped += 1
        self._incr_count = 0
        self._decr_count += 1
        if self._decr_count == self._decr_every_n_nan_or_inf:
            self._scale = self._scale * self._decr_ratio
            self._decr_count = 0

    def scale_factor(self) -> float:
        """Return the present factor of the loss. The public way, state_dict(), returns it with all else."""
        return self._scale.item() if self._enable else 1.0


def shut_down_workers(reader: Any, timeout: float) -> None:
    """End the data workers of an iterator over a DataLoader with workers; wait `timeout` seconds for each.

    The public way is to drop the iterator, but its own thread holds on to it.
    """
    reader._try_shutdown_all(timeout)


# ---- processes and threads

def set_num_threads(threads: int) -> None:
    """Set the number of threads on a CPU. The public way works only before the import: OMP_NUM_THREADS."""
    paddle.base.core.set_num_threads(threads)


def process_store() -> Any:
    """Return the key-value store of all processes, with add(key, number).

    The public way to wait for each other, a barrier, gives up after 30 s with gloo.
    """
    return paddle.base.core.create_or_get_global_tcp_store()


def is_lost_connection(error: BaseException) -> bool:
    """True if Paddle raised `error` as another process did not answer: by its text.

    Gloo and the store have their source path in it, NCCL an error number: system, internal or remote error.
    """
    return bool(re.search(r'/third_party/gloo/|/core/distributed/store/|NCCL error\([236]\)', str(error)))


# ---- compiled operators

def register_operators(path: str) -> None:
    """Load a library of custom operators. The public way, cpp_extension.load, compiles it as well."""
    extension_utils.load_op_meta_info_and_register_op(path)


def run_operator(name: str, *arguments: Any) -> list:
    """Call a registered operator with its inputs, then its attributes. The public way: a generated module."""
    return paddle._C_ops._run_custom_op(name, *arguments)


def operator_includes() -> list[str]:
    """Return the folders of the headers that custom operators need: Paddle's, third parties', Python's."""
    # another scheme, Debian's default, may name a folder that does not exist
    return [*extension_utils.find_paddle_includes(), sysconfig.get_path('include', 'posix_prefix')]


def library_folders() -> list[str]:
    """Return the folders of the wheel with libpaddle.so and with libiomp5.so. Public for the second:
    paddle.sysconfig.get_lib()."""
    return [os.path.join(os.path.dirname(paddle.__file__), 'base'), paddle.sysconfig.get_lib()]


def openmp_library() -> Optional[str]:
    """Return the name of the OpenMP library that Paddle brings and computes with, None if it has none."""
    name = 'libiomp5.so'
    if os.path.exists(os.path.join(paddle.sysconfig.get_lib(), name)):
        return name
    return None
