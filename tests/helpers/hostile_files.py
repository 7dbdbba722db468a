"""Pickles and containers made by the instruction to run code, to take memory or to take time.

HOSTILE are whole files, MANY are instructions to repeat.
"""
import io
import json
import pickle
import struct
import zipfile

from model import weight_formats


def pickled(*instructions):
    return b''.join([pickle.PROTO, b'\4', *instructions, pickle.STOP])


def text(value):
    return pickle.BINUNICODE + struct.pack('<I', len(value.encode())) + value.encode()


def data(value):
    return pickle.BINBYTES + struct.pack('<I', len(value)) + value


def number(value):
    return pickle.BININT + struct.pack('<i', value)


def name(module, attribute):
    return text(module) + text(attribute) + pickle.STACK_GLOBAL


def group(*items):
    return pickle.MARK + b''.join(items) + pickle.TUPLE


def call(function, *args):
    return function + group(*args) + pickle.REDUCE


def state(**values):
    """A state dict with the entries 'stem.KEY'."""
    pairs = [text(f'stem.{key}') + value for key, value in values.items()]
    return pickled(pickle.EMPTY_DICT, pickle.MARK, *pairs, pickle.SETITEMS)


def doubled(first, level, levels=60):
    """Nest tuples or lists, each twice in the next one: 2 ** levels values in a few hundred bytes."""
    parts = [first + pickle.MEMOIZE, *(level(get(n) * 2) for n in range(levels))]
    return pickle.POP.join(parts)


def get(index):
    return pickle.LONG_BINGET + struct.pack('<I', index)


DTYPE = call(name('numpy', 'dtype'), text('f4'), pickle.NEWFALSE, pickle.NEWTRUE)
RECONSTRUCT, SCALAR = (name('numpy._core.multiarray', what) for what in ('_reconstruct', 'scalar'))
FROM_BUFFER, ENCODE = name('numpy._core.numeric', '_frombuffer'), name('_codecs', 'encode')
OBJECTS = (
    call(name('numpy', 'dtype'), text('O8'), pickle.NEWFALSE, pickle.NEWTRUE)
    + group(number(3), text('|'), pickle.NONE, pickle.NONE, pickle.NONE, number(-1), number(-1), number(0))
    + pickle.BUILD
)
ADDRESSES = data(b'A' * 8)                          # where numpy would look for objects


def array(content, count, dtype=DTYPE, order='C'):
    return call(FROM_BUFFER, content, dtype, group(number(count)), text(order))


def reference(part=None, hostile=b''):
    """A persistent id of PyTorch, in which `hostile` stands for one part."""
    parts = [text('storage'), name('torch', 'FloatStorage'), text('0'), text('cpu'), number(4), pickle.NONE]
    if part is not None:
        parts[part] = hostile
    return group(*parts) + pickle.BINPERSID


def torch_tensor(storage, count=4, **hostile):
    """A tensor (count,) of PyTorch, in which `hostile` stands for its offset, shape or strides."""
    parts = {'offset': number(0), 'shape': group(number(count)), 'strides': group(number(1)), **hostile}
    return call(
        name('torch._utils', '_rebuild_tensor_v2'),
        storage,
        *parts.values(),
        pickle.NEWFALSE,
        pickle.EMPTY_DICT,
    )


def zipped(content, **entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('a/data.pkl', content)
        for key, value in ({'0': bytes(16)} if not entries else entries).items():
            archive.writestr(f'a/data/{key}', value)
    return file.getvalue()


def legacy(version=None, system=None, content=None, keys=None):
    parts = [
        pickle.dumps(weight_formats.TORCH_MAGIC, 2),
        version or pickle.dumps(1001),
        system or pickle.dumps({'little_endian': True}),
        content or pickle.dumps({}),
        keys or pickle.dumps([]),
    ]
    return b''.join(parts)


def safetensors(header, content=b''):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(header)) + header + content


def short_entry():
    """A zip file by torch.save, whose directory says of storage 0 that 4 of its 16 bytes are there."""
    whole = bytearray(zipped(state(a=torch_tensor(reference()))))
    at = whole.rindex(b'PK\1\2')  # the entry of the directory that is last: that of the storage
    whole[at + 20:at + 24] = struct.pack('<I', 4)
    return bytes(whole)


def overlapping_entries(count=500, size=1 << 20):
    """A zip file of storages that all end with the same megabyte of zeros."""
    names = [f'a/data/{n}'.encode() for n in range(count)]
    storages = [
        group(text('storage'), name('torch', 'ByteStorage'), text(str(n)), text('cpu'), number(size))
        + pickle.BINPERSID
        for n in range(count)
    ]
    content = state(**{f'k{n}': torch_tensor(found, size) for n, found in enumerate(storages)})
    file, directory = io.BytesIO(), []
    for title, length, body in [
        (b'a/data.pkl', len(content), content),
        *((title, size, b'') for title in names),
    ]:
        crc = zipfile.crc32(body)
        start = file.tell()
        file.write(
            struct.pack('<IHHHHHIIIHH', 0x04034B50, 20, 0, 0, 0, 0, crc, length, length, len(title), 0)
            + title
            + body
        )
        directory.append(
            struct.pack(
                '<IHHHHHHIIIHHHHHII',
                0x02014B50,
                20,
                20,
                0,
                0,
                0,
                0,
                crc,
                length,
                length,
                len(title),
                0,
                0,
                0,
                0,
                0,
                start,
            )
            + title
        )
    file.write(bytes(size))
    start, entries = file.tell(), b''.join(directory)
    file.write(
        entries + struct.pack('<IHHHHIIH', 0x06054B50, 0, 0, count + 1, count + 1, len(entries), start, 0)
    )
    return file.getvalue()


def with_doubled(hostile):
    """{description: file} with `hostile` wherever the reader looks at a value."""
    files = {
        'file': pickled(hostile),
        'value': state(a=hostile),
        'arguments': state(a=SCALAR + hostile + pickle.REDUCE),
        'key': pickled(pickle.EMPTY_DICT, hostile, pickle.NONE, pickle.SETITEM),
        'function': state(a=call(hostile)),
        'key of a call': state(a=call(name('a', 'b')) + hostile + pickle.NONE + pickle.SETITEM),
        'type': state(a=array(data(bytes(4)), 1, call(name('numpy', 'dtype'), hostile))),
        'encoding': state(a=array(call(ENCODE, text('abcd'), hostile), 1)),
        'text': state(a=array(call(ENCODE, hostile, text('latin1')), 1)),
        'shape': state(a=call(FROM_BUFFER, data(bytes(4)), DTYPE, hostile, text('C'))),
        'device': state(a=call(name('torch', 'device'), hostile)),
        'eval': state(a=call(name('builtins', 'eval'), hostile, hostile)),
        'version': legacy(version=pickled(hostile)),
        'system': legacy(system=pickled(hostile)),
        'keys': legacy(keys=pickled(hostile)),
        'storage': legacy(content=state(a=torch_tensor(hostile))),
    }
    for part in (0, 1, 2, 4, 5):
        files[f'part {part} of a storage'] = zipped(state(a=torch_tensor(reference(part, hostile))))
    for what in ('offset', 'shape', 'strides'):
        files[f'{what} of a tensor'] = zipped(state(a=torch_tensor(reference(), **{what: hostile})))
    return files


TUPLES = with_doubled(doubled(pickle.EMPTY_TUPLE, lambda items: items + pickle.TUPLE2 + pickle.MEMOIZE))
LISTS = with_doubled(
    doubled(
        pickle.EMPTY_LIST,
        lambda items: pickle.EMPTY_LIST + pickle.MEMOIZE + pickle.MARK + items + pickle.APPENDS,
    )
)
LONG = text('é' * 300_000)  # each character takes two bytes of the file, and one of an array
BYTES = call(name('numpy', 'dtype'), text('u1'))


def entries(pairs):
    """The instructions of a dictionary with (key, value) of instructions."""
    return pickle.EMPTY_DICT + pickle.MARK + b''.join(key + value for key, value in pairs) + pickle.SETITEMS


def raw(shape, offsets, kind='U8', key='a.b'):
    """The entry of an array in the header of safetensors."""
    return {key: {'dtype': kind, 'shape': shape, 'data_offsets': offsets}}


def reused(content, value, titles):
    """A pickle of {title: value} for each title, in which value refers to the one `content` as entry 0."""
    return pickled(content, pickle.MEMOIZE, pickle.POP, entries((text(title), value) for title in titles))


HOSTILE = {
    **{f'doubled tuples as {where}': content for where, content in TUPLES.items()},
    **{f'doubled lists as {where}': content for where, content in LISTS.items()},
    # numpy would take bytes of the file for addresses
    'scalar of objects': state(a=call(SCALAR, OBJECTS, ADDRESSES)),
    'set of an array of objects': state(
        a=call(name('builtins', 'set'), call(name('numpy', 'ndarray'), group(number(1)), OBJECTS, ADDRESSES))
    ),
    'state of an array of objects': state(
        a=call(RECONSTRUCT, name('numpy', 'ndarray'), group(number(0)), data(b'b'))
        + group(number(1), group(number(1)), OBJECTS, pickle.NEWFALSE, ADDRESSES)
        + pickle.BUILD
    ),
    'buffer of objects': state(a=array(ADDRESSES, 1, OBJECTS)),
    'array of 2 ** 27 objects': state(a=call(name('numpy', 'ndarray'), group(number(2**27)), text('O'))),
    'type with fields': state(a=call(SCALAR, call(name('numpy', 'dtype'), text('V8')), ADDRESSES)),
    # deep
    'tuples in tuples as key': pickled(
        entries([(pickle.EMPTY_TUPLE + pickle.TUPLE1 * 100_000, pickle.NONE)])
    ),
    'tuples in tuples': state(a=pickle.EMPTY_TUPLE + pickle.TUPLE1 * 100_000),
    'lists in lists': state(a=pickle.EMPTY_LIST * 100_000 + pickle.APPEND * 99_999),
    'calls of calls': state(a=name('a', 'b') + (pickle.EMPTY_TUPLE + pickle.REDUCE) * 100_000),
    'parameters of parameters': reused(
        name('torch._utils', '_rebuild_parameter'),
        get(0) * 50_000 + pickle.NONE + (pickle.TUPLE1 + pickle.REDUCE) * 50_000,
        ['stem.a'],
    ),
    'a dictionary in itself': pickled(
        pickle.EMPTY_DICT, pickle.MEMOIZE, text('model'), get(0), pickle.SETITEM
    ),
    # many
    'texts of wide characters': pickled(text('a' * 1000 + '\U0001f600') * 40_000),
    'numbers with the same hash': pickled(
        entries(
            (pickle.LONG1 + b'\x0b' + (n * (2**61 - 1)).to_bytes(11, 'little'), pickle.NONE)
            for n in range(50_000)
        )
    ),
    'a memo entry of a high number': pickled(pickle.NONE, pickle.LONG_BINPUT, b'\xff\xff\xff\x7f'),
    'a text decoded often': reused(
        LONG, array(call(ENCODE, get(0), text('latin1')), 300_000, BYTES), [f'stem.{n}' for n in range(3000)]
    ),
    'a text decoded in vain': reused(
        LONG, array(call(ENCODE, get(0), text('latin1')), 5), [f'{n}' for n in range(9000)]
    ),
    'the same bytes often': reused(
        data(bytes(400_000)), array(get(0), 100_000), [f'stem.{n}' for n in range(9000)]
    ),
    'an encoding of long computations': state(
        a=array(call(ENCODE, text('é' * 500_000), text('punycode')), 1)
    ),
    # lengths that are not there
    'bytes of 2 ** 62': state(a=pickle.BINBYTES8 + struct.pack('<Q', 2**62)),
    'bytearray of 2 ** 40': state(a=pickle.BYTEARRAY8 + struct.pack('<Q', 2**40)),
    'text of 2 ** 64 - 1': state(a=pickle.BINUNICODE8 + struct.pack('<Q', 2**64 - 1)),
    'number of 2 ** 31 - 1 bytes': state(a=pickle.LONG4 + struct.pack('<i', 2**31 - 1)),
    'too few bytes': state(a=array(data(bytes(4)), 2)),
    'too many bytes': state(a=array(data(bytes(9)), 2)),
    'negative shape': state(a=array(data(bytes(4)), -1)),
    # instructions that weight files do not have
    'no instruction': pickled(b'\xff'),
    'DUP': pickled(pickle.NONE, pickle.DUP),
    'an extension': pickled(pickle.EXT1, b'\1'),
    'an object of protocol 0': pickled(pickle.MARK, b'ios\nsystem\n'),
    # containers
    'short zip entry': short_entry(),
    'overlapping zip entries': overlapping_entries(),
    'zip of 60,000 entries': zipped(pickle.dumps({}), **{str(n): b'' for n in range(60_000)}),
    'header of 2 ** 32 bytes': struct.pack('<Q', 2**32 - 1) + b'{}',
    'header of deep lists': safetensors(b'{"a":' + b'[' * 1_000_000),
    'header of long numbers': safetensors(
        b'{"a.b":{"dtype":"U8","shape":[' + b'9' * 3_000_000 + b'],"data_offsets":[0,1]}}', bytes(1)
    ),
    'header of overlapping arrays': safetensors(
        {**raw([4], [0, 4]), **raw([4], [0, 4], key='a.c')}, bytes(4)
    ),
    'header of a hole': safetensors(raw([4], [4, 8]), bytes(8)),
    'header of negative sizes': safetensors(raw([-2, -2], [0, 4]), bytes(4)),
    'header of an endless shape': safetensors(raw([0, 2**47, 2**47], [0, 0])),
    'header that is a list': struct.pack('<Q', 8) + b'{"a":[]}',
    # what could stand in a message
    'control characters in a name': state(a=call(name('x\x1b[31m\n\u202e', 'y' * 900))),
    'control characters in a key': pickled(entries([(text('stem.\x1b[31m\n'), pickle.NONE)])),
    'control characters in a type': safetensors(raw([4], [0, 4], kind='\x1b[31m\n' * 999), bytes(4)),
    'a key of 100,000 characters': pickled(entries([(text('stem.' + 'a' * 100_000), pickle.NONE)])),
    'half a character in a key': pickled(entries([(b'X\5\0\0\0a.\xed\xa0\x80', pickle.NONE)])),
}
MANY = {  # instructions, more than the reader follows
    'dictionaries': pickle.EMPTY_DICT,
    'marks': pickle.MARK,
    'sets': pickle.EMPTY_SET,
    'frames': pickle.FRAME + bytes(8),
    'memo entries': pickle.NONE + pickle.MEMOIZE,
    'tuples': pickle.EMPTY_TUPLE + pickle.TUPLE1,
}
