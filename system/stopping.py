"""How a process is asked to stop, and how it ends: signals, exceptions, exit codes. Needs no Paddle."""
import os
import signal
import threading
from types import FrameType
from typing import Optional

FAILURE = 1                                         # another start may help
MISTAKE = 2                                         # another start meets the same error
STOPPED = 75                                        # EX_TEMPFAIL: on request, another start continues
MISTAKES = (ValueError, FloatingPointError, FileNotFoundError, FileExistsError, NotADirectoryError,
            IsADirectoryError, PermissionError, MemoryError)


class Failure(RuntimeError):
    """An error that another start may avoid, such as a killed process; its message is one line."""


class Stopped(Exception):
    """The run has stopped on request; its work is saved."""


def exit_code(error: Exception) -> int:
    """Return MISTAKE for an error that another start would meet again, else FAILURE."""
    return MISTAKE if isinstance(error, MISTAKES) else FAILURE


class Stop:
    """A request to stop. `requested` is '' or, after `listen`, the name of the signal that came."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    requested: str = ''
    interrupts: int = 0                             # number of SIGINTs

    def listen(self) -> 'Stop':
        """Record SIGTERM and SIGINT instead of ending. A second SIGINT ends the process at once.

        One thread waits for them. All others block them, later ones and spawned processes too: a signal
        that interrupts a system call breaks Paddle's TCP store, and Paddle's handler of SIGTERM may hang.
        Call it before importing Paddle, which starts threads.
        """
        for signum in self.SIGNALS:
            signal.signal(signum, self._record)     # for threads that exist already
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        threading.Thread(target=self._wait, daemon=True).start()
        return self

    def _wait(self) -> None:
        while True:
            self._record(signal.sigwait(self.SIGNALS))

    def _record(self, signum: int, frame: Optional[FrameType] = None) -> None:
        if signum == signal.SIGINT:
            self.interrupts += 1
        if self.interrupts > 1:
            os._exit(128 + signum)                  # the kernel ends the data workers: die_with_parent
        self.requested = self.requested or signal.Signals(signum).name

    @classmethod
    def unlisten(cls) -> None:
        """Let these signals end a forked process again. Those that came before are dropped."""
        for signum in cls.SIGNALS:
            signal.signal(signum, signal.SIG_IGN)   # drops what is pending
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, cls.SIGNALS)
