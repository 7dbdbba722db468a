"""A start that wrong input ends before training leaves nothing behind, and removes nothing of before."""
import os

from system import stopping

import pytest
from runs import TINY, make_images, options, program

from config import get_config
from training import checkpoint, engine

MISTAKES = {
    'no list': ['DATA.DATA_PATH', 'nowhere'], 'no weights': ['MODEL.PRETRAINED', 'nowhere.pdparams'],
    'a checkpoint that is not there': ['MODEL.RESUME', 'nowhere.pdckpt'],
    'a batch too large': ['DATA.BATCH_SIZE', 99],
    'no weights to evaluate': ['EVAL', True],
    'a damaged file to evaluate': ['EVAL', True, 'MODEL.PRETRAINED', __file__],
    'a model that cannot be': ['MODEL.HEADS', [0, 0]],
    'a policy that is none': ['TRAIN.AUTO_AUGMENT', 'rand-x']}


def start(images, *opts):
    return engine.run(get_config(None, [*TINY, 'DATA.DATA_PATH', images, *opts]))


def content(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob('*')}


@pytest.mark.parametrize('how', MISTAKES)
@pytest.mark.parametrize('where', [['OUTPUT', 'new/run'], ['SAVE', 'new/output']])
def test_failed_start_leaves_no_folder(images, tmp_path, monkeypatch, how, where):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(stopping.MISTAKES):
        start(images, *MISTAKES[how], *where)
    assert content(tmp_path) == {}


@pytest.mark.parametrize('how', MISTAKES)
def test_existing_files_are_not_removed(images, tmp_path, monkeypatch, how):
    """An empty folder, one with files of the user, and one with an earlier run."""
    monkeypatch.chdir(tmp_path)
    for name in ('empty', 'notes', 'run'):
        (tmp_path / name).mkdir()
    (tmp_path / 'notes/notes.txt').write_text('mine')
    for name in ('config.yaml', 'machine.json', 'metrics.jsonl', 'log.txt', 'best.pdparams', 'run.lock'):
        (tmp_path / 'run' / name).write_text(f'an earlier {name}\n')
    before = content(tmp_path)
    for name in ('empty', 'notes', 'run'):
        with pytest.raises(stopping.MISTAKES):
            start(images, *MISTAKES[how], 'OUTPUT', name)
    after = content(tmp_path)
    assert after.pop('run/log.txt').startswith(before.pop('run/log.txt'))
    before.pop('run/run.lock'), after.pop('run/run.lock')
    new = {f'{name}/{file}' for name in ('empty', 'notes') for file in ('log.txt', 'run.lock')}
    assert {name for name in after if name not in before} == new     # a folder of the user gets the log
    assert {name: before[name] for name in before} == {name: after[name] for name in before}


def test_evaluation_of_a_broken_image_leaves_no_folder(images, tmp_path, monkeypatch):
    start(images, 'OUTPUT', str(tmp_path / 'run'))
    data = tmp_path / 'data'
    make_images(data)
    (data / 'val' / '7.png').write_bytes(b'')
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r'val_list.txt:8 .*7\.png: the file is empty'):
        start(str(data), 'OUTPUT', str(tmp_path / 'eval'), 'EVAL', True,
              'MODEL.PRETRAINED', str(tmp_path / 'run/final'))
    assert content(tmp_path) == before


def test_started_training_keeps_its_folder(images, tmp_path):
    data = tmp_path / 'data'
    make_images(data)
    (data / 'train' / '7.png').write_bytes(b'')
    with pytest.raises(ValueError, match='the file is empty'):
        start(str(data), 'OUTPUT', str(tmp_path / 'run'))
    assert {'log.txt', 'config.yaml', 'machine.json'} <= {*os.listdir(tmp_path / 'run')}


def test_refused_resume_keeps_machine_json(images, tmp_path):
    start(images, 'OUTPUT', str(tmp_path / 'run'))
    before = content(tmp_path)
    with pytest.raises(ValueError, match='other settings'):
        start(images, 'OUTPUT', str(tmp_path / 'run'), 'MODEL.RESUME', 'auto', 'SEED', 9)
    after = content(tmp_path)
    assert after.pop('run/log.txt').startswith(before.pop('run/log.txt'))
    before.pop('run/run.lock'), after.pop('run/run.lock')
    assert after == before and checkpoint.newest(tmp_path / 'run')


def test_failed_start_is_reported_in_one_line(images, tmp_path):
    done = program('main_single_gpu.py', '-data_path', tmp_path / 'nowhere', '-output', tmp_path / 'a' / 'b',
                   *options(TINY), check=False)
    assert done.returncode == 2 and done.stdout.splitlines()[-1].startswith('error: ')
    assert content(tmp_path) == {} and 'Traceback' not in done.stdout + done.stderr


@pytest.mark.slow
def test_failed_start_of_two_processes_leaves_no_folder(tmp_path):
    done = program('main_multi_gpu.py', '-nprocs', 2, '-data_path', tmp_path / 'nowhere',
                   '-output', tmp_path / 'a' / 'b', *options(TINY), check=False)
    assert done.returncode == 2 and content(tmp_path) == {}


# ---- weights of another model, more passes than an epoch has

OTHER = [
    'MODEL.STAGES', ['conv', 'conv'], 'MODEL.HEADS', [0, 0], 'MODEL.WIDTHS', [16, 16], 'MODEL.NAME', 'other']


@pytest.mark.parametrize('opts', [['EVAL', True], []])
def test_weights_of_another_model_name_it(images, tmp_path, opts):
    start(images, 'OUTPUT', str(tmp_path / 'run'), 'TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0)
    for path in (tmp_path / 'run/final.pdparams', checkpoint.newest(tmp_path / 'run')):
        message = 'the weights do not fit the model, and nothing was loaded'
        with pytest.raises(ValueError, match=message) as error:
            start(images, *OTHER, *opts, 'MODEL.PRETRAINED', str(path), 'OUTPUT', str(tmp_path / 'new'))
        text = str(error.value)
        beside = f'{tmp_path}/run/config.yaml'
        assert f'{beside} describes another model (MODEL.NAME tiny there and other here, ' in text
        assert text.endswith('; give that file by -cfg') and len(text) < 1000
    with pytest.raises(ValueError, match='describes another model'):
        start(images, *OTHER, 'EVAL', True, 'MODEL.RESUME', str(path), 'OUTPUT', str(tmp_path / 'new'))
    os.remove(tmp_path / 'run/config.yaml')
    with pytest.raises(ValueError) as error:
        start(images, *OTHER, 'MODEL.PRETRAINED', str(path), 'OUTPUT', str(tmp_path / 'new'))
    assert 'config.yaml' not in str(error.value)


def test_accumulation_over_more_passes_than_an_epoch(images, tmp_path):
    """20 images are 2 batches of 8: a step of 16 images, whatever is asked for."""
    start(images, 'OUTPUT', str(tmp_path), 'TRAIN.ACCUM_ITER', 1000, 'TRAIN.LR_BATCH', 16,
          'TRAIN.BASE_LR', 0.002)
    log = (tmp_path / 'log.txt').read_text()
    assert 'TRAIN.ACCUM_ITER is 1000 and an epoch has 2 forward passes: it is one step' in log
    assert ('1 steps per epoch of 16 images (8 per forward pass x 1 processes x 2 passes), '
            'learning rate 2.000e-03') in log
