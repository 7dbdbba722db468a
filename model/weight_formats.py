"""Open weight files of every known format: Paddle's and other pickles, PyTorch's two, safetensors.

Nothing is read but what says where the arrays lie. An array is a stand-in: a Call of safe_pickle, or a Raw of safetensors.
"""
import io
import json
import os
import zipfile
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from model import safe_pickle
from model.safe_pickle import Blob, Global, shown

TORCH_MAGIC = 0x1950A86A20F9469CFC6C                # the first pickle of a file by torch.save before PyTorch 1.6
TORCH_STORAGES = {'FloatStorage': 'float32', 'DoubleStorage': 'float64', 'HalfStorage': 'float16', 'BFloat16Storage': 'bfloat16',
                  'LongStorage': 'int64', 'IntStorage': 'int32', 'ShortStorage': 'int16', 'CharStorage': 'int8',
                  'ByteStorage': 'uint8', 'BoolStorage': 'bool'}
SAFETENSORS = {'F32': 'float32', 'F64': 'float64', 'F16': 'float16', 'BF16': 'bfloat16', 'I64': 'int64', 'I32': 'int32',
               'I16': 'int16', 'I8': 'int8', 'U8': 'uint8', 'BOOL': 'bool'}
INDEX = 1 << 22                                     # bytes of the directory of a zip file, and of the header of safetensors
NAME = 256                                          # characters of the longest name of an entry or a storage
OUTSIDE = 'it refers to something outside, and a weight file may hold arrays only'
NOT_WEIGHTS = (                                     # how files begin that people take for weights
    (b'version https://git-lfs', 'it is a git-lfs pointer; fetch the file behind it with git lfs pull'),
    (b'<', 'it is a web page; download the file itself, not the page that shows it'),
    (b'{', 'it is JSON text'), (b'\x1f\x8b', 'it is gzip-compressed; unpack it first'), (b'\x89HDF', 'it is HDF5 (Keras)'),
    (b'PK', 'it is a damaged or incomplete zip file'),
)


class Raw(NamedTuple):
    """An array of safetensors: its bytes, its type as in SAFETENSORS and its shape, which is not checked yet."""

    data: Blob
    kind: str
    shape: tuple


class Storage(NamedTuple):
    """The memory that tensors of PyTorch lie in: `size` numbers of a type as in TORCH_STORAGES."""

    key: str
    kind: str
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * itemsize(self.kind)


def itemsize(kind: str) -> int:
    """Bytes of a number of a type as in TORCH_STORAGES."""
    return 2 if kind == 'bfloat16' else np.dtype(kind).itemsize


def open_file(file: io.BufferedIOBase) -> tuple[Any, Optional[Callable]]:
    """What an open file of any known format holds, with stand-ins for arrays.

    Returns the content, and for PyTorch's files the function from a Storage to its bytes or Blob. Raises ValueError for
    what is no weight file, and nearly anything for a damaged one.
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
        return _open_torch_legacy(file) if type(content) is int and content == TORCH_MAGIC else (content, None)
    if not head.strip(b'\0'):
        raise ValueError('it holds nothing but zeros' if head else 'it is empty')
    if head[257:262] == b'ustar':
        raise ValueError('it is a tar file; PyTorch of 2017 and before wrote such: save it again with a newer one')
    raise ValueError(next((what for start, what in NOT_WEIGHTS if head.lstrip().startswith(start)),
                          'it is none of .pdparams, .pdckpt, .safetensors, .pth'))


# ---- safetensors

def _open_safetensors(file):
    """{name: Raw} of safetensors: 8 bytes, the length of the header; the header in JSON; the numbers, without gaps."""
    size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), 'little')
    if length > min(INDEX, size - 8):
        raise ValueError(f'its header is said to have {length} bytes; the limit is {INDEX}, and the file has {size}')
    try:
        header = json.loads(file.read(length), parse_int=lambda digits: int(digits[:20]))
        header.pop('__metadata__', None)
        entries = [(*entry['data_offsets'], name, entry['dtype'], tuple(entry['shape'])) for name, entry in header.items()]
        entries.sort(key=lambda entry: entry[:2])
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise ValueError('its header is damaged') from None
    content, end = {}, 0
    for first, last, name, kind, shape in entries:
        if type(kind) is not str or kind not in SAFETENSORS:
            raise ValueError(f'its numbers are {shown(kind) if type(kind) is str else "damaged"}; known are '
                             + ', '.join(SAFETENSORS))
        if type(first) is not int or type(last) is not int or first != end or last < first:
            raise ValueError('its header is damaged: arrays overlap or leave gaps')
        content[name] = Raw(Blob(file, 8 + length + first, last - first), SAFETENSORS[kind], shape)
        end = last
    if 8 + length + end != size:
        raise ValueError(f'it has {size} bytes, and by its header {8 + length + end}: it is incomplete or damaged')
    return content


# ---- PyTorch's files

def storage(pid) -> Storage:
    """The Storage that a persistent id ('storage', type, key, device, count[, view]) means. Raises ValueError."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or type(pid[0]) is not str or pid[0] != 'storage' \
            or type(pid[1]) is not Global or pid[5:] not in ((), (None,)):
        raise ValueError(OUTSIDE)
    _, kind, key, _, count = pid[:5]
    name = kind.attribute if kind.module == 'torch' else ''
    if name not in TORCH_STORAGES:
        raise ValueError(f'its numbers are {shown(kind.name)}; known are {", ".join(TORCH_STORAGES)}')
    if type(key) is not str or len(key) > NAME or type(count) is not int or not 0 <= count < 1 << 48:
        raise ValueError('a storage of its tensors has no sensible name or size')
    return Storage(key, TORCH_STORAGES[name], count)


class _Limited:
    """A file for zipfile that gives at most `most` bytes at once: crafted directories would take gigabytes."""

    def __init__(self, file, most):
        self.file, self.most = file, most
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count=-1):
        if count > self.most:
            raise ValueError('its directory is damaged or has too many entries')
        return self.file.read(self.most if count < 0 else count)


def _open_torch_zip(file):
    """What torch.save of PyTorch 1.6 and later wrote: NAME/data.pkl, and each storage as NAME/data/KEY."""
    size, limited = os.fstat(file.fileno()).st_size, _Limited(file, INDEX)
    archive = zipfile.ZipFile(limited)
    limited.most = size                             # from here on for entries, of which none exceeds the file
    roots = [name[:-len('data.pkl')] for name in archive.NameToInfo if name.endswith('data.pkl')]
    if len(roots) != 1 or len(roots[0]) > NAME or f'{roots[0]}constants.pkl' in archive.NameToInfo:
        raise ValueError('it is a zip file, but torch.save of a state dict did not write it')

    def entry(name, length=None):
        info, name = archive.NameToInfo.get(roots[0] + name), shown(name)
        if info is None:
            raise ValueError(f'its entry {name!r} is missing')
        if length not in (None, info.file_size):
            raise ValueError(f'its entry {name!r} is not as long as a tensor says')
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.file_size > size:
            raise ValueError(f'its entry {name!r} is compressed or damaged')           # torch.save does not compress
        content = archive.read(info)
        if len(content) != info.file_size:
            raise ValueError(f'its entry {name!r} is shorter than its directory says')
        return content

    if f'{roots[0]}byteorder' in archive.NameToInfo and entry('byteorder') != b'little':
        raise ValueError('its numbers are big-endian; save it again on a little-endian machine')
    content = safe_pickle.load(io.BytesIO(entry('data.pkl')))
    return content, lambda found: entry(f'data/{found.key}', found.nbytes)


def _open_torch_legacy(file):
    """What torch.save before PyTorch 1.6 wrote, from behind the magic number: four pickles, then the storages."""
    version, system = safe_pickle.load(file), safe_pickle.load(file)
    if type(version) is not int or version != 1001:
        raise ValueError("it is of another version of PyTorch's old format than 1001; save it again with a newer PyTorch")
    if type(system) is not dict or system.get('little_endian') is not True:
        raise ValueError('its numbers are big-endian; save it again on a little-endian machine')
    references = []
    content, keys = safe_pickle.load(file, references), safe_pickle.load(file)
    named = {found.key: found for found in (storage(reference.id) for reference in references)}
    if type(keys) is not list or not all(type(key) is str for key in keys) or {*named} != {*keys} or len(named) != len(keys):
        raise ValueError('it is incomplete: it names other storages than its tensors')
    blobs, size = {}, os.fstat(file.fileno()).st_size
    for key in keys:
        count, start = int.from_bytes(file.read(8), 'little'), file.tell()
        if count != named[key].size or named[key].nbytes > size - start:
            raise ValueError(f'it is incomplete: the storage {shown(key)!r} is not there as a whole')
        blobs[named[key]] = Blob(file, start, named[key].nbytes)
        file.seek(start + named[key].nbytes)

    def find(found):
        if found not in blobs:
            raise ValueError(f'its storage {shown(found.key)!r} has two types or sizes')
        return blobs[found]

    return content, find
