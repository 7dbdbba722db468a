"""Weights under other names, strict loading, safe reading."""
import os
import pickle
import warnings

import numpy as np
import paddle
import pytest
import reference as ref
from tiny_models import assert_holds, build_tiny, other_arrays, paddlevit_name

from config import get_config
from halonet import build_halonet
from model import weights

TABLE = 'StructuredToParameterName@@'       # an entry that paddle.save adds


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
def test_paddlevit_keys_are_renamed(key, expected):
    assert weights.rename(key) == expected


@pytest.mark.parametrize('name', ['halonet_26t_256', 'halonet_50ts_256'])
def test_paddlevit_files_fit_the_model_one_to_one(name, request):
    model = build_halonet(get_config(request.config.rootpath / f'configs/{name}.yaml'))
    published = ref.paddlevit_keys(name)
    renamed = {weights.rename(key): shape for key, shape in published.items()}
    assert len(renamed) == len(published)
    assert renamed == {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert published.keys() == {paddlevit_name(key) for key in renamed}
    assert all(weights.rename(key) == key for key in renamed)


def test_set_state_dict_takes_a_paddlevit_file(tmp_path, request):
    model = build_halonet(get_config(request.config.rootpath / 'configs/halonet_26t_256.yaml'))
    rng = np.random.default_rng(0)
    file = {
        key: rng.standard_normal(shape, 'float32')
        for key, shape in ref.paddlevit_keys('halonet_26t_256').items()
    }
    paddle.save(
        {key: paddle.to_tensor(array) for key, array in file.items()}, str(tmp_path / 'halonet.pdparams')
    )

    assert model.set_state_dict(paddle.load(str(tmp_path / 'halonet.pdparams'))) == ([], [])
    assert_holds(model, {key: file[paddlevit_name(key)] for key in model.state_dict()})


# ---- timm's files

def from_timm(key, array):
    """timm's entry under our key and layout, computed independently: only the classifier is linear."""
    key = key.replace('running_mean', '_mean').replace('running_var', '_variance')
    return key, array.T if key == 'head.fc.weight' else array


@pytest.mark.parametrize('key, expected', [
    ('stem.conv1.bn.running_mean', 'stem.conv1.bn._mean'),
    ('stages.3.0.post_attn.running_var', 'stages.3.0.post_attn._variance'),
    ('stages.0.0.attn.fc1.bias', 'stages.0.0.attn.fc1.bias'),
    ('running_mean_like.weight', 'running_mean_like.weight'),
])
def test_timm_keys_are_renamed(key, expected):
    assert weights.rename(key) == expected
    assert weights.rename(expected, weights.TO_TIMM) == key


@pytest.mark.parametrize('name', ref.TIMM_NAMES)
def test_timm_keys_round_trip(name):
    """For the whole family: nothing is lost, only the classifier is transposed."""
    timm = {key: np.zeros(shape, 'float32') for key, shape in ref.timm_keys(name).items()}
    counters = {
        key.replace('running_mean', 'num_batches_tracked'): np.array(3)
        for key in timm
        if key.endswith('running_mean')
    }
    ours = weights.to_ours({**timm, **counters})
    assert {key: array.shape for key, array in ours.items()} == {
        key: array.shape for key, array in (from_timm(*item) for item in timm.items())}
    assert counters and not any('running' in key or 'num_batches' in key for key in ours)
    assert {key: array.shape for key, array in weights.to_timm(ours).items()} == {
        k: a.shape for k, a in timm.items()
    }
    assert weights.to_ours(ours).keys() == ours.keys()
    assert [key for key, array in timm.items() if array.ndim == 2 and not key.endswith('_rel')] == [
        'head.fc.weight'
    ]


def test_square_classifier_is_transposed_only_from_timm():
    """Where the shape does not tell."""
    square = np.arange(9.0).reshape(3, 3)
    timm = {'head.fc.weight': square, 'stem.conv1.bn.running_mean': np.zeros(3)}
    paddle_s = {'head.fc.weight': square, 'stem.conv1.bn._mean': np.zeros(3)}
    np.testing.assert_array_equal(weights.to_ours(timm)['head.fc.weight'], square.T)
    np.testing.assert_array_equal(weights.to_ours(paddle_s)['head.fc.weight'], square)


def test_two_entries_for_one_parameter_are_refused():
    with pytest.raises(ValueError, match=r'several entries stand for head\.fc\.bias$'):
        weights.to_ours({'head.fc.bias': np.zeros(3), 'classifier.1.bias': np.zeros(3), 'a': np.zeros(2)})


def test_set_state_dict_takes_timm_keys():
    model = build_tiny()
    file = other_arrays(model)
    model.set_state_dict(weights.to_timm(file))
    assert_holds(model, file)
    model.set_state_dict(
        {key: paddle.to_tensor(np.ascontiguousarray(array)) for key, array in weights.to_timm(file).items()}
    )
    assert_holds(model, file)


# ---- strictness

def test_load_strictly_translates_no_keys():
    model = build_tiny()
    state = other_arrays(model)
    weights.load_strictly(model, state)
    assert_holds(model, state)
    with pytest.raises(ValueError, match=r'missing .*\n  unexpected \(\d+\): stem'):
        weights.load_strictly(model, weights.to_timm(state))


def test_load_pretrained_translates_keys_once(tmp_path, monkeypatch):
    model, path, calls = build_tiny(), str(tmp_path / 'a.pdparams'), []
    paddle.save(model.state_dict(), path)
    to_ours = weights.to_ours
    monkeypatch.setattr(weights, 'to_ours', lambda state: calls.append(1) or to_ours(state))
    weights.load_pretrained(model, path)
    assert calls == [1]


def without(key):
    return lambda state: state.pop(key)


CHANGES = {
    'missing': (without('head.fc.bias'), [r'missing \(1\): head\.fc\.bias$']),
    'unexpected': (lambda state: state.update(extra=np.zeros(3)), [r'unexpected \(1\): extra$']),
    'misshapen': (
        lambda state: state.update({'head.fc.bias': np.zeros(7)}),
        [r'other shape \(1\): head\.fc\.bias: \[7\] in the file, \[10\] in the model$'],
    ),
    'transposed': (
        lambda state: state.update({'head.fc.weight': state['head.fc.weight'].T}),
        [r'head\.fc\.weight: \[10, 32\] in the file, \[32, 10\] in the model'],
    ),
    'misnamed': (
        lambda state: state.update(fc=state.pop('head.fc.bias')),
        [r'missing \(1\): head\.fc\.bias\n', r'unexpected \(1\): fc$'],
    ),
    'empty': (lambda state: state.clear(), [r'missing \(\d\d+\): .*stem\.conv1\.conv\.weight']),
    'nested': (
        lambda state: (
            state.update(model=dict(state)),
            [state.pop(key) for key in list(state) if key != 'model'],
        ),
        [r'unexpected \(1\): model$', r'missing \(\d\d+\)'],
    ),
}


@pytest.mark.parametrize('change, messages', CHANGES.values(), ids=CHANGES)
def test_misfit_is_refused_and_loads_nothing(change, messages):
    model = build_tiny()
    before, state = ref.arrays(model), other_arrays(model)
    change(state)
    for message in messages:
        with pytest.raises(ValueError, match=r'(?ms)nothing was loaded.*' + message):
            model.set_state_dict(state)
    assert_holds(model, before)


def test_long_lists_of_keys_are_shortened():
    model = build_tiny()
    with pytest.raises(ValueError, match=r', \.\.\.$') as error:
        model.set_state_dict({})
    assert len(str(error.value)) < 2000 and f'({len(model.state_dict())})' in str(error.value)


@pytest.mark.filterwarnings('ignore:Skip loading')                     # Paddle names what is left as it was
def test_partial_loads_only_fitting_entries():
    model = build_tiny()
    before, state = ref.arrays(model), other_arrays(model)
    file = dict(
        state, extra=np.zeros(3), **{'head.fc.weight': np.zeros((32, 7)), 'head.fc.bias': np.zeros(7)}
    )
    del file['stem.conv1.conv.weight']
    missing, unexpected = model.set_state_dict(file, partial=True)
    unset = ['head.fc.bias', 'head.fc.weight', 'stem.conv1.conv.weight']
    assert (sorted(missing), unexpected) == (unset, ['extra'])
    assert_holds(model, {key: before[key] if key in unset else state[key] for key in before})


@pytest.mark.parametrize('method', ['set_state_dict', 'set_dict', 'load_dict'])
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_other_dtypes_are_cast(method, dtype):
    model = build_tiny()
    state = {key: array.astype(dtype) for key, array in other_arrays(model).items()}
    getattr(model, method)(state)
    assert all(tensor.dtype == paddle.float32 for tensor in model.state_dict().values())
    assert_holds(model, {key: array.astype('float32') for key, array in state.items()})
    tensors = {key: paddle.to_tensor(array) + 1 for key, array in state.items()}
    getattr(model, method)(tensors)
    assert_holds(model, {key: tensor.numpy().astype('float32') for key, tensor in tensors.items()})


def test_bfloat16_model_gets_the_nearest_numbers():
    model = build_tiny()
    state = other_arrays(model)
    model.to(dtype='bfloat16')
    model.set_state_dict(state)
    for key, tensor in model.state_dict().items():
        if tensor.dtype == paddle.bfloat16:
            assert np.allclose(tensor.astype('float32').numpy(), state[key], rtol=2 ** -8, atol=0), key
    assert tensor.dtype == paddle.bfloat16
    with pytest.raises(
        ValueError, match='head.fc.bias holds numbers that are not finite, or too large for bfloat16'
    ):
        model.set_state_dict({**state, 'head.fc.bias': np.full_like(state['head.fc.bias'], np.nan)})


# ---- files

def test_saved_model_is_loaded_unchanged(tmp_path):
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
    assert {key: array.tolist() for key, array in weights.read(path).items()} == {
        k: a.tolist() for k, a in expected.items()
    }


def test_reads_bfloat16(tmp_path):
    path = str(tmp_path / 'model.pdparams')
    halves = {
        key: tensor.astype('bfloat16') for key, tensor in ref.fill_seeded(build_tiny()).state_dict().items()
    }
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


@pytest.mark.parametrize(
    'hide', [lambda x: x, lambda x: {'stem.conv1.conv.weight': x}, lambda x: [{'a': (1, {'b': x})}]]
)
def test_pickled_call_is_refused_and_not_run(tmp_path, hide):
    path, trace = tmp_path / 'evil.pdparams', tmp_path / 'trace'
    path.write_bytes(pickle.dumps(hide(Runs(trace)), protocol=4))
    with pytest.raises(ValueError, match=rf'{path}.*it contains \w+\.system'):
        weights.read(str(path))
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()                           # the trap works


def test_functions_are_refused_by_their_full_name(tmp_path):
    """numpy.ndarray is allowed, what can be reached through it or lies beside it is not."""
    for name in (
        'numpy.ndarray.tofile',
        'numpy.load',
        'numpy._core.multiarray.fromfile',
        'builtins.eval',
        'builtins.getattr',
    ):
        module, _, attribute = (
            name.partition('.') if name.startswith('numpy.ndarray') else name.rpartition('.')
        )
        path = tmp_path / 'evil.pdparams'
        short = b''.join(b'\x8c' + bytes([len(text)]) + text.encode() for text in (module, attribute))
        path.write_bytes(b'\x80\x04' + short + b'\x93.')
        with pytest.raises(ValueError, match='it contains ' + name.replace('.', r'\.')):
            weights.read(str(path))


def damage(path, kind):
    whole = path.read_bytes()
    path.write_bytes(
        {
            'truncated': whole[: len(whole) // 2],
            'cut at its end': whole[:-1],
            'empty': b'',
            'text': b'version https://git-lfs.github.com/spec/v1\n',
            'page': b'<!DOCTYPE html>',
            'zeros': bytes(999),
            'list': pickle.dumps([1, 2]),
            'numbers': pickle.dumps({'a': 1}),
            'no entries': pickle.dumps({}),
            'nested': pickle.dumps({'weights': {'a': np.zeros(3)}}),
            'texts': pickle.dumps({'a': np.array(['b'])}),
        }[kind]
    )


@pytest.mark.parametrize('kind', ['truncated', 'cut at its end', 'empty', 'text', 'page', 'zeros',
                                  'list', 'numbers', 'no entries', 'nested', 'texts'])
@pytest.mark.parametrize(
    'load', [weights.read, lambda path: weights.load_pretrained(build_tiny(), path)], ids=['read', 'load']
)
def test_damaged_file_is_named(tmp_path, kind, load):
    path = tmp_path / 'model.pdparams'
    paddle.save(build_tiny().state_dict(), str(path))
    damage(path, kind)
    with pytest.raises(ValueError, match=f'^{path}: .*(not a readable weight file: .|expected a state dict)'):
        load(str(path))


def test_load_pretrained_names_the_file_in_errors(tmp_path):
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


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e300, 1j])
def test_non_finite_numbers_are_refused_with_their_key(value):
    layer = build_tiny()
    before = {key: tensor.numpy() for key, tensor in layer.state_dict().items()}
    state = {**before, 'head.fc.bias': np.full(before['head.fc.bias'].shape, value)}
    with pytest.raises(ValueError, match='head.fc.bias holds .*nothing was loaded'):
        layer.set_state_dict(state)
    assert all((tensor.numpy() == before[key]).all() for key, tensor in layer.state_dict().items())


def test_partial_load_takes_lists_without_a_warning():
    layer = build_tiny()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        missing, unexpected = layer.set_state_dict(
            {'head.fc.bias': [0.5] * len(layer.head.fc.bias), 'x': [1.0]}, partial=True
        )
    assert unexpected == ['x'] and 'head.fc.bias' not in missing and (layer.head.fc.bias.numpy() == 0.5).all()
