"""Damaged and wrong weight files are refused with a reason, and nothing in them is run."""
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import reference as ref
from safetensors.numpy import save_file
from torch_files import NUMBERS, WRITERS, Named, Ref, dump, legacy_tensor, tensor, write_legacy, write_zip

from model import weight_files, weight_formats

TORCH = ref.FIXTURES / 'torch'
FORMATS = ('zip.pth', 'legacy.pth', 'torch.safetensors')


# ---- crafted files

class Runs:
    """A pickle of this creates the file `path` when a plain unpickler reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


EVIL = {
    'pdparams': lambda path, evil: path.write_bytes(pickle.dumps({'a': np.zeros(2), 'b': evil})),
    'pdckpt': lambda path, evil: path.write_bytes(
        pickle.dumps({'model': {'a': np.zeros(2)}, 'ema': {}, 'progress': evil})
    ),
    'zip': lambda path, evil: write_zip(path, {'a': tensor(), 'b': evil}),
    'legacy': lambda path, evil: write_legacy(path, {'a': legacy_tensor(), 'b': evil}),
    'legacy, in front': lambda path, evil: path.write_bytes(dump(weight_formats.TORCH_MAGIC) + dump(evil)),
    'legacy, behind': lambda path, evil: path.write_bytes(
        b''.join(
            map(
                dump,
                (weight_formats.TORCH_MAGIC, 1001, {'little_endian': True}, {'a': legacy_tensor()}, [evil]),
            )
        )
    ),
}


@pytest.mark.parametrize('kind', EVIL)
def test_pickled_calls_are_refused_and_not_run(tmp_path, kind):
    path, trace = tmp_path / 'evil', tmp_path / 'trace'
    EVIL[kind](path, Runs(trace))
    with pytest.raises(ValueError, match=rf'^{path}: .*it contains (posix|nt|os)\.system'):
        weight_files.read(str(path))
    assert not trace.exists()
    pickle.loads(dump(Runs(trace)))
    assert trace.exists()                           # the trap works


@pytest.mark.parametrize(
    'name',
    [
        'builtins.eval',
        'builtins.exec',
        'builtins.getattr',
        'torch.load',
        'torch._utils._import',
        'torch.storage._load_from_bytes',
        'torch.FloatStorage.from_file',
        'torch.hub.load',
        'os.system',
        'argparse.FileType',
        'timm.models.byobnet.ByobNet',
        'numpy.load',
        'functools.partial',
    ],
)
def test_functions_and_classes_are_refused_by_name(tmp_path, name):
    path = write_zip(tmp_path / 'evil', {'a.a': tensor(), 'a.b': Named(*name.rsplit('.', 1), args=('x',))})
    with pytest.raises(ValueError, match=f'^{path}: .*it contains ' + name.replace('.', r'\.')):
        weight_files.read(path)


BAD_TENSORS = {
    'beyond the end': {'offset': 1},
    'long strides': {'strides': (4, 1)},
    'negative strides': {'strides': (-1, 1), 'offset': 3},
    'negative offset': {'offset': -1},
    'negative size': {'shape': (-2, -3)},
    'more sizes than strides': {'shape': (1, 2, 3)},
    'repeated numbers': {'shape': (10**12,), 'strides': (0,)},
    'absurd size': {'shape': (10**20, 10**20)},
    'not a number': {'offset': 'x'},
    'broken number': {'offset': 0.5},
    'truth': {'shape': (True, 3)},
    'absurd storage': {'count': 10**15},
    'negative storage': {'count': -1},
    'storage of text': {'count': 'x'},
    'missing storage': {'key': '1'},
    'path as storage': {'key': '../../etc/passwd'},
    'absolute storage': {'key': '/etc/passwd'},
    'another type': {'kind': 'DoubleStorage'},
    'complex': {'kind': 'ComplexFloatStorage'},
}


@pytest.mark.parametrize('kind', WRITERS)
@pytest.mark.parametrize('change', BAD_TENSORS)
def test_tensors_outside_their_storage_are_refused(tmp_path, kind, change):
    write, make = WRITERS[kind]
    path = write(tmp_path / 'bad', {'a': make(**BAD_TENSORS[change])})
    with pytest.raises(ValueError, match=f'^{path}: not a readable weight file: .*[a-z]{{4}}'):
        weight_files.read(path)


@pytest.mark.parametrize(
    'write, message',
    [
        (lambda path: write_zip(path, {'a': tensor()}, compression=zipfile.ZIP_DEFLATED), 'compressed'),
        (
            lambda path: write_zip(path, {'a': tensor()}, storages={'0': b'123'}),
            'not as long as a tensor says',
        ),
        (lambda path: write_zip(path, {'a': tensor()}, byteorder=b'big'), 'big-endian'),
        (
            lambda path: write_zip(path, {'a': tensor()}, **{'constants.pkl': b''}),
            'torch.save of a state dict did not write it',
        ),
        (
            lambda path: write_zip(path, {'a': tensor()}, **{'other/data.pkl': b''}),
            'torch.save of a state dict did not write it',
        ),
        (lambda path: np.savez(open(path, 'wb'), a=NUMBERS), 'torch.save of a state dict did not write it'),
        (lambda path: write_legacy(path, {'a': legacy_tensor()}, version=1000), 'another version'),
        (lambda path: write_legacy(path, {'a': legacy_tensor()}, little=False), 'big-endian'),
        (
            lambda path: write_legacy(path, {'a': legacy_tensor()}, storages={'0': NUMBERS[:5]}),
            'incomplete: the storage .0.',
        ),
        (lambda path: write_legacy(path, {'a': tensor(extra=(('1', 0, 2),))}), 'it refers to'),
        (lambda path: write_zip(path, {'a.b': Ref(('module', 1, 2, 3, 4))}), 'it contains Reference'),
        (lambda path: path.write_bytes(dump({'a': tensor()})), 'it refers to'),
        (
            lambda path: path.write_bytes(b'\x80\x04}r\xff\xff\xff\x7f.'),
            'entry 2147483647',
        ),  # Python would take 32 GB
        (lambda path: path.write_bytes(b'\x80\x04\x8e' + b'\xff' * 7 + b'\x0f.'), '[mM]emory|bytes'),
        (lambda path: path.write_bytes(b'\xff' * 7 + b'\x7f{}'), 'none of'),
        (lambda path: path.write_bytes(struct.pack('<Q', 90_000_000) + b'{"a": 1}'), 'eader'),
        (lambda path: path.write_bytes(struct.pack('<Q', 8) + b'{"a": 1}'), 'eader'),
    ],
)
def test_crafted_files_are_refused_with_a_reason(tmp_path, write, message):
    path = tmp_path / 'bad'
    write(path)
    with pytest.raises(ValueError, match=f'^{path}: not a readable weight file: .*({message})'):
        weight_files.read(str(path))


def test_safetensors_of_unknown_numbers_are_refused(tmp_path):
    save_file({'a': np.zeros(2, 'uint16')}, str(tmp_path / 'a'))
    with pytest.raises(ValueError, match='its numbers are U16; known are'):
        weight_files.read(str(tmp_path / 'a'))


# ---- damaged files

@pytest.mark.parametrize('name', FORMATS)
def test_truncated_file_is_named(tmp_path, name):
    whole, path = (TORCH / name).read_bytes(), tmp_path / 'cut'
    for length in {*range(0, len(whole) - 1, 37), 1, 8, 9, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=f'^{path}: (not a readable weight file: .|expected a state dict)'
        ):
            weight_files.read(str(path))


def test_flipped_bit_in_a_zip_file_is_detected(tmp_path):
    whole, path = bytearray((TORCH / 'zip.pth').read_bytes()), tmp_path / 'flipped'
    with np.load(TORCH / 'expected.npz') as expected:
        at = whole.index(expected['float32'].tobytes())
    whole[at] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match='CRC'):
        weight_files.read(str(path))


@pytest.mark.parametrize(
    'content, looks_like',
    [
        (b'', 'it is empty'),
        (bytes(300), 'nothing but zeros'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'git-lfs pointer'),
        (b'<!DOCTYPE html>', 'web page'),
        (b'\n<html>', 'web page'),
        (b'{"error": "no"}', 'JSON'),
        (b'\x1f\x8b\x08', 'gzip'),
        (b'\x89HDF\r\n', 'HDF5'),
        (b'PK\x03\x04torn', 'incomplete zip'),
        (bytes(200) + b'x' + bytes(56) + b'ustar\x0000', 'tar file'),
        (b'just words', 'none of .pdparams, .pdckpt, .safetensors, .pth'),
    ],
)
def test_other_kinds_of_files_are_recognised(tmp_path, content, looks_like):
    path = tmp_path / 'file.pth'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f'^{path}: not a readable weight file: .*{looks_like}'):
        weight_files.read(str(path))
