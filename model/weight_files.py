"""Weight files of Paddle, PyTorch and safetensors -> {key: numpy array}. Only numpy is needed.

What a file is follows from its content, not from its ending, and nothing in it is ever run: safe_pickle reads the
pickles, and arrays are made afterwards, from bytes whose number was checked. Whatever a file holds, reading it ends
within seconds, and memory is bounded.
"""
import math
import os
import zipfile
from typing import Any, BinaryIO, Optional

from utils import log

import numpy as np

from model import safe_pickle, weight_formats
from model.safe_pickle import Blob, Call, Global, Reference, shown

PADDLE_NAME_TABLE = 'StructuredToParameterName@@'   # paddle.save adds it; it is no parameter
AVERAGE_COUNTER = 'n_averaged'                      # torch.optim.swa_utils.AveragedModel adds it; torchvision saves such
WHOLE, AVERAGED = ('state_dict', 'model', 'model_state_dict'), ('state_dict_ema', 'model_ema', 'ema')  # entries of checkpoints
OWN_PARTS = {'stem', 'stages', 'final_conv', 'head', 'stage1', 'stage2', 'stage3', 'stage4', 'classifier'}  # keys begin so
WRAPPERS = {'module', '_orig_mod', 'model', 'timm_model'}   # parallel, compiled and other models around the model
LIMIT = 1 << 32                                     # bytes of the arrays of a file, where no limit is given
SLACK = 1 << 26                                     # bytes that arrays may take beyond 4 times their file
KEY = 256                                           # characters of the longest key
PARAMETERS = ('torch._utils._rebuild_parameter', 'torch._utils._rebuild_parameter_with_state')
SMALL = ('bfloat16', '<u2', '>u2', '|u2')           # types that may become float32
NUMPY = {'f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1'}       # the types of numbers in its pickles


def read(path: str, ema: bool = False, limit: int = LIMIT) -> dict:
    """Read the state dict {key: numpy array} of a weight file or a checkpoint, under the file's own keys.

    A checkpoint's weights are the raw ones, or with `ema` their moving average. A prefix that all keys have before
    the names of a HaloNet is taken off. limit: bytes that the arrays may take. Raises FileNotFoundError, and
    ValueError, naming the file, for one that is damaged, holds something else or too much, or has no moving average
    when that is asked for.
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
        raise ValueError(f'{path}: expected a state dict of arrays, as model.state_dict() gives, or a checkpoint with one')
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
    """One line that says what is wrong: the text of an error that is made for people, else its type."""
    made_for_people = isinstance(error, (ValueError, zipfile.BadZipFile)) and str(error)
    return shown(str(error), 400) if made_for_people else f'it is damaged ({type(error).__name__})'


def _name(value) -> str:
    """The name of a stand-in or the type of a value, for a message. Values may be endless and are never shown."""
    name = value.name if isinstance(value, (Global, Call)) else ''
    return shown(name or type(value).__name__)


# ---- choosing the weights

def choose(content: dict, ema: bool, path: str) -> dict:
    """Return the state dict in what a file holds: itself, or the weights or moving average of a checkpoint."""
    whole, averaged = (next((content[name] for name in names if type(content.get(name)) is dict and content[name]), None)
                       for names in (WHOLE, AVERAGED))
    if ema and not averaged:
        raise ValueError('it holds no moving average of the weights (EMA); leave MODEL.PRETRAINED_EMA, ema or --ema out')
    if averaged and not ema:
        log.info('%s holds weights and their moving average (EMA): taking the weights; MODEL.PRETRAINED_EMA True is for the EMA',
                 path)
    if averaged and ema:                            # our checkpoints average the parameters only, not the statistics
        return {**_bare(whole or {}, path), **_bare(averaged, path)}
    return _bare(whole or content, path)


def _bare(state: dict, path: str) -> dict:
    """`state` without the prefix that all its keys have before the names of a HaloNet, such as `module.`"""
    keys = [key for key in state if type(key) is str and '.' in key and key != PADDLE_NAME_TABLE]
    parts = keys[0].split('.') if keys else []
    count = next((n for n, part in enumerate(parts) if part in OWN_PARTS), None)
    if count is None:                               # no name of a HaloNet
        count = next((n for n, part in enumerate(parts) if part not in WRAPPERS), 0)
    prefix = ''.join(f'{part}.' for part in parts[:count])
    if not prefix or not all(key.startswith(prefix) for key in keys):
        return state
    log.info('%s: all keys begin with %s, which is taken off', path, shown(prefix))
    return {key[len(prefix):] if type(key) is str and key.startswith(prefix) else key: value for key, value in state.items()}


def _take_arrays(state: dict, arrays: '_Arrays', path: str) -> dict:
    """The arrays of a state dict. Entries beside them that are none, such as `epoch`, are left out and logged."""
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
    """Makes arrays of the stand-ins of a file, within budgets.

    find: the function of weight_formats.open_file from a Storage to its bytes or Blob.
    """

    def __init__(self, file: BinaryIO, find=None, limit: float = math.inf):
        size = os.fstat(file.fileno()).st_size
        self.budget = min(limit, 4 * size + SLACK)  # bytes: bfloat16 doubles, and a few keys may share an array
        self.left, self.left_to_decode = self.budget, 2 * size + SLACK
        self.find = find
        self.made: dict = {}
        self.storages: dict = {}

    def take(self, value) -> Optional[np.ndarray]:
        """The array that a stand-in means, or None where it means none. Raises ValueError for a damaged one."""
        if type(value) is tuple and len(value) == 2 and type(value[0]) is str:
            value = value[1]                        # Paddle's tensors in nested containers: (name, array)
        while type(value) is Call and value.name in PARAMETERS and value.args:
            value = value.args[0]
        if type(value) is weight_formats.Raw:
            return self.numbers(value.data, value.kind, value.shape)
        make = MAKERS.get(value.name) if type(value) is Call else None
        if make and id(value) not in self.made:     # `value` is kept so that its id stays its own
            self.made[id(value)] = value, make(self, value)
        return self.made[id(value)][1] if make else None

    def require(self, value) -> np.ndarray:
        """As take. Raises ValueError where a stand-in means no array."""
        array = self.take(value)
        if array is None:
            raise ValueError(f'it contains {_name(value)}, and a checkpoint may hold arrays, text and numbers only')
        return array

    def spend(self, count, kind):
        """Take `count` numbers off the budget, before they are read."""
        self.left -= count * (4 if kind in SMALL else weight_formats.itemsize(kind))
        if self.left < 0:
            raise ValueError(f'its arrays take more than {self.budget / 2 ** 20:.0f} MB, too much for the model or for this file')

    def numbers(self, data, kind, shape):
        """Bytes or a Blob -> array of `shape`."""
        self.spend(_size(shape), kind)
        return _numbers(data, kind, shape)

    def reconstructed(self, call):
        """numpy's _reconstruct with the state (version, shape, dtype, True for Fortran's order, bytes)."""
        if type(call.state) is not tuple or len(call.state) != 5:
            raise ValueError('an array of numpy is damaged')
        _, shape, dtype, fortran, data = call.state
        return self.ordered(data, dtype, shape, fortran is True)

    def from_buffer(self, call):
        """numpy's _frombuffer(bytes, dtype, shape, order[, axes]) of protocol 5."""
        data, dtype, shape, order, *axes = call.args
        array = self.ordered(data, dtype, shape, type(order) is str and order == 'F')
        if axes and axes[0] is not None:
            _size(axes[0])
            array = array.transpose(axes[0])
        return array

    def scalar(self, call):
        """numpy's scalar(dtype, bytes), as an array ()."""
        dtype, data = call.args
        return self.ordered(data, dtype, (), fortran=False)

    def ordered(self, data, dtype, shape, fortran):
        _size(shape)
        array = self.numbers(self.bytes(data), _numpy_type(dtype), shape[::-1] if fortran else shape)
        return array.transpose() if fortran else array

    def bytes(self, data):
        """The bytes of an array of numpy, or their Blob. Protocol 2 writes them as text in Latin-1."""
        if type(data) is bytes or type(data) is Blob and not data.text:
            return data
        name, args = (data.name, data.args) if type(data) is Call else ('', ())
        if name == 'builtins.bytes' and not args:
            return b''
        if name == '_codecs.encode' and len(args) == 2 and type(args[1]) is str and args[1] == 'latin1':
            if type(args[0]) is str:
                return args[0].encode('latin1')
            if type(args[0]) is Blob and args[0].text:
                self.left_to_decode -= args[0].length
                if self.left_to_decode < 0:
                    raise ValueError('its arrays use the same bytes too often')
                return str(args[0].array(np.dtype('u1')).data, 'utf-8').encode('latin1')
        raise ValueError('an array of numpy holds something else than numbers')

    def tensor(self, call):
        """torch's _rebuild_tensor(storage, offset, shape, strides, ...): a view of a storage, within its bounds."""
        reference, offset, shape, strides = call.args[:4]
        if type(reference) is not Reference or not self.find:
            raise ValueError(weight_formats.OUTSIDE)
        storage, count = weight_formats.storage(reference.id), _size(shape)
        _size(strides)
        reach = _size((offset,)) + 1 + sum((n - 1) * step for n, step in zip(shape, strides))
        if len(shape) != len(strides) or count > storage.size or count and reach > storage.size:
            raise ValueError(f'a tensor of shape {list(shape)}, strides {list(strides)} and offset {offset} lies outside its '
                             f'storage of {storage.size} numbers')
        if storage not in self.storages:
            self.spend(storage.size, storage.kind)
            self.storages[storage] = _numbers(self.find(storage), storage.kind, (storage.size,))
        numbers = self.storages[storage]
        steps = [step * numbers.itemsize for step in strides] if count else None
        return np.ndarray(shape, numbers.dtype, numbers, min(offset, storage.size) * numbers.itemsize if count else 0, steps)


MAKERS = {'torch._utils._rebuild_tensor': _Arrays.tensor, 'torch._utils._rebuild_tensor_v2': _Arrays.tensor}
for _core in ('numpy.core', 'numpy._core'):         # of numpy 1 and 2
    MAKERS[f'{_core}.multiarray._reconstruct'] = _Arrays.reconstructed
    MAKERS[f'{_core}.multiarray.scalar'] = _Arrays.scalar
    MAKERS[f'{_core}.numeric._frombuffer'] = _Arrays.from_buffer


def _size(shape) -> int:
    """The product of a shape. Raises ValueError unless it is a tuple of a few whole numbers from 0 on."""
    if type(shape) is not tuple or len(shape) > 32 or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise ValueError('an array has a shape, strides or an offset that are no plain numbers from 0 on')
    return math.prod(shape)


def _numbers(data, kind: str, shape: tuple) -> np.ndarray:
    """Bytes or a Blob -> array of `shape` in native byte order; bfloat16 becomes float32.

    Raises ValueError where their number is another one.
    """
    dtype = np.dtype('<u2' if kind == 'bfloat16' else kind)
    length, expected = data.length if type(data) is Blob else len(data), _size(shape) * dtype.itemsize
    if length != expected:
        raise ValueError(f'an array of {_size(shape)} numbers has {length} bytes and not {expected}')
    array = data.array(dtype) if type(data) is Blob else np.frombuffer(data, dtype)
    array = array.reshape(shape).astype(dtype.newbyteorder('='), copy=False)
    return _from_bfloat16(array) if kind == 'bfloat16' else array


def _numpy_type(value) -> str:
    """The type that a stand-in of numpy.dtype means, such as '<f4'. Raises ValueError for anything but numbers."""
    if type(value) is not Call or value.name != 'numpy.dtype' or not value.args or type(value.args[0]) is not str:
        raise ValueError('an array of numpy has no type')
    code, state = value.args[0], value.state        # the state is (version, byte order, ...)
    order = state[1] if type(state) is tuple and len(state) > 1 else '|'
    if code not in NUMPY or type(order) is not str or order not in ('<', '>', '|'):
        raise ValueError(f'its numbers are {shown(code)}; known are {", ".join(sorted(NUMPY))}')
    return order + code


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
