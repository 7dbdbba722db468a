"""Weight files: real ones by PyTorch and Paddle, crafted ones, damaged ones.

fixtures/torch holds one state dict of odd tensors (views, transposed, empty, every type), written by PyTorch 2.13 with
torch.save (zip.pth, and legacy.pth with _use_new_zipfile_serialization=False) and safetensors.torch.save_file; expected.npz
holds its numbers by Tensor.numpy(). module.pth is the state_dict of a module, timm_checkpoint.pth.tar one in timm's layout.
"""
import argparse
import datetime
import io
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import paddle
import pytest
import reference as ref
from safetensors.numpy import save_file

from model import weight_files, weight_formats

TORCH = ref.FIXTURES / 'torch'
FORMATS = ('zip.pth', 'legacy.pth', 'torch.safetensors')


# ---- a writer of torch.save's formats, opcode by opcode

class Named:
    """Stands for the global MODULE.NAME, called with `args` if there are any; pickled by Writer."""

    def __init__(self, module, name, args=None):
        self.module, self.name, self.args = module, name, args


class Ref(tuple):
    """A persistent id."""


class Writer(pickle._Pickler):
    """A pickler that writes Named and Ref objects as PyTorch does."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Ref):
            super().save(tuple(obj))
            self.write(pickle.BINPERSID)
        elif isinstance(obj, Named):
            self.write(pickle.GLOBAL + f'{obj.module}\n{obj.name}\n'.encode())
            if obj.args is not None:
                super().save(obj.args)
                self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def dump(obj):
    buffer = io.BytesIO()
    Writer(buffer, protocol=2).dump(obj)
    return buffer.getvalue()


def tensor(key='0', *, count=6, offset=0, shape=(2, 3), strides=(3, 1), kind='FloatStorage', extra=()):
    storage = Ref(('storage', Named('torch', kind), key, 'cpu', count, *extra))
    return Named('torch._utils', '_rebuild_tensor_v2', (storage, offset, shape, strides, False, OrderedDict()))


NUMBERS = np.arange(6, dtype='<f4')


def write_zip(path, content, storages=None, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr('archive/data.pkl', content if isinstance(content, bytes) else dump(content))
        for key, data in ({'0': NUMBERS.tobytes()} if storages is None else storages).items():
            archive.writestr(f'archive/data/{key}', data)
        for name, data in entries.items():
            archive.writestr(f'archive/{name}', data)
    return str(path)


def write_legacy(path, content, storages=None, version=1001, little=True):
    storages = {'0': NUMBERS} if storages is None else storages
    parts = [dump(weight_formats.TORCH_MAGIC), dump(version), dump({'little_endian': little}),
             content if isinstance(content, bytes) else dump(content), dump(list(storages))]
    parts += [struct.pack('<q', len(data)) + data.tobytes() for data in storages.values()]
    path.write_bytes(b''.join(parts))
    return str(path)


def legacy_tensor(**kwargs):
    return tensor(extra=(None,), **kwargs)


WRITERS = {'zip': (write_zip, tensor), 'legacy': (write_legacy, legacy_tensor)}


# ---- real files

@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('ending', ['', '.pdparams', '.safetensors'])
def test_reads_what_pytorch_wrote_whatever_the_ending(tmp_path, name, ending):
    path = str(tmp_path / f'weights{ending}')
    shutil.copy(TORCH / name, path)
    state = weight_files.read(path)
    with np.load(TORCH / 'expected.npz') as expected:
        assert state.keys() == set(expected.files) and len(state) == 12
        for key in state:
            assert state[key].dtype == expected[key].dtype
            np.testing.assert_array_equal(state[key], expected[key], err_msg=key)


def test_reads_without_pytorch():
    """And without Paddle, but for the logger."""
    code = 'import sys; sys.modules["torch"] = None; from model import weight_files; print(len(weight_files.read(sys.argv[1])))'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, TORCH / 'zip.pth'], capture_output=True, text=True,
                          cwd=ref.FIXTURES.parent.parent, timeout=60)
    assert done.stdout == '12\n', done.stderr


def test_reads_the_state_dict_of_a_module():
    state = weight_files.read(str(TORCH / 'module.pth'))
    assert {key: array.shape for key, array in state.items()} == {
        'conv.weight': (2, 1, 1, 1), 'conv.bias': (2,), 'bn.weight': (2,), 'bn.bias': (2,), 'bn.running_mean': (2,),
        'bn.running_var': (2,), 'bn.num_batches_tracked': ()}
    np.testing.assert_array_equal(state['bn.running_var'], [1, 1])


@pytest.mark.parametrize('kind', WRITERS)
def test_reads_what_this_file_s_writer_wrote(tmp_path, kind):
    """So that a refusal below is one of the change, not of the writer."""
    write, make = WRITERS[kind]
    path = write(tmp_path / 'a', {'a': make(), 'b': make(shape=(2, 2), strides=(1, 3), offset=1),
                                  'c': make(shape=(), strides=())})
    state = weight_files.read(path)
    np.testing.assert_array_equal(state['a'], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(state['b'], [[1, 4], [2, 5]])
    assert state['c'] == 0 and state['c'].shape == ()


# ---- Paddle's and numpy's files

ARRAYS = {
    'plain': np.arange(6, dtype='f4').reshape(2, 3), 'transposed': np.arange(24, dtype='f4').reshape(2, 3, 4).T,
    'axes exchanged': np.arange(24, dtype='f4').reshape(2, 3, 4).transpose(0, 2, 1), 'steps': np.arange(9, dtype='i8')[::2],
    'empty': np.zeros((0, 3), 'f4'), 'no axes': np.array(2.5), 'scalar': np.float64(2.5), 'big-endian': np.arange(3, dtype='>f8'),
    'bool': np.array([True, False]), 'half': np.arange(3, dtype='f2'), 'bytes': np.arange(200, dtype='u1'),
    'large': np.arange(5000, dtype='f4').reshape(50, 100),
}


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_reads_every_array_of_every_protocol(tmp_path, protocol):
    path = tmp_path / 'file'
    path.write_bytes(pickle.dumps({f'stem.{key}': value for key, value in ARRAYS.items()}, protocol))
    for read in (weight_files.read, weight_files.read_pickle):
        state = read(str(path))
        assert [*state] == [f'stem.{key}' for key in ARRAYS]
        for value, expected in zip(state.values(), ARRAYS.values()):
            assert value.dtype == expected.dtype.newbyteorder('=') and value.shape == expected.shape
            np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_reads_tensors_that_paddle_nested(tmp_path, protocol):
    """paddle.save writes a tensor below another dictionary as a tuple (name, array)."""
    path, layer = str(tmp_path / 'file'), paddle.nn.Linear(30, 40)
    optimizer = paddle.optimizer.AdamW(parameters=layer.parameters())
    layer(paddle.ones([1, 30])).sum().backward()
    optimizer.step()
    expected = {key: value.numpy() for key, value in layer.state_dict().items()}
    half = {key: value.astype('bfloat16') for key, value in layer.state_dict().items()}
    paddle.save({'model': {f'stem.{key}': value for key, value in layer.state_dict().items()}, 'epoch': 3,
                 'model_ema': {f'stem.{key}': value for key, value in half.items()},
                 'optimizer': optimizer.state_dict(), 'lr_scheduler': {'last_lr': 0.1}}, path, protocol=protocol)
    state, averaged = weight_files.read(path), weight_files.read(path, ema=True)
    for key, value in expected.items():
        np.testing.assert_array_equal(state[f'stem.{key}'], value)
        np.testing.assert_array_equal(averaged[f'stem.{key}'], half[key].astype('float32').numpy())


def test_reads_optimizer_files_of_paddle(tmp_path):
    """Nobody needs them here; they are what lies beside weights of paddle.save."""
    layer = paddle.nn.Linear(30, 40)
    optimizer = paddle.optimizer.Momentum(paddle.optimizer.lr.StepDecay(0.1, 3), parameters=layer.parameters())
    layer(paddle.ones([1, 30])).sum().backward()
    optimizer.step()
    paddle.save(optimizer.state_dict(), str(tmp_path / 'a.pdopt'))
    state, expected = weight_files.read_pickle(str(tmp_path / 'a.pdopt')), optimizer.state_dict()
    assert state['LR_Scheduler'] == expected['LR_Scheduler']
    assert all((state[key] == value.numpy()).all() for key, value in expected.items() if key != 'LR_Scheduler')


class StaticTensor:
    """Pickled as paddle.save writes a tensor of a static program."""

    def __reduce__(self):
        return eval, ('data', {'data': NUMBERS})


def test_reads_tensors_of_static_programs(tmp_path):
    (tmp_path / 'file').write_bytes(pickle.dumps({'model': {'stem.a': StaticTensor()}}))
    np.testing.assert_array_equal(weight_files.read(str(tmp_path / 'file'))['stem.a'], NUMBERS)


# ---- other trainers' files

def save_state(path, keys, **beside):
    path.write_bytes(pickle.dumps({**{key: NUMBERS for key in keys}, **beside}))
    return str(path)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', '_orig_mod.module.', 'module.module.', 'model.', 'timm_model.',
                                    'model.backbone.', 'net.', 'student.encoder.'])
def test_a_prefix_of_all_keys_is_taken_off(tmp_path, prefix, caplog):
    path = save_state(tmp_path / 'file', [f'{prefix}stem.conv.weight', f'{prefix}head.fc.bias'], epoch=3)
    with caplog.at_level('INFO'):
        assert [*weight_files.read(path)] == ['stem.conv.weight', 'head.fc.bias']
    assert f'{path}: all keys begin with {prefix}, which is taken off' in caplog.text


@pytest.mark.parametrize('keys', [['stem.conv.weight', 'head.fc.bias'], ['model.stem.conv.weight', 'head.fc.bias'],
                                  ['stages.0.head.fc.weight'], ['a.b', 'a.c'], ['head.fc.weight']])
def test_keys_without_a_common_prefix_stay(tmp_path, keys):
    assert [*weight_files.read(save_state(tmp_path / 'file', keys))] == keys


def test_reads_an_averaged_model_of_torchvision(tmp_path):
    averaged = {'n_averaged': tensor(shape=(), strides=()), 'module.stem.a': tensor()}
    path = write_zip(tmp_path / 'file', {'model': {'stem.a': tensor()}, 'model_ema': averaged})
    assert [*weight_files.read(path, ema=True)] == [*weight_files.read(path)] == ['stem.a']


FOREIGN = {
    'type of PyTorch': Named('torch', 'float32'), 'path': pathlib.PurePosixPath('/a'),
    'defaultdict': defaultdict(list, {'a': [1]}),
    'scalar of numpy': np.float32(3), 'text array': np.array(['a']), 'set': {1, 2}, 'frozenset': frozenset([(1, 2)]),
    'options': argparse.Namespace(lr=0.1), 'class': Named('timm.models.byobnet', 'ByobNet'), 'tuple as key': {(1, 2): 3},
    'ordered': OrderedDict(a=1), 'counter': Counter('aab'), 'deque': deque([1, 2]), 'date': datetime.date(2021, 3, 23),
    'complex': 1j, 'range': range(3), 'number': 2 ** 70, 'bytes': b'a', 'none': None,
}


@pytest.mark.parametrize('kind', FOREIGN)
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_objects_beside_the_weights_are_left_alone(tmp_path, kind, protocol):
    """Both beside a state dict and among its entries, where the names of weights have a dot."""
    path, buffer = tmp_path / 'file', io.BytesIO()
    for content in ({'state_dict': {'stem.a': NUMBERS}, 'other': FOREIGN[kind]}, {'stem.a': NUMBERS, 'other': FOREIGN[kind]}):
        buffer.seek(0)
        Writer(buffer, protocol).dump(content)
        path.write_bytes(buffer.getvalue())
        state = weight_files.read(str(path))
        assert [key for key in state if key != 'other'] == ['stem.a'] and state['stem.a'].tolist() == NUMBERS.tolist()


def test_a_weight_that_is_no_array_is_never_left_out(tmp_path):
    path = save_state(tmp_path / 'file', ['stem.a'], **{'stem.b': pathlib.PurePosixPath('/a')})
    with pytest.raises(ValueError, match=f'^{path}: .*stem.b is no array of numbers: it contains pathlib'):
        weight_files.read(path)


def test_arrays_beyond_the_limit_are_not_read(tmp_path):
    path = save_state(tmp_path / 'file', ['stem.a'])
    assert weight_files.read(path, limit=NUMBERS.nbytes)['stem.a'].shape == NUMBERS.shape
    with pytest.raises(ValueError, match=f'^{path}: .*stem.a: its arrays take more than 0 MB, too much for the model'):
        weight_files.read(path, limit=NUMBERS.nbytes - 1)


# ---- weights or their moving average

CHECKPOINTS = {
    "timm's": {'epoch': 1, 'state_dict': {'a': 1, 'b': 2}, 'state_dict_ema': {'a': 3, 'b': 4}, 'args': argparse.Namespace(lr=1)},
    "PaddleViT's": {'epoch': 1, 'model': {'a': 1, 'b': 2}, 'model_ema': {'a': 3, 'b': 4}, 'optimizer': {'LR_Scheduler': {}}},
    'ours': {'model': {'a': 1, 'b': 4}, 'ema': {'a': 3}, 'optimizer': {'a|moment1_0': 7}, 'progress': {'best': {'val': [1, 2]}}},
    'prefixed': {'state_dict': {'module.a': 1, 'module.b': 2}, 'state_dict_ema': {'module.a': 3, 'module.b': 4}},
}


def as_arrays(value):
    return {key: as_arrays(item) for key, item in value.items()} if isinstance(value, dict) else \
        np.full(2, value, 'float32') if isinstance(value, int) else value


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_checkpoints_give_the_raw_or_the_averaged_weights(tmp_path, name, caplog):
    path = tmp_path / 'checkpoint'
    path.write_bytes(pickle.dumps(as_arrays(CHECKPOINTS[name]), protocol=2))
    with caplog.at_level('INFO'):
        raw = weight_files.read(str(path))
        assert 'moving average' in caplog.text and 'taking the weights' in caplog.text
    averaged = weight_files.read(str(path), ema=True)
    assert {key: array.tolist() for key, array in averaged.items()} == {'a': [3, 3], 'b': [4, 4]}
    assert {key: array.tolist() for key, array in raw.items()} == {'a': [1, 1], 'b': [4, 4] if name == 'ours' else [2, 2]}


def test_reads_a_timm_checkpoint_by_pytorch(caplog):
    path = str(TORCH / 'timm_checkpoint.pth.tar')
    assert weight_files.read(path)['a.weight'].tolist() == [1, 2]
    assert weight_files.read(path, ema=True)['a.weight'].tolist() == [3, 4]


@pytest.mark.parametrize('content', [{'a': 1}, {'model': {'a': 1}}, {'model': {'a': 1}, 'ema': {}}])
def test_without_an_average_asking_for_it_is_an_error(tmp_path, content, caplog):
    path = tmp_path / 'file'
    path.write_bytes(pickle.dumps(as_arrays(content)))
    with caplog.at_level('INFO'):
        assert weight_files.read(str(path))['a'].tolist() == [1, 1] and not caplog.text
    with pytest.raises(ValueError, match=f'^{path}: .*no moving average'):
        weight_files.read(str(path), ema=True)


# ---- crafted files

class Runs:
    """A pickle of this creates the file `path` when a plain unpickler reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


EVIL = {
    'pdparams': lambda path, evil: path.write_bytes(pickle.dumps({'a': np.zeros(2), 'b': evil})),
    'pdckpt': lambda path, evil: path.write_bytes(pickle.dumps({'model': {'a': np.zeros(2)}, 'ema': {}, 'progress': evil})),
    'zip': lambda path, evil: write_zip(path, {'a': tensor(), 'b': evil}),
    'legacy': lambda path, evil: write_legacy(path, {'a': legacy_tensor(), 'b': evil}),
    'legacy, in front': lambda path, evil: path.write_bytes(dump(weight_formats.TORCH_MAGIC) + dump(evil)),
    'legacy, behind': lambda path, evil: path.write_bytes(
        b''.join(map(dump, (weight_formats.TORCH_MAGIC, 1001, {'little_endian': True}, {'a': legacy_tensor()}, [evil])))),
}


@pytest.mark.parametrize('kind', EVIL)
def test_no_file_runs_anything(tmp_path, kind):
    path, trace = tmp_path / 'evil', tmp_path / 'trace'
    EVIL[kind](path, Runs(trace))
    with pytest.raises(ValueError, match=rf'^{path}: .*it contains (posix|nt|os)\.system'):
        weight_files.read(str(path))
    assert not trace.exists()
    pickle.loads(dump(Runs(trace)))
    assert trace.exists()                           # the trap works


@pytest.mark.parametrize('name', ['builtins.eval', 'builtins.exec', 'builtins.getattr', 'torch.load', 'torch._utils._import',
                                  'torch.storage._load_from_bytes', 'torch.FloatStorage.from_file', 'torch.hub.load', 'os.system',
                                  'argparse.FileType', 'timm.models.byobnet.ByobNet', 'numpy.load', 'functools.partial'])
def test_globals_are_refused_by_name(tmp_path, name):
    path = write_zip(tmp_path / 'evil', {'a.a': tensor(), 'a.b': Named(*name.rsplit('.', 1), args=('x',))})
    with pytest.raises(ValueError, match=f'^{path}: .*it contains ' + name.replace('.', r'\.')):
        weight_files.read(path)


BAD_TENSORS = {
    'beyond the end': {'offset': 1}, 'long strides': {'strides': (4, 1)}, 'negative strides': {'strides': (-1, 1), 'offset': 3},
    'negative offset': {'offset': -1}, 'negative size': {'shape': (-2, -3)}, 'more sizes than strides': {'shape': (1, 2, 3)},
    'repeated numbers': {'shape': (10 ** 12,), 'strides': (0,)}, 'absurd size': {'shape': (10 ** 20, 10 ** 20)},
    'not a number': {'offset': 'x'}, 'broken number': {'offset': 0.5}, 'truth': {'shape': (True, 3)},
    'absurd storage': {'count': 10 ** 15}, 'negative storage': {'count': -1}, 'storage of text': {'count': 'x'},
    'missing storage': {'key': '1'}, 'path as storage': {'key': '../../etc/passwd'}, 'absolute storage': {'key': '/etc/passwd'},
    'another type': {'kind': 'DoubleStorage'}, 'complex': {'kind': 'ComplexFloatStorage'},
}


@pytest.mark.parametrize('kind', WRITERS)
@pytest.mark.parametrize('change', BAD_TENSORS)
def test_tensors_outside_their_storage_are_refused(tmp_path, kind, change):
    write, make = WRITERS[kind]
    path = write(tmp_path / 'bad', {'a': make(**BAD_TENSORS[change])})
    with pytest.raises(ValueError, match=f'^{path}: not a readable weight file: .*[a-z]{{4}}'):
        weight_files.read(path)


@pytest.mark.parametrize('write, message', [
    (lambda path: write_zip(path, {'a': tensor()}, compression=zipfile.ZIP_DEFLATED), 'compressed'),
    (lambda path: write_zip(path, {'a': tensor()}, storages={'0': b'123'}), 'not as long as a tensor says'),
    (lambda path: write_zip(path, {'a': tensor()}, byteorder=b'big'), 'big-endian'),
    (lambda path: write_zip(path, {'a': tensor()}, **{'constants.pkl': b''}), 'torch.save of a state dict did not write it'),
    (lambda path: write_zip(path, {'a': tensor()}, **{'other/data.pkl': b''}), 'torch.save of a state dict did not write it'),
    (lambda path: np.savez(open(path, 'wb'), a=NUMBERS), 'torch.save of a state dict did not write it'),
    (lambda path: write_legacy(path, {'a': legacy_tensor()}, version=1000), 'another version'),
    (lambda path: write_legacy(path, {'a': legacy_tensor()}, little=False), 'big-endian'),
    (lambda path: write_legacy(path, {'a': legacy_tensor()}, storages={'0': NUMBERS[:5]}), 'incomplete: the storage .0.'),
    (lambda path: write_legacy(path, {'a': tensor(extra=(('1', 0, 2),))}), 'it refers to'),
    (lambda path: write_zip(path, {'a.b': Ref(('module', 1, 2, 3, 4))}), 'it contains Reference'),
    (lambda path: path.write_bytes(dump({'a': tensor()})), 'it refers to'),
    (lambda path: path.write_bytes(b'\x80\x04}r\xff\xff\xff\x7f.'), 'entry 2147483647'),       # Python would take 32 GB
    (lambda path: path.write_bytes(b'\x80\x04\x8e' + b'\xff' * 7 + b'\x0f.'), '[mM]emory|bytes'),
    (lambda path: path.write_bytes(b'\xff' * 7 + b'\x7f{}'), 'none of'),
    (lambda path: path.write_bytes(struct.pack('<Q', 90_000_000) + b'{"a": 1}'), 'eader'),
    (lambda path: path.write_bytes(struct.pack('<Q', 8) + b'{"a": 1}'), 'eader'),
])
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
def test_a_file_cut_anywhere_is_named(tmp_path, name):
    whole, path = (TORCH / name).read_bytes(), tmp_path / 'cut'
    for length in {*range(0, len(whole) - 1, 37), 1, 8, 9, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f'^{path}: (not a readable weight file: .|expected a state dict)'):
            weight_files.read(str(path))


def test_a_flipped_bit_in_a_zip_is_found(tmp_path):
    whole, path = bytearray((TORCH / 'zip.pth').read_bytes()), tmp_path / 'flipped'
    with np.load(TORCH / 'expected.npz') as expected:
        at = whole.index(expected['float32'].tobytes())
    whole[at] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match='CRC'):
        weight_files.read(str(path))


@pytest.mark.parametrize('content, looks_like', [
    (b'', 'it is empty'), (bytes(300), 'nothing but zeros'), (b'version https://git-lfs.github.com/spec/v1\n', 'git-lfs pointer'),
    (b'<!DOCTYPE html>', 'web page'), (b'\n<html>', 'web page'), (b'{"error": "no"}', 'JSON'), (b'\x1f\x8b\x08', 'gzip'),
    (b'\x89HDF\r\n', 'HDF5'), (b'PK\x03\x04torn', 'incomplete zip'), (bytes(200) + b'x' + bytes(56) + b'ustar\x0000', 'tar file'),
    (b'just words', 'none of .pdparams, .pdckpt, .safetensors, .pth'),
])
def test_what_is_no_weight_file_is_told(tmp_path, content, looks_like):
    path = tmp_path / 'file.pth'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f'^{path}: not a readable weight file: .*{looks_like}'):
        weight_files.read(str(path))
