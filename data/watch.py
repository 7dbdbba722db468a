"""A time limit for reading one image, over all data processes."""
from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import suppress

import numpy as np

IDLE = -1                                           # instead of an index: no image is being read


class Watch:
    """Kill a data process that reads one image for longer than `limit` seconds; 0: no limit.

    A read from a network mount that is gone never returns. Each data process notes in shared memory
    which image it reads. A thread of the trainer looks at the notes every second. `late` is the index of
    the image that exceeded the limit, or IDLE.
    """

    def __init__(self, workers: int, limit: float):
        shared = multiprocessing.RawArray('q', 3 * workers)
        # (workers, 3): process, index of its image, number of its notes so far
        self.notes = np.frombuffer(shared, np.int64).reshape(workers, 3)
        self.notes[:, 1] = IDLE
        self.limit, self.late = limit, IDLE
        self._stopped = threading.Event()
        if limit:
            threading.Thread(target=self._look, daemon=True).start()

    def note(self, worker: int, index: int) -> None:
        """Note, in a data process, that it starts to read the image `index`, or that it is IDLE."""
        self.notes[worker] = os.getpid(), index, self.notes[worker, 2] + 1

    def stop(self) -> None:
        """Stop looking at the notes."""
        self._stopped.set()

    def _look(self) -> None:
        before = self.notes.copy()
        # seconds since the last note of each process, while the trainer runs: it may have been stopped
        seconds = np.zeros(len(before))
        while not self._stopped.wait(1):
            now = self.notes.copy()
            reading = now[:, 1] != IDLE
            unchanged = (now == before).all(axis=1)
            seconds = np.where(reading & unchanged, seconds + 1, 0)
            before = now
            if seconds.max() >= self.limit:
                process, self.late, _ = now[seconds.argmax()].tolist()
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(process, signal.SIGKILL)
                return
