"""Read list files: text of 'relative/path label' lines -> the samples as a few arrays.

Lines of the usual form are read in bulk by numpy, all others one by one. So 14 million lines take seconds;
one by one they would take half a minute.
"""
from __future__ import annotations

import hashlib
import io
import os
import re
import shlex
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data import archives

LIST_FORMAT = "lines of 'relative/path label'"
OPTIONAL_LABELS = "lines of 'relative/path' or 'relative/path label'"
WHOLE_NUMBER = re.compile(r'[+-]?\d{1,18}', re.ASCII)                     # a label
SHOWN = 10                                          # bad lines quoted in an error
CHUNK = 1 << 24                                     # bytes parsed at a time: limits temporary memory
SAMPLES_AT_A_TIME = 1 << 20                         # hashed at a time
LABEL_DIGITS = 9                                    # at most, of a usual line
BOM = b'\xef\xbb\xbf'
UTF_8_LOCALE = sys.getfilesystemencoding().lower() == 'utf-8'


@dataclass(frozen=True)
class ImageList:
    """The n samples of a list file.

    It holds arrays, no text objects. Reading a text object writes to its reference count, and so copies
    a page of memory into each forked process.
    """

    list_file: str
    data_path: str
    text: bytes                                     # the whole file
    starts: np.ndarray                              # (n,) int64, where the names begin in the text
    lengths: np.ndarray                             # (n,) int32, of the names, in bytes
    labels: np.ndarray                              # (n,) int64
    gaps: np.ndarray                                # for each line that is no sample: samples before it

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the relative path of a sample, as the list has it."""
        return self.text[self.starts[index]:self.starts[index] + self.lengths[index]].decode()

    def path(self, index: int) -> str:
        """Return the path of a sample, for the functions of `os`."""
        return os.path.join(self.data_path, file_name(self.name(index), self.data_path))

    def where(self, index: int) -> str:
        """Return list file and line number of a sample, as FILE:LINE."""
        return f'{self.list_file}:{index + 1 + np.searchsorted(self.gaps, index, "right")}'

    def count_classes(self) -> int:
        """Return the largest label plus 1."""
        return int(self.labels.max()) + 1

    def digest(self) -> str:
        """Return the number of samples and a hash of their names and labels, in order.

        Comments, empty lines and line endings make no difference.
        """
        digest = hashlib.sha256(self.labels.astype('<i8').tobytes() + self.lengths.astype('<i4').tobytes())
        for first in range(0, len(self), SAMPLES_AT_A_TIME):
            digest.update(self._names(first, min(first + SAMPLES_AT_A_TIME, len(self))))
        return f'{len(self)} images, sha256 {digest.hexdigest()[:16]}'

    def _names(self, first: int, last: int) -> bytes:
        """Return the names of the samples first..last-1, one after another."""
        begin, end = self.starts[first], self.starts[last - 1] + self.lengths[last - 1]
        starts, lengths = self.starts[first:last] - begin, self.lengths[first:last]
        edges: np.ndarray = np.zeros(end - begin + 1, np.int8)
        edges[starts] += 1
        edges[starts + lengths] -= 1
        inside = np.cumsum(edges[:-1], dtype=np.int8).astype(bool)
        return np.frombuffer(self.text, np.uint8, end - begin, begin)[inside].tobytes()

    def file_digest(self) -> str:
        """Return the hash of the whole file, which checkpoints of earlier versions hold."""
        return hashlib.sha256(self.text).hexdigest()[:16]


# ---- names of files

def file_name(name: str, folder: str = '') -> str:
    """Return the relative path for the functions of `os` that a UTF-8 text names.

    A name is bytes. In a locale with another encoding than UTF-8, Python would translate the text into
    other bytes. The translated name is taken only if `folder` has such a file, and none with the name of
    the text.
    """
    if UTF_8_LOCALE:
        return name
    as_bytes = os.fsdecode(name.encode())
    exact, translated = os.path.join(folder, as_bytes), os.path.join(folder, name)
    if not os.path.exists(exact) and os.path.exists(translated):
        return name
    return as_bytes


def name_of_file(path: str) -> str:
    """Return the text for a list that names a path of the functions of `os`: the inverse of file_name.

    Bytes that are no UTF-8 text become surrogates, unless the locale can decode them.
    """
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        return path


# ---- reading

def read_lines(path: str, expected: str) -> list[str]:
    """Read the lines of a UTF-8 text file, without empty lines and lines that start with #.

    Raises OSError, and ValueError with what was `expected` for a file that is not UTF-8 text.
    """
    with io.TextIOWrapper(archives.open_file(path), encoding='utf-8-sig') as file:
        try:
            lines = [line.strip() for line in file]
        except UnicodeDecodeError:
            raise ValueError(f'{path}: not a UTF-8 text file; expected {expected}') from None
    return [line for line in lines if line and not line.startswith('#')]


def read_list(list_file: str, data_path: str, num_classes: int) -> ImageList:
    """Read a text file of 'relative/path label' lines; empty lines and lines that start with # do not
    count.

    Missing images are found when they are read.
    Raises FileNotFoundError, and ValueError with the first SHOWN bad lines.
    """
    text = _read_bytes(list_file)
    first = len(BOM) if text.startswith(BOM) else 0
    lines = samples = 0
    bad: list[tuple[int, str]] = []                 # line number, reason
    parts = []
    while first < len(text):
        last = text.find(b'\n', first + CHUNK) + 1 or len(text)
        try:
            part, problems = _parse(text, first, last, num_classes)
        except UnicodeDecodeError:
            raise ValueError(f'{list_file}: not a UTF-8 text file; expected {LIST_FORMAT}') from None
        bad += [(lines + line + 1, reason) for line, reason in problems]
        if len(bad) >= SHOWN:
            break
        parts.append(part._replace(gaps=part.gaps + samples))
        samples += len(part.starts)
        lines += len(part.starts) + len(part.gaps)
        first = last
    if bad:
        raise ValueError(_describe_bad_lines(list_file, bad))
    if not samples:
        raise ValueError(f'{list_file}: the list is empty; expected {LIST_FORMAT}')
    columns = [np.concatenate(column) for column in zip(*parts)]
    return ImageList(list_file, data_path, text, *columns)


def read_optional_labels(list_file: str) -> list[tuple[str, int | None]]:
    """Read a list file in which labels may be missing, as (path, label or None) of each line.

    Paths are relative to its folder. The last word is a label if it is a whole number, unless the whole
    line names a file. Raises as `read_lines`, and ValueError for an empty list.
    """
    folder = os.path.dirname(list_file)
    found: list[tuple[str, int | None]] = []
    for line in read_lines(list_file, OPTIONAL_LABELS):
        whole = os.path.join(folder, file_name(line, folder))
        name, *last = line.rsplit(None, 1)
        if last and WHOLE_NUMBER.fullmatch(last[0]) and not os.path.exists(whole):
            found.append((os.path.join(folder, file_name(name, folder)), int(last[0])))
        else:
            found.append((whole, None))
    if not found:
        raise ValueError(f'{list_file}: the list is empty; expected {OPTIONAL_LABELS}')
    return found


def _read_bytes(list_file: str) -> bytes:
    """Read a list file whole. Raises FileNotFoundError with the command that makes it."""
    folder = os.path.dirname(list_file) or '.'
    if not os.path.exists(folder):
        raise FileNotFoundError(f'{list_file}: no such list file, for there is no folder {folder}; '
                                '-data_path names the folder or archive with the images')
    if os.path.isdir(folder) and not os.path.isfile(list_file):
        raise FileNotFoundError(f'{list_file}: no such list file; it has {LIST_FORMAT}. If each class has '
                                f'a folder, python tools/make_lists.py {shlex.quote(folder)} makes it')
    with archives.open_file(list_file) as file:
        return file.read()


def _describe_bad_lines(list_file: str, bad: list[tuple[int, str]]) -> str:
    count = str(len(bad)) if len(bad) < SHOWN else f'at least {SHOWN}'
    title = f'{list_file}: {count} bad line{"s" if len(bad) > 1 else ""}'
    return '\n  '.join([title, *(f'{list_file}:{line}: {reason}' for line, reason in bad[:SHOWN])])


def _parse_line(line: str, num_classes: int) -> tuple[str, int, str]:
    """Parse 'relative/path label' to name, label, and the reason why the line is bad, or ''."""
    name, *rest = line.rsplit(None, 1)
    shown = line if len(line) <= 100 and line.isprintable() else ascii(line[:100])
    if not rest:
        return '', 0, f"no label in {shown}; expected 'relative/path label'"
    if not WHOLE_NUMBER.fullmatch(rest[0]):
        return '', 0, f'label {ascii(rest[0][:40])} is not a whole number'
    label = int(rest[0])
    if not 0 <= label < num_classes:
        return '', 0, f'label {label} is not in 0..{num_classes - 1} (MODEL.NUM_CLASSES is {num_classes})'
    if os.path.isabs(name):
        return '', 0, f'{shown}: the path is absolute; it must be relative to DATA.DATA_PATH'
    if '..' in name and os.path.normpath(name).split(os.sep)[0] == os.pardir:
        return '', 0, f'{shown}: the path leaves DATA.DATA_PATH'
    return name, label, ''


# ---- many lines at a time

class _Samples(NamedTuple):
    """The columns of an ImageList, of some lines; a bad line is a sample, too."""
    starts: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    gaps: np.ndarray


def _parse(text: bytes, first: int, last: int, num_classes: int) -> tuple[_Samples, list[tuple[int, str]]]:
    """Parse the whole lines of text[first:last] to samples and the bad lines: (line number from 0,
    reason)."""
    part = np.frombuffer(text, np.uint8, last - first, first)
    if part.max() > 127:
        text[first:last].decode()                   # raises UnicodeDecodeError
    starts, stops = _find_lines(part)
    spaces, labels = _read_numbers(part, stops)
    lengths = spaces - starts
    is_usual = _is_usual(part, starts, stops, spaces) & (labels < num_classes)
    is_sample: np.ndarray = np.ones(len(starts), bool)
    problems: list[tuple[int, str]] = []
    for i in np.flatnonzero(~is_usual).tolist():
        line = text[first + starts[i]:first + stops[i]].decode()
        indent = line[:len(line) - len(line.lstrip())]
        line = line.strip()
        is_sample[i] = line != '' and not line.startswith('#')
        if not is_sample[i]:
            continue
        name, labels[i], reason = _parse_line(line, num_classes)
        starts[i] += len(indent.encode())
        lengths[i] = len(name.encode())
        if reason:
            problems.append((i, reason))
        if len(problems) == SHOWN:
            break
    skipped = np.flatnonzero(~is_sample)
    samples = _Samples(starts[is_sample] + first, lengths[is_sample].astype(np.int32), labels[is_sample],
                       gaps=skipped - np.arange(len(skipped)))
    return samples, problems


def _find_lines(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the lines of some bytes start and stop.

    A line ends with \\n, \\r\\n or \\r, as in Python's text files.
    """
    end = part == ord('\n')
    returns = part == ord('\r')
    if returns.any():
        end |= returns & ~np.append(end[1:], False)
    ends = np.flatnonzero(end)
    if not end[-1]:
        ends = np.append(ends, len(part))
    starts: np.ndarray = np.append(0, ends[:-1] + 1)
    return starts, ends - ((ends > starts) & returns[ends - 1])


def _read_numbers(part: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of the byte before the digits at the end of each line, and their number.

    At most LABEL_DIGITS digits are read.
    """
    at: np.ndarray = stops - 1
    labels: np.ndarray = np.zeros(len(stops), np.int64)
    for i in range(LABEL_DIGITS):
        digit = part[np.maximum(at, 0)] - np.uint8(ord('0'))     # 10 or more for anything else, by overflow
        is_digit = digit < 10
        if not is_digit.any():
            break
        labels += np.where(is_digit, digit, 0) * np.int64(10 ** i)
        at -= is_digit
    return at, labels


def _is_usual(part: np.ndarray, starts: np.ndarray, stops: np.ndarray, spaces: np.ndarray) -> np.ndarray:
    """Return for each line if it is a relative name, one space or tab, and digits.

    The name begins and ends with visible ASCII characters and has no two dots in sequence.
    """
    head = part[np.minimum(starts, len(part) - 1)]
    end, space = part[np.maximum(spaces - 1, 0)], part[np.maximum(spaces, 0)]
    usual = (spaces > starts) & (spaces < stops - 1)
    usual &= (space == ord(' ')) | (space == ord('\t'))
    usual &= (end > 32) & (end < 127) & (head > 32) & (head < 127)
    usual &= (head != ord('#')) & (head != ord('/'))
    dots = part == ord('.')
    dots[:-1] &= dots[1:]
    # two dots may lead out of the folder
    usual[np.searchsorted(stops, np.flatnonzero(dots[:-1]))] = False
    return usual
