"""Open weight files of every known format: Paddle's and other pickles, PyTorch's two, safetensors.

Only the description of the arrays is read here. Each array is a stand-in: a Call of safe_pickle, or a Raw of
safetensors.
"""
import io
import json
import os
import zipfile
from typing import Any, BinaryIO, Callable, NamedTuple, Optional, Union, cast

import numpy as np

from model import safe_pickle
from model.safe_pickle import Blob, Global, shown

TORCH_MAGIC = 0x1950A86A20F9469CFC6C                # a file by torch.save before PyTorch 1.6
TORCH_VERSION = 1001                                # of that format
TORCH_STORAGES = {
    'FloatStorage': 'float32', 'DoubleStorage': 'float64', 'HalfStorage': 'float16',
    'BFloat16Storage': 'bfloat16', 'LongStorage': 'int64', 'IntStorage': 'int32', 'ShortStorage': 'int16',
    'CharStorage': 'int8', 'ByteStorage': 'uint8', 'BoolStorage': 'bool'}
SAFETENSORS = {
    'F32': 'float32', 'F64': 'float64', 'F16': 'float16', 'BF16': 'bfloat16', 'I64': 'int64', 'I32': 'int32',
    'I16': 'int16', 'I8': 'int8', 'U8': 'uint8', 'BOOL': 'bool'}
INDEX = 1 << 22                                     # bytes of a zip directory, and of a header of safetensors
NAME = 256                                          # characters of the longest name of an entry or a storage
SIZE = 1 << 48                                      # numbers of the largest storage
OUTSIDE = 'it refers to something outside, and a weight file may hold arrays only'
NOT_WEIGHTS = (                                     # how other files begin that are mistaken for weights
    (b'version https://git-lfs', 'it is a git-lfs pointer; fetch the file behind it with git lfs pull'),
    (b'<', 'it is a web page; download the file itself, not the page that shows it'),
    (b'{', 'it is JSON text'),
    (b'\x1f\x8b', 'it is gzip-compressed; unpack it first'),
    (b'\x89HDF', 'it is HDF5 (Keras)'),
    (b'PK', 'it is a damaged or incomplete zip file'),
)


class Raw(NamedTuple):
    """An array of safetensors: its bytes, its dtype as in SAFETENSORS and its unchecked shape."""

    data: Blob
    kind: str
    shape: tuple


class Storage(NamedTuple):
    """The memory behind tensors of PyTorch: `size` numbers of a dtype as in TORCH_STORAGES."""

    key: str
    kind: str
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * itemsize(self.kind)


Find = Callable[[Storage], Union[bytes, Blob]]
Opened = tuple[Any, Optional[Find]]                 # content, and for PyTorch's files the bytes of a Storage


def itemsize(kind: str) -> int:
    """Return the bytes of a number of a dtype as in TORCH_STORAGES."""
    return 2 if kind == 'bfloat16' else np.dtype(kind).itemsize


def open_file(file: io.BufferedIOBase) -> Opened:
    """Read the content of an open file of any known format, with stand-ins for arrays.

    Returns the content, and for PyTorch's files the function from a Storage to its bytes or Blob. Raises
    ValueError for a file of another kind, and nearly anything for a damaged one.
    """
    head = file.read(512)
    file.seek(0)
    if head[4:9] == b'\0\0\0\0{':                   # the length of the header, 8 bytes, then the header
        return _open_safetensors(file), None
    if head[:2] == b'PK' and zipfile.is_zipfile(file):
        return _open_torch_zip(file)
    if head[:1] == b'\x80':
        file.seek(0)
        content = safe_pickle.load(file)
        is_torch = type(content) is int and content == TORCH_MAGIC
        return _open_torch_legacy(file) if is_torch else (content, None)
    raise ValueError(_kind_of(head))


def _kind_of(head: bytes) -> str:
    """Describe a file that is no weight file by its first bytes."""
    if not head:
        return 'it is empty'
    if not head.strip(b'\0'):
        return 'it holds nothing but zeros'
    if head[257:262] == b'ustar':
        return 'it is a tar file; PyTorch of 2017 and before wrote such: save it again with a newer one'
    for start, description in NOT_WEIGHTS:
        if head.lstrip().startswith(start):
            return description
    return 'it is none of .pdparams, .pdckpt, .safetensors, .pth'


# ---- safetensors

def _open_safetensors(file: io.BufferedIOBase) -> dict[str, Raw]:
    """Read the header of safetensors: {name: Raw}.

    The file has the header's length in 8 bytes, the header in JSON, and the numbers without gaps.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), 'little')
    if length > min(INDEX, size - 8):
        raise ValueError(f'its header is said to have {length} bytes; the limit is {INDEX}, '
                         f'and the file has {size}')
    content, end = {}, 0
    for first, last, name, kind, shape in _header_entries(file.read(length)):
        if type(kind) is not str or kind not in SAFETENSORS:
            text = shown(kind) if type(kind) is str else 'damaged'
            raise ValueError(f'its numbers are {text}; known are {", ".join(SAFETENSORS)}')
        if type(first) is not int or type(last) is not int or first != end or last < first:
            raise ValueError('its header is damaged: arrays overlap or leave gaps')
        content[name] = Raw(Blob(file, 8 + length + first, last - first), SAFETENSORS[kind], shape)
        end = last
    expected = 8 + length + end
    if expected != size:
        raise ValueError(f'it has {size} bytes, and by its header {expected}: it is incomplete or damaged')
    return content


def _header_entries(header: bytes) -> list[tuple]:
    """Parse the header: (first byte, last byte, name, dtype, shape) of each array, in their order."""
    def short_int(digits: str) -> int:
        return int(digits[:20])                     # long ones take minutes, and are wrong anyway

    try:
        arrays = json.loads(header, parse_int=short_int)
        arrays.pop('__metadata__', None)
        entries = []
        for name, array in arrays.items():
            first, last = array['data_offsets']
            entries.append((first, last, name, array['dtype'], tuple(array['shape'])))
        return sorted(entries, key=lambda entry: entry[:2])
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise ValueError('its header is damaged') from None


# ---- PyTorch's files

def storage(pid: Any) -> Storage:
    """Return the Storage of a persistent id ('storage', type, key, device, size[, view])."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or type(pid[0]) is not str or pid[0] != 'storage' \
            or type(pid[1]) is not Global or pid[5:] not in ((), (None,)):
        raise ValueError(OUTSIDE)
    _, kind, key, _, size = pid[:5]
    name = kind.attribute if kind.module == 'torch' else ''
    if name not in TORCH_STORAGES:
        raise ValueError(f'its numbers are {shown(kind.name)}; known are {", ".join(TORCH_STORAGES)}')
    if type(key) is not str or len(key) > NAME or type(size) is not int or not 0 <= size < SIZE:
        raise ValueError('a storage of its tensors has no sensible name or size')
    return Storage(key, TORCH_STORAGES[name], size)


class _Limited:
    """A file for zipfile that reads `most` bytes at once: crafted directories would take gigabytes."""

    def __init__(self, file: io.BufferedIOBase, most: int):
        self.file, self.most = file, most
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        if count > self.most:
            raise ValueError('its directory is damaged or has too many entries')
        return self.file.read(self.most if count < 0 else count)


class _TorchZip:
    """A file by torch.save of PyTorch 1.6 and later: NAME/data.pkl, and each storage in NAME/data/KEY."""

    def __init__(self, file: io.BufferedIOBase):
        self.size, limited = os.fstat(file.fileno()).st_size, _Limited(file, INDEX)
        self.archive = zipfile.ZipFile(cast(BinaryIO, limited))
        limited.most = self.size                    # from here on for entries, of which none exceeds the file
        self.names = self.archive.NameToInfo
        roots = [name[:-len('data.pkl')] for name in self.names if name.endswith('data.pkl')]
        if len(roots) != 1 or len(roots[0]) > NAME or f'{roots[0]}constants.pkl' in self.names:
            raise ValueError('it is a zip file, but torch.save of a state dict did not write it')
        self.root = roots[0]

    def read(self, name: str, length: Optional[int] = None) -> bytes:
        """Read an entry and verify its checksum. Raises ValueError where it has not `length` bytes."""
        info, name = self.names.get(self.root + name), shown(name)
        if info is None:
            raise ValueError(f'its entry {name!r} is missing')
        if length not in (None, info.file_size):
            raise ValueError(f'its entry {name!r} is not as long as a tensor says')
        is_stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not is_stored or info.file_size > self.size:                      # torch.save does not compress
            raise ValueError(f'its entry {name!r} is compressed or damaged')
        content = self.archive.read(info)
        if len(content) != info.file_size:
            raise ValueError(f'its entry {name!r} is shorter than its directory says')
        return content

    def find(self, storage: Storage) -> bytes:
        """Read the bytes of a storage."""
        return self.read(f'data/{storage.key}', storage.nbytes)


def _open_torch_zip(file: io.BufferedIOBase) -> Opened:
    """Open a file by torch.save of PyTorch 1.6 and later."""
    entries = _TorchZip(file)
    if f'{entries.root}byteorder' in entries.names and entries.read('byteorder') != b'little':
        raise ValueError('its numbers are big-endian; save it again on a little-endian machine')
    return safe_pickle.load(io.BytesIO(entries.read('data.pkl'))), entries.find


def _open_torch_legacy(file: io.BufferedIOBase) -> Opened:
    """Open a file by torch.save before PyTorch 1.6, behind its magic number: four pickles, then storages."""
    version, system = safe_pickle.load(file), safe_pickle.load(file)
    if type(version) is not int or version != TORCH_VERSION:
        raise ValueError(f"it is of another version of PyTorch's old format than {TORCH_VERSION}; "
                         'save it again with a newer PyTorch')
    if type(system) is not dict or system.get('little_endian') is not True:
        raise ValueError('its numbers are big-endian; save it again on a little-endian machine')
    references: list = []
    content, keys = safe_pickle.load(file, references), safe_pickle.load(file)
    storages = [storage(reference.id) for reference in references]
    blobs = _legacy_blobs(file, keys, {found.key: found for found in storages})

    def find(found: Storage) -> Blob:
        if found not in blobs:
            raise ValueError(f'its storage {shown(found.key)!r} has two types or sizes')
        return blobs[found]

    return content, find


def _legacy_blobs(file: io.BufferedIOBase, keys: Any, named: dict[str, Storage]) -> dict[Storage, Blob]:
    """Find the numbers of each storage, in the order of `keys`: a count in 8 bytes, then the numbers."""
    are_names = type(keys) is list and all(type(key) is str for key in keys)
    if not are_names or {*named} != {*keys} or len(named) != len(keys):
        raise ValueError('it is incomplete: it names other storages than its tensors')
    blobs, size = {}, os.fstat(file.fileno()).st_size
    for key in keys:
        count, start = int.from_bytes(file.read(8), 'little'), file.tell()
        if count != named[key].size or named[key].nbytes > size - start:
            raise ValueError(f'it is incomplete: the storage {shown(key)!r} is not there as a whole')
        blobs[named[key]] = Blob(file, start, named[key].nbytes)
        file.seek(start + named[key].nbytes)
    return blobs
