"""Weight files: PaddleViT's names, strict loading, safe reading."""
import os
import pickle

import numpy as np
import paddle
import pytest
import reference as ref

import weights
from config import get_config
from halonet import build_halonet

TABLE = 'StructuredToParameterName@@'       # an entry that paddle.save adds


def build_tiny():
    return build_halonet(get_config(None, ref.TINY))


def paddlevit_name(key):
    """A key of ours -> what PaddleViT calls it."""
    if key.startswith('stages.'):
        _, stage, block, rest = key.split('.', 3)
        key = f'stage{int(stage) + 1}.blocks.{block}.{rest}'
    for ours, theirs in (('.shortcut.', '.creat_shortcut.'), ('height_rel', 'rel_height'), ('width_rel', 'rel_width'),
                         ('.post_attn.', '.post_attn.bn.'), ('head.fc.', 'classifier.1.')):
        key = key.replace(ours, theirs)
    return key


def other_arrays(model):
    """Random arrays for everything in the state dict, unlike those in the model."""
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=array.shape).astype('float32') for key, array in ref.arrays(model).items()}


def assert_holds(model, expected):
    state = ref.arrays(model)
    assert state.keys() == expected.keys()
    for key in state:
        np.testing.assert_array_equal(state[key], expected[key], err_msg=key)


# ---- PaddleViT's files

@pytest.mark.parametrize('key, expected', [
    ('stem.conv1.bn._mean', 'stem.conv1.bn._mean'),
    ('stage1.blocks.0.creat_shortcut.conv.weight', 'stages.0.0.shortcut.conv.weight'),
    ('stage3.blocks.1.self_attn.pos_embed.rel_height', 'stages.2.1.self_attn.pos_embed.height_rel'),
    ('stage3.blocks.1.self_attn.pos_embed.rel_width', 'stages.2.1.self_attn.pos_embed.width_rel'),
    ('stage4.blocks.0.post_attn.bn._variance', 'stages.3.0.post_attn._variance'),
    ('stage2.blocks.10.conv2_kxk.conv.weight', 'stages.1.10.conv2_kxk.conv.weight'),
    ('classifier.1.bias', 'head.fc.bias'),
    ('stages.2.1.self_attn.pos_embed.height_rel', 'stages.2.1.self_attn.pos_embed.height_rel'),
    ('head.fc.weight', 'head.fc.weight'),
    ('mystage1.blocks.0', 'mystage1.blocks.0'),
])
def test_rename(key, expected):
    assert weights.rename(key) == expected


@pytest.mark.parametrize('name', ['halonet_26t_256', 'halonet_50ts_256'])
def test_paddlevit_files_fit_one_to_one(name, request):
    model = build_halonet(get_config(request.config.rootpath / f'configs/{name}.yaml'))
    published = ref.paddlevit_keys(name)
    renamed = {weights.rename(key): shape for key, shape in published.items()}
    assert len(renamed) == len(published)
    assert renamed == {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert published.keys() == {paddlevit_name(key) for key in renamed}
    assert all(weights.rename(key) == key for key in renamed)


def test_documented_use_with_a_paddlevit_file(tmp_path, request):
    model = build_halonet(get_config(request.config.rootpath / 'configs/halonet_26t_256.yaml'))
    rng = np.random.default_rng(0)
    file = {key: rng.standard_normal(shape, 'float32') for key, shape in ref.paddlevit_keys('halonet_26t_256').items()}
    paddle.save({key: paddle.to_tensor(array) for key, array in file.items()}, str(tmp_path / 'halonet.pdparams'))

    assert model.set_state_dict(paddle.load(str(tmp_path / 'halonet.pdparams'))) == ([], [])
    assert_holds(model, {key: file[paddlevit_name(key)] for key in model.state_dict()})


# ---- strictness

def without(key):
    return lambda state: state.pop(key)


CHANGES = {
    'missing': (without('head.fc.bias'), [r'missing \(1\): head\.fc\.bias$']),
    'unexpected': (lambda state: state.update(extra=np.zeros(3)), [r'unexpected \(1\): extra$']),
    'misshapen': (lambda state: state.update({'head.fc.bias': np.zeros(7)}),
                  [r'other shape \(1\): head\.fc\.bias: \[7\] in the file, \[10\] in the model$']),
    'transposed': (lambda state: state.update({'head.fc.weight': state['head.fc.weight'].T}),
                   [r'head\.fc\.weight: \[10, 32\] in the file, \[32, 10\] in the model']),
    'misnamed': (lambda state: state.update(fc=state.pop('head.fc.bias')),
                 [r'missing \(1\): head\.fc\.bias\n', r'unexpected \(1\): fc$']),
    'empty': (lambda state: state.clear(), [r'missing \(\d\d+\): .*stem\.conv1\.conv\.weight']),
    'nested': (lambda state: (state.update(model=dict(state)), [state.pop(key) for key in list(state) if key != 'model']),
               [r'unexpected \(1\): model$', r'missing \(\d\d+\)']),
}


@pytest.mark.parametrize('change, messages', CHANGES.values(), ids=CHANGES)
def test_misfit_loads_nothing(change, messages):
    model = build_tiny()
    before, state = ref.arrays(model), other_arrays(model)
    change(state)
    for message in messages:
        with pytest.raises(ValueError, match=r'(?ms)nothing was loaded.*' + message):
            model.set_state_dict(state)
    assert_holds(model, before)


def test_long_lists_of_keys_are_cut():
    model = build_tiny()
    with pytest.raises(ValueError, match=r', \.\.\.$') as error:
        model.set_state_dict({})
    assert len(str(error.value)) < 2000 and f'({len(model.state_dict())})' in str(error.value)


@pytest.mark.filterwarnings('ignore:Skip loading')                     # Paddle names what is left as it was
def test_partial_loads_what_fits():
    model = build_tiny()
    before, state = ref.arrays(model), other_arrays(model)
    file = dict(state, extra=np.zeros(3), **{'head.fc.weight': np.zeros((32, 7)), 'head.fc.bias': np.zeros(7)})
    del file['stem.conv1.conv.weight']
    missing, unexpected = model.set_state_dict(file, partial=True)
    unset = ['head.fc.bias', 'head.fc.weight', 'stem.conv1.conv.weight']
    assert (sorted(missing), unexpected) == (unset, ['extra'])
    assert_holds(model, {key: before[key] if key in unset else state[key] for key in before})


@pytest.mark.parametrize('method', ['set_state_dict', 'set_dict', 'load_dict'])
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_other_precisions_are_cast(method, dtype):
    model = build_tiny()
    state = {key: array.astype(dtype) for key, array in other_arrays(model).items()}
    getattr(model, method)(state)
    assert all(tensor.dtype == paddle.float32 for tensor in model.state_dict().values())
    assert_holds(model, {key: array.astype('float32') for key, array in state.items()})
    tensors = {key: paddle.to_tensor(array) + 1 for key, array in state.items()}
    getattr(model, method)(tensors)
    assert_holds(model, {key: tensor.numpy().astype('float32') for key, tensor in tensors.items()})


# ---- files

def test_own_files_round_trip(tmp_path):
    model, other, path = build_tiny(), build_tiny(), str(tmp_path / 'model.pdparams')
    ref.fill_seeded(model)
    paddle.save(model.state_dict(), path)
    read = weights.read(path)
    assert TABLE not in read and all(type(array) is np.ndarray for array in read.values())
    for load in (lambda: other.set_state_dict(read), lambda: other.set_state_dict(paddle.load(path)),
                 lambda: other.set_state_dict(paddle.load(path, keep_name_table=True)),
                 lambda: weights.load_pretrained(other, path)):
        other.set_state_dict({key: np.zeros_like(array) for key, array in read.items()})
        load()
        assert_holds(other, ref.arrays(model))


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_reads_every_protocol_of_paddle_save(tmp_path, protocol):
    model, path = build_tiny(), str(tmp_path / 'model.pdparams')
    paddle.save(model.state_dict(), path, protocol=protocol)
    expected = ref.arrays(model)
    assert {key: array.tolist() for key, array in weights.read(path).items()} == {k: a.tolist() for k, a in expected.items()}


def test_reads_bfloat16(tmp_path):
    path = str(tmp_path / 'model.pdparams')
    halves = {key: tensor.astype('bfloat16') for key, tensor in ref.fill_seeded(build_tiny()).state_dict().items()}
    expected = {key: tensor.astype('float32').numpy() for key, tensor in halves.items()}
    paddle.save(halves, path)
    for state in (halves, paddle.load(path), weights.read(path)):
        model = build_tiny()
        model.set_state_dict(state)
        assert_holds(model, expected)


class Runs:
    """A pickle of this creates the file `path` when a plain unpickler reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('hide', [lambda x: x, lambda x: {'stem.conv1.conv.weight': x}, lambda x: [{'a': (1, {'b': x})}]])
def test_reading_runs_nothing(tmp_path, hide):
    path, trace = tmp_path / 'evil.pdparams', tmp_path / 'trace'
    path.write_bytes(pickle.dumps(hide(Runs(trace)), protocol=4))
    with pytest.raises(ValueError, match=rf'{path}.*it contains \w+\.system'):
        weights.read(str(path))
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()                           # the trap works


def test_reading_refuses_by_the_whole_name(tmp_path):
    """numpy.ndarray is allowed, what can be reached through it or lies beside it is not."""
    for name in ('numpy.ndarray.tofile', 'numpy.load', 'numpy._core.multiarray.fromfile', 'builtins.eval', 'builtins.getattr'):
        module, _, attribute = name.partition('.') if name.startswith('numpy.ndarray') else name.rpartition('.')
        path = tmp_path / 'evil.pdparams'
        short = b''.join(b'\x8c' + bytes([len(text)]) + text.encode() for text in (module, attribute))
        path.write_bytes(b'\x80\x04' + short + b'\x93.')
        with pytest.raises(ValueError, match='it contains ' + name.replace('.', r'\.')):
            weights.read(str(path))


def spoilt(path, kind):
    whole = path.read_bytes()
    path.write_bytes({'truncated': whole[:len(whole) // 2], 'cut at its end': whole[:-1], 'empty': b'',
                      'text': b'version https://git-lfs.github.com/spec/v1\n', 'page': b'<!DOCTYPE html>', 'zeros': bytes(999),
                      'list': pickle.dumps([1, 2]), 'numbers': pickle.dumps({'a': 1}), 'no entries': pickle.dumps({}),
                      'nested': pickle.dumps({'weights': {'a': np.zeros(3)}}),
                      'texts': pickle.dumps({'a': np.array(['b'])})}[kind])


@pytest.mark.parametrize('kind', ['truncated', 'cut at its end', 'empty', 'text', 'page', 'zeros',
                                  'list', 'numbers', 'no entries', 'nested', 'texts'])
@pytest.mark.parametrize('load', [weights.read, lambda path: weights.load_pretrained(build_tiny(), path)], ids=['read', 'load'])
def test_a_spoilt_file_is_named(tmp_path, kind, load):
    path = tmp_path / 'model.pdparams'
    paddle.save(build_tiny().state_dict(), str(path))
    spoilt(path, kind)
    with pytest.raises(ValueError, match=f'^{path}: .*(not a readable weight file: .|expected a state dict)'):
        load(str(path))


def test_load_pretrained_names_the_file(tmp_path):
    model, path = build_tiny(), tmp_path / 'model.pdparams'
    with pytest.raises(FileNotFoundError, match=str(path)):
        weights.read(str(path))
    with pytest.raises(FileNotFoundError, match=str(path)):
        weights.load_pretrained(model, str(path))
    paddle.save({'head.fc.bias': paddle.zeros([10])}, str(path))
    with pytest.raises(ValueError, match=f'^{path}: .*\n  missing'):
        weights.load_pretrained(model, str(path))
    ref.fill_seeded(model)
    paddle.save(model.state_dict(), str(path))
    other = build_tiny()
    weights.load_pretrained(other, str(path.with_suffix('')))         # the ending may be left out
    assert_holds(other, ref.arrays(model))
