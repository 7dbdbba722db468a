"""Import Paddle without its side effects: import this module before Paddle.

Paddle's import installs a handler of SIGTERM in C++, which allocates memory: a signal in the middle of an allocation, or of
the fork of a data worker, would leave the process waiting for ever. It sets OMP_NUM_THREADS, and it warns.
"""
import os
import signal
import warnings

warnings.filterwarnings('ignore', message='No ccache found')                 # at each import of Paddle
warnings.filterwarnings('ignore', message='When training, we now always track')  # by each batch norm in each step
warnings.filterwarnings('ignore', message='Your model will be trained under CPUONLY mode')   # the log says it

USER_THREADS = os.environ.get('OMP_NUM_THREADS')

_handler = signal.getsignal(signal.SIGTERM)
_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})           # one that comes now is delivered below
import paddle  # noqa: E402

try:
    signal.signal(signal.SIGTERM, _handler or signal.SIG_DFL)
except ValueError:                                  # in a thread only all of Paddle's handlers can be removed
    paddle.disable_signal_handler()
signal.pthread_sigmask(signal.SIG_SETMASK, _mask)

if USER_THREADS is None:
    os.environ.pop('OMP_NUM_THREADS', None)         # child processes see the user's environment
