"""Options that are asked of one start of the program: they end with it, and an explicit flag decides."""
import csv
import logging

from tools import cli, eval_all, predict

import pytest
import yaml
from runs import TINY, options, program, records

from config import OF_ONE_START, dump_run, flatten, get_config, parse_args
from reporting import page, runs
from training import checkpoint, engine


def start(images, output, *opts, cfg=None):
    """One start as on the command line, with options that a user would repeat each time."""
    always = [] if cfg else [*TINY, 'DATA.DATA_PATH', images]
    return engine.run(get_config(cfg and str(cfg), [*always, 'OUTPUT', str(output), *opts]))


@pytest.fixture(scope='module')
def resumed(images, tmp_path_factory):
    """A run that got every option of one start, in several starts; and weights that are not its newest."""
    folder = tmp_path_factory.mktemp('resumed')
    start(images, folder / 'other', 'SEED', 5, 'TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0)
    weights = ['MODEL.PRETRAINED', str(folder / 'other' / 'final.pdparams'), 'MODEL.RESUME', 'auto']
    keep = ['SAVE_KEEP', 9, 'TRAIN.EMA_DECAY', 0.5, 'RESULTS', 'r.csv', 'NPROCS', 1]
    start(images, folder / 'run', *weights, *keep)
    start(images, folder / 'run', *weights, *keep, 'TRAIN.LAST_EPOCH', 1, 'MODEL.RESUME_FORCE', True)
    return folder


def write_as_before(folder, path, **values):
    """config.yaml as earlier versions wrote it: a dump of all options."""
    opts = [item for key, value in values.items() for item in (key.replace('__', '.'), value)]
    path.write_text(get_config(str(folder / 'run' / 'config.yaml'), opts).dump())
    return path


def losses(folder):
    return [record['loss'] for record in records(folder, 'val')]


def test_run_folder_keeps_no_option_of_one_start(resumed):
    content = yaml.safe_load((resumed / 'run' / 'config.yaml').read_text())
    written = flatten(content)
    assert not set(OF_ONE_START) & written.keys()
    assert written.keys() | set(OF_ONE_START) == flatten(get_config()).keys()
    assert written['TRAIN.EMA_DECAY'] == 0.5


def test_log_has_the_command_of_every_start(resumed):
    assert (resumed / 'run' / 'log.txt').read_text().count('started by: ') == 2


def test_explicit_weights_are_evaluated(images, resumed, tmp_path):
    other = resumed / 'other' / 'final.pdparams'
    expected = start(images, tmp_path / 'plain', 'EVAL', True, 'MODEL.PRETRAINED', str(other))['val']['loss']
    newest = start(images, tmp_path / 'newest', 'EVAL', True, 'MODEL.RESUME',
                   checkpoint.newest(resumed / 'run'))['val']['loss']
    assert expected != newest
    new = resumed / 'run' / 'config.yaml'
    old = write_as_before(resumed, tmp_path / 'config.yaml', MODEL__RESUME='auto', TRAIN__LAST_EPOCH=1)
    old_file = write_as_before(resumed, tmp_path / 'old.yaml',
                               MODEL__RESUME=checkpoint.newest(resumed / 'run'),
                               MODEL__PRETRAINED_EMA=True)
    by_hand = tmp_path / 'by_hand.yaml'
    by_hand.write_text(f'BASE: {new}\nMODEL: {{RESUME: "{checkpoint.newest(resumed / "run")}"}}\n')
    for cfg in (new, old, old_file, by_hand):
        result = start(images, tmp_path / cfg.stem, 'EVAL', True, 'MODEL.PRETRAINED', str(other), cfg=cfg)
        assert result['val']['loss'] == expected, cfg


def test_explicit_resume_overrides_weights_of_a_file(images, resumed, tmp_path):
    newest = checkpoint.newest(resumed / 'run')
    path = tmp_path / 'c.yaml'
    path.write_text(f'BASE: {resumed}/run/config.yaml\n'
                    f'MODEL: {{PRETRAINED: "{resumed}/other/final.pdparams"}}\n')
    result = start(images, tmp_path / 'eval', 'EVAL', True, 'MODEL.RESUME', newest, cfg=path)['val']['loss']
    assert result == start(images, tmp_path / 'b', 'EVAL', True, 'MODEL.RESUME', newest)['val']['loss']


@pytest.mark.parametrize('opts, conflict', [
    (['-eval', '-pretrained', 'x', '-resume', 'auto', '-output', 'o'], '-resume auto'),
    (['-eval', '-pretrained=x', '-resume=y'], '-resume y'),
    (['-pretrained', 'x', '-resume', 'y'], '-resume y'),
    (['-pretrained', 'x', '-opts', 'MODEL.RESUME', 'y'], '-resume y')])
def test_two_sources_of_weights_are_refused(opts, conflict, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(opts)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f'-pretrained x and {conflict} name different weights; leave one of them out' in error
    assert error.count('\n') == 1


def test_two_sources_in_one_file_are_refused(tmp_path):
    (tmp_path / 'c.yaml').write_text('MODEL: {PRETRAINED: x, RESUME: y}')
    with pytest.raises(ValueError, match='name different weights'):
        get_config(tmp_path / 'c.yaml')
    assert get_config(tmp_path / 'c.yaml', ['MODEL.RESUME', 'z']).MODEL.PRETRAINED == ''
    assert get_config(tmp_path / 'c.yaml', ['MODEL.PRETRAINED', 'z']).MODEL.RESUME == ''


def test_resume_auto_may_start_from_pretrained():
    config = parse_args(['-pretrained', 'x', '-resume', 'auto'])
    assert (config.MODEL.PRETRAINED, config.MODEL.RESUME) == ('x', 'auto')


def test_config_by_hand_may_hold_these_options(tmp_path):
    (tmp_path / 'c.yaml').write_text('EVAL: True\nOUTPUT: o\nMODEL: {PRETRAINED: x, PRETRAINED_EMA: True}')
    config = get_config(tmp_path / 'c.yaml')
    assert (config.EVAL, config.OUTPUT) == (True, 'o')
    assert (config.MODEL.PRETRAINED, config.MODEL.PRETRAINED_EMA) == ('x', True)


def test_options_left_out_of_an_old_file_are_logged(resumed, tmp_path, caplog):
    old = write_as_before(resumed, tmp_path / 'config.yaml', MODEL__RESUME='auto', MODEL__PRETRAINED='x')
    with caplog.at_level(logging.WARNING, 'halonet'):
        get_config(old)
    messages = [record.getMessage().partition(': ')[2] for record in caplog.records]
    end = 'belongs to the start that wrote this file, and is ignored'
    assert messages == [f'MODEL.PRETRAINED x {end}', f'MODEL.RESUME auto {end}']


def test_config_of_an_evaluation_keeps_eval():
    text = dump_run(get_config(None, ['EVAL', True, 'MODEL.PRETRAINED', 'x']))
    assert yaml.safe_load(text)['EVAL'] is True and 'PRETRAINED' not in text


# ---- -last_epoch

def test_last_epoch_counts_once_in_a_run(images, tmp_path, monkeypatch):
    """A run is moved to epoch 1, fails in epoch 3 and is started again with the same options: it goes on."""
    start(images, tmp_path, 'TRAIN.NUM_EPOCHS', 4, 'SAVE_KEEP', 9)
    again = ['TRAIN.NUM_EPOCHS', 4, 'SAVE_KEEP', 9, 'MODEL.RESUME', 'auto', 'TRAIN.LAST_EPOCH', 1]
    train_one_epoch, epochs = engine.train_one_epoch, []

    def fail_in_epoch_3(training, progress, *rest):
        epochs.append(progress.epoch + 1)
        if epochs == [2, 3]:
            raise RuntimeError('a failure')
        train_one_epoch(training, progress, *rest)
    monkeypatch.setattr(engine, 'train_one_epoch', fail_in_epoch_3)
    with pytest.raises(RuntimeError, match='a failure'):
        start(images, tmp_path, *again)
    start(images, tmp_path, *again)
    start(images, tmp_path, *again)                 # nothing is left to do
    assert epochs == [2, 3, 3, 4]
    assert 'an earlier start of this run did that' in (tmp_path / 'log.txt').read_text()
    start(images, tmp_path, *again[:-1], 3)         # another epoch is asked for
    assert epochs == [2, 3, 3, 4, 4]


def test_checkpoint_of_an_earlier_version_was_not_moved():
    assert checkpoint.Progress(**{'epoch': 2, 'step': 4, 'steps_of_epoch': 0, 'best': {}}).moved_to == -1


# ---- tools that read RUN/config.yaml

@pytest.mark.parametrize('of_before', [False, True])
def test_tools_use_the_given_weights(resumed, tmp_path, of_before):
    cfg = resumed / 'run' / 'config.yaml'
    if of_before:
        cfg = write_as_before(resumed, tmp_path / 'config.yaml', MODEL__RESUME='auto',
                              MODEL__PRETRAINED_EMA=True)
    path = str(resumed / 'other' / 'final.pdparams')
    config = cli.config_of(predict.parser().parse_args(['-cfg', str(cfg), '-pretrained', path, 'x.png']))
    assert (config.MODEL.PRETRAINED, config.MODEL.RESUME, config.MODEL.PRETRAINED_EMA) == (path, '', False)
    cli.load_model(config)


def test_each_row_of_a_table_has_its_own_weights(images, resumed, tmp_path):
    """Also with a cfg that people wrote to go on with a run."""
    (tmp_path / 'hand.yaml').write_text(f'BASE: {resumed}/run/config.yaml\n'
                                        f'MODEL: {{RESUME: "{checkpoint.newest(resumed / "run")}"}}\n')
    weights = [str(resumed / name / 'final.pdparams') for name in ('other', 'run')]
    entries = [{'cfg': 'hand.yaml', 'pretrained': path} for path in weights]
    (tmp_path / 'models.yaml').write_text(yaml.safe_dump(entries))
    with pytest.raises(SystemExit) as stop:
        eval_all.parser().run(eval_all.main, [str(tmp_path / 'models.yaml'), '-data_path', images,
                                              '-results', str(tmp_path / 'all.csv')])
    assert stop.value.code == 0
    with open(tmp_path / 'all.csv', encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['weights'] for row in rows] == [entry['pretrained'] for entry in entries]
    for row, entry in zip(rows, entries):
        loss = start(images, tmp_path / 'e', 'EVAL', True, 'MODEL.PRETRAINED',
                     entry['pretrained'])['val']['loss']
        assert float(row['loss']) == pytest.approx(loss, abs=1e-5)


def test_table_without_the_row_is_refused(tmp_path):
    (tmp_path / 'r.csv').write_text('weights,top1\na,1\n')
    with pytest.raises(ValueError, match='no line about b'):
        eval_all.last_line(str(tmp_path / 'r.csv'), 'b')


def test_page_names_the_first_weights_of_a_run(resumed):
    run = runs.read_run(str(resumed / 'run'))
    assert run.config['MODEL.PRETRAINED'] == str(resumed / 'other' / 'final.pdparams')
    assert 'MODEL.PRETRAINED' in [row[0] for row in page.configuration(run).differing.rows]
    assert runs.read_run(str(resumed / 'other')).config['MODEL.PRETRAINED'] == ''
    changed = {*runs.differences(run.config, flatten(get_config()))}
    assert not changed & {*OF_ONE_START} - {'MODEL.PRETRAINED'}


@pytest.mark.slow
def test_main_programs_evaluate_explicit_weights(images, resumed, tmp_path):
    old = write_as_before(resumed, tmp_path / 'config.yaml', MODEL__RESUME='auto')
    other = resumed / 'other' / 'final.pdparams'
    done = program('main_single_gpu.py', '-cfg', old, '-eval', '-pretrained', other,
                   '-output', tmp_path / 'a', '-data_path', images)
    assert f'evaluating {other}' in done.stdout and 'MODEL.RESUME auto belongs to the start' in done.stderr
    done = program('main_single_gpu.py', '-eval', '-pretrained', other, '-resume', 'auto',
                   '-output', tmp_path / 'b', *options(TINY), check=False)
    assert done.returncode == 2 and not (tmp_path / 'b').exists() and done.stderr.count('\n') == 1
