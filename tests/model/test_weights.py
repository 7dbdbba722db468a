"""Weight files: PaddleViT's names, strict loading, safe reading."""
import os
import pickle
import warnings

import numpy as np
import paddle
import pytest
import reference as ref

from config import get_config
from halonet import build_halonet
from model import weights

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


# ---- timm's files

def from_timm(key, array):
    """timm's entry under our key and layout, written down independently: the classifier alone is a linear layer."""
    key = key.replace('running_mean', '_mean').replace('running_var', '_variance')
    return key, array.T if key == 'head.fc.weight' else array


@pytest.mark.parametrize('key, expected', [
    ('stem.conv1.bn.running_mean', 'stem.conv1.bn._mean'),
    ('stages.3.0.post_attn.running_var', 'stages.3.0.post_attn._variance'),
    ('stages.0.0.attn.fc1.bias', 'stages.0.0.attn.fc1.bias'),
    ('running_mean_like.weight', 'running_mean_like.weight'),
])
def test_rename_of_timm(key, expected):
    assert weights.rename(key) == expected
    assert weights.rename(expected, weights.TO_TIMM) == key


@pytest.mark.parametrize('name', ref.TIMM_NAMES)
def test_timm_s_keys_translate_there_and_back(name):
    """For the whole family: nothing is lost, only the classifier is transposed."""
    timm = {key: np.zeros(shape, 'float32') for key, shape in ref.timm_keys(name).items()}
    counters = {key.replace('running_mean', 'num_batches_tracked'): np.array(3) for key in timm if key.endswith('running_mean')}
    ours = weights.to_ours({**timm, **counters})
    assert {key: array.shape for key, array in ours.items()} == {
        key: array.shape for key, array in (from_timm(*item) for item in timm.items())}
    assert counters and not any('running' in key or 'num_batches' in key for key in ours)
    assert {key: array.shape for key, array in weights.to_timm(ours).items()} == {k: a.shape for k, a in timm.items()}
    assert weights.to_ours(ours).keys() == ours.keys()
    assert [key for key, array in timm.items() if array.ndim == 2 and not key.endswith('_rel')] == ['head.fc.weight']


def test_square_classifiers_are_transposed_by_their_origin():
    """Where the shape does not tell."""
    square = np.arange(9.0).reshape(3, 3)
    timm = {'head.fc.weight': square, 'stem.conv1.bn.running_mean': np.zeros(3)}
    paddle_s = {'head.fc.weight': square, 'stem.conv1.bn._mean': np.zeros(3)}
    np.testing.assert_array_equal(weights.to_ours(timm)['head.fc.weight'], square.T)
    np.testing.assert_array_equal(weights.to_ours(paddle_s)['head.fc.weight'], square)


def test_two_entries_for_one_parameter_are_an_error():
    with pytest.raises(ValueError, match=r'several entries stand for head\.fc\.bias$'):
        weights.to_ours({'head.fc.bias': np.zeros(3), 'classifier.1.bias': np.zeros(3), 'a': np.zeros(2)})


def test_set_state_dict_takes_timm_s_names():
    model = build_tiny()
    file = other_arrays(model)
    model.set_state_dict(weights.to_timm(file))
    assert_holds(model, file)
    model.set_state_dict({key: paddle.to_tensor(np.ascontiguousarray(array)) for key, array in weights.to_timm(file).items()})
    assert_holds(model, file)


# ---- fine-tuning

def hat(rows, new_rows):
    """Linear interpolation of a table as a matrix (new_rows, rows), from distances alone."""
    w, new_w = (rows + 1) // 2, (new_rows + 1) // 2
    old_offsets = np.arange(1 - w, w)
    at = np.arange(1 - new_w, new_w) * (w - 1) / (new_w - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - old_offsets))


@pytest.mark.parametrize('w, new_w', [(12, 14), (14, 12), (12, 23), (5, 4), (8, 12), (14, 14)])
def test_position_tables_are_stretched_about_offset_0(w, new_w):
    table = np.random.default_rng(0).normal(size=(2 * w - 1, 3)).astype('float32')
    stretched = weights.stretch_table(table, 2 * new_w - 1)
    assert stretched.dtype == np.float32
    np.testing.assert_allclose(stretched, hat(2 * w - 1, 2 * new_w - 1) @ table, atol=1e-6)
    np.testing.assert_array_equal(stretched[[0, new_w - 1, -1]], table[[0, w - 1, -1]])       # the ends and offset 0
    np.testing.assert_allclose(weights.stretch_table(table[::-1], 2 * new_w - 1), stretched[::-1], atol=1e-6)
    if new_w == 2 * w - 1:                          # every second row is an old one
        np.testing.assert_array_equal(stretched[::2], table)


def saved(model, path):
    paddle.save(model.state_dict(), str(path))
    return str(path)


def test_another_number_of_classes_gets_a_fresh_head(tmp_path, caplog):
    path = saved(ref.fill_seeded(build_tiny()), tmp_path / 'ten.pdparams')
    model = build_halonet(get_config(None, [*ref.TINY, 'MODEL.NUM_CLASSES', 3]))
    before = ref.arrays(model)
    with pytest.raises(ValueError, match=r'head\.fc\.weight: \[32, 10\] in the file, \[32, 3\] in the model'):
        weights.load_pretrained(model, path)
    assert_holds(model, before)
    with caplog.at_level('INFO'):
        weights.load_pretrained(model, path, fine_tune=True)
    assert caplog.messages == ['fresh head for 3 classes: the weights have one for 10']
    assert_holds(model, {key: before[key] if key.startswith('head.fc.') else array for key, array in weights.read(path).items()})


@pytest.mark.parametrize('drop', [['head.fc.weight', 'head.fc.bias'], ['head.fc.weight'], ['head.fc.bias']])
def test_weights_without_a_head(tmp_path, caplog, drop):
    """A whole head may be missing; half a one is damage."""
    state = {key: array for key, array in other_arrays(build_tiny()).items() if key not in drop}
    paddle.save(state, str(tmp_path / 'features.pdparams'))
    model = build_tiny()
    if len(drop) == 1:
        with pytest.raises(ValueError, match=rf'missing \(1\): {drop[0]}'):
            weights.load_pretrained(model, str(tmp_path / 'features'), fine_tune=True)
        return
    before = ref.arrays(model)
    with caplog.at_level('INFO'):
        weights.load_pretrained(model, str(tmp_path / 'features'), fine_tune=True)
    assert caplog.messages == ['fresh head for 10 classes: the weights have none']
    assert_holds(model, {**state, **{key: before[key] for key in drop}})


@pytest.mark.parametrize('change', [['MODEL.HALO_SIZE', 2], ['MODEL.BLOCK_SIZE', 8], ['MODEL.BLOCK_SIZE', 2]])
def test_another_window_gets_stretched_tables(tmp_path, caplog, change):
    path = saved(ref.fill_seeded(build_tiny()), tmp_path / 'a.pdparams')
    model, file = build_halonet(get_config(None, [*ref.TINY, *change])), weights.read(path)
    with pytest.raises(ValueError, match='other shape'):
        weights.load_pretrained(model, path)
    with caplog.at_level('INFO'):
        weights.load_pretrained(model, path, fine_tune=True)
    w = len(model.state_dict()['stages.1.0.self_attn.pos_embed.height_rel']) // 2 + 1
    assert sorted(caplog.messages) == [f'stages.1.{block}.self_attn.pos_embed.{side}_rel: interpolated from a window of 6 pixels '
                                       f'to one of {w}' for block in (0, 1) for side in ('height', 'width')]
    for key, array in ref.arrays(model).items():
        np.testing.assert_allclose(array, hat(11, 2 * w - 1) @ file[key] if key.endswith('_rel') else file[key], atol=1e-6)


def test_what_fits_is_carried_over_exactly_and_in_silence(tmp_path, caplog):
    path, model = saved(ref.fill_seeded(build_tiny()), tmp_path / 'a.pdparams'), build_tiny()
    with caplog.at_level('INFO'):
        weights.load_pretrained(model, path, fine_tune=True)
    assert_holds(model, weights.read(path))
    assert not caplog.messages


@pytest.mark.parametrize('change, message', [
    (['MODEL.HEADS', [0, 4]], r'height_rel: \[11, 4\] in the file, \[11, 2\] in the model'),
    (['MODEL.WIDTHS', [16, 64]], r'other shape \(42\): stages'),
    (['MODEL.WIDTHS', [16, 64], 'MODEL.NUM_CLASSES', 3], r'other shape \(43\): stages'),
])
def test_fine_tuning_adapts_nothing_else(tmp_path, change, message):
    path, model = saved(build_tiny(), tmp_path / 'a.pdparams'), build_halonet(get_config(None, [*ref.TINY, *change]))
    before = ref.arrays(model)
    with pytest.raises(ValueError, match=f'(?s)^{path}: the weights do not fit.*{message}'):
        weights.load_pretrained(model, path, fine_tune=True)
    assert_holds(model, before)


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


def test_a_model_in_bfloat16_gets_the_nearest_numbers():
    model = build_tiny()
    state = other_arrays(model)
    model.to(dtype='bfloat16')
    model.set_state_dict(state)
    for key, tensor in model.state_dict().items():
        if tensor.dtype == paddle.bfloat16:
            assert np.allclose(tensor.astype('float32').numpy(), state[key], rtol=2 ** -8, atol=0), key
    assert tensor.dtype == paddle.bfloat16
    with pytest.raises(ValueError, match='head.fc.bias holds numbers that are not finite, or too large for bfloat16'):
        model.set_state_dict({**state, 'head.fc.bias': np.full_like(state['head.fc.bias'], np.nan)})


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


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e300, 1j])
def test_numbers_that_a_model_cannot_hold_are_refused_by_name(value):
    layer = build_tiny()
    before = {key: tensor.numpy() for key, tensor in layer.state_dict().items()}
    state = {**before, 'head.fc.bias': np.full(before['head.fc.bias'].shape, value)}
    with pytest.raises(ValueError, match='head.fc.bias holds .*nothing was loaded'):
        layer.set_state_dict(state)
    assert all((tensor.numpy() == before[key]).all() for key, tensor in layer.state_dict().items())


def test_a_partial_load_takes_lists_and_warns_of_nothing():
    layer = build_tiny()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        missing, unexpected = layer.set_state_dict({'head.fc.bias': [0.5] * len(layer.head.fc.bias), 'x': [1.0]}, partial=True)
    assert unexpected == ['x'] and 'head.fc.bias' not in missing and (layer.head.fc.bias.numpy() == 0.5).all()
