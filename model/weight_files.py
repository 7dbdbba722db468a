"""Read weight files of Paddle, PyTorch and safetensors: {key: numpy array}.

The format follows from the content of a file, not from its ending, and nothing in it is run. safe_pickle
reads the pickles; arrays are made afterwards, from bytes whose number was checked. Reading any file ends
within seconds, in bounded memory.
"""
import io
import math
import os
import zipfile
from collections.abc import Sequence
from typing import Any, Optional, Union

from utils import log

import numpy as np

from model import safe_pickle, weight_formats
from model.safe_pickle import Blob, Call, Global, Reference, shown

PADDLE_NAME_TABLE = 'StructuredToParameterName@@'   # an entry by paddle.save that is no parameter
AVERAGE_COUNTER = 'n_averaged'                      # an entry by torch.optim.swa_utils.AveragedModel
WHOLE = ('state_dict', 'model', 'model_state_dict')             # entries of checkpoints: the weights,
AVERAGED = ('state_dict_ema', 'model_ema', 'ema')               # and their moving average
OWN_PARTS = {                                       # first parts of keys of a HaloNet, ours and PaddleViT's
    'stem', 'stages', 'final_conv', 'head', 'stage1', 'stage2', 'stage3', 'stage4', 'classifier'}
WRAPPERS = {'module', '_orig_mod', 'model', 'timm_model'}       # models around the model
LIMIT = 1 << 32                                     # bytes of the arrays of a file, where no limit is given
SLACK = 1 << 26                                     # bytes of arrays in addition to 4 times their file
KEY = 256                                           # characters of the longest key
PARAMETERS = ('torch._utils._rebuild_parameter', 'torch._utils._rebuild_parameter_with_state')
SMALL = ('bfloat16', '<u2', '>u2', '|u2')           # dtypes that may become float32
NUMPY = {'f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1'}     # in its pickles
AXES, EXTENT = 32, 1 << 48                          # of the largest shape

Data = Union[bytes, Blob]


def read(path: str, ema: bool = False, limit: int = LIMIT) -> dict[str, np.ndarray]:
    """Read the state dict {key: numpy array} of a weight file or a checkpoint, under the file's own keys.

    A checkpoint gives its raw weights, or with `ema` their moving average. A prefix that all keys have
    before the names of a HaloNet is removed. limit: bytes that the arrays may take. Raises
    FileNotFoundError, and ValueError, naming the file, where it is damaged, holds something else or too
    much, or lacks the moving average.
    """
    with open(path, 'rb') as file:
        try:
            content, find = weight_formats.open_file(file)
            if isinstance(content, (Global, Call)):
                raise ValueError(f'it contains {_name(content)}, and a weight file may hold arrays only')
            state = choose(content, ema, path) if type(content) is dict else {}
            state = _take_arrays(state, _Arrays(file, find, limit), path)
        except Exception as error:                  # a damaged file may raise nearly anything
            raise ValueError(f'{path}: not a readable weight file: {_reason(error)}') from None
    if not state:
        raise ValueError(f'{path}: expected a state dict of arrays, as model.state_dict() gives, '
                         'or a checkpoint with one')
    return state


def read_pickle(path: str) -> Any:
    """Read nested containers of arrays, text and numbers, as checkpoints are, under the budget of their size.

    Raises ValueError, naming the file, for a damaged file and for one that holds anything else.
    """
    with open(path, 'rb') as file:
        try:
            return safe_pickle.plain(safe_pickle.load(file), _Arrays(file).require)
        except Exception as error:                  # a damaged pickle may raise nearly anything
            raise ValueError(f'{path}: not a readable weight file: {_reason(error)}') from None


def _reason(error: Exception) -> str:
    """Describe an error on one line: by its text if that is meant for users, else by its type."""
    text = str(error)
    if text and isinstance(error, (ValueError, zipfile.BadZipFile)):
        return shown(text, 400)
    return f'it is damaged ({type(error).__name__})'


def _name(value: Any) -> str:
    """Return the name of a stand-in or the type of a value, for a message. Values may be endless."""
    name = value.name if isinstance(value, (Global, Call)) else ''
    return shown(name or type(value).__name__)


# ---- choosing the weights

def choose(content: dict, ema: bool, path: str) -> dict:
    """Return the state dict in the content of a file: itself, or a checkpoint's weights or moving average."""
    whole, averaged = _first_dict(content, WHOLE), _first_dict(content, AVERAGED)
    if ema and not averaged:
        raise ValueError('it holds no moving average of the weights (EMA); '
                         'leave MODEL.PRETRAINED_EMA, ema or --ema out')
    if averaged and not ema:
        log.info('%s holds weights and their moving average (EMA): taking the weights; '
                 'MODEL.PRETRAINED_EMA True is for the EMA', path)
    if averaged and ema:                            # our checkpoints average no running statistics
        return {**_without_prefix(whole or {}, path), **_without_prefix(averaged, path)}
    return _without_prefix(whole or content, path)


def _first_dict(content: dict, names: Sequence[str]) -> Optional[dict]:
    """Return the first entry among `names` that is a dictionary and not empty, or None."""
    for name in names:
        if type(content.get(name)) is dict and content[name]:
            return content[name]
    return None


def _without_prefix(state: dict, path: str) -> dict:
    """Remove the prefix that all keys have before the names of a HaloNet, such as `module.`"""
    keys = [key for key in state if type(key) is str and '.' in key and key != PADDLE_NAME_TABLE]
    prefix = _prefix_of(keys[0]) if keys else ''
    if not prefix or not all(key.startswith(prefix) for key in keys):
        return state
    log.info('%s: all keys begin with %s, which is taken off', path, shown(prefix))
    renamed = {}
    for key, value in state.items():
        has_prefix = type(key) is str and key.startswith(prefix)
        renamed[key[len(prefix):] if has_prefix else key] = value
    return renamed


def _prefix_of(key: str) -> str:
    """Return the parts of a key before those of a HaloNet; of another key, the wrappers in front."""
    parts = key.split('.')
    for n, part in enumerate(parts):
        if part in OWN_PARTS:
            return '.'.join([*parts[:n], ''])
    for n, part in enumerate(parts):
        if part not in WRAPPERS:
            return '.'.join([*parts[:n], ''])
    return ''


def _take_arrays(state: dict, arrays: '_Arrays', path: str) -> dict[str, np.ndarray]:
    """Make the arrays of a state dict. Other entries, such as `epoch`, are left out and logged."""
    found, others = {}, {}
    for key, value in state.items():
        if key in (PADDLE_NAME_TABLE, AVERAGE_COUNTER):
            continue
        if type(key) is not str or len(key) > KEY or not key.isprintable():
            raise ValueError('its state dict has a key that is no name')
        try:
            array = arrays.take(value)
            problem = f'{shown(key)} is no array of numbers: it contains {_name(value)}'
        except ValueError as error:
            array, problem = None, f'{shown(key)}: {error}'
        if array is not None:                       # paddle.save writes bfloat16 as uint16
            found[key] = _from_bfloat16(array) if array.dtype == np.uint16 else array
        elif '.' in key:                            # as the names of weights have
            raise ValueError(problem)
        else:
            others[key] = problem
    if others and not found:
        raise ValueError(next(iter(others.values())))
    if others:
        log.info('%s: left out, being no arrays: %s', path, shown(', '.join(others), 200))
    return found


# ---- arrays

class _Arrays:
    """Makes arrays from the stand-ins of a file, within budgets.

    find: the function of weight_formats.open_file from a Storage to its bytes or Blob.
    """

    def __init__(self, file: io.BufferedIOBase, find: Optional[weight_formats.Find] = None,
                 limit: float = math.inf):
        size = os.fstat(file.fileno()).st_size
        self.budget = min(limit, 4 * size + SLACK)  # bytes: bfloat16 doubles, a few keys are one array
        self.left, self.left_to_decode = self.budget, 2 * size + SLACK
        self.find = find
        self.made: dict = {}
        self.storages: dict = {}

    def take(self, value: Any) -> Optional[np.ndarray]:
        """Make the array of a stand-in, None for another value. Raises ValueError for a damaged one."""
        if type(value) is tuple and len(value) == 2 and type(value[0]) is str:
            value = value[1]                        # Paddle's tensors in nested containers: (name, array)
        while type(value) is Call and value.name in PARAMETERS and value.args:
            value = value.args[0]
        if type(value) is weight_formats.Raw:
            return self.numbers(value.data, value.kind, value.shape)
        make = MAKERS.get(value.name) if type(value) is Call else None
        if make is None:
            return None
        if id(value) not in self.made:              # `value` is kept so that its id stays its own
            self.made[id(value)] = value, make(self, value)
        return self.made[id(value)][1]

    def require(self, value: Any) -> np.ndarray:
        """Make the array of a stand-in. Raises ValueError where it stands for something else."""
        array = self.take(value)
        if array is None:
            raise ValueError(f'it contains {_name(value)}, and a checkpoint may hold arrays, text '
                             'and numbers only')
        return array

    def spend(self, count: int, kind: str) -> None:
        """Take `count` numbers off the budget, before they are read."""
        self.left -= count * (4 if kind in SMALL else weight_formats.itemsize(kind))
        if self.left < 0:
            raise ValueError(f'its arrays take more than {self.budget / 2 ** 20:.0f} MB, '
                             'too much for the model or for this file')

    def numbers(self, data: Data, kind: str, shape: tuple) -> np.ndarray:
        """Make an array of `shape` from its bytes."""
        self.spend(_size(shape), kind)
        return _numbers(data, kind, shape)

    def reconstructed(self, call: Call) -> np.ndarray:
        """Make the array of numpy's _reconstruct with the state (version, shape, dtype, fortran, bytes).

        fortran: True for Fortran's order.
        """
        if type(call.state) is not tuple or len(call.state) != 5:
            raise ValueError('an array of numpy is damaged')
        _, shape, dtype, fortran, data = call.state
        return self.ordered(data, dtype, shape, fortran is True)

    def from_buffer(self, call: Call) -> np.ndarray:
        """Make the array of numpy's _frombuffer(bytes, dtype, shape, order[, axes]) of protocol 5."""
        data, dtype, shape, order, *axes = call.args
        array = self.ordered(data, dtype, shape, type(order) is str and order == 'F')
        if axes and axes[0] is not None:
            _size(axes[0])
            array = array.transpose(axes[0])
        return array

    def scalar(self, call: Call) -> np.ndarray:
        """Make the array () of numpy's scalar(dtype, bytes)."""
        dtype, data = call.args
        return self.ordered(data, dtype, (), fortran=False)

    def ordered(self, data: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
        """Make an array in C's or Fortran's order from the parts of a pickle by numpy."""
        _size(shape)
        array = self.numbers(self.bytes(data), _numpy_type(dtype), shape[::-1] if fortran else shape)
        return array.transpose() if fortran else array

    def bytes(self, data: Any) -> Data:
        """Return the bytes of an array of numpy. Protocol 2 writes them as text in Latin-1."""
        if type(data) is bytes or type(data) is Blob and not data.text:
            return data
        name, args = (data.name, data.args) if type(data) is Call else ('', ())
        if name == 'builtins.bytes' and not args:
            return b''
        if name == '_codecs.encode' and len(args) == 2 and type(args[1]) is str and args[1] == 'latin1':
            if type(args[0]) is str:
                return args[0].encode('latin1')
            if type(args[0]) is Blob and args[0].text:
                return self.decoded(args[0])
        raise ValueError('an array of numpy holds something else than numbers')

    def decoded(self, text: Blob) -> Data:
        """Return the bytes of which a long text is the Latin-1."""
        self.left_to_decode -= text.length
        if self.left_to_decode < 0:
            raise ValueError('its arrays use the same bytes too often')
        return str(text.array(np.dtype('u1')).data, 'utf-8').encode('latin1')

    def tensor(self, call: Call) -> np.ndarray:
        """Make the array of torch's _rebuild_tensor(storage, offset, shape, strides, ...)."""
        reference, offset, shape, strides = call.args[:4]
        if type(reference) is not Reference or not self.find:
            raise ValueError(weight_formats.OUTSIDE)
        storage, count = weight_formats.storage(reference.id), _size(shape)
        _size(strides)
        reach = _size((offset,)) + 1 + sum((n - 1) * step for n, step in zip(shape, strides))
        if len(shape) != len(strides) or count > storage.size or count and reach > storage.size:
            raise ValueError(f'a tensor of shape {list(shape)}, strides {list(strides)} and offset {offset} '
                             f'lies outside its storage of {storage.size} numbers')
        if storage not in self.storages:
            self.spend(storage.size, storage.kind)
            self.storages[storage] = _numbers(self.find(storage), storage.kind, (storage.size,))
        numbers = self.storages[storage]
        if not count:
            return np.ndarray(shape, numbers.dtype, numbers)
        steps = [step * numbers.itemsize for step in strides]
        return np.ndarray(shape, numbers.dtype, numbers, offset * numbers.itemsize, steps)


MAKERS = {'torch._utils._rebuild_tensor': _Arrays.tensor, 'torch._utils._rebuild_tensor_v2': _Arrays.tensor}
for _core in ('numpy.core', 'numpy._core'):         # of numpy 1 and 2
    MAKERS[f'{_core}.multiarray._reconstruct'] = _Arrays.reconstructed
    MAKERS[f'{_core}.multiarray.scalar'] = _Arrays.scalar
    MAKERS[f'{_core}.numeric._frombuffer'] = _Arrays.from_buffer


def _size(shape: Any) -> int:
    """Return the product of a shape. Raises ValueError unless it is a tuple of a few natural numbers."""
    if type(shape) is not tuple or len(shape) > AXES \
            or not all(type(n) is int and 0 <= n < EXTENT for n in shape):
        raise ValueError('an array has a shape, strides or an offset that are no plain numbers from 0 on')
    return math.prod(shape)


def _numbers(data: Data, kind: str, shape: tuple) -> np.ndarray:
    """Make an array of `shape` in native byte order from its bytes; bfloat16 becomes float32.

    Raises ValueError where there are fewer or more bytes.
    """
    dtype = np.dtype('<u2' if kind == 'bfloat16' else kind)
    length = data.length if isinstance(data, Blob) else len(data)
    expected = _size(shape) * dtype.itemsize
    if length != expected:
        raise ValueError(f'an array of {_size(shape)} numbers has {length} bytes and not {expected}')
    array = data.array(dtype) if isinstance(data, Blob) else np.frombuffer(data, dtype)
    array = array.reshape(shape).astype(dtype.newbyteorder('='), copy=False)
    return _from_bfloat16(array) if kind == 'bfloat16' else array


def _numpy_type(value: Any) -> str:
    """Return the dtype of a stand-in of numpy.dtype, such as '<f4'. Raises ValueError for no numbers."""
    is_dtype = type(value) is Call and value.name == 'numpy.dtype' and value.args
    if not is_dtype or type(value.args[0]) is not str:
        raise ValueError('an array of numpy has no type')
    code, state = value.args[0], value.state        # the state is (version, byte order, ...)
    order = state[1] if type(state) is tuple and len(state) > 1 else '|'
    if code not in NUMPY or type(order) is not str or order not in ('<', '>', '|'):
        raise ValueError(f'its numbers are {shown(code)}; known are {", ".join(sorted(NUMPY))}')
    return order + code


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Convert bfloat16, the upper half of a float32, given as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
