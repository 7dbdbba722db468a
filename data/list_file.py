"""List files: text of 'relative/path label' lines <-> the samples as a few arrays, which forked data processes share.

14 million lines are read in seconds: lines of the usual form in bulk, by numpy; every other line one by one, by the rules.
"""
import hashlib
import os
import re
import shlex
import sys
from dataclasses import dataclass

import numpy as np

LIST_FORMAT = "lines of 'relative/path label'"
SHOWN = 10                                          # bad lines quoted in an error
CHUNK = 1 << 24                                     # bytes parsed at a time: the memory of the intermediate arrays
SAMPLES_AT_A_TIME = 1 << 20                         # hashed at a time
LABEL_DIGITS = 9                                    # of a usual line
BOM = b'\xef\xbb\xbf'
UTF_8_LOCALE = sys.getfilesystemencoding().lower() == 'utf-8'


@dataclass(frozen=True)
class ImageList:
    """The n samples of a list file. Only arrays, no text objects: a process that reads those writes to their reference counts,
    and so gets a copy of each page of memory that it looks at."""

    list_file: str
    data_path: str
    text: bytes                                     # the file
    starts: np.ndarray                              # (n,) int64, where the names begin in it
    lengths: np.ndarray                             # (n,) int32, of the names, in bytes
    labels: np.ndarray                              # (n,) int64
    gaps: np.ndarray                                # for each line that is no sample, in order, the number of samples before it

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return self.text[self.starts[index]:self.starts[index] + self.lengths[index]].decode()

    def path(self, index):
        return os.path.join(self.data_path, file_name(self.name(index), self.data_path))

    def count_classes(self) -> int:
        """Return the largest label plus 1."""
        return int(self.labels.max()) + 1

    def digest(self) -> str:
        """Describe the names and labels, in their order; comments, empty lines and line endings do not count."""
        digest = hashlib.sha256(self.labels.astype('<i8').tobytes() + self.lengths.astype('<i4').tobytes())
        for first in range(0, len(self), SAMPLES_AT_A_TIME):
            digest.update(self._names(first, min(first + SAMPLES_AT_A_TIME, len(self))))
        return f'{len(self)} images, sha256 {digest.hexdigest()[:16]}'

    def _names(self, first, last):
        """Return the names of the samples first..last-1, one after another, as bytes."""
        begin, end = self.starts[first], self.starts[last - 1] + self.lengths[last - 1]
        starts, lengths = self.starts[first:last] - begin, self.lengths[first:last]
        edges = np.zeros(end - begin + 1, np.int8)
        edges[starts] += 1
        edges[starts + lengths] -= 1
        inside = np.cumsum(edges[:-1], dtype=np.int8).astype(bool)
        return np.frombuffer(self.text, np.uint8, end - begin, begin)[inside].tobytes()

    def file_digest(self) -> str:
        """Return the fingerprint of the whole file, which checkpoints of earlier versions hold."""
        return hashlib.sha256(self.text).hexdigest()[:16]

    def where(self, index):
        return f'{self.list_file}:{index + 1 + np.searchsorted(self.gaps, index, "right")}'


def file_name(name: str, folder: str = '') -> str:
    """Return the relative path that a UTF-8 text names, for the functions of `os`.

    A name is bytes. Where the locale has another encoding than UTF-8, Python would translate the text into other bytes; that is
    taken only if there is such a file in `folder` and none with the name of the text.
    """
    if UTF_8_LOCALE:
        return name
    as_bytes = os.fsdecode(name.encode())
    exact, translated = (os.path.join(folder, path) for path in (as_bytes, name))
    return name if not os.path.exists(exact) and os.path.exists(translated) else as_bytes


def name_of_file(path: str) -> str:
    """Return the text for a list that names a path of the functions of `os`: the inverse of file_name.

    Bytes that are no UTF-8 text become surrogates, unless the locale can tell them.
    """
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        return path


def read_list(list_file, data_path, num_classes):
    """Read a text file of 'relative/path label' lines as an ImageList; blank lines and lines that start with # do not count.

    Missing images are found when they are read. Raises FileNotFoundError, and ValueError with the first SHOWN bad lines.
    """
    if not os.path.isfile(list_file):
        folder = os.path.dirname(list_file) or '.'
        if not os.path.isdir(folder):
            raise FileNotFoundError(f'{list_file}: no such list file, for there is no folder {folder}; -data_path names the '
                                    'folder with the images')
        raise FileNotFoundError(f'{list_file}: no such list file; it has {LIST_FORMAT}. If each class has a folder, '
                                f'python tools/make_lists.py {shlex.quote(folder)} makes it')
    with open(list_file, 'rb') as file:
        text = file.read()
    first, lines, samples, bad, parts = len(BOM) if text.startswith(BOM) else 0, 0, 0, [], []
    while first < len(text):
        last = text.find(b'\n', first + CHUNK) + 1 or len(text)
        try:
            *arrays, gaps, problems = _parse(text, first, last, num_classes)
        except UnicodeDecodeError:
            raise ValueError(f'{list_file}: not a UTF-8 text file; expected {LIST_FORMAT}') from None
        parts.append([*arrays, gaps + samples])
        bad += [(lines + line + 1, problem) for line, problem in problems]
        if len(bad) >= SHOWN:
            break
        samples, lines, first = samples + len(arrays[0]), lines + len(arrays[0]) + len(gaps), last
    if bad:
        count = len(bad) if len(bad) < SHOWN else f'at least {SHOWN}'
        raise ValueError(f'{list_file}: {count} bad line{"s" if len(bad) > 1 else ""}'
                         + ''.join(f'\n  {list_file}:{line}: {problem}' for line, problem in bad[:SHOWN]))
    if not samples:
        raise ValueError(f'{list_file}: the list is empty; expected {LIST_FORMAT}')
    return ImageList(list_file, data_path, text, *(np.concatenate(column) for column in zip(*parts)))


def _parse(text, first, last, num_classes):
    """Whole lines, text[first:last] -> starts, lengths and labels of their samples (a bad line is one, too), gaps,
    [(line number from 0, what is wrong), ...]."""
    part = np.frombuffer(text, np.uint8, last - first, first)
    if part.max() > 127:
        text[first:last].decode()                   # raises where it is not UTF-8
    starts, stops = _lines(part)
    spaces, labels = _numbers(part, stops)
    lengths = spaces - starts
    usual = _usual(part, starts, stops, spaces) & (labels < num_classes)
    counts, problems = np.ones(len(starts), bool), []
    for i in np.flatnonzero(~usual):
        line = text[first + starts[i]:first + stops[i]].decode()
        start = len(line[:len(line) - len(line.lstrip())].encode())
        line = line.strip()
        counts[i] = line != '' and not line.startswith('#')
        if counts[i]:
            name, labels[i], problem = _parse_line(line, num_classes)
            starts[i], lengths[i] = starts[i] + start, len(name.encode())
            problems += [(int(i), problem)] if problem else []
            if len(problems) == SHOWN:
                break
    skipped = np.flatnonzero(~counts)
    return starts[counts] + first, lengths[counts].astype(np.int32), labels[counts], skipped - np.arange(len(skipped)), problems


def _lines(part):
    """Bytes -> where their lines start and stop; a line ends with \\n, \\r\\n or \\r, as in Python's text files."""
    end = part == ord('\n')
    returns = part == ord('\r')
    if returns.any():
        end |= returns & ~np.append(end[1:], False)
    ends = np.flatnonzero(end)
    if not end[-1]:
        ends = np.append(ends, len(part))
    starts = np.append(0, ends[:-1] + 1)
    return starts, ends - ((ends > starts) & returns[ends - 1])


def _numbers(part, stops):
    """The byte before the digits that a line ends with, at most LABEL_DIGITS of them, and their number."""
    at, labels = stops - 1, np.zeros(len(stops), np.int64)
    for i in range(LABEL_DIGITS):
        digit = part[np.maximum(at, 0)] - np.uint8(ord('0'))     # wraps round to 10 or more for what is no digit
        is_digit = digit < 10
        if not is_digit.any():
            break
        labels += np.where(is_digit, digit, 0) * np.int64(10 ** i)
        at -= is_digit
    return at, labels


def _usual(part, starts, stops, spaces):
    """Whether a line is a relative name between visible ASCII characters, one space or tab, and digits."""
    before, space, head = part[np.maximum(spaces - 1, 0)], part[np.maximum(spaces, 0)], part[np.minimum(starts, len(part) - 1)]
    usual = (spaces > starts) & (spaces < stops - 1) & ((space == ord(' ')) | (space == ord('\t')))
    usual &= (before > 32) & (before < 127) & (head > 32) & (head < 127) & (head != ord('#')) & (head != ord('/'))
    dots = part == ord('.')
    dots[:-1] &= dots[1:]
    usual[np.searchsorted(stops, np.flatnonzero(dots[:-1]))] = False         # two dots may lead out of the folder
    return usual


def _parse_line(line, num_classes):
    """'relative/path label' -> name, label, what is wrong or ''."""
    name, *rest = line.rsplit(None, 1)
    shown = line if len(line) <= 100 and line.isprintable() else ascii(line[:100])
    if not rest:
        return '', 0, f"no label in {shown}; expected 'relative/path label'"
    if not re.fullmatch(r'[+-]?\d{1,18}', rest[0], re.ASCII):
        return '', 0, f'label {ascii(rest[0][:40])} is not a whole number'
    label = int(rest[0])
    if not 0 <= label < num_classes:
        return '', 0, f'label {label} is not in 0..{num_classes - 1} (MODEL.NUM_CLASSES is {num_classes})'
    if os.path.isabs(name):
        return '', 0, f'{shown}: the path is absolute; it must be relative to DATA.DATA_PATH'
    if '..' in name and os.path.normpath(name).split(os.sep)[0] == os.pardir:
        return '', 0, f'{shown}: the path leaves DATA.DATA_PATH'
    return name, label, ''
