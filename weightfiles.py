"""Weight files of Paddle, PyTorch and safetensors -> {key: numpy array}; also back into PyTorch's. Only numpy and safetensors
are needed.

What a file is follows from its content, not from its ending, and nothing in it is ever run: of the globals that a pickle
names, arrays and containers are allowed, PyTorch's tensors become stand-ins of ours, and anything else is refused by name.
"""
import argparse
import io
import math
import os
import pickle
import pickletools
import zipfile

import numpy as np
import safetensors

from utils import log

PADDLE_NAME_TABLE = 'StructuredToParameterName@@'   # paddle.save adds it; it is no parameter
TORCH_MAGIC = 0x1950A86A20F9469CFC6C                # the first pickle of a file by torch.save before PyTorch 1.6
TORCH_STORAGES = {'FloatStorage': 'float32', 'DoubleStorage': 'float64', 'HalfStorage': 'float16', 'BFloat16Storage': 'bfloat16',
                  'LongStorage': 'int64', 'IntStorage': 'int32', 'ShortStorage': 'int16', 'CharStorage': 'int8',
                  'ByteStorage': 'uint8', 'BoolStorage': 'bool'}
SAFETENSORS = {'F32': 'float32', 'F64': 'float64', 'F16': 'float16', 'BF16': 'bfloat16', 'I64': 'int64', 'I32': 'int32',
               'I16': 'int16', 'I8': 'int8', 'U8': 'uint8', 'BOOL': 'bool'}
WHOLE, AVERAGED = ('state_dict', 'model'), ('state_dict_ema', 'model_ema', 'ema')  # timm's, PaddleViT's, our checkpoints' entries
PREFIXES = ('module.', '_orig_mod.')                # of a parallel and of a compiled model
NOT_WEIGHTS = (                                     # how files begin that people take for weights
    (b'version https://git-lfs', 'it is a git-lfs pointer; fetch the file behind it with git lfs pull'),
    (b'<', 'it is a web page; download the file itself, not the page that shows it'),
    (b'{', 'it is JSON text'), (b'\x1f\x8b', 'it is gzip-compressed; unpack it first'), (b'\x89HDF', 'it is HDF5 (Keras)'),
    (b'PK', 'it is a damaged or incomplete zip file'),
)


def read(path, ema=False):
    """The state dict {key: numpy array} in a weight file or a training checkpoint, under the file's own keys.

    A checkpoint's weights are the raw ones, or with `ema` their moving average. Raises FileNotFoundError, and ValueError,
    naming the file, for one that is damaged, holds something else, or has no moving average when that is asked for.
    """
    with open(path, 'rb') as file:
        try:
            content = _open(file)
            state = _choose(content, ema, path) if isinstance(content, dict) else {}
            arrays = {key: _array(value) for key, value in state.items() if key != PADDLE_NAME_TABLE}
        except Exception as error:                  # a damaged file may raise nearly anything
            raise ValueError(f'{path}: not a readable weight file: {str(error) or type(error).__name__}') from None
    if not arrays or not all(isinstance(key, str) and value is not None for key, value in arrays.items()):
        raise ValueError(f'{path}: expected a state dict of arrays, as model.state_dict() gives, or a checkpoint with one')
    return arrays


def read_pickle(path):
    """What paddle.save wrote to `path`, tensors as numpy arrays. Raises ValueError, naming the file, for anything else."""
    with open(path, 'rb') as file:
        try:
            return _Unpickler(file).load()
        except Exception as error:                  # a damaged pickle may raise nearly anything
            raise ValueError(f'{path}: not a readable weight file: {str(error) or type(error).__name__}') from None


def _open(file):
    """The content of an open file of any known format; tensors of PyTorch stay in the file for now."""
    head, size = file.read(512), os.path.getsize(file.name)
    file.seek(0)
    if head[4:9] == b'\0\0\0\0{':                   # the length of the header, 8 bytes, then the header
        return {name: _numbers(entry['data'], SAFETENSORS.get(entry['dtype'], entry['dtype'])).reshape(entry['shape'])
                for name, entry in safetensors.deserialize(file.read())}
    if head[:2] == b'PK' and zipfile.is_zipfile(file):
        return _open_torch_zip(zipfile.ZipFile(file))
    if head[:1] == b'\x80':
        file.seek(0)
        content = _Unpickler(file).load()
        return _open_torch_legacy(file, size) if content == TORCH_MAGIC and type(content) is int else content
    if not head.strip(b'\0'):
        raise ValueError('it holds nothing but zeros' if head else 'it is empty')
    if head[257:262] == b'ustar':
        raise ValueError('it is a tar file; PyTorch of 2017 and before wrote such: save it again with a newer one')
    raise ValueError(next((what for start, what in NOT_WEIGHTS if head.lstrip().startswith(start)),
                          'it is none of .pdparams, .pdckpt, .safetensors, .pth'))


def _choose(content, ema, path):
    """The state dict in what a file holds: itself, or a checkpoint's weights or moving average."""
    whole, averaged = (next((content[name] for name in names if isinstance(content.get(name), dict) and content[name]), None)
                       for names in (WHOLE, AVERAGED))
    if ema and not averaged:
        raise ValueError('it holds no moving average of the weights (EMA); leave MODEL.PRETRAINED_EMA, ema or --ema out')
    if averaged and not ema:
        log.info('%s holds weights and their moving average (EMA): taking the weights; MODEL.PRETRAINED_EMA True is for the EMA',
                 path)
    # our checkpoints average the parameters only: batch-norm statistics are those of the weights
    return {**_bare(whole or {}), **_bare(averaged)} if ema else _bare(whole or content)


def _bare(state):
    """`state` without the prefix of a parallel or compiled model."""
    for prefix in PREFIXES:
        if state and all(isinstance(key, str) and key.startswith(prefix) for key in state if key != PADDLE_NAME_TABLE):
            state = {key[len(prefix):]: value for key, value in state.items() if key != PADDLE_NAME_TABLE}
    return state


def _array(value):
    """The array of a leaf; None where it is no tensor of numbers."""
    if isinstance(value, _Tensor):
        return value.array()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in 'biuf':
        return None
    return _from_bfloat16(value) if value.dtype == np.uint16 else value      # so writes paddle.save


def _numbers(data, kind):
    """Little-endian bytes -> array (count,); bfloat16 becomes float32."""
    if kind not in SAFETENSORS.values():
        raise ValueError(f'its numbers are {kind}; known are {", ".join(SAFETENSORS.values())}')
    if kind == 'bfloat16':
        return _from_bfloat16(np.frombuffer(data, '<u2'))
    return np.frombuffer(data, np.dtype(kind).newbyteorder('<'))


def _from_bfloat16(bits):
    """bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---- pickles

class _Storage:
    """The memory that tensors of PyTorch lie in: `count` numbers of `kind`, read when they are needed."""

    def __init__(self, kind, count, read_bytes=None):
        self.kind, self.count, self.read_bytes, self.numbers = kind, count, read_bytes, None
        if type(count) is not int or count < 0:
            raise ValueError(f'it holds a storage of {count!r} numbers')

    @property
    def nbytes(self):
        return self.count * (2 if self.kind == 'bfloat16' else np.dtype(self.kind).itemsize)

    def array(self):
        if self.numbers is None:
            self.numbers = _numbers(self.read_bytes(), self.kind)
        return self.numbers


class _Tensor:
    """A view of a storage, checked against its bounds when it is taken."""

    def __init__(self, storage, offset, shape, strides):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self):
        sizes = (self.offset, *self.shape, *self.strides)
        count, reach = math.prod(self.shape), 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides))
        if len(self.shape) != len(self.strides) or not all(type(n) is int and n >= 0 for n in sizes) \
                or count > self.storage.count or count and self.offset + reach > self.storage.count:
            raise ValueError(f'a tensor of shape {list(self.shape)}, strides {list(self.strides)} and offset {self.offset} '
                             f'lies outside its storage of {self.storage.count} numbers')
        numbers = self.storage.array()
        return np.lib.stride_tricks.as_strided(numbers[self.offset:], self.shape, [n * numbers.itemsize for n in self.strides],
                                               writeable=False)


def _stand_ins():
    """{global of PyTorch: what stands for it}, made anew for every file, so that no file can change them for the next."""
    def tensor(storage, offset, shape, strides, *_):
        return _Tensor(storage, offset, shape, strides)

    return {('torch._utils', '_rebuild_tensor'): tensor, ('torch._utils', '_rebuild_tensor_v2'): tensor,
            ('torch._utils', '_rebuild_parameter'): lambda data, *_: data, ('torch', 'Size'): lambda sizes=(): tuple(sizes),
            ('torch', 'device'): lambda *names: ':'.join(map(str, names)),
            ('argparse', 'Namespace'): type('Namespace', (argparse.Namespace,), {}),     # timm keeps its arguments in one
            **{('torch', name): kind for name, kind in TORCH_STORAGES.items()}}


class _Unpickler(pickle.Unpickler):
    """An unpickler for arrays in containers. Any other global is refused by name, before it is called.

    storage: (kind, key, count) -> the _Storage of a PyTorch tensor; without it, a file with such tensors is refused.
    """

    AS_THEY_ARE = {('numpy', 'ndarray'), ('numpy', 'dtype'), ('collections', 'OrderedDict'), ('_codecs', 'encode'),
                   ('builtins', 'tuple'), ('builtins', 'slice'), ('builtins', 'set')} | {
        (f'numpy.{core}.multiarray', name) for core in ('core', '_core') for name in ('_reconstruct', 'scalar')}

    def __init__(self, file, storage=None):
        super().__init__(file)
        self.file, self.storage, self.stand_ins = file, storage, _stand_ins()

    def load(self):
        start = self.file.tell()
        for operation, argument, position in pickletools.genops(self.file):
            # Python makes room for as many entries as the number of one says, were it 4 billion
            if operation.name.endswith('PUT') and argument > position - start:
                raise pickle.UnpicklingError(f'it has an entry {argument} in its first {position - start} bytes')
            if operation.name == 'DUP':             # no pickler writes it; nested tuples of it take for ever to hash
                raise pickle.UnpicklingError('it has an instruction (DUP) that no program writes')
        self.file.seek(start)
        return super().load()

    def find_class(self, module, name):
        if (module, name) in self.AS_THEY_ARE:
            return super().find_class(module, name)
        if (module, name) not in self.stand_ins:
            raise pickle.UnpicklingError(f'it contains {module}.{name}, and a weight file may hold arrays only')
        return self.stand_ins[module, name]

    def persistent_load(self, pid):
        known = type(pid) is tuple and pid[:1] == ('storage',) and pid[1] in TORCH_STORAGES.values() and not any(pid[5:])
        if not self.storage or not known:
            raise pickle.UnpicklingError('it refers to something outside, and a weight file may hold arrays only')
        return self.storage(pid[1], pid[2], pid[4])


# ---- PyTorch's files

def _open_torch_zip(archive):
    """What torch.save of PyTorch 1.6 and later wrote: NAME/data.pkl, and each storage as NAME/data/KEY."""
    roots = [name[:-len('data.pkl')] for name in archive.namelist() if name.endswith('data.pkl')]
    if len(roots) != 1 or f'{roots[0]}constants.pkl' in archive.namelist():
        raise ValueError('it is a zip file, but torch.save of a state dict did not write it')
    root = roots[0]

    def entry(name, size=None):
        if root + name not in archive.namelist():
            raise ValueError(f'its entry {name[:80]!r} is missing')
        info = archive.getinfo(root + name)         # torch.save does not compress: no entry exceeds the file
        if info.compress_type != zipfile.ZIP_STORED or size not in (None, info.file_size):
            raise ValueError(f'its entry {name[:80]!r} is compressed, or not as long as a tensor says')
        return archive.read(info)

    def storage(kind, key, count):
        found = storages.setdefault(key, _Storage(kind, count))
        found.read_bytes = lambda: entry(f'data/{key}', found.nbytes)
        return found

    storages = {}
    if f'{root}byteorder' in archive.namelist() and entry('byteorder') != b'little':
        raise ValueError('its numbers are big-endian; save it again on a little-endian machine')
    return _Unpickler(io.BytesIO(entry('data.pkl')), storage).load()


def _open_torch_legacy(file, size):
    """What torch.save before PyTorch 1.6 wrote, from behind the magic number: four pickles, then the storages."""
    storages = {}

    def storage(kind, key, count):
        return storages.setdefault(key, _Storage(kind, count))

    version, system = _Unpickler(file).load(), _Unpickler(file).load()
    if version != 1001 or not system['little_endian']:
        raise ValueError(f"it is of version {version!r} of PyTorch's old format, or big-endian; save it again with a newer one")
    content, keys = _Unpickler(file, storage).load(), _Unpickler(file).load()
    if {*storages} != {*keys}:
        raise ValueError('it is incomplete: it names other storages than its tensors')
    for key in keys:
        count, found = int.from_bytes(file.read(8), 'little'), storages[key]
        if count != found.count or found.nbytes > size - file.tell():
            raise ValueError(f'it is incomplete: the storage {str(key)[:80]!r} is not there as a whole')
        found.numbers = _numbers(file.read(found.nbytes), found.kind)
    return content


def encode_torch(state):
    """{key: array} -> the bytes of the file that torch.save of such a dict of tensors writes, readable with weights_only too.

    Raises ValueError for numbers that PyTorch does not have.
    """
    state = {key: np.asarray(value, value.dtype.newbyteorder('<'), order='C') for key, value in state.items()}
    entries = {'data.pkl': _pickle_tensors(state), 'byteorder': b'little', 'version': b'3\n',
               **{f'data/{number}': value.tobytes() for number, value in enumerate(state.values())}}
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name, content in entries.items():       # ZipInfo, as a mere name would be given the time of day
            archive.writestr(zipfile.ZipInfo(f'archive/{name}'), content)
    return file.getvalue()


def _pickle_tensors(state):
    """The pickle of {key: tensor}, the Nth in storage N, opcode by opcode: a Pickler would import torch to name its globals."""
    def plain(value):
        return pickle.dumps(value, 2)[2:-1]         # without the marks of beginning and end

    def name(module, what):
        return pickle.GLOBAL + f'{module}\n{what}\n'.encode()

    storages = {kind: what for what, kind in TORCH_STORAGES.items()}
    parts = [pickle.PROTO, b'\2', pickle.EMPTY_DICT, pickle.MARK]
    for number, (key, value) in enumerate(state.items()):
        if value.dtype.name not in storages:
            raise ValueError(f'{key}: PyTorch has no {value.dtype.name}; known are {", ".join(storages)}')
        strides = tuple(math.prod(value.shape[axis + 1:]) for axis in range(value.ndim))
        storage = [pickle.MARK, plain('storage'), name('torch', storages[value.dtype.name]), plain(str(number)), plain('cpu'),
                   plain(value.size), pickle.TUPLE, pickle.BINPERSID]
        parts += [plain(key), name('torch._utils', '_rebuild_tensor_v2'), pickle.MARK, *storage, plain(0), plain(value.shape),
                  plain(strides), plain(False), name('collections', 'OrderedDict'), pickle.EMPTY_TUPLE, pickle.REDUCE,
                  pickle.TUPLE, pickle.REDUCE]
    return b''.join([*parts, pickle.SETITEMS, pickle.STOP])
