"""Options: what overrides what, what is refused and how, the command line; and the shape that the code is held to."""
import re

from system.options import ON_RESUME

import pytest
import yaml

import config as module
from config import OPTIONS, defaults, flatten, get_config, parse_args

DEFAULTS = defaults()
CHOICES = {option.key: option.choices for option in OPTIONS if option.choices}
PATHS = [option.key for option in OPTIONS if option.path]
SINGLE = [option for option in OPTIONS if type(option.default) in (int, float)]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return str(path)
    return write


def refuses(argv, capsys):
    """The one line with which the command line `argv` ends the program."""
    with pytest.raises(SystemExit) as stop:
        parse_args(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ''
    *usage, line = err.splitlines()
    assert ': error: ' in line and not any('error' in text for text in usage)
    return line


# ---- what overrides what

def test_defaults():
    assert flatten(get_config()) == DEFAULTS
    assert get_config().DATA.IMAGE_SIZE == 256


def test_order(write):
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


@pytest.mark.parametrize('base', ["['']", '[]', "''", '~'])
def test_no_base(write, base):
    assert flatten(get_config(write('a.yaml', f'BASE: {base}\nSEED: 1'))) == DEFAULTS | {'SEED': 1}


def test_two_files_may_share_a_base(write):
    write('root.yaml', 'SEED: 1')
    write('a.yaml', 'BASE: root.yaml\nNPROCS: 2')
    write('b.yaml', 'BASE: root.yaml\nSAVE_KEEP: 4')
    config = get_config(write('own.yaml', 'BASE: [a.yaml, b.yaml]'))
    assert (config.SEED, config.NPROCS, config.SAVE_KEEP) == (1, 2, 4)


@pytest.mark.parametrize('first, second', [
    ('recipe', 'model'), ('recipe', 'small'), ('model', 'other')])
def test_base_does_not_undo_in_silence(write, first, second):
    """A recipe before the model, whose BASE is another one; and anything that a shared BASE would set back."""
    write('usual.yaml', 'TRAIN: {BASE_LR: 0.1, LOSS: ce}\nSEED: 1')
    write('recipe.yaml', 'TRAIN: {BASE_LR: 0.2, LOSS: bce}')
    write('model.yaml', 'BASE: usual.yaml\nMODEL: {NAME: a}\nSEED: 2')
    write('small.yaml', 'TRAIN: {BASE_LR: 0.3}\nMODEL: {NAME: b}')              # has a recipe of its own
    write('other.yaml', 'BASE: usual.yaml\nMODEL: {NAME: c}')                # what it leaves open, usual.yaml says again
    path = write('own.yaml', f'BASE: [{first}.yaml, {second}.yaml]')
    told = r'(TRAIN.BASE_LR|SEED) from \S+ \(of \S+\.yaml\) to \S+ \(of \S+\.yaml\)'
    with pytest.raises(ValueError, match=rf'^{path}: BASE names {second}\.yaml too late: it would turn {told}; name it before'):
        get_config(path)
    config = get_config(write('own.yaml', f'BASE: [{second}.yaml, {first}.yaml]'))
    assert first != 'recipe' or (config.TRAIN.BASE_LR, config.TRAIN.LOSS) == (0.2, 'bce')


@pytest.mark.parametrize('chain', ['aa', 'aba', 'abcb'])
def test_base_cycle(write, tmp_path, chain):
    for name, base in zip(chain, chain[1:]):
        write(f'{name}.yaml', f'BASE: {base}.yaml')
    with pytest.raises(ValueError, match='cycle: ' + ' -> '.join(rf'\S+/{name}\.yaml' for name in chain) + '$'):
        get_config(tmp_path / 'a.yaml')


def test_missing_files(write):
    path = write('a.yaml', 'BASE: other/none.yaml')
    with pytest.raises(FileNotFoundError, match=rf'other/none\.yaml: no such config file .*BASE of {path}'):
        get_config(path)
    with pytest.raises(FileNotFoundError, match=r'/none\.yaml: no such config file$'):
        get_config('none.yaml')


@pytest.mark.parametrize('content', ['', '# nothing', 'DATA: {}', '---'])
def test_empty_file(write, content):
    assert flatten(get_config(write('a.yaml', content))) == DEFAULTS


# ---- types

@pytest.mark.parametrize('key, value, expected', [
    ('TRAIN.BASE_LR', '1e-3', 0.001), ('TRAIN.BASE_LR', '0.5', 0.5), ('TRAIN.BASE_LR', 1, 1.0), ('TRAIN.BASE_LR', '2', 2.0),
    ('TRAIN.BETAS', [0, 0.5], [0.0, 0.5]), ('TRAIN.BETAS', '[0, 1e-3]', [0.0, 0.001]), ('TRAIN.BETAS', (0.1, '2e-1'), [0.1, 0.2]),
    ('SEED', '7', 7), ('MODEL.HEADS', '[0, 0, 4, 4]', [0, 0, 4, 4]), ('MODEL.STAGES', "['conv', 'conv', 'conv', 'halo']",
                                                                     ['conv', 'conv', 'conv', 'halo']),
    ('AMP', True, True), ('AMP', 'True', True), ('EVAL', 'False', False), ('OUTPUT', 7, '7'), ('OUTPUT', '7', '7'),
    ('OUTPUT', "['x']", "['x']"), ('MODEL.STEM', '3x3', '3x3')])
def test_coercion(key, value, expected):
    result = flatten(get_config(None, [key, value]))[key]
    assert result == expected and type(result) is type(expected)
    if isinstance(expected, list):
        assert [type(item) for item in result] == [type(item) for item in expected]


def test_yaml_numbers_without_a_point(write):
    """YAML reads 1e-3 as text."""
    assert get_config(write('a.yaml', 'TRAIN: {BASE_LR: 1e-3, BETAS: [0.9, 1e-1], WARMUP_EPOCHS: 3}')).TRAIN.BASE_LR == 0.001


@pytest.mark.parametrize('key, value, kind', [
    ('SEED', 1.0, 'a whole number'), ('SEED', 'one', 'a whole number'), ('SEED', True, 'a whole number'),
    ('SEED', None, 'a whole number'), ('SEED', [1], 'a whole number'), ('TRAIN.BASE_LR', 'fast', 'a number'),
    ('TRAIN.BASE_LR', False, 'a number'), ('AMP', 1, 'True or False'), ('AMP', 'yes please', 'True or False'),
    ('OUTPUT', ['a'], 'text'), ('OUTPUT', True, 'text'), ('OUTPUT', None, 'text'), ('MODEL.HEADS', 8, 'a list'),
    ('MODEL.HEADS', '8', 'a list'), ('MODEL.HEADS', [0, 0, 8, 8.5], 'a whole number'), ('MODEL.STAGES', 'conv halo', 'a list'),
    ('TRAIN.BETAS', ['a', 'b'], 'a number')])
def test_wrong_types_name_file_and_key(write, key, value, kind):
    *group, name = key.split('.')
    content = {name: value}
    path = write('wrong.yaml', yaml.safe_dump({group[0]: content} if group else content))
    with pytest.raises(ValueError, match=rf'^{path}: {key} must be {kind}, got '):
        get_config(path)
    with pytest.raises(ValueError, match=rf'^command line: {key} must be {kind}, got '):
        get_config(None, [key, value])


@pytest.mark.parametrize('content, key, close', [
    ('DATA: {IMAGESIZE: 1}', 'DATA.IMAGESIZE', 'DATA.IMAGE_SIZE'), ('BATCH_SIZE: 1', 'BATCH_SIZE', 'DATA.BATCH_SIZE'),
    ('MODEL: {STAGE: [conv]}', 'MODEL.STAGE', 'MODEL.STAGES'), ('TRAIN: {OPTIMISER: sgd}', 'TRAIN.OPTIMISER', 'TRAIN.OPTIMIZER'),
    ('MODEL: {TRANS: {NUM_HEADS: 8}}', 'MODEL.TRANS.NUM_HEADS', None), ('ZZZZZ: 1', 'ZZZZZ', None),
    ('DATA: {IMAGE_SIZE: {SIDE: 1}}', 'DATA.IMAGE_SIZE.SIDE', None), ('7: 1', '7', None)])
def test_unknown_options_name_file_and_key(write, content, key, close):
    path = write('wrong.yaml', content)
    hint = rf'; did you mean {close}\?$' if close else ''
    with pytest.raises(ValueError, match=rf'^{path}: unknown option {key}{hint}'):
        get_config(path)


@pytest.mark.parametrize('content, message', [
    ('DATA: 3', 'DATA is a group of options'), ('DATA:', 'DATA is a group of options'),
    ('- SEED', 'expected KEY: VALUE lines, found list'), ('just words', 'expected KEY: VALUE lines, found str'),
    ('DATA: {IMAGE_SIZE: 3', 'not valid YAML'), ('a: b: c', 'not valid YAML'),
    ('BASE: 3', 'BASE must be a list'), ('BASE: [{a: b}]', 'BASE must be text')])
def test_malformed_files_are_named(write, content, message):
    path = write('wrong.yaml', content)
    with pytest.raises(ValueError, match=f'^{path}: {message}'):
        get_config(path)


def test_odd_opts():
    with pytest.raises(ValueError, match=r"pairs KEY VALUE; 'AMP' has no value"):
        get_config(None, ['SEED', 1, 'AMP'])
    with pytest.raises(ValueError, match='BASE has a meaning in config files only'):
        get_config(None, ['BASE', ['a.yaml']])


# ---- frozen, in range

def test_frozen():
    config = get_config()
    for node, key in ((config, 'SEED'), (config.DATA, 'IMAGE_SIZE'), (config.TRAIN, 'NEW')):
        with pytest.raises(AttributeError):
            setattr(node, key, 1)


def test_options_are_those_that_were_decided(request):
    """A new option, another default or another rule for resumed runs is a decision.

    Who has taken it writes it into tests/fixtures/options.txt, in the order of the table in config.py.
    """
    lines = [f'{option.key} {option.default!r} {option.on_resume}' for option in OPTIONS]
    path = request.config.rootpath / 'tests' / 'fixtures' / 'options.txt'
    assert lines == path.read_text(encoding='utf-8').splitlines()


def test_rows_are_well_formed():
    assert len({option.key for option in OPTIONS}) == len(OPTIONS)
    for option in OPTIONS:
        assert option.comment and option.on_resume in ON_RESUME, option.key
        assert option.path in ('', 'FILE', 'DIR'), option.key
        assert not (option.ge is not None and option.gt is not None), option.key
        assert not (option.le is not None and option.lt is not None), option.key
        assert type(option.default) is list or (option.length, option.items) == (None, None), option.key
        assert option.default == [] or option.items is None, option.key


def test_relations_are_between_options():
    for relation in module.RELATIONS:
        assert {*relation.keys.split()} <= DEFAULTS.keys() and relation.sentence


def is_number(option):
    """True for an option that is a number or a list of numbers."""
    kind = type(option.default)
    if kind is list:
        kind = option.items or type(option.default[0])
    return kind in (int, float)


def test_every_number_has_a_lower_limit():
    for option in OPTIONS:
        assert is_number(option) == (option.ge is not None or option.gt is not None), option.key


@pytest.mark.parametrize('key', [key for key, value in DEFAULTS.items() if type(value) in (int, float, list) and value])
def test_no_number_is_absurd(key):
    """Neither infinite nor no number, and no whole number that 64 bits do not hold, alone or in a list."""
    default = DEFAULTS[key]
    absurd = {int: [2 ** 70, -2 ** 70], float: [float('inf'), -float('inf'), float('nan')], str: []}
    many = isinstance(default, list)
    for value in absurd[type(default[0] if many else default)]:
        with pytest.raises(ValueError, match=key.replace('.', r'\.')):
            get_config(None, [key, [*default[1:], value] if many else value])


@pytest.mark.parametrize('opts, message', [
    (['DATA.MEAN', [123.675, 116.28, 103.53]], r'DATA.MEAN is \[123.675, 116.28, 103.53\].* 0 to 1\. Divide by 255'),
    (['DATA.STD', [58.395, 57.12, 57.375]], r'DATA.STD is .* above 0 and at most 1\. Divide by 255'),
    (['DATA.MEAN', [0.5, 0.5, -0.1]], 'DATA.MEAN is'), (['DATA.STD', [0.5, 0.5, 0]], 'DATA.STD is'),
    (['TRAIN.LAST_EPOCH', 301], 'TRAIN.LAST_EPOCH is 301, TRAIN.NUM_EPOCHS is 300; no epoch would be left')])
def test_values_that_make_no_sense_say_what_to_do(opts, message):
    with pytest.raises(ValueError, match=message):
        get_config(None, opts)


def test_mean_and_std_of_other_projects_are_accepted():
    for mean, std in (([0, 0, 0], [1, 1, 1]), ([0.5] * 3, [0.5] * 3), ([0.48145466, 0.4578275, 0.40821073], [0.26862954] * 3)):
        assert get_config(None, ['DATA.MEAN', mean, 'DATA.STD', std]).DATA.MEAN == mean


def outside(option):
    """Values just outside the limits of a number."""
    if option.ge is not None:
        yield option.ge - 1
        yield option.ge - 0.01 if type(option.default) is float else option.ge - 2
    if option.gt is not None:
        yield option.gt
    if option.le is not None:
        yield option.le + 1
    if option.lt is not None:
        yield option.lt


@pytest.mark.parametrize('key, value', [
    *((key, 'other') for key in CHOICES), *((option.key, value) for option in SINGLE for value in outside(option)),
    ('TRAIN.BASE_LR', float('nan')), ('TRAIN.HFLIP', float('nan')), ('DATA.CROP_PCT', 1.01), ('TRAIN.HFLIP', 1.01),
    ('DATA.MEAN', [0.5]), ('DATA.STD', [0.5, 0.5, 0.0]), ('DATA.STD', [0.5]), ('TRAIN.CROP_SCALE', [0.5, 0.4]),
    ('TRAIN.CROP_SCALE', [0.0, 1.0]), ('TRAIN.CROP_SCALE', [0.5, 1.1]), ('TRAIN.CROP_SCALE', [1.0]),
    ('TRAIN.CROP_RATIO', [2.0, 1.0]), ('TRAIN.CROP_RATIO', [0.0, 1.0]), ('TRAIN.NUM_EPOCHS', 5),
    ('TRAIN.BETAS', [0.9]), ('TRAIN.BETAS', [0.9, 1.0]), ('MODEL.HEADS', [0, 0, -8, 8]), ('SEED', 2 ** 63),
    ('MODEL.INNER_WIDTHS', [8]), ('MODEL.INNER_WIDTHS', [8, 8, 8, 0]), ('MODEL.INNER_WIDTHS', [8, 8, 8, 8.5]),
    ('MODEL.LAMBDA_SIZE', 4), ('MODEL.LAMBDA_SIZE', -1), ('MODEL.FREEZE', 6), ('TRAIN.RECOMPUTE', 5),
    ('TRAIN.COOLDOWN_EPOCHS', 295.0), ('MODEL.WIDTHS', [8]), ('MODEL.WIDTHS', [8, 8, 8, 0]), ('MODEL.WIDTHS', []),
    ('MODEL.STRIDES', [1, 1, 1, 1, 1]), ('MODEL.STRIDES', [1, 0, 1, 1]), ('MODEL.HEADS', []),
    ('MODEL.STAGES', ['conv']), ('MODEL.STAGES', []), ('DATA.BACKGROUND', 'whitish'),
    ('DATA.BACKGROUND', '#80808080')])
def test_value_outside_the_limits_is_refused(key, value):
    with pytest.raises(ValueError, match=key.replace('.', r'\.')):
        get_config(None, [key, value])


@pytest.mark.parametrize('key, value, limits', [
    ('SAVE_KEEP', 0, 'at least 1'), ('NPROCS', 1025, 'from 0 to 1024'), ('TRAIN.EPS', 0.0, 'above 0'),
    ('DATA.CROP_PCT', 0.0, 'above 0 and at most 1'), ('TRAIN.EMA_DECAY', 1.0, 'at least 0 and below 1'),
    ('TRAIN.BETAS', [0.5, 2.0], 'a list of 2 numbers, each at least 0 and below 1'),
    ('MODEL.WIDTHS', [0], 'a list of numbers, each at least 1')])
def test_message_states_all_limits(key, value, limits):
    with pytest.raises(ValueError) as error:
        get_config(None, [key, value])
    assert str(error.value) == f'{key} is {value}; it must be {limits}'


@pytest.mark.parametrize('key, value', [
    *((key, choice) for key, choices in CHOICES.items() for choice in choices),
    *((option.key, limit) for option in SINGLE for limit in (option.ge, option.le) if limit is not None),
    ('SEED', 2 ** 63 - 1), ('TRAIN.CROP_SCALE', [1.0, 1.0]), ('TRAIN.BETAS', [0.0, 0.0]),
    ('DATA.MEAN', [0.0, 1.0, 0.0]), ('MODEL.FREEZE', 5), ('TRAIN.RECOMPUTE', 4), ('DATA.BACKGROUND', 'drop')])
def test_limits_are_allowed(key, value):
    opts = [key, value, 'TRAIN.WARMUP_EPOCHS', 0]
    assert flatten(get_config(None, opts))[key] == value


def test_recomputing_traced_programs_is_refused():
    with pytest.raises(ValueError, match=r'TRAIN\.RECOMPUTE is 1, TRAIN\.TO_STATIC is True; .*eager mode'):
        get_config(None, ['TRAIN.RECOMPUTE', 1, 'TRAIN.TO_STATIC', True])


# ---- the command line

FLAGS = {
    'data_path': ('some dir', 'DATA.DATA_PATH', 'some dir'), 'dataset': ('imagenet2012', 'DATA.DATASET', 'imagenet2012'),
    'batch_size': ('3', 'DATA.BATCH_SIZE', 3), 'batch_size_eval': ('4', 'DATA.BATCH_SIZE_EVAL', 4),
    'image_size': ('512', 'DATA.IMAGE_SIZE', 512), 'num_workers': ('0', 'DATA.NUM_WORKERS', 0),
    'accum_iter': ('2', 'TRAIN.ACCUM_ITER', 2), 'pretrained': ('a.pdparams', 'MODEL.PRETRAINED', 'a.pdparams'),
    'resume': ('auto', 'MODEL.RESUME', 'auto'), 'last_epoch': ('0', 'TRAIN.LAST_EPOCH', 0), 'output': ('7', 'OUTPUT', '7'),
    'results': ('r.csv', 'RESULTS', 'r.csv'),
    'device': ('cpu', 'DEVICE', 'cpu'), 'nprocs': ('2', 'NPROCS', 2), 'eval': (None, 'EVAL', True), 'amp': (None, 'AMP', True),
}


@pytest.mark.parametrize('name', FLAGS)
@pytest.mark.parametrize('dashes', ['-', '--'])
def test_flags(name, dashes):
    text, key, expected = FLAGS[name]
    forms = [[dashes + name]] if text is None else [[dashes + name, text], [f'{dashes}{name}={text}']]
    for argv in forms:
        assert flatten(parse_args(argv)) == DEFAULTS | {key: expected}


def test_the_flags_above_are_all(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(['-h'])
    assert stop.value.code == 0
    assert {*re.findall(r'^ +-\w.*?, --(\w+)', capsys.readouterr().out, re.M)} == {*FLAGS, 'help', 'cfg', 'opts'}


@pytest.mark.parametrize('cfg', [['-cfg=FILE'], ['--cfg=FILE'], ['-cfg', 'FILE'], ['--cfg', 'FILE']])
@pytest.mark.parametrize('opts', ['-opts', '--opts'])
def test_cfg_flags_and_opts(write, cfg, opts):
    path = write('a.yaml', 'SEED: 1\nDATA: {BATCH_SIZE: 1, IMAGE_SIZE: 1}\nEVAL: True')
    flags = ['-batch_size=2', '-last_epoch', '-1']
    config = parse_args([text.replace('FILE', path) for text in cfg] + flags
                        + [opts, 'DATA.IMAGE_SIZE', '3', 'TRAIN.BASE_LR', '1e-2'])
    changed = {'SEED': 1, 'DATA.BATCH_SIZE': 2, 'DATA.IMAGE_SIZE': 3, 'TRAIN.BASE_LR': 0.01, 'EVAL': True}
    assert flatten(config) == DEFAULTS | changed


def test_opts_add_up():
    config = parse_args(['-opts', 'SEED', '1', 'NPROCS', '2', '-amp', '-opts', 'SAVE_KEEP', '9', 'TRAIN.LAST_EPOCH', '-1'])
    assert flatten(config) == DEFAULTS | {'SEED': 1, 'NPROCS': 2, 'AMP': True, 'SAVE_KEEP': 9}
    assert flatten(parse_args([])) == DEFAULTS


@pytest.mark.parametrize('flag, key, value, shown', [
    (['-batch_size', '2'], 'DATA.BATCH_SIZE', '3', '-batch_size says 2 and -opts DATA.BATCH_SIZE says 3'),
    (['--eval'], 'EVAL', 'False', '-eval says True and -opts EVAL says False'),
    (['-ngpus=2'], 'NPROCS', '4', '-nprocs says 2 and -opts NPROCS says 4'),
    (['-output=a'], 'OUTPUT', 'b', "-output says 'a' and -opts OUTPUT says 'b'")])
def test_a_flag_and_opts_that_contradict_each_other(flag, key, value, shown, capsys):
    assert f'{shown}, of the same option; leave one out' in refuses([*flag, '-opts', 'SEED', '1', key, value], capsys)
    same = flag[-1].split('=')[-1] if key != 'EVAL' else 'True'
    assert parse_args([*flag, '-opts', key, same]) == parse_args(flag)


def test_a_flag_and_opts_are_compared_as_values(capsys):
    assert parse_args(['-batch_size', '8', '-opts', 'DATA.BATCH_SIZE', ' 8']).DATA.BATCH_SIZE == 8
    assert "DATA.BATCH_SIZE must be a whole number, got 'x'" in refuses(['-batch_size', '8', '-opts', 'DATA.BATCH_SIZE', 'x'],
                                                                        capsys)


def test_the_program_s_own_arguments_are_the_default(monkeypatch):
    monkeypatch.setattr('sys.argv', ['main.py', '-batch_size', '9'])
    assert parse_args().DATA.BATCH_SIZE == 9


@pytest.mark.parametrize('argv, message', [
    (['-batch_size', 'many'], "DATA.BATCH_SIZE must be a whole number, got 'many'"),
    (['-batch_size=0'], 'DATA.BATCH_SIZE is 0; it must be at least 1'),
    (['-device', 'tpu'], "DEVICE is 'tpu'; it can be auto or gpu or cpu"),
    (['-cfg', 'none.yaml'], 'none.yaml: no such config file'),
    (['-opts', 'SED', '1'], 'unknown option SED; did you mean SEED?'),
    (['-opts', 'SEED'], "'SEED' has no value"),
    (['-batchsize', '3'], 'unrecognized arguments: -batchsize 3; did you mean -batch_size?'),
    (['--batchsize=3'], 'unrecognized arguments: --batchsize=3; did you mean -batch_size?'),
    (['-opts', 'SEED', '1', '-data-path', 'x'], 'unrecognized arguments: -data-path x; did you mean -data_path?'),
    (['-num_classes', '3'], 'did you mean -opts MODEL.NUM_CLASSES?'),
    (['-cfg', 'halonet_26'], 'halonet_26: no such config file; did you mean configs/halonet_26t_256.yaml?'),
    (['-data_path=~nobody_of_that_name/x'], 'there is no such user; write ./~nobody_of_that_name/x'),
    (['--batch', '3'], 'unrecognized arguments: --batch 3'),           # no abbreviations
    (['-batch_size'], 'expected one argument'),
    (['train'], 'unrecognized arguments: train')])
def test_errors_end_with_one_line(argv, message, capsys):
    assert message in refuses(argv, capsys)


@pytest.mark.parametrize('argv', [['-batchsize', '3'], ['-batch_size'], ['-batch_size', 'x'], ['-cfg', 'none']])
def test_a_mistake_is_one_line_without_the_usage(argv, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('name, file', [
    ('halonet_26t', 'halonet_26t_256'), ('halonet_26t_256', 'halonet_26t_256'), ('halonet_26t_256.yaml', 'halonet_26t_256'),
    ('configs/halonet_50ts_256.yaml', 'halonet_50ts_256'), ('halonet_h1', 'halonet_h1_256'), ('halonet_digits', 'halonet_digits'),
    ('halonet_h7_conv1', 'halonet_h7_conv1_600'), ('_a1h', '_a1h')])
def test_configs_are_found_by_name(name, file, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    assert module.find_config(name) == str(request.config.rootpath / 'configs' / f'{file}.yaml')
    assert parse_args(['-cfg', name, '-opts', 'SEED', '4']).SEED == 4


def test_every_model_is_found_by_its_name(request):
    for path in (request.config.rootpath / 'configs').glob('[!_]*.yaml'):
        assert module.find_config(get_config(path).MODEL.NAME) == str(path) or path.stem.endswith('timm_256')


def test_a_file_of_the_user_comes_before_a_name(write, tmp_path, monkeypatch):
    write('halonet_26t', 'SEED: 7')
    monkeypatch.chdir(tmp_path)
    assert parse_args(['-cfg', 'halonet_26t']).SEED == 7


@pytest.mark.parametrize('key', PATHS)
def test_a_tilde_is_the_home_folder(key, monkeypatch, write):
    monkeypatch.setenv('HOME', '/home/someone')
    assert flatten(get_config(None, [key, '~/x']))[key] == '/home/someone/x'
    *group, name = key.split('.')
    content = {name: '~'}
    path = write('tilde.yaml', yaml.safe_dump({group[0]: content} if group else content))
    assert flatten(get_config(path))[key] == '/home/someone'
    assert flatten(get_config(None, [key, './~']))[key] == './~'


def test_a_tilde_before_the_config_file(write, tmp_path, monkeypatch):
    write('own.yaml', 'SEED: 6')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert parse_args(['-cfg=~/own.yaml']).SEED == 6


@pytest.mark.parametrize('content', ['DATA: {IMAGE_SIZE: 3', 'TRIAN: {BASE_LR: 1}', 'SEED: x', 'BASE: none.yaml'])
def test_errors_in_files_end_with_one_line(write, content, capsys):
    path = write('wrong.yaml', content)
    assert path in refuses(['-cfg', path], capsys)


# ---- files of the repository, written files

@pytest.mark.parametrize('changes', [[], ['SEED', 3, 'OUTPUT', '007', 'TRAIN.EPS', 1e-12, 'TRAIN.BETAS', [0, 0.5], 'AMP', True,
                                          'MODEL.STEM', '3x3', 'TRAIN.CROP_RATIO', [1 / 3, 3], 'DATA.DATA_PATH', 'a: b # c']])
def test_dump_loads_back(write, changes, request):
    config = get_config(request.config.rootpath / 'configs/halonet_50ts_256.yaml', changes)
    assert get_config(write('config.yaml', config.dump())) == config


def test_use_as_in_the_readme(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    config = get_config('./configs/halonet_26t_256.yaml')
    assert (config.DATA.IMAGE_SIZE, config.DATA.CROP_PCT, config.MODEL.NAME) == (256, 0.95, 'halonet_26t')
    config = get_config('./configs/halonet_50ts_256.yaml')
    assert (config.DATA.IMAGE_SIZE, config.DATA.CROP_PCT, config.MODEL.NAME) == (256, 0.94, 'halonet_50ts')


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    (tmp_path / 'twice.yaml').write_text('TRAIN: {BASE_LR: 0.5}\nTRAIN: {NUM_EPOCHS: 7}\n')
    with pytest.raises(ValueError, match='twice.yaml: .*TRAIN stands twice'):
        get_config(tmp_path / 'twice.yaml')


def test_every_config_file_is_valid(request):
    paths = sorted((request.config.rootpath / 'configs').glob('*.yaml'))
    assert len(paths) >= 2
    for path in paths:
        name = get_config(path).MODEL.NAME
        assert path.name.startswith('_') or path.name.startswith(name)
