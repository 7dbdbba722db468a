"""The command line of the main programs: flags, -opts, help, and mistakes in one line."""
import re

import pytest

from config import OPTIONS, defaults, flatten, parse_args

DEFAULTS = defaults()
FLAGS = {
    'data_path': ('some dir', 'DATA.DATA_PATH', 'some dir'),
    'dataset': ('imagenet2012', 'DATA.DATASET', 'imagenet2012'),
    'batch_size': ('3', 'DATA.BATCH_SIZE', 3), 'batch_size_eval': ('4', 'DATA.BATCH_SIZE_EVAL', 4),
    'image_size': ('512', 'DATA.IMAGE_SIZE', 512), 'num_workers': ('0', 'DATA.NUM_WORKERS', 0),
    'accum_iter': ('2', 'TRAIN.ACCUM_ITER', 2), 'pretrained': ('a.pdparams', 'MODEL.PRETRAINED',
                                                               'a.pdparams'),
    'resume': ('auto', 'MODEL.RESUME', 'auto'), 'last_epoch': ('0', 'TRAIN.LAST_EPOCH', 0),
    'output': ('7', 'OUTPUT', '7'),
    'results': ('r.csv', 'RESULTS', 'r.csv'),
    'device': ('cpu', 'DEVICE', 'cpu'), 'nprocs': ('2', 'NPROCS', 2), 'eval': (None, 'EVAL', True),
    'amp': (None, 'AMP', True), 'check': (None, 'CHECK', True), 'check_batch': (None, 'CHECK_BATCH', True),
}


def refuses(argv, capsys):
    """Return the one line with which the command line `argv` ends the program."""
    with pytest.raises(SystemExit) as stop:
        parse_args(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ''
    *usage, line = err.splitlines()
    assert ': error: ' in line and not any('error' in text for text in usage)
    return line


# ---- flags and -opts

@pytest.mark.parametrize('name', FLAGS)
@pytest.mark.parametrize('dashes', ['-', '--'])
def test_flag_sets_its_option(name, dashes):
    text, key, expected = FLAGS[name]
    forms = [[dashes + name]] if text is None else [[dashes + name, text], [f'{dashes}{name}={text}']]
    for argv in forms:
        assert flatten(parse_args(argv)) == DEFAULTS | {key: expected}


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(['-h'])
    assert stop.value.code == 0
    text = ' '.join(capsys.readouterr().out.split())
    assert {*re.findall(r' -\w+(?: [A-Z ]+)?, --(\w+)', text)} >= {*FLAGS, 'cfg'}
    assert {option.name for option in OPTIONS if option.flag} == {*FLAGS}
    for option in OPTIONS:
        assert (f'--{option.name} ' in text) == option.flag
        assert not option.flag or option.comment in text


@pytest.mark.parametrize('cfg', [['-cfg=FILE'], ['--cfg=FILE'], ['-cfg', 'FILE'], ['--cfg', 'FILE']])
@pytest.mark.parametrize('opts', ['-opts', '--opts'])
def test_cfg_flags_and_opts(write, cfg, opts):
    path = write('a.yaml', 'SEED: 1\nDATA: {BATCH_SIZE: 1, IMAGE_SIZE: 1}\nEVAL: True')
    flags = ['-batch_size=2', '-last_epoch', '-1']
    config = parse_args([text.replace('FILE', path) for text in cfg] + flags
                        + [opts, 'DATA.IMAGE_SIZE', '3', 'TRAIN.BASE_LR', '1e-2'])
    changed = {'SEED': 1, 'DATA.BATCH_SIZE': 2, 'DATA.IMAGE_SIZE': 3, 'TRAIN.BASE_LR': 0.01, 'EVAL': True}
    assert flatten(config) == DEFAULTS | changed


def test_repeated_opts_add_up():
    config = parse_args(['-opts', 'SEED', '1', 'NPROCS', '2', '-amp', '-opts', 'SAVE_KEEP', '9',
                         'TRAIN.LAST_EPOCH', '-1'])
    assert flatten(config) == DEFAULTS | {'SEED': 1, 'NPROCS': 2, 'AMP': True, 'SAVE_KEEP': 9}
    assert flatten(parse_args([])) == DEFAULTS


@pytest.mark.parametrize('flag, key, value, shown', [
    (['-batch_size', '2'], 'DATA.BATCH_SIZE', '3', '-batch_size says 2 and -opts DATA.BATCH_SIZE says 3'),
    (['--eval'], 'EVAL', 'False', '-eval says True and -opts EVAL says False'),
    (['-ngpus=2'], 'NPROCS', '4', '-nprocs says 2 and -opts NPROCS says 4'),
    (['-output=a'], 'OUTPUT', 'b', "-output says 'a' and -opts OUTPUT says 'b'")])
def test_flag_that_contradicts_opts_is_refused(flag, key, value, shown, capsys):
    assert f'{shown}, of the same option; leave one out' in refuses([*flag, '-opts', 'SEED', '1', key,
                                                                     value], capsys)
    same = flag[-1].split('=')[-1] if key != 'EVAL' else 'True'
    assert parse_args([*flag, '-opts', key, same]) == parse_args(flag)


def test_flag_and_opts_are_compared_as_values(capsys):
    assert parse_args(['-batch_size', '8', '-opts', 'DATA.BATCH_SIZE', ' 8']).DATA.BATCH_SIZE == 8
    assert "DATA.BATCH_SIZE must be a whole number, got 'x'" in refuses(['-batch_size', '8', '-opts',
                                                                         'DATA.BATCH_SIZE', 'x'],
                                                                        capsys)


def test_arguments_of_the_program_are_the_default(monkeypatch):
    monkeypatch.setattr('sys.argv', ['main.py', '-batch_size', '9'])
    assert parse_args().DATA.BATCH_SIZE == 9


def test_tilde_in_the_path_of_the_config_file(write, tmp_path, monkeypatch):
    write('own.yaml', 'SEED: 6')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert parse_args(['-cfg=~/own.yaml']).SEED == 6


# ---- mistakes

@pytest.mark.parametrize('argv, message', [
    (['-batch_size', 'many'], "DATA.BATCH_SIZE must be a whole number, got 'many'"),
    (['-batch_size=0'], 'DATA.BATCH_SIZE is 0; it must be at least 1'),
    (['-opts', 'DATA.BACKEND', 'gd'], "DATA.BACKEND is 'gd'; it can be pillow or cv2"),
    (['-cfg', 'none.yaml'], 'none.yaml: no such config file'),
    (['-opts', 'SED', '1'], 'unknown option SED; did you mean SEED?'),
    (['-opts', 'SEED'], "'SEED' has no value"),
    (['-batchsize', '3'], 'unrecognized arguments: -batchsize 3; did you mean -batch_size?'),
    (['--batchsize=3'], 'unrecognized arguments: --batchsize=3; did you mean -batch_size?'),
    (['-opts', 'SEED', '1', '-data-path', 'x'],
     'unrecognized arguments: -data-path x; did you mean -data_path?'),
    (['-num_classes', '3'], 'did you mean -opts MODEL.NUM_CLASSES?'),
    (['-cfg', 'halonet_26'], 'halonet_26: no such config file; did you mean configs/halonet_26t_256.yaml?'),
    (['-data_path=~nobody_of_that_name/x'], 'there is no such user; write ./~nobody_of_that_name/x'),
    (['--batch', '3'], 'unrecognized arguments: --batch 3'),           # no abbreviations
    (['-batch_size'], 'expected one argument'),
    (['train'], 'unrecognized arguments: train')])
def test_mistake_is_one_line(argv, message, capsys):
    assert message in refuses(argv, capsys)


@pytest.mark.parametrize('argv', [['-batchsize', '3'], ['-batch_size'], ['-batch_size', 'x'],
                                  ['-cfg', 'none']])
def test_mistake_is_one_line_without_the_usage(argv, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('content', ['DATA: {IMAGE_SIZE: 3', 'TRIAN: {BASE_LR: 1}', 'SEED: x',
                                     'BASE: none.yaml'])
def test_mistake_in_a_file_is_one_line(write, content, capsys):
    path = write('wrong.yaml', content)
    assert path in refuses(['-cfg', path], capsys)
