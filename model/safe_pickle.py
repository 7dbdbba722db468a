"""Read a pickle without calling anything that it names.

Python's own unpickler follows a list of allowed instructions. Text, numbers, lists, tuples and dictionaries are
built as they are. Everything else becomes an inert stand-in: a Global for a name, a Call for an object, a Reference
for what lies outside. Long byte strings stay in the file, as a Blob, until an array is made of them.

Time and memory are bounded by MEMORY, whatever the file holds. Only text and small numbers are ever hashed, because
hashing tuples that contain each other twice takes time without end.
"""
import io
import pickle
import struct
from typing import Any, ClassVar, Optional

import numpy as np

MEMORY = 1 << 27                                    # bytes that a pickle may take, apart from its Blobs
COST = 128                                          # bytes that one instruction takes at most, on average
LONGEST = 1024                                      # bytes of the longest text or byte string that is no Blob
DEPTH, VALUES = 50, 200_000                         # of nested containers; of the values in them
REFUSED = {                                         # modules of which only an attack needs something
    'asyncio', 'code', 'commands', 'concurrent', 'ctypes', 'http', 'imp', 'importlib', 'marshal', 'multiprocessing',
    'nt', 'os', 'pdb', 'pickle', 'pip', 'popen2', 'posix', 'pty', 'runpy', 'shutil', 'signal', 'site', 'socket',
    'subprocess', 'sys', 'threading', 'timeit', 'urllib', 'webbrowser'}
REFUSED_BUILTINS = {
    '__import__', 'breakpoint', 'compile', 'delattr', 'exec', 'globals', 'input', 'open', 'setattr', 'vars'}
OLD_MODULES = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}             # so protocol 2 calls them
DICTIONARIES = ('collections.OrderedDict', 'collections.defaultdict')


class Global:
    """The name of something in a module. It is never imported."""

    __slots__ = ('module', 'attribute')

    def __init__(self, module: str, attribute: str):
        self.module, self.attribute = module, attribute

    @property
    def name(self) -> str:
        return f'{self.module}.{self.attribute}'


class Call:
    """An object, by the call `function(*args)` that would have made it and the `state` it would have."""

    __slots__ = ('function', 'args', 'state')

    def __init__(self, function, args: tuple):
        self.function, self.args = function, args
        self.state: Any = None

    @property
    def name(self) -> str:
        """The name of the function, or '' where that is made by another call."""
        return self.function.name if type(self.function) is Global else ''


class Reference:
    """Something outside the pickle, by its persistent id."""

    __slots__ = ('id',)

    def __init__(self, id):
        self.id = id


class Opaque:
    """Something of no use here: a set, or a key that is neither text nor a small number."""

    __slots__ = ()


class Blob:
    """`length` bytes of an open file from `start`; with `text` they are UTF-8."""

    __slots__ = ('file', 'start', 'length', 'text')

    def __init__(self, file: io.BufferedIOBase, start: int, length: int, text: bool = False):
        self.file, self.start, self.length, self.text = file, start, length, text

    def array(self, dtype: np.dtype) -> np.ndarray:
        """Read all the bytes as an array (count,). Raises ValueError where the file is shorter."""
        numbers = np.empty(self.length // dtype.itemsize, dtype)
        self.file.seek(self.start)
        if numbers.nbytes != self.length or self.file.readinto(numbers.view(np.uint8)) != self.length:
            raise ValueError(f'it ends within {self.length} bytes of numbers')
        return numbers


STAND_INS = (Global, Call, Reference, Opaque, Blob)


def load(file: io.BufferedIOBase, references: Optional[list] = None) -> Any:
    """Read one pickle from an open file, up to its end.

    references: gets every Reference in the order of the file. Raises ValueError for a pickle that is damaged, too
    large or an attack.
    """
    try:
        return _Unpickler(_Source(file), [] if references is None else references).load()
    except (IndexError, struct.error, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(f'its pickle is damaged ({type(error).__name__})') from None
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from None


def plain(value: Any, leaf) -> Any:
    """Copy nested containers with `leaf(stand-in)` for each stand-in. Raises ValueError where they hold too much."""
    left = VALUES

    def copy(value, depth):
        nonlocal left
        left -= 1                                   # shared parts count each time: a walk of the copy meets them so
        if depth > DEPTH or left < 0:
            raise ValueError(f'it is nested deeper than {DEPTH} levels, or holds more than {VALUES} values')
        if type(value) is dict:
            if not all(key is None or type(key) in (str, int, bool) for key in value):
                raise ValueError('one of its dictionaries has a key that is neither text nor a small number')
            return {key: copy(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([copy(item, depth + 1) for item in value])
        return leaf(value) if isinstance(value, STAND_INS) else value

    return copy(value, 0)


def shown(text: str, longest: int = 80) -> str:
    """Text from a file on one line: control characters escaped, cut to `longest` characters."""
    line = ''.join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:longest + 1])
    return line if len(line) <= longest else line[:longest] + '...'


class _Source:
    """The file as the unpickler reads it: within MEMORY, and never past its end."""

    def __init__(self, file):
        self.file, self.left, start = file, MEMORY, file.tell()
        self.end = file.seek(0, io.SEEK_END)
        file.seek(start)

    def spend(self, count):
        self.left -= COST + 4 * count               # a character of text takes up to 4 bytes
        if self.left < 0:
            raise pickle.UnpicklingError('it has more instructions and texts than any weight file')

    def read(self, count):
        self.spend(count)
        data = self.file.read(count)
        if len(data) < count:
            raise pickle.UnpicklingError('it ends in the middle of its pickle')
        return data

    def readline(self):
        line = self.file.readline(LONGEST)
        self.spend(len(line))
        if not line.endswith(b'\n'):
            raise pickle.UnpicklingError('it has a name that is too long or ends in the middle')
        return line

    def skip(self, count, text):
        """Pass over `count` bytes. Returns them as a Blob."""
        start = self.file.tell()
        if count > self.end - start:
            raise pickle.UnpicklingError(f'it ends in the middle of a string of {count} bytes')
        self.file.seek(start + count)
        return Blob(self.file, start, count, text)


def _key(key):
    """Return `key` if it is quick to hash: text, or a number too small for crafted collisions. Else an Opaque."""
    is_small = type(key) in (int, bool) and -1 <= key < 1 << 20
    return key if is_small or key is None or type(key) in (str, Global) else Opaque()


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with the instructions of protocol 2 to 5 that weight files need. None calls anything."""

    AS_THEY_ARE = (                                 # not DUP, LONG4, EXT, INST, OBJ, buffers elsewhere, protocol 0
        pickle.PROTO, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.NONE, pickle.NEWTRUE,
        pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT,
        pickle.SHORT_BINUNICODE, pickle.SHORT_BINBYTES, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2,
        pickle.TUPLE3, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID,
        pickle.BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET)

    def __init__(self, source, references):
        super().__init__(source)
        self.source, self.references, self.globals = source, references, {}

    def find_class(self, module, name):
        module = OLD_MODULES.get(module, module)
        if module.split('.')[0] in REFUSED or module == 'builtins' and name in REFUSED_BUILTINS:
            name = f'{shown(module)}.{shown(name)}'
            raise pickle.UnpicklingError(f'it contains {name}, and a weight file may hold arrays only')
        return self.globals.setdefault((module, name), Global(module, name))

    def persistent_load(self, pid):
        self.references.append(Reference(pid))
        return self.references[-1]

    def refuse(self):
        raise pickle.UnpicklingError('it has an instruction that no weight file needs, or is damaged')

    def load_frame(self):
        self.read(8)                                # its length; what is within is read from the file

    def load_binunicode(self):
        self.load_string(4, text=True)

    def load_binunicode8(self):
        self.load_string(8, text=True)

    def load_binbytes(self):
        self.load_string(4)

    def load_binbytes8(self):
        self.load_string(8)

    def load_string(self, size, text=False):
        count = int.from_bytes(self.read(size), 'little')
        if count > LONGEST:
            self.append(self.source.skip(count, text))
        else:
            data = self.read(count)
            self.append(str(data, 'utf-8', 'surrogatepass') if text else data)

    def load_long_binput(self):
        index = int.from_bytes(self.read(4), 'little')
        if index > MEMORY // COST:
            raise pickle.UnpicklingError(f'it has an entry {index}, more than instructions')
        self.memo[index] = self.stack[-1]

    def load_empty_set(self):
        self.append(Opaque())

    def load_frozenset(self):
        self.pop_mark()
        self.append(Opaque())

    def load_additems(self):
        self.add(self.pop_mark(), Opaque)

    def load_append(self):
        self.add([self.stack.pop()], list)

    def load_appends(self):
        self.add(self.pop_mark(), list)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.add([key, value], dict)

    def load_setitems(self):
        self.add(self.pop_mark(), dict)

    def add(self, items, kind):
        """Add items to the container on top of the stack; those of an inert object are dropped."""
        container = self.stack[-1]
        if type(container) not in (kind, Call) or kind is dict and len(items) % 2:
            self.refuse()
        if type(container) is list:
            container.extend(items)
        elif type(container) is dict:
            container.update(zip(map(_key, items[::2]), items[1::2]))

    def load_reduce(self):
        args, function = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple or type(function) not in (Global, Call):
            self.refuse()
        self.append(_called(function, args))

    def load_newobj_ex(self):
        self.stack.pop()                            # keywords
        self.load_reduce()

    def load_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Call:
            target.state = state
        elif type(target) is not dict:              # attributes of an OrderedDict: PyTorch's _metadata
            self.refuse()

    dispatch: ClassVar[dict[int, Any]] = dict.fromkeys(range(256), refuse)
    dispatch.update({code[0]: pickle._Unpickler.dispatch[code[0]] for code in AS_THEY_ARE})
    dispatch.update({
        pickle.FRAME[0]: load_frame, pickle.LONG_BINPUT[0]: load_long_binput,
        pickle.BINUNICODE[0]: load_binunicode, pickle.BINUNICODE8[0]: load_binunicode8,
        pickle.BINBYTES[0]: load_binbytes, pickle.BINBYTES8[0]: load_binbytes8, pickle.BYTEARRAY8[0]: load_binbytes8,
        pickle.EMPTY_SET[0]: load_empty_set, pickle.FROZENSET[0]: load_frozenset,
        pickle.ADDITEMS[0]: load_additems, pickle.APPEND[0]: load_append, pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce, pickle.NEWOBJ_EX[0]: load_newobj_ex, pickle.BUILD[0]: load_build})


def _called(function, args):
    """The stand-in for `function(*args)`, or a plain value where the function only wraps one."""
    name = function.name if type(function) is Global else ''
    if name in DICTIONARIES and not any(type(arg) in (list, dict) for arg in args):
        return {}                                   # its items follow
    if name == 'builtins.tuple' and len(args) == 1 and type(args[0]) is tuple:
        return args[0]                              # Paddle's tensors: (name, array)
    if name == 'builtins.eval':                     # Paddle's static tensors: eval('data', {'data': array})
        if len(args) != 2 or args[0] != 'data' or type(args[1]) is not dict or {*args[1]} != {'data'}:
            raise pickle.UnpicklingError('it contains builtins.eval, and a weight file may hold arrays only')
        return args[1]['data']
    return Call(function, args)
