"""Text for consoles and logs: no name of a file may end a program or control the terminal."""
import io
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STDOUT, STDERR = 1, 2                               # file descriptors

# Control characters but tab and line feed, other line separators, marks that reverse the direction of
# writing, and surrogates, by which Python keeps the bytes of a name that is no text.
UNSAFE = re.compile('[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]')


def visible(text: object) -> str:
    """Replace characters that a terminal obeys or cannot show by escapes, such as \\x1b for Escape."""
    return UNSAFE.sub(_escape, str(text))


def _escape(match: re.Match) -> str:
    code = ord(match[0])
    return f'\\x{code:02x}' if code < 256 else f'\\u{code:04x}'


def prepare() -> None:
    """Let the standard streams escape what their encoding lacks, without UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the output of libraries, from C++ too. An exception other than ValueError shows it."""
    streams = sys.stdout, sys.stderr
    for stream in streams:
        stream.flush()
    copies = {descriptor: os.dup(descriptor) for descriptor in (STDOUT, STDERR)}
    with tempfile.TemporaryFile() as hidden:
        try:
            for descriptor in copies:
                os.dup2(hidden.fileno(), descriptor)
            yield
        except ValueError:
            raise
        except BaseException:
            hidden.seek(0)
            os.write(copies[STDERR], hidden.read())
            raise
        finally:
            for stream in streams:
                stream.flush()
            for descriptor, copy in copies.items():
                os.dup2(copy, descriptor)
                os.close(copy)


# ---- logs

class _WarnsOnce(logging.Handler):
    """Makes a log handler report its first error of writing, such as a full disk, in one line."""

    warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Report the error that is being handled, which writing this record has raised."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        if not self.warned:
            self.warned = True
            name = getattr(self, 'baseFilename', 'console')
            with suppress(OSError):                 # stderr may be the same pipe
                print(f'warning: {name}: cannot write: {error.strerror}; the run goes on, '
                      'its log has gaps', file=sys.stderr)


class LogFile(_WarnsOnce, logging.FileHandler):
    """A log file without a buffer: a line that does not fit on the disk is lost, later ones are tried."""

    def _open(self) -> io.TextIOWrapper:
        file = open(self.baseFilename, 'ab', buffering=0)
        return io.TextIOWrapper(file, encoding='utf-8', errors='backslashreplace', write_through=True)


class Console(_WarnsOnce, logging.StreamHandler):
    """The log on a terminal, or in whatever reads the standard output."""


class Formatter(logging.Formatter):
    """Formats records so that names of files do not control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return visible(super().format(record))
