"""Write files that survive crashes, full disks and other writers. Needs no Paddle.

Whole files by `atomic_write`, lines by `appending`, and one writer per run folder by `reserved`.
"""
import errno
import fcntl
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Callable, Union

log = logging.getLogger('halonet')

TEMPORARY = '.tmp'                                  # and a number: ends the name of a temporary file
LOCK = 'run.lock'                                   # in a run folder
LOCK_PATIENCE = 10                                  # seconds: the old process may still be ending
# Some network file systems, FUSE and CIFS cannot flush or lock
NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_held: set[BinaryIO] = set()                        # open lock files of run folders


def sync(descriptor: int) -> None:
    """Flush an open file or folder to the disk, if its file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def lock(file: BinaryIO, wait: bool = True) -> bool:
    """Lock an open file against other processes until it is closed.

    Returns False on a file system without locks. Raises BlockingIOError, unless `wait`, for a file that
    another process has locked.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno not in NOT_SUPPORTED | {errno.ENOLCK}:
            raise
        return False


def cache_folder(*names: str) -> str:
    """Return the path of a folder of this project below $XDG_CACHE_HOME, or below ~/.cache."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(cache, 'halonet', *names)


# ---- whole files

def atomic_write(path: Union[str, os.PathLike], write: Callable[[BinaryIO], Any]) -> None:
    """Make the file `path` by `write(binary file)`; after a crash it is the old file or the new one.

    A device or a pipe, such as /dev/stdout, is written to directly. Raises OSError with the path.
    """
    path = os.fspath(path)
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            with open(path, 'wb') as file:
                write(file)
            return
        _write_and_rename(path, write)
    except OSError as error:
        if error.errno is None:
            raise                                   # by `write`, which reports an error of its own
        message = f'cannot write: {error.strerror}; what was there before is intact'
        raise OSError(error.errno, message, path) from None
    try:
        _sync_folder(os.path.dirname(os.path.abspath(path)))
    except OSError as error:
        message = f'written, but its folder cannot be flushed to the disk: {error.strerror}'
        raise OSError(error.errno, message, path) from None


def _write_and_rename(path: str, write: Callable[[BinaryIO], Any]) -> None:
    temporary = f'{path}{TEMPORARY}{secrets.randbelow(10 ** 9)}'
    try:
        with open(temporary, 'xb') as file:
            lock(file, wait=False)                  # against remove_temporary
            write(file)
            file.flush()
            sync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def _sync_folder(folder: str) -> None:
    """Flush a folder, so that a new name in it survives a crash. Skip one without read permission."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary(folder: str) -> None:
    """Remove the temporary files of killed writers from a folder. Those of living writers stay."""
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if not re.fullmatch(rf'.*{re.escape(TEMPORARY)}\d+', name):
            continue
        path = os.path.join(folder, name)
        with suppress(BlockingIOError, FileNotFoundError, PermissionError), open(path, 'r+b') as file:
            lock(file, wait=False)
            os.remove(path)


# ---- appended lines

@contextmanager
def appending(path: str, is_whole: Callable[[bytes], bool]) -> Iterator[BinaryIO]:
    """Open `path` to append lines, for this process only. An error leaves the file as it was.

    A crash may have left a last line without a line end: completed if `is_whole(line)`, else removed.
    Yields an unbuffered binary file, to be written by `write_all`. Raises OSError with the path.
    """
    with open(path, 'a+b', buffering=0) as file:
        lock(file)
        before = file.seek(0, os.SEEK_END)
        try:
            before = _end_last_line(file, before, is_whole)
            yield file
            sync(file.fileno())
        except BaseException as error:
            with suppress(OSError):
                file.truncate(before)
            if isinstance(error, OSError) and error.errno:
                message = f'cannot append to it: {error.strerror}; what was there before is intact'
                raise OSError(error.errno, message, path) from None
            raise


def _end_last_line(file: BinaryIO, size: int, is_whole: Callable[[bytes], bool]) -> int:
    """Complete or remove a last line without a line end. Returns the size of the file."""
    file.seek(max(size - 1, 0))
    if file.read(1) in (b'', b'\n'):
        return size
    file.seek(max(size - 2 ** 16, 0))
    line = file.read(2 ** 16).rpartition(b'\n')[2]
    if is_whole(line):
        write_all(file, b'\n')
        return size + 1
    log.warning('%s: its last line was cut by a crash, and is removed: %.200r', file.name, line)
    return file.truncate(size - len(line))


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write `data` to an unbuffered file, which may take only a part at a time."""
    while data:
        data = data[file.write(data):]


# ---- one writer per run folder

@contextmanager
def reserved(folder: str) -> Iterator[None]:
    """Keep other processes from `reserved(folder)` during the block; the kernel ends it with the process.

    Raises ValueError, with the process and its host, if another one holds the folder for LOCK_PATIENCE.
    """
    with open(os.path.join(folder, LOCK), 'a+b', buffering=0) as file:
        _lock_run(folder, file)
        with suppress(OSError):                     # a full disk: the lock counts, not its text
            file.truncate(0)
            since = time.strftime('%Y-%m-%d %H:%M:%S')
            holder = f'process {os.getpid()} on host {socket.gethostname()} since {since}'
            write_all(file, f'{holder}\n'.encode())
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
            with suppress(OSError, ValueError):     # ValueError: closed, in a fork
                file.truncate(0)


def _lock_run(folder: str, file: BinaryIO) -> None:
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            if not lock(file, wait=False):
                log.warning('the file system of %s has no locks: see that no other run writes to it',
                            folder)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                break
        time.sleep(0.2)
    file.seek(0)
    holder = file.read().decode(errors='replace').strip() or 'another process'
    raise ValueError(f'{folder} is in use by {holder}; wait until that ends, '
                     'or choose another folder with -output')


def _close_held() -> None:
    """Close the lock files in a forked data worker: it may outlive the run, and would keep the locks."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_close_held)
