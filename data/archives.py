"""Read files within tar and zip archives in place: a path such as flowers.zip/daisy/1.jpg names a member.

A tar may lie in a tar, as in ImageNet's ILSVRC2012_img_train.tar/n01440764.tar/n01440764_18.JPEG. Of a
parquet file, as hubs distribute images, FILE.parquet/17 is the image of row 17, counted from 0.
The first use of a tar or zip writes an index: a file with 32 bytes for each member, sorted, which all
processes map into their memory. It is beside the archive, or in the cache if that folder is read-only. An
archive of another size or time gets a new one.
"""
from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import posixpath
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from system import files

import numpy as np

log = logging.getLogger('halonet')

PARQUET = '.parquet'
IMAGE_COLUMN = 'image'                              # of a hub's parquet: the bytes, or a struct with `bytes`
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
HAS_CHECKSUM = 1 << 40                              # in Member.packing, beside method << 32 and the CRC-32
LOCAL_HEADER = 30                                   # bytes of a zip's header before the name of a member
NAMES_AT = 26                                       # in it: the lengths of the name and of an extra field
NESTED = re.compile(rb'^(.*?\.(?:tar|zip|parquet))/', re.MULTILINE | re.IGNORECASE)
Stamp = tuple[int, int]                             # bytes and time of change of an archive


class Member(NamedTuple):
    """A file in an archive: its name, where its bytes or its zip header start, their number."""

    name: str
    offset: int
    size: int
    packing: int = 0


# ---- reading a member

def open_member(path: str) -> BinaryIO:
    """Open the member of an archive that `path` names, as binary.

    Raises FileNotFoundError if no part of the path is an archive or if the archive has no such member,
    OSError for a damaged member, and ValueError for an archive that cannot be read.
    """
    archive, name = split(path)
    if not archive:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    stamp = _stamp(archive)
    if _is_parquet(archive):
        return io.BytesIO(_read_row(archive, stamp, name, path))
    index = _index(archive, stamp)
    found = int(np.searchsorted(index[0], _hash(name)))
    if found == index.shape[1] or index[0, found] != _hash(name):
        raise FileNotFoundError(errno.ENOENT, f'no such member in the archive {archive}', path)
    offset, size, packing = (int(number) for number in index[1:, found])
    with open(archive, 'rb', buffering=0) as file:
        if packing & HAS_CHECKSUM:
            return io.BytesIO(_read_packed(file, path, offset, size, packing))
        return io.BytesIO(_read_at(file, path, offset, size))


def is_file(path: str) -> bool:
    """True for a file, and for a member of an archive."""
    if os.path.exists(path):
        return os.path.isfile(path)
    try:
        open_member(path).close()
    except (OSError, ValueError):
        return False
    return True


def open_file(path: str) -> BinaryIO:
    """Open a file or a member of an archive, as binary. Raises as open_member."""
    try:
        return open(path, 'rb')
    except NotADirectoryError:
        return open_member(path)


def split(path: str) -> tuple[str, str]:
    """Return the archive and the name of the member in a path, or ('', '') if no part of it is a file."""
    archive = os.path.dirname(path)
    while archive and not os.path.exists(archive):
        shorter = os.path.dirname(archive)
        if shorter == archive:
            break
        archive = shorter
    if not os.path.isfile(archive):
        return '', ''
    return archive, path[len(archive) + 1:]


def _read_at(file: BinaryIO, path: str, offset: int, size: int) -> bytes:
    parts = []
    left = size
    while left:
        part = os.pread(file.fileno(), left, offset + size - left)
        if not part:
            raise OSError(errno.EIO, f'the archive ends within this member, which takes bytes {offset} to '
                          f'{offset + size}; fetch the archive again', path)
        parts.append(part)
        left -= len(part)
    return b''.join(parts)


def _read_packed(file: BinaryIO, path: str, offset: int, size: int, packing: int) -> bytes:
    """Read a member of a zip archive and compare its checksum."""
    header = _read_at(file, path, offset, LOCAL_HEADER)
    skipped = LOCAL_HEADER + sum(struct.unpack_from('<HH', header, NAMES_AT))
    data = _read_at(file, path, offset + skipped, size)
    try:
        if packing >> 32 & 0xff == DEFLATED:
            data = zlib.decompress(data, -zlib.MAX_WBITS)
    except zlib.error as error:
        raise OSError(errno.EIO, f'damaged in the archive, at byte {offset}: {error}', path) from None
    if zlib.crc32(data) != packing & 0xffffffff:
        raise OSError(errno.EIO, f'damaged in the archive, at byte {offset}: its checksum is another', path)
    return data


# ---- rows of a parquet file

def _is_parquet(archive: str) -> bool:
    return archive.lower().endswith(PARQUET)


@lru_cache(maxsize=512)                            # each is an open file
def _parquet(archive: str, stamp: Stamp, process: int) -> tuple[Any, np.ndarray]:
    """Open a parquet file for one process; returns it and the first row of each row group, and the end.

    Raises ValueError if it cannot be read, also without pyarrow.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f'{archive}: reading it needs pyarrow: python -m pip install pyarrow') from None
    try:
        file = parquet.ParquetFile(archive, memory_map=True)
    except Exception as error:                      # pyarrow has errors of its own
        raise ValueError(f'{archive}: no parquet file, or a damaged one ({error}); fetch it again') from None
    names = file.schema_arrow.names
    if IMAGE_COLUMN not in names:
        raise ValueError(f'{archive}: the images must be in a column {IMAGE_COLUMN}; it has '
                         f'{", ".join(names)}')
    counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return file, np.cumsum([0, *counts])


def _read_row(archive: str, stamp: Stamp, name: str, path: str) -> bytes:
    file, starts = _parquet(archive, stamp, os.getpid())
    if not name.isdecimal() or int(name) >= starts[-1]:
        raise FileNotFoundError(errno.ENOENT, f'no such row; {archive} has rows 0 to {starts[-1] - 1}', path)
    row = int(name)
    group = int(np.searchsorted(starts, row, 'right')) - 1
    try:
        column = file.read_row_group(group, columns=[IMAGE_COLUMN], use_threads=False)[IMAGE_COLUMN]
        value = column[row - int(starts[group])].as_py()
    except Exception as error:                      # pyarrow has errors of its own
        raise OSError(errno.EIO, f'row group {group} of the parquet file is damaged: {error}', path) from None
    data = value['bytes'] if isinstance(value, dict) else value
    return data or b''


def read_labels(archive: str) -> np.ndarray:
    """Return the column `label` of a parquet file, (rows,) int64. Raises ValueError."""
    file, _ = _parquet(archive, _stamp(archive), os.getpid())
    if 'label' not in file.schema_arrow.names:
        raise ValueError(f'{archive}: it has no column label')
    return file.read(columns=['label'], use_threads=False)['label'].to_numpy()


# ---- the index

def prepare(data_path: str, names: bytes) -> None:
    """Make the indices of the archives that a list needs; `names` is its text.

    A damaged or compressed archive is then found before a training. Raises ValueError with the reason.
    """
    found = {data_path} if os.path.isfile(data_path) else set()
    for name in set(NESTED.findall(names)):
        found.add(os.path.join(data_path, os.fsdecode(name)))
    for path in sorted(found):
        if os.path.isfile(path) and _is_parquet(path):
            _parquet(path, _stamp(path), os.getpid())
        elif os.path.isfile(path):
            _index(path, _stamp(path))


def _stamp(archive: str) -> Stamp:
    status = os.stat(archive)
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=4096)
def _index(archive: str, stamp: Stamp) -> np.ndarray:
    """Return the index (4, members) uint64: hash of the name, in rising order; offset; size; packing."""
    places = _index_files(archive, stamp)
    for path in places:
        with suppress(OSError, ValueError, EOFError):
            return np.load(path, mmap_mode='r')
    log.info('%s: its index is made, once', archive)
    index = _make_index(members(archive))
    for path in places:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            _remove_old_index(path, archive)
            files.atomic_write(path, lambda file: np.save(file, index))
            return np.load(path, mmap_mode='r')
        except OSError:
            continue                                # read-only or full
    return index


def _index_files(archive: str, stamp: Stamp) -> list[str]:
    """Return the paths where the index can be: beside the archive, and in the cache."""
    name = f'.{os.path.basename(archive)}.{stamp[0]:x}-{stamp[1]:x}.index.npy'
    beside = os.path.dirname(os.path.abspath(archive))
    folder = hashlib.sha256(os.fsencode(os.path.realpath(archive))).hexdigest()[:16]
    return [os.path.join(beside, name), os.path.join(files.cache_folder('archives', folder), name)]


def _remove_old_index(path: str, archive: str) -> None:
    """Remove from the folder of a new index those of the archive as it was before."""
    folder = os.path.dirname(path)
    old = re.compile(rf'\.{re.escape(os.path.basename(archive))}\.[0-9a-f]+-[0-9a-f]+\.index\.npy')
    for name in os.listdir(folder):
        if old.fullmatch(name) and name != os.path.basename(path):
            with suppress(FileNotFoundError):       # another process has removed it
                os.remove(os.path.join(folder, name))


def _make_index(found: Iterable[Member]) -> np.ndarray:
    rows = ((_hash(member.name), *member[1:]) for member in found)
    index: np.ndarray = np.fromiter(rows, np.dtype((np.uint64, 4))).T        # 32 bytes a member, at once
    # of members of one name the last counts, as in unpacking
    last: np.ndarray = np.arange(index.shape[1])[::-1]
    hashes, first = np.unique(index[0, last], return_index=True)
    kept = index[:, last[first]]
    kept[0] = hashes
    return kept


def _hash(name: str) -> np.uint64:
    """Return 64 bits of a name: two of 14 million names have the same with a probability of 5e-6."""
    digest = hashlib.blake2b(name.encode('utf-8', 'surrogateescape'), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, 'little'))


# ---- the members

def members(archive: str) -> Iterator[Member]:
    """Yield the files in a tar, those of tars in it included, or in a zip.

    Raises ValueError for another file and for an archive that is compressed as a whole, cut or encrypted.
    """
    with open(archive, 'rb') as file:
        try:
            if zipfile.is_zipfile(file):
                yield from _members_of_zip(file)
            else:
                file.seek(0)
                yield from _members_of_tar(file, 0, os.fstat(file.fileno()).st_size)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f'{archive}: {_describe(archive, error)}') from None


def _describe(archive: str, error: Exception) -> str:
    with open(archive, 'rb') as file:
        start = file.read(6)
    for magic, unpack in ((b'\x1f\x8b', 'gunzip'), (b'BZh', 'bunzip2'), (b'\xfd7zXZ\0', 'unxz'),
                          (b'\x28\xb5\x2f\xfd', 'unzstd')):
        if start.startswith(magic):
            return ('compressed as a whole, so that no image can be read alone; '
                    f'make it a plain tar by {unpack}')
    return f'no tar or zip archive, or a damaged one ({error}); fetch it again'


def _members_of_tar(file: BinaryIO, start: int, size: int, folder: str = '') -> Iterator[Member]:
    """Yield the files of a tar that takes `size` bytes from `start` on."""
    with tarfile.open(fileobj=_Part(file, start, size), mode='r:') as tar:
        while True:
            entry = tar.next()
            if entry is None:
                break
            tar.members = []                        # type: ignore[attr-defined]  # or it keeps them all
            if not entry.isreg() or entry.issparse():
                continue
            name = folder + posixpath.normpath(entry.name)
            offset = start + entry.offset_data
            if name.lower().endswith('.tar'):
                yield from _members_of_tar(file, offset, entry.size, f'{name}/')
            else:
                yield Member(name, offset, entry.size)


class _Part(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self.file, self.start, self.size, self.at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(self.size - self.at, 0)
        wanted = left if size < 0 else min(size, left)
        data = os.pread(self.file.fileno(), wanted, self.start + self.at)
        self.at += len(data)
        return data


def _members_of_zip(file: BinaryIO) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            if entry.flag_bits & 1 or entry.compress_type not in (STORED, DEFLATED):
                raise ValueError(f'{archive.filename}: {entry.filename} in it is encrypted, or compressed '
                                 'otherwise than by deflate; make the archive again')
            packing = HAS_CHECKSUM | entry.compress_type << 32 | entry.CRC
            name = posixpath.normpath(entry.filename)
            yield Member(name, entry.header_offset, entry.compress_size, packing)
