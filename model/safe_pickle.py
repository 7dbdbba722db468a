"""Read a pickle without calling anything that it names.

Python's own unpickler follows a list of allowed instructions. Text, numbers, lists, tuples and dictionaries
are built. Everything else becomes an inert stand-in: a Global for a name, a Call for an object, a Reference
for an object outside the pickle. Long byte strings stay in the file, as a Blob, until an array is made of
them.

MEMORY bounds time and memory for every file. Only text and small numbers are hashed: hashing tuples that
contain each other twice never ends.
"""
import io
import pickle
import struct
from typing import Any, Callable, ClassVar, NoReturn, Optional

import numpy as np

MEMORY = 1 << 27                                    # bytes that a pickle may take, apart from its Blobs
COST = 128                                          # bytes that one instruction takes at most, on average
LONGEST = 1024                                      # bytes of the longest text or byte string that is no Blob
DEPTH, VALUES = 50, 200_000                         # of nested containers; of the values in them
REFUSED = {                                         # modules that only an attack uses
    'asyncio', 'code', 'commands', 'concurrent', 'ctypes', 'http', 'imp', 'importlib', 'marshal',
    'multiprocessing', 'nt', 'os', 'pdb', 'pickle', 'pip', 'popen2', 'posix', 'pty', 'runpy', 'shutil',
    'signal', 'site', 'socket', 'subprocess', 'sys', 'threading', 'timeit', 'urllib', 'webbrowser'}
REFUSED_BUILTINS = {
    '__import__', 'breakpoint', 'compile', 'delattr', 'exec', 'globals', 'input', 'open', 'setattr', 'vars'}
OLD_MODULES = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}             # their names in protocol 2
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

    def __init__(self, function: Any, args: tuple):
        self.function, self.args = function, args
        self.state: Any = None

    @property
    def name(self) -> str:
        """The name of the function, or '' if another call makes the function."""
        return self.function.name if type(self.function) is Global else ''


class Reference:
    """An object outside the pickle, by its persistent id."""

    __slots__ = ('id',)

    def __init__(self, id: Any):
        self.id = id


class Opaque:
    """A value that is not used here: a set, or a key that is neither text nor a small number."""

    __slots__ = ()


class Blob:
    """`length` bytes of an open file from `start`; with `text` they are UTF-8."""

    __slots__ = ('file', 'start', 'length', 'text')

    def __init__(self, file: io.BufferedIOBase, start: int, length: int, text: bool = False):
        self.file, self.start, self.length, self.text = file, start, length, text

    def array(self, dtype: np.dtype) -> np.ndarray:
        """Read all the bytes as an array (count,). Raises ValueError if the file is shorter."""
        numbers = np.empty(self.length // dtype.itemsize, dtype)
        self.file.seek(self.start)
        if numbers.nbytes != self.length or self.file.readinto(numbers.view(np.uint8)) != self.length:
            raise ValueError(f'it ends within {self.length} bytes of numbers')
        return numbers


STAND_INS = (Global, Call, Reference, Opaque, Blob)


def load(file: io.BufferedIOBase, references: Optional[list] = None) -> Any:
    """Read one pickle from an open file, up to its end.

    references: a list to which every Reference is added, in the order of the file. Raises ValueError for
    a pickle that is damaged, too large or an attack.
    """
    try:
        return _Unpickler(_Source(file), [] if references is None else references).load()
    except (IndexError, struct.error, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(f'its pickle is damaged ({type(error).__name__})') from None
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from None


def plain(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Copy nested containers, with `leaf(stand-in)` for each stand-in. Raises ValueError for too many."""
    left = VALUES

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1                                   # a part that occurs twice counts twice
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
    """Return text from a file on one line, cut to `longest` characters, with control characters escaped."""
    line = ''.join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:longest + 1])
    return line if len(line) <= longest else line[:longest] + '...'


class _Source:
    """Reads the file for the unpickler: within MEMORY, and never past its end."""

    def __init__(self, file: io.BufferedIOBase):
        self.file, self.left = file, MEMORY
        start = file.tell()
        self.end = file.seek(0, io.SEEK_END)
        file.seek(start)

    def spend(self, count: int) -> None:
        """Take one instruction and `count` bytes off the memory. Raises UnpicklingError if it is used up."""
        self.left -= COST + 4 * count               # a character of text takes up to 4 bytes
        if self.left < 0:
            raise pickle.UnpicklingError('it has more instructions and texts than any weight file')

    def read(self, count: int) -> bytes:
        self.spend(count)
        data = self.file.read(count)
        if len(data) < count:
            raise pickle.UnpicklingError('it ends in the middle of its pickle')
        return data

    def readline(self) -> bytes:
        line = self.file.readline(LONGEST)
        self.spend(len(line))
        if not line.endswith(b'\n'):
            raise pickle.UnpicklingError('it has a name that is too long or ends in the middle')
        return line

    def skip(self, count: int, text: bool) -> Blob:
        """Skip `count` bytes of the file, and return them as a Blob."""
        start = self.file.tell()
        if count > self.end - start:
            raise pickle.UnpicklingError(f'it ends in the middle of a string of {count} bytes')
        self.file.seek(start + count)
        return Blob(self.file, start, count, text)


def _key(key: Any) -> Any:
    """Return `key` if it is quick to hash, else an Opaque.

    Text is, and numbers that are too small for crafted collisions.
    """
    is_small = type(key) in (int, bool) and -1 <= key < 1 << 20
    if is_small or key is None or type(key) in (str, Global):
        return key
    return Opaque()


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with the instructions that weight files need. None calls a function."""

    stack: list                                     # these five are of Python's unpickler
    read: Callable[[int], bytes]
    memo: dict
    append: Callable[[Any], None]
    pop_mark: Callable[[], list]
    UNCHANGED = (                                   # without DUP, LONG4, EXT, INST and OBJ
        pickle.PROTO, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.NONE, pickle.NEWTRUE,
        pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT,
        pickle.SHORT_BINUNICODE, pickle.SHORT_BINBYTES, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1,
        pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.GLOBAL,
        pickle.STACK_GLOBAL, pickle.BINPERSID, pickle.BINPUT, pickle.MEMOIZE, pickle.BINGET,
        pickle.LONG_BINGET)

    def __init__(self, source: _Source, references: list):
        super().__init__(source)
        self.source, self.references = source, references
        self.globals: dict[tuple[str, str], Global] = {}

    def find_class(self, module: str, name: str) -> Global:
        module = OLD_MODULES.get(module, module)
        is_refused_builtin = module == 'builtins' and name in REFUSED_BUILTINS
        if module.split('.')[0] in REFUSED or is_refused_builtin:
            name = f'{shown(module)}.{shown(name)}'
            raise pickle.UnpicklingError(f'it contains {name}, and a weight file may hold arrays only')
        return self.globals.setdefault((module, name), Global(module, name))

    def persistent_load(self, pid: Any) -> Reference:
        self.references.append(Reference(pid))
        return self.references[-1]

    def refuse(self) -> NoReturn:
        raise pickle.UnpicklingError('it has an instruction that no weight file needs, or is damaged')

    def load_frame(self) -> None:
        self.read(8)                                # its length; the content is read from the file

    def load_binunicode(self) -> None:
        self.load_string(4, text=True)

    def load_binunicode8(self) -> None:
        self.load_string(8, text=True)

    def load_binbytes(self) -> None:
        self.load_string(4)

    def load_binbytes8(self) -> None:
        self.load_string(8)

    def load_string(self, size: int, text: bool = False) -> None:
        """Load text or bytes, whose length has `size` bytes: long ones as a Blob."""
        count = int.from_bytes(self.read(size), 'little')
        if count > LONGEST:
            self.append(self.source.skip(count, text))
        else:
            data = self.read(count)
            self.append(str(data, 'utf-8', 'surrogatepass') if text else data)

    def load_long_binput(self) -> None:
        index = int.from_bytes(self.read(4), 'little')
        if index > MEMORY // COST:
            raise pickle.UnpicklingError(f'it has an entry {index}, more than instructions')
        self.memo[index] = self.stack[-1]

    def load_empty_set(self) -> None:
        self.append(Opaque())

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Opaque())

    def load_additems(self) -> None:
        self.add(self.pop_mark(), Opaque)

    def load_append(self) -> None:
        self.add([self.stack.pop()], list)

    def load_appends(self) -> None:
        self.add(self.pop_mark(), list)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.add([key, value], dict)

    def load_setitems(self) -> None:
        self.add(self.pop_mark(), dict)

    def add(self, items: list, kind: type) -> None:
        """Add items to the container on top of the stack, of the type `kind`; those of a Call are dropped."""
        container = self.stack[-1]
        if type(container) not in (kind, Call) or kind is dict and len(items) % 2:
            self.refuse()
        if type(container) is list:
            container.extend(items)
        elif type(container) is dict:
            container.update(zip(map(_key, items[::2]), items[1::2]))

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple or type(function) not in (Global, Call):
            self.refuse()
        self.append(_called(function, args))

    def load_newobj_ex(self) -> None:
        self.stack.pop()                            # keywords
        self.load_reduce()

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Call:
            target.state = state
        elif type(target) is not dict:              # attributes of an OrderedDict: PyTorch's _metadata
            self.refuse()

    dispatch: ClassVar[dict[int, Any]] = dict.fromkeys(range(256), refuse)
    dispatch.update({code[0]: pickle._Unpickler.dispatch[code[0]] for code in UNCHANGED})
    dispatch.update({
        pickle.FRAME[0]: load_frame,
        pickle.LONG_BINPUT[0]: load_long_binput,
        pickle.BINUNICODE[0]: load_binunicode,
        pickle.BINUNICODE8[0]: load_binunicode8,
        pickle.BINBYTES[0]: load_binbytes,
        pickle.BINBYTES8[0]: load_binbytes8,
        pickle.BYTEARRAY8[0]: load_binbytes8,
        pickle.EMPTY_SET[0]: load_empty_set,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.ADDITEMS[0]: load_additems,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
    })


def _called(function: Any, args: tuple) -> Any:
    """Return the stand-in for `function(*args)`, or a plain value if the function only wraps one."""
    name = function.name if type(function) is Global else ''
    if name in DICTIONARIES and not any(type(arg) in (list, dict) for arg in args):
        return {}                                   # its items follow
    if name == 'builtins.tuple' and len(args) == 1 and type(args[0]) is tuple:
        return args[0]                              # Paddle's tensors: (name, array)
    if name == 'builtins.eval':                     # Paddle's static tensors: eval('data', {'data': array})
        is_array = len(args) == 2 and args[0] == 'data' and type(args[1]) is dict and {*args[1]} == {'data'}
        if not is_array:
            raise pickle.UnpicklingError('it contains builtins.eval, and a weight file may hold arrays only')
        return args[1]['data']
    return Call(function, args)
