"""Config files: what overrides what, YAML and its types, names of files, files that a run writes."""

import sys

import pytest
import yaml

import config as module
from config import defaults, flatten, get_config, parse_args

DEFAULTS = defaults()


# ---- what overrides what

def test_file_overrides_its_base_and_opts_override_the_file(write):
    write('base.yaml', 'DATA: {BATCH_SIZE: 1, IMAGE_SIZE: 1, CROP_PCT: 0.5}')
    path = write('own.yaml', 'DATA: {IMAGE_SIZE: 2, CROP_PCT: 0.6}\nBASE: [base.yaml]')
    changed = {'DATA.BATCH_SIZE': 1, 'DATA.IMAGE_SIZE': 2, 'DATA.CROP_PCT': 0.7}
    assert flatten(get_config(path, ['DATA.CROP_PCT', 0.7])) == DEFAULTS | changed
    assert flatten(get_config(path, ['DATA.CROP_PCT', 0.8, 'DATA.CROP_PCT', 0.7])) == DEFAULTS | changed
    assert flatten(get_config()) == DEFAULTS                          # nothing of the above stays


def test_base_is_relative_to_its_file_and_depth_first(write, tmp_path, monkeypatch):
    write('deep/root.yaml', 'SEED: 1\nNPROCS: 1\nSAVE_FREQ: 1\nSAVE_KEEP: 11')
    write('deep/a.yaml', 'BASE: root.yaml\nSEED: 2\nNPROCS: 2\nSAVE_FREQ: 2')
    write('b.yaml', 'SEED: 3\nNPROCS: 3')
    path = write('own.yaml', 'BASE: [deep/a.yaml, b.yaml]\nSEED: 4')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    for name in (path, '../own.yaml'):
        config = get_config(name)
        assert (config.SEED, config.NPROCS, config.SAVE_FREQ, config.SAVE_KEEP) == (4, 3, 2, 11)
    absolute = write('absolute.yaml', f'BASE: {path}')
    assert get_config(absolute).SEED == 4


def test_tilde_in_base(write, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    write('home/base.yaml', 'SEED: 5')
    assert get_config(write('own.yaml', 'BASE: ~/base.yaml')).SEED == 5


@pytest.mark.parametrize('base', ["['']", '[]', "''", '~'])
def test_empty_base(write, base):
    assert flatten(get_config(write('a.yaml', f'BASE: {base}\nSEED: 1'))) == DEFAULTS | {'SEED': 1}


def test_two_files_with_the_same_base(write):
    write('root.yaml', 'SEED: 1')
    write('a.yaml', 'BASE: root.yaml\nNPROCS: 2')
    write('b.yaml', 'BASE: root.yaml\nSAVE_KEEP: 4')
    config = get_config(write('own.yaml', 'BASE: [a.yaml, b.yaml]'))
    assert (config.SEED, config.NPROCS, config.SAVE_KEEP) == (1, 2, 4)


@pytest.mark.parametrize('first, second', [
    ('recipe', 'model'), ('recipe', 'small'), ('model', 'other')])
def test_base_that_silently_overrides_an_earlier_one_is_refused(write, first, second):
    """A recipe before a model whose BASE is another recipe; and what the BASE of both would set back."""
    write('usual.yaml', 'TRAIN: {BASE_LR: 0.1, LOSS: ce}\nSEED: 1')
    write('recipe.yaml', 'TRAIN: {BASE_LR: 0.2, LOSS: bce}')
    write('model.yaml', 'BASE: usual.yaml\nMODEL: {NAME: a}\nSEED: 2')
    write('small.yaml', 'TRAIN: {BASE_LR: 0.3}\nMODEL: {NAME: b}')              # has a recipe of its own
    write('other.yaml', 'BASE: usual.yaml\nMODEL: {NAME: c}')          # usual.yaml states the rest once more
    path = write('own.yaml', f'BASE: [{first}.yaml, {second}.yaml]')
    change = r'(TRAIN.BASE_LR|SEED) from \S+ \(of \S+\.yaml\) to \S+ \(of \S+\.yaml\)'
    message = rf'^{path}: BASE names {second}\.yaml too late: it would turn {change}; name it before'
    with pytest.raises(ValueError, match=message):
        get_config(path)
    config = get_config(write('own.yaml', f'BASE: [{second}.yaml, {first}.yaml]'))
    assert first != 'recipe' or (config.TRAIN.BASE_LR, config.TRAIN.LOSS) == (0.2, 'bce')


@pytest.mark.parametrize('chain', ['aa', 'aba', 'abcb'])
def test_cycle_of_base_files_is_refused(write, tmp_path, chain):
    for name, base in zip(chain, chain[1:]):
        write(f'{name}.yaml', f'BASE: {base}.yaml')
    files = ' -> '.join(rf'\S+/{name}\.yaml' for name in chain)
    with pytest.raises(ValueError, match=f'cycle: {files}$'):
        get_config(tmp_path / 'a.yaml')


def test_missing_file_is_refused(write):
    path = write('a.yaml', 'BASE: other/none.yaml')
    with pytest.raises(FileNotFoundError, match=rf'other/none\.yaml: no such config file .*BASE of {path}'):
        get_config(path)
    with pytest.raises(FileNotFoundError, match=r'/none\.yaml: no such config file$'):
        get_config('none.yaml')


@pytest.mark.parametrize('content', ['', '# nothing', 'DATA: {}', '---'])
def test_empty_file(write, content):
    assert flatten(get_config(write('a.yaml', content))) == DEFAULTS


# ---- YAML

def test_yaml_number_without_a_point(write):
    """YAML reads 1e-3 as text."""
    path = write('a.yaml', 'TRAIN: {BASE_LR: 1e-3, BETAS: [0.9, 1e-1], WARMUP_EPOCHS: 3}')
    assert get_config(path).TRAIN.BASE_LR == 0.001


@pytest.mark.parametrize('key, value, kind', [
    ('SEED', 1.0, 'a whole number'), ('SEED', 'one', 'a whole number'), ('SEED', True, 'a whole number'),
    ('SEED', None, 'a whole number'), ('SEED', [1], 'a whole number'), ('TRAIN.BASE_LR', 'fast', 'a number'),
    ('TRAIN.BASE_LR', False, 'a number'), ('AMP', 1, 'True or False'), ('AMP', 'yes please', 'True or False'),
    ('OUTPUT', ['a'], 'text'), ('OUTPUT', True, 'text'), ('OUTPUT', None, 'text'),
    ('MODEL.HEADS', 8, 'a list'),
    ('MODEL.HEADS', '8', 'a list'), ('MODEL.HEADS', [0, 0, 8, 8.5], 'a whole number'),
    ('MODEL.STAGES', 'conv halo', 'a list'),
    ('TRAIN.BETAS', ['a', 'b'], 'a number')])
def test_another_type_is_refused(write, key, value, kind):
    *group, name = key.split('.')
    content = {name: value}
    path = write('wrong.yaml', yaml.safe_dump({group[0]: content} if group else content))
    with pytest.raises(ValueError, match=rf'^{path}: {key} must be {kind}, got '):
        get_config(path)
    with pytest.raises(ValueError, match=rf'^command line: {key} must be {kind}, got '):
        get_config(None, [key, value])


@pytest.mark.parametrize('content, key, close', [
    ('DATA: {IMAGESIZE: 1}', 'DATA.IMAGESIZE', 'DATA.IMAGE_SIZE'),
    ('BATCH_SIZE: 1', 'BATCH_SIZE', 'DATA.BATCH_SIZE'),
    ('MODEL: {STAGE: [conv]}', 'MODEL.STAGE', 'MODEL.STAGES'),
    ('TRAIN: {OPTIMISER: sgd}', 'TRAIN.OPTIMISER', 'TRAIN.OPTIMIZER'),
    ('MODEL: {TRANS: {NUM_HEADS: 8}}', 'MODEL.TRANS.NUM_HEADS', None), ('ZZZZZ: 1', 'ZZZZZ', None),
    ('DATA: {IMAGE_SIZE: {SIDE: 1}}', 'DATA.IMAGE_SIZE.SIDE', None), ('7: 1', '7', None)])
def test_unknown_option_is_refused(write, content, key, close):
    path = write('wrong.yaml', content)
    hint = rf'; did you mean {close}\?$' if close else ''
    with pytest.raises(ValueError, match=rf'^{path}: unknown option {key}{hint}'):
        get_config(path)


@pytest.mark.parametrize('content, message', [
    ('DATA: 3', 'DATA is a group of options'), ('DATA:', 'DATA is a group of options'),
    ('SEED: 2001-99-99', 'not valid YAML'), ('SEED: !!int ""', 'not valid YAML'),
    ('MODEL: &m {NAME: *m}', 'not valid YAML'), ('[' * 3000, 'not valid YAML'), ('\0', 'not valid YAML'),
    (f'SEED: {"9" * 5000}', 'not valid YAML' if hasattr(sys, 'set_int_max_str_digits') else 'SEED'),
    ('SEED: !!python/object:os.x {}', 'not valid YAML'), ('BASE: {a: b}', 'unknown option BASE.a'),
    ('- SEED', 'expected KEY: VALUE lines, found list'),
    ('just words', 'expected KEY: VALUE lines, found str'),
    ('DATA: {IMAGE_SIZE: 3', 'not valid YAML'), ('a: b: c', 'not valid YAML'),
    ('BASE: 3', 'BASE must be a list'), ('BASE: [{a: b}]', 'BASE must be text')])
def test_malformed_file_is_refused(write, content, message):
    path = write('wrong.yaml', content)
    with pytest.raises(ValueError, match=f'^{path}: {message}'):
        get_config(path)


@pytest.mark.parametrize('content, key', [
    ('TRAIN: {BASE_LR: 0.5}\nTRAIN: {NUM_EPOCHS: 7}', 'TRAIN'), ('DATA: {TIMEOUT: 1, TIMEOUT: 2}', 'TIMEOUT'),
    ('DATA.TIMEOUT: 1\nDATA: {TIMEOUT: 2}', 'DATA.TIMEOUT')])
def test_duplicate_key_is_refused(write, content, key):
    path = write('twice.yaml', content)
    with pytest.raises(ValueError, match=f'^{path}: .*duplicate key {key}'):
        get_config(path)


def test_merged_mappings(write):
    """YAML's << copies a mapping; its own keys override the copy."""
    path = write('a.yaml', 'TRAIN: {<<: {LOSS: bce, BASE_LR: 0.5}, LOSS: ce}')
    train = get_config(path).TRAIN
    assert (train.LOSS, train.BASE_LR) == ('ce', 0.5)


# ---- names of files

@pytest.mark.parametrize('name, file', [
    ('halonet_26t', 'halonet_26t_256'), ('halonet_26t_256', 'halonet_26t_256'),
    ('halonet_26t_256.yaml', 'halonet_26t_256'),
    ('configs/halonet_50ts_256.yaml', 'halonet_50ts_256'), ('halonet_h1', 'halonet_h1_256'),
    ('halonet_digits', 'halonet_digits'),
    ('halonet_h7_conv1', 'halonet_h7_conv1_600'), ('_a1h', '_a1h')])
def test_config_is_found_by_name(name, file, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    assert module.find_config(name) == str(request.config.rootpath / 'configs' / f'{file}.yaml')
    assert parse_args(['-cfg', name, '-opts', 'SEED', '4']).SEED == 4


def test_every_model_is_found_by_name(request):
    for path in (request.config.rootpath / 'configs').glob('[!_]*.yaml'):
        assert module.find_config(get_config(path).MODEL.NAME) == str(path) or path.stem.endswith('timm_256')


def test_file_of_the_user_comes_before_a_name(write, tmp_path, monkeypatch):
    write('halonet_26t', 'SEED: 7')
    monkeypatch.chdir(tmp_path)
    assert parse_args(['-cfg', 'halonet_26t']).SEED == 7


# ---- files of the repository, written files

@pytest.mark.parametrize('changes', [[], ['SEED', 3, 'OUTPUT', '007', 'TRAIN.EPS', 1e-12, 'TRAIN.BETAS',
                                          [0, 0.5], 'AMP', True,
                                          'MODEL.STEM', '3x3', 'TRAIN.CROP_RATIO', [1 / 3, 3],
                                          'DATA.DATA_PATH', 'a: b # c']])
def test_dumped_config_loads_back(write, changes, request):
    config = get_config(request.config.rootpath / 'configs/halonet_50ts_256.yaml', changes)
    assert get_config(write('config.yaml', config.dump())) == config


def test_relative_paths_to_configs(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    config = get_config('./configs/halonet_26t_256.yaml')
    assert (config.DATA.IMAGE_SIZE, config.DATA.CROP_PCT, config.MODEL.NAME) == (256, 0.95, 'halonet_26t')
    config = get_config('./configs/halonet_50ts_256.yaml')
    assert (config.DATA.IMAGE_SIZE, config.DATA.CROP_PCT, config.MODEL.NAME) == (256, 0.94, 'halonet_50ts')


def test_every_config_file_is_valid(request):
    paths = sorted((request.config.rootpath / 'configs').glob('*.yaml'))
    assert len(paths) >= 2
    for path in paths:
        name = get_config(path).MODEL.NAME
        assert path.name.startswith('_') or path.name.startswith(name)
