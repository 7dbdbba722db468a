"""Weight files are read: those of PyTorch, Paddle, numpy and other trainers.

fixtures/torch holds one state dict of odd tensors (views, transposed, empty, every type), written by
PyTorch 2.13 with torch.save (zip.pth, and legacy.pth with _use_new_zipfile_serialization=False) and
safetensors.torch.save_file; expected.npz holds its numbers by Tensor.numpy(). module.pth is the
state_dict of a module, timm_checkpoint.pth.tar one in timm's layout.
"""
import argparse
import datetime
import io
import pathlib
import pickle
import shutil
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import paddle
import pytest
import reference as ref
from torch_files import NUMBERS, WRITERS, Named, Writer, tensor, write_zip

from model import weight_files

TORCH = ref.FIXTURES / 'torch'
FORMATS = ('zip.pth', 'legacy.pth', 'torch.safetensors')


# ---- real files

@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('ending', ['', '.pdparams', '.safetensors'])
def test_files_of_pytorch_are_read_under_any_ending(tmp_path, name, ending):
    path = str(tmp_path / f'weights{ending}')
    shutil.copy(TORCH / name, path)
    state = weight_files.read(path)
    with np.load(TORCH / 'expected.npz') as expected:
        assert state.keys() == set(expected.files) and len(state) == 12
        for key in state:
            assert state[key].dtype == expected[key].dtype
            np.testing.assert_array_equal(state[key], expected[key], err_msg=key)


def test_pytorch_is_not_imported():
    """And without Paddle, but for the logger."""
    code = ('import sys; sys.modules["torch"] = None; from model import weight_files; '
            'print(len(weight_files.read(sys.argv[1])))')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code, TORCH / 'zip.pth'],
        capture_output=True,
        text=True,
        cwd=ref.FIXTURES.parent.parent,
        timeout=60,
    )
    assert done.stdout == '12\n', done.stderr


def test_state_dict_of_a_pytorch_module_is_read():
    state = weight_files.read(str(TORCH / 'module.pth'))
    assert {key: array.shape for key, array in state.items()} == {
        'conv.weight': (2, 1, 1, 1),
        'conv.bias': (2,),
        'bn.weight': (2,),
        'bn.bias': (2,),
        'bn.running_mean': (2,),
        'bn.running_var': (2,),
        'bn.num_batches_tracked': (),
    }
    np.testing.assert_array_equal(state['bn.running_var'], [1, 1])


@pytest.mark.parametrize('kind', WRITERS)
def test_files_of_the_test_writer_are_read(tmp_path, kind):
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
    'plain': np.arange(6, dtype='f4').reshape(2, 3),
    'transposed': np.arange(24, dtype='f4').reshape(2, 3, 4).T,
    'axes exchanged': np.arange(24, dtype='f4').reshape(2, 3, 4).transpose(0, 2, 1),
    'steps': np.arange(9, dtype='i8')[::2],
    'empty': np.zeros((0, 3), 'f4'),
    'no axes': np.array(2.5),
    'scalar': np.float64(2.5),
    'big-endian': np.arange(3, dtype='>f8'),
    'bool': np.array([True, False]),
    'half': np.arange(3, dtype='f2'),
    'bytes': np.arange(200, dtype='u1'),
    'large': np.arange(5000, dtype='f4').reshape(50, 100),
}


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_every_kind_of_array_is_read_in_every_protocol(tmp_path, protocol):
    path = tmp_path / 'file'
    path.write_bytes(pickle.dumps({f'stem.{key}': value for key, value in ARRAYS.items()}, protocol))
    for read in (weight_files.read, weight_files.read_pickle):
        state = read(str(path))
        assert [*state] == [f'stem.{key}' for key in ARRAYS]
        for value, expected in zip(state.values(), ARRAYS.values()):
            assert value.dtype == expected.dtype.newbyteorder('=') and value.shape == expected.shape
            np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_nested_tensors_of_paddle_are_read(tmp_path, protocol):
    """paddle.save writes a tensor below another dictionary as a tuple (name, array)."""
    path, layer = str(tmp_path / 'file'), paddle.nn.Linear(30, 40)
    optimizer = paddle.optimizer.AdamW(parameters=layer.parameters())
    layer(paddle.ones([1, 30])).sum().backward()
    optimizer.step()
    expected = {key: value.numpy() for key, value in layer.state_dict().items()}
    half = {key: value.astype('bfloat16') for key, value in layer.state_dict().items()}
    paddle.save(
        {
            'model': {f'stem.{key}': value for key, value in layer.state_dict().items()},
            'epoch': 3,
            'model_ema': {f'stem.{key}': value for key, value in half.items()},
            'optimizer': optimizer.state_dict(),
            'lr_scheduler': {'last_lr': 0.1},
        },
        path,
        protocol=protocol,
    )
    state, averaged = weight_files.read(path), weight_files.read(path, ema=True)
    for key, value in expected.items():
        np.testing.assert_array_equal(state[f'stem.{key}'], value)
        np.testing.assert_array_equal(averaged[f'stem.{key}'], half[key].astype('float32').numpy())


def test_optimizer_files_of_paddle_are_read(tmp_path):
    """Nobody needs them here; they are what lies beside weights of paddle.save."""
    layer = paddle.nn.Linear(30, 40)
    optimizer = paddle.optimizer.Momentum(
        paddle.optimizer.lr.StepDecay(0.1, 3), parameters=layer.parameters()
    )
    layer(paddle.ones([1, 30])).sum().backward()
    optimizer.step()
    paddle.save(optimizer.state_dict(), str(tmp_path / 'a.pdopt'))
    state, expected = weight_files.read_pickle(str(tmp_path / 'a.pdopt')), optimizer.state_dict()
    assert state['LR_Scheduler'] == expected['LR_Scheduler']
    assert all(
        (state[key] == value.numpy()).all() for key, value in expected.items() if key != 'LR_Scheduler'
    )


class StaticTensor:
    """Pickled as paddle.save writes a tensor of a static program."""

    def __reduce__(self):
        return eval, ('data', {'data': NUMBERS})


def test_tensors_of_static_programs_are_read(tmp_path):
    (tmp_path / 'file').write_bytes(pickle.dumps({'model': {'stem.a': StaticTensor()}}))
    np.testing.assert_array_equal(weight_files.read(str(tmp_path / 'file'))['stem.a'], NUMBERS)


# ---- other trainers' files

def save_state(path, keys, **beside):
    path.write_bytes(pickle.dumps({**{key: NUMBERS for key in keys}, **beside}))
    return str(path)


@pytest.mark.parametrize(
    'prefix',
    [
        'module.',
        '_orig_mod.',
        '_orig_mod.module.',
        'module.module.',
        'model.',
        'timm_model.',
        'model.backbone.',
        'net.',
        'student.encoder.',
    ],
)
def test_common_prefix_of_all_keys_is_removed(tmp_path, prefix, caplog):
    path = save_state(tmp_path / 'file', [f'{prefix}stem.conv.weight', f'{prefix}head.fc.bias'], epoch=3)
    with caplog.at_level('INFO'):
        assert [*weight_files.read(path)] == ['stem.conv.weight', 'head.fc.bias']
    assert f'{path}: all keys begin with {prefix}, which is taken off' in caplog.text


@pytest.mark.parametrize(
    'keys',
    [
        ['stem.conv.weight', 'head.fc.bias'],
        ['model.stem.conv.weight', 'head.fc.bias'],
        ['stages.0.head.fc.weight'],
        ['a.b', 'a.c'],
        ['head.fc.weight'],
    ],
)
def test_keys_without_a_common_prefix_are_unchanged(tmp_path, keys):
    assert [*weight_files.read(save_state(tmp_path / 'file', keys))] == keys


def test_averaged_model_of_torchvision_is_read(tmp_path):
    averaged = {'n_averaged': tensor(shape=(), strides=()), 'module.stem.a': tensor()}
    path = write_zip(tmp_path / 'file', {'model': {'stem.a': tensor()}, 'model_ema': averaged})
    assert [*weight_files.read(path, ema=True)] == [*weight_files.read(path)] == ['stem.a']


FOREIGN = {
    'type of PyTorch': Named('torch', 'float32'),
    'path': pathlib.PurePosixPath('/a'),
    'defaultdict': defaultdict(list, {'a': [1]}),
    'scalar of numpy': np.float32(3),
    'text array': np.array(['a']),
    'set': {1, 2},
    'frozenset': frozenset([(1, 2)]),
    'options': argparse.Namespace(lr=0.1),
    'class': Named('timm.models.byobnet', 'ByobNet'),
    'tuple as key': {(1, 2): 3},
    'ordered': OrderedDict(a=1),
    'counter': Counter('aab'),
    'deque': deque([1, 2]),
    'date': datetime.date(2021, 3, 23),
    'complex': 1j,
    'range': range(3),
    'number': 2**70,
    'bytes': b'a',
    'none': None,
}


@pytest.mark.parametrize('kind', FOREIGN)
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_other_objects_beside_the_weights_are_ignored(tmp_path, kind, protocol):
    """Both beside a state dict and among its entries, where the names of weights have a dot."""
    path, buffer = tmp_path / 'file', io.BytesIO()
    for content in (
        {'state_dict': {'stem.a': NUMBERS}, 'other': FOREIGN[kind]},
        {'stem.a': NUMBERS, 'other': FOREIGN[kind]},
    ):
        buffer.seek(0)
        Writer(buffer, protocol).dump(content)
        path.write_bytes(buffer.getvalue())
        state = weight_files.read(str(path))
        assert [key for key in state if key != 'other'] == ['stem.a'] and state[
            'stem.a'
        ].tolist() == NUMBERS.tolist()


def test_weight_that_is_no_array_is_refused(tmp_path):
    path = save_state(tmp_path / 'file', ['stem.a'], **{'stem.b': pathlib.PurePosixPath('/a')})
    with pytest.raises(ValueError, match=f'^{path}: .*stem.b is no array of numbers: it contains pathlib'):
        weight_files.read(path)


def test_arrays_over_the_limit_are_refused(tmp_path):
    path = save_state(tmp_path / 'file', ['stem.a'])
    assert weight_files.read(path, limit=NUMBERS.nbytes)['stem.a'].shape == NUMBERS.shape
    with pytest.raises(
        ValueError, match=f'^{path}: .*stem.a: its arrays take more than 0 MB, too much for the model'
    ):
        weight_files.read(path, limit=NUMBERS.nbytes - 1)


# ---- weights or their moving average

CHECKPOINTS = {
    "timm's": {
        'epoch': 1,
        'state_dict': {'a': 1, 'b': 2},
        'state_dict_ema': {'a': 3, 'b': 4},
        'args': argparse.Namespace(lr=1),
    },
    "PaddleViT's": {
        'epoch': 1,
        'model': {'a': 1, 'b': 2},
        'model_ema': {'a': 3, 'b': 4},
        'optimizer': {'LR_Scheduler': {}},
    },
    'ours': {
        'model': {'a': 1, 'b': 4},
        'ema': {'a': 3},
        'optimizer': {'a|moment1_0': 7},
        'progress': {'best': {'val': [1, 2]}},
    },
    'prefixed': {
        'state_dict': {'module.a': 1, 'module.b': 2},
        'state_dict_ema': {'module.a': 3, 'module.b': 4},
    },
}


def as_arrays(value):
    if isinstance(value, dict):
        return {key: as_arrays(item) for key, item in value.items()}
    return np.full(2, value, 'float32') if isinstance(value, int) else value


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_raw_or_averaged_weights_of_a_checkpoint_are_read(tmp_path, name, caplog):
    path = tmp_path / 'checkpoint'
    path.write_bytes(pickle.dumps(as_arrays(CHECKPOINTS[name]), protocol=2))
    with caplog.at_level('INFO'):
        raw = weight_files.read(str(path))
        assert 'moving average' in caplog.text and 'taking the weights' in caplog.text
    averaged = weight_files.read(str(path), ema=True)
    assert {key: array.tolist() for key, array in averaged.items()} == {'a': [3, 3], 'b': [4, 4]}
    assert {key: array.tolist() for key, array in raw.items()} == {
        'a': [1, 1],
        'b': [4, 4] if name == 'ours' else [2, 2],
    }


def test_timm_checkpoint_written_by_pytorch_is_read(caplog):
    path = str(TORCH / 'timm_checkpoint.pth.tar')
    assert weight_files.read(path)['a.weight'].tolist() == [1, 2]
    assert weight_files.read(path, ema=True)['a.weight'].tolist() == [3, 4]


@pytest.mark.parametrize('content', [{'a': 1}, {'model': {'a': 1}}, {'model': {'a': 1}, 'ema': {}}])
def test_missing_average_is_refused(tmp_path, content, caplog):
    path = tmp_path / 'file'
    path.write_bytes(pickle.dumps(as_arrays(content)))
    with caplog.at_level('INFO'):
        assert weight_files.read(str(path))['a'].tolist() == [1, 1] and not caplog.text
    with pytest.raises(ValueError, match=f'^{path}: .*no moving average'):
        weight_files.read(str(path), ema=True)
