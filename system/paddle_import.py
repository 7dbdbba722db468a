"""Import Paddle and undo what its import does to the process: a handler of SIGTERM, and OMP_NUM_THREADS.

The handler, in C++, allocates memory. A signal in the middle of an allocation, or of the fork of a data
worker, would leave the process waiting for ever. Paddle's handler stays until this module is imported.
"""
import os
import signal

from system import cpu

_handler = signal.getsignal(signal.SIGTERM)         # as Python has set it, which does not see Paddle's
_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # one that comes now is delayed
import paddle  # noqa: E402

try:
    signal.signal(signal.SIGTERM, _handler or signal.SIG_DFL)
except ValueError:                                  # in a thread: only all handlers can be removed
    paddle.disable_signal_handler()
signal.pthread_sigmask(signal.SIG_SETMASK, _mask)

if cpu.user_threads() is None:
    os.environ.pop('OMP_NUM_THREADS', None)         # child processes get the user's environment
