"""tools/port_weights.py: every format into ours, PaddleViT's and timm's, verified, or nothing at all."""
import pickle

from tools import port_weights

import numpy as np
import paddle
import pytest
import reference as ref
import yaml
from safetensors.numpy import load_file, save_file
from tiny_models import build_tiny, paddlevit_name

from config import get_config
from halonet import build_halonet
from model import weights
from training import checkpoint


@pytest.fixture(scope='module')
def state():
    return ref.arrays(ref.fill_seeded(build_tiny()))


@pytest.fixture
def cfg(tmp_path):
    path = tmp_path / 'tiny.yaml'
    pairs = zip(ref.TINY[::2], ref.TINY[1::2])
    path.write_text(yaml.safe_dump({'MODEL': {key.split('.')[1]: value for key, value in pairs}}))
    return str(path)


def timm_seeded(state):
    """The seeded weights as timm would hold them, from the rule itself."""
    def shape(key):
        return state[key].shape[::-1] if key == 'head.fc.weight' else state[key].shape
    return {ref.timm_key(key): ref.seeded_weight(ref.timm_key(key), shape(key)) for key in state}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


SOURCES = {
    'ours': lambda path, state: paddle.save({key: paddle.to_tensor(a) for key, a in state.items()}, path),
    "PaddleViT's": lambda path, state: paddle.save(
        {paddlevit_name(key): paddle.to_tensor(a) for key, a in state.items()}, path
    ),
    "timm's": lambda path, state: save_file(timm_seeded(state), path),
    'a checkpoint': lambda path, state: pickle.dump(
        {'model': state, 'ema': {}, 'progress': {'step': 3}}, open(path, 'wb')
    ),
}


@pytest.mark.parametrize('kind', SOURCES)
def test_every_source_is_converted_to_ours_and_timm(tmp_path, kind, state, cfg, capsys):
    source, ours, timm = (str(tmp_path / name) for name in ('source', 'ours.pdparams', 'timm.safetensors'))
    SOURCES[kind](source, state)
    ported([source, ours, '-cfg', cfg])
    ported([source, timm])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f'{ours}: {len(state)} arrays, ') and out[0].endswith(
        f'the model of {cfg} loads them'
    )
    assert_equal({key: tensor.numpy() for key, tensor in paddle.load(ours).items()}, state)
    assert_equal(load_file(timm), timm_seeded(state))
    model = build_halonet(get_config(cfg))
    model.set_state_dict(paddle.load(ours))
    assert_equal(ref.arrays(model), state)


def test_round_trip_gives_the_same_bytes(tmp_path, state):
    first, timm, back, again = (
        tmp_path / name for name in ('a.pdparams', 'b.safetensors', 'c.pdparams', 'd.safetensors')
    )
    checkpoint.save_weights(str(first), state)
    for source, target in ((first, timm), (timm, back), (back, again)):
        port_weights.port(str(source), str(target))
    assert_equal(weights.read(str(back)), state)
    assert timm.read_bytes() == again.read_bytes()


@pytest.mark.parametrize('name', ['halonet_26t_256', 'halonet_50ts_256'])
def test_paddlevit_file_round_trips_unchanged(tmp_path, name):
    """A file as PaddleViT published it, into ours and back, is the same: its keys, shapes and numbers."""
    published = {
        key: np.full(shape, n, 'float32') for n, (key, shape) in enumerate(ref.paddlevit_keys(name).items())
    }
    source, ours, back = (str(tmp_path / file) for file in ('a.pdparams', 'b.pdparams', 'c.pdparams'))
    with open(source, 'wb') as file:
        pickle.dump(published, file)
    port_weights.port(source, ours)
    port_weights.port(ours, back, to='paddlevit')
    assert not weights.read(ours).keys() & {'classifier.1.weight'}
    assert_equal({key: tensor.numpy() for key, tensor in paddle.load(back).items()}, published)


FOREIGN = {                                         # timm's model -> an entry that PaddleViT's cannot have
    'eca_halonext26ts': 'stages.0.0.attn.conv.weight', 'sehalonet33ts': 'stages.0.0.attn.fc1.weight',
    'haloregnetz_b': 'stem.conv.weight', 'halo2botnet50ts_256': 'stages.3.1.self_attn.qkv.weight',
    'lamhalobotnet50ts_256': 'stages.1.1.self_attn.qkv.weight',
}


@pytest.mark.parametrize('name', FOREIGN)
def test_models_without_paddlevit_names_are_refused(name):
    ours = weights.to_ours({key: np.zeros(shape, 'float32') for key, shape in ref.timm_keys(name).items()})
    with pytest.raises(ValueError, match=r'PaddleViT has no names for \d+ entries of this model \('
                       + FOREIGN[name].replace('.', r'\.')):
        weights.to_paddlevit(ours)


def test_safetensors_with_our_names(tmp_path, state):
    paddle.save(state, str(tmp_path / 'a.pdparams'))
    port_weights.port(str(tmp_path / 'a.pdparams'), str(tmp_path / 'b.safetensors'), to='paddle')
    assert_equal(load_file(tmp_path / 'b.safetensors'), state)


def test_ema_flag_chooses_the_average(tmp_path, state):
    ema = {key: array + 1 for key, array in state.items() if '_mean' not in key and '_variance' not in key}
    with open(tmp_path / 'c', 'wb') as file:
        pickle.dump({'model': state, 'ema': ema}, file)
    for flag, expected in ((False, state), (True, {**state, **ema})):
        port_weights.port(str(tmp_path / 'c'), str(tmp_path / f'{flag}.pdparams'), ema=flag)
        assert_equal(weights.read(str(tmp_path / f'{flag}.pdparams')), expected)


def port(argv):
    port_weights.parser().run(port_weights.main, [str(word) for word in argv])


def ported(argv):
    with pytest.raises(SystemExit) as stop:
        port(argv)
    assert stop.value.code == 0


def fails(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        port(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_mistakes_are_refused_and_write_nothing(tmp_path, state, cfg, capsys):
    source, target = tmp_path / 'a.pdparams', tmp_path / 'b.safetensors'
    paddle.save(state, str(source))
    other = tmp_path / 'other.yaml'
    other.write_text(f'BASE: {cfg}\nMODEL: {{NUM_CLASSES: 3}}')
    assert 'nowhere: no such file' in fails(['nowhere', target], capsys)
    for ending in ('.bin', '.pth'):
        message = (
            f'b{ending}: the ending must be .pdparams or .safetensors; timm and PyTorch read .safetensors'
        )
        assert message in fails([source, tmp_path / f'b{ending}'], capsys)
    for to, endings, ending in (
        ('timm', '.safetensors', '.pdparams'),
        ('paddlevit', '.pdparams', '.safetensors'),
    ):
        assert f'-to {to} writes {endings}, not {ending}' in fails(
            [source, f'{tmp_path}/b{ending}', '--to', to], capsys
        )
    assert 'holds no moving average' in fails([source, target, '--ema'], capsys)
    assert f'-cfg {other}: the weights do not fit' in fails([source, target, '--cfg', other], capsys)
    assert 'no such config file' in fails([source, target, '-cfg', 'none.yaml'], capsys)
    assert 'No such file' in fails([source, tmp_path / 'none' / 'b.safetensors'], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.pdparams', 'other.yaml', 'tiny.yaml']


def test_file_is_overwritten_only_with_force_and_as_a_whole(tmp_path, state, capsys, monkeypatch):
    source, target = tmp_path / 'a.pdparams', tmp_path / 'b.safetensors'
    paddle.save(state, str(source))
    target.write_bytes(b'precious')
    assert 'exists; -force overwrites it' in fails([source, target], capsys)
    monkeypatch.setitem(
        port_weights.NAMES, 'timm', lambda state: {**state, 'head.fc.bias': state['head.fc.bias'] + 1}
    )
    assert 'differs from the source in 1 entries: head.fc.bias' in fails([source, target, '--force'], capsys)
    assert target.read_bytes() == b'precious' and len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    ported([str(source), str(target), '--force'])
    assert_equal(weights.to_ours(weights.read(str(target))), state)


@pytest.mark.parametrize(
    'change', [{'a': np.float32([1, 3])}, {'a': np.float64([1, 2])}, {'a': np.float32([[1, 2]])}, {'b': 1}]
)
def test_compare_detects_every_difference(change):
    state = {'a': np.float32([1, np.nan])}
    port_weights.compare(state, {'a': state['a'].copy()})
    with pytest.raises(ValueError, match='differs from the source in 1 entries: [ab]'):
        port_weights.compare(state, {**state, **change})
