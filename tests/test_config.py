"""The options: their list, types and limits, relations between them, and the frozen config."""
from system.options import ON_RESUME

import pytest
import yaml

import config as module
from config import OPTIONS, defaults, flatten, get_config

DEFAULTS = defaults()
CHOICES = {option.key: option.choices for option in OPTIONS if option.choices}
PATHS = [option.key for option in OPTIONS if option.path]
SINGLE = [option for option in OPTIONS if type(option.default) in (int, float)]


def is_number(option):
    """True for an option that is a number or a list of numbers."""
    kind = type(option.default)
    if kind is list:
        kind = option.items or type(option.default[0])
    return kind in (int, float)


NUMBERS = [option for option in OPTIONS if is_number(option)]


# ---- the table

def test_list_of_options(request):
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


def test_every_number_has_a_lower_limit():
    for option in OPTIONS:
        assert is_number(option) == (option.ge is not None or option.gt is not None), option.key


# ---- the config

def test_defaults():
    assert flatten(get_config()) == DEFAULTS
    assert get_config().DATA.IMAGE_SIZE == 256


@pytest.mark.parametrize('key, value, expected', [
    ('TRAIN.BASE_LR', '1e-3', 0.001), ('TRAIN.BASE_LR', '0.5', 0.5), ('TRAIN.BASE_LR', 1, 1.0),
    ('TRAIN.BASE_LR', '2', 2.0),
    ('TRAIN.BETAS', [0, 0.5], [0.0, 0.5]), ('TRAIN.BETAS', '[0, 1e-3]', [0.0, 0.001]),
    ('TRAIN.BETAS', (0.1, '2e-1'), [0.1, 0.2]),
    ('SEED', '7', 7), ('MODEL.HEADS', '[0, 0, 4, 4]', [0, 0, 4, 4]),
    ('MODEL.STAGES', "['conv', 'conv', 'conv', 'halo']", ['conv', 'conv', 'conv', 'halo']),
    ('AMP', True, True), ('AMP', 'True', True), ('EVAL', 'False', False), ('OUTPUT', 7, '7'),
    ('OUTPUT', '7', '7'),
    ('OUTPUT', "['x']", "['x']"), ('MODEL.STEM', '3x3', '3x3'),
    ('DATA.IMAGE_SIZE', '224', 224), ('DATA.IMAGE_SIZE', '128x256', [128, 256]),
    ('DATA.IMAGE_SIZE', '[128, 256]', [128, 256]), ('DATA.IMAGE_SIZE', (7, 5), [7, 5]),
    ('DATA.IMAGE_SIZE', '96x96', 96), ('DATA.IMAGE_SIZE', [96, 96], 96)])
def test_values_become_the_type_of_the_option(key, value, expected):
    result = flatten(get_config(None, [key, value]))[key]
    assert result == expected and type(result) is type(expected)
    if isinstance(expected, list):
        assert [type(item) for item in result] == [type(item) for item in expected]


@pytest.mark.parametrize('value, message', [
    ('big', r"must be a whole number, or \[height, width\], or a text such as 128x256, got 'big'"),
    ('128x', "got '128x'"), ('1x2x3', "got '1x2x3'"), ([1, 2, 3], r'got \[1, 2, 3\]'), ([], r'got \[\]'),
    (32.5, 'got 32.5'), ([32, 'x'], 'got'), (True, 'got True'),
    ([128, 0], r'DATA.IMAGE_SIZE is \[128, 0\]; it must be from 1 to 16384'), ('16385x8', '16384')])
def test_wrong_size_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        get_config(None, ['DATA.IMAGE_SIZE', value])


def test_malformed_opts_are_refused():
    with pytest.raises(ValueError, match=r"pairs KEY VALUE; 'AMP' has no value"):
        get_config(None, ['SEED', 1, 'AMP'])
    with pytest.raises(ValueError, match='BASE has a meaning in config files only'):
        get_config(None, ['BASE', ['a.yaml']])


@pytest.mark.parametrize('key', PATHS)
def test_tilde_is_the_home_folder(key, monkeypatch, write):
    monkeypatch.setenv('HOME', '/home/someone')
    assert flatten(get_config(None, [key, '~/x']))[key] == '/home/someone/x'
    *group, name = key.split('.')
    content = {name: '~'}
    path = write('tilde.yaml', yaml.safe_dump({group[0]: content} if group else content))
    assert flatten(get_config(path))[key] == '/home/someone'
    assert flatten(get_config(None, [key, './~']))[key] == './~'


def test_config_is_frozen():
    config = get_config()
    for node, key in ((config, 'SEED'), (config.DATA, 'IMAGE_SIZE'), (config.TRAIN, 'NEW')):
        with pytest.raises(AttributeError):
            setattr(node, key, 1)


# ---- limits and relations

@pytest.mark.parametrize('option', NUMBERS, ids=lambda option: option.key)
def test_infinite_and_huge_numbers_are_refused(option):
    """Also a number that a float or 64 bits do not hold, alone or in a list."""
    many = isinstance(option.default, list)
    kind = type([*option.default, 0][0] if many else option.default)
    absurd = {int: [2 ** 70, -2 ** 70], float: [float('inf'), -float('inf'), float('nan'), 10 ** 400]}
    for value in absurd[kind]:
        with pytest.raises(ValueError, match=option.key.replace('.', r'\.')):
            get_config(None, [option.key, [*option.default[1:], value] if many else value])


@pytest.mark.parametrize('opts, message', [
    (['DATA.MEAN', [123.675, 116.28, 103.53]],
     r'DATA.MEAN is \[123.675, 116.28, 103.53\].* 0 to 1\. Divide by 255'),
    (['DATA.STD', [58.395, 57.12, 57.375]], r'DATA.STD is .* above 0 and at most 1\. Divide by 255'),
    (['DATA.MEAN', [0.5, 0.5, -0.1]], 'DATA.MEAN is'), (['DATA.STD', [0.5, 0.5, 0]], 'DATA.STD is'),
    (['TRAIN.LAST_EPOCH', 301], 'TRAIN.LAST_EPOCH is 301, TRAIN.NUM_EPOCHS is 300; no epoch would be left')])
def test_message_says_what_to_do(opts, message):
    with pytest.raises(ValueError, match=message):
        get_config(None, opts)


def test_mean_and_std_of_other_projects_are_accepted():
    for mean, std in (([0, 0, 0], [1, 1, 1]), ([0.5] * 3, [0.5] * 3),
                      ([0.48145466, 0.4578275, 0.40821073], [0.26862954] * 3)):
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
    *((key, 'other') for key in CHOICES), *((option.key,
                                             value) for option in SINGLE for value in outside(option)),
    ('TRAIN.BASE_LR', float('nan')), ('TRAIN.HFLIP', float('nan')), ('DATA.CROP_PCT', 1.01),
    ('TRAIN.HFLIP', 1.01),
    ('DATA.MEAN', [0.5, 0.5]), ('DATA.STD', [0.5, 0.5, 0.0]), ('DATA.STD', []),
    ('TRAIN.CROP_SCALE', [0.5, 0.4]),
    ('TRAIN.CROP_SCALE', [0.0, 1.0]), ('TRAIN.CROP_SCALE', [0.5, 1.1]), ('TRAIN.CROP_SCALE', [1.0]),
    ('TRAIN.CROP_RATIO', [2.0, 1.0]), ('TRAIN.CROP_RATIO', [0.0, 1.0]), ('TRAIN.NUM_EPOCHS', 5),
    ('TRAIN.BETAS', [0.9]), ('TRAIN.BETAS', [0.9, 1.0]), ('MODEL.HEADS', [0, 0, -8, 8]), ('SEED', 2 ** 63),
    ('MODEL.INNER_WIDTHS', [8]), ('MODEL.INNER_WIDTHS', [8, 8, 8, 0]), ('MODEL.INNER_WIDTHS', [8, 8, 8, 8.5]),
    ('MODEL.LAMBDA_SIZE', 4), ('MODEL.LAMBDA_SIZE', -1), ('MODEL.FREEZE', 6), ('TRAIN.RECOMPUTE', 5),
    ('TRAIN.COOLDOWN_EPOCHS', 295.0), ('MODEL.WIDTHS', [8]), ('MODEL.WIDTHS', [8, 8, 8, 0]),
    ('MODEL.WIDTHS', []),
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
    if key == 'DATA.CHANNELS':                      # one mean for any number of them
        opts += ['DATA.MEAN', [0.5], 'DATA.STD', [0.5]]
    assert flatten(get_config(None, opts))[key] == value


def test_recomputing_traced_programs_is_refused():
    with pytest.raises(ValueError, match=r'TRAIN\.RECOMPUTE is 1, TRAIN\.TO_STATIC is True; .*eager mode'):
        get_config(None, ['TRAIN.RECOMPUTE', 1, 'TRAIN.TO_STATIC', True])
