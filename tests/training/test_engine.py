"""Whole runs on a few small images: training, evaluation, resuming, several processes."""
import math
import os
import re
import shutil
import time
from contextlib import nullcontext
from types import SimpleNamespace

import utils

import numpy as np
import paddle
import pytest
from exact_runs import EVERYTHING, run, untimed_records
from runs import TINY, options, program, records

import datasets
from config import get_config
from halonet import build_halonet
from model import safe_pickle
from training import builders, checkpoint, engine, optim


def weights_of(folder, name='final.pdparams'):
    return {key: value.numpy() for key, value in paddle.load(os.path.join(folder, name)).items()}


def test_run_writes_weights_metrics_config_and_log(images, tmp_path):
    results = run(images, tmp_path / 'run')
    model = build_halonet(get_config(str(tmp_path / 'run' / 'config.yaml')))
    for name in ('best.pdparams', 'final.pdparams'):
        model.set_state_dict(paddle.load(str(tmp_path / 'run' / name)))      # raises unless complete
    train, val = records(tmp_path / 'run', 'train'), records(tmp_path / 'run', 'val')
    assert [r['step'] for r in train] == [1, 2, 3, 4] and [r['epoch'] for r in val] == [1, 2]
    keys = {'epoch', 'step', 'split', 'loss', 'acc1', 'acc5', 'lr', 'images_per_s'}
    assert all(set(r) == keys for r in val) and all(set(r) == keys | {'data_wait'} for r in train)
    assert val[-1]['acc1'] == pytest.approx(results['val']['acc1']) and results['val']['images'] == 11
    schedule = dict(total_steps=4, warmup_steps=2, base_lr=1e-3, warmup_lr=1e-6, end_lr=1e-6)
    expected = [optim.lr_at(step, **schedule) for step in range(4)]
    assert [r['lr'] for r in train] == pytest.approx(expected, rel=1e-6)
    assert 'acc@1' in (tmp_path / 'run' / 'log.txt').read_text()


def test_training_learns(images, tmp_path):
    results = run(images, tmp_path / 'run', 'TRAIN.NUM_EPOCHS', 20, 'TRAIN.BASE_LR', 0.01,
                  'TRAIN.CROP_SCALE', [0.8, 1.0])
    assert results['val']['acc1'] > 90


def test_evaluation_of_saved_weights_equals_that_of_the_run(images, full_run, tmp_path):
    last = records(full_run, 'val')[-1]
    result = run(images, tmp_path, 'EVAL', True, 'MODEL.PRETRAINED', str(full_run / 'final.pdparams'))['val']
    assert (result['acc1'], result['acc5']) == (pytest.approx(last['acc1']), pytest.approx(last['acc5']))
    assert result['loss'] == pytest.approx(last['loss'], rel=1e-6)
    averaged = run(images, tmp_path, 'EVAL', True, 'MODEL.PRETRAINED', str(full_run / 'final_ema'))['val']
    assert averaged['loss'] == pytest.approx(records(full_run, 'val_ema')[-1]['loss'], rel=1e-6)


def test_evaluation_of_the_newest_checkpoint(images, full_run, tmp_path):
    shutil.copytree(full_run / 'checkpoints', tmp_path / 'checkpoints')
    result = run(images, tmp_path, 'EVAL', True, 'MODEL.RESUME', 'auto')['val']
    assert result['loss'] == pytest.approx(records(full_run, 'val')[-1]['loss'], rel=1e-6)


@pytest.mark.parametrize('resume', ['auto', 'step_00000012.pdckpt'])
def test_evaluation_reads_its_checkpoint_once(images, full_run, tmp_path, monkeypatch, resume):
    shutil.copytree(full_run / 'checkpoints', tmp_path / 'checkpoints')
    read, load = [], safe_pickle.load
    monkeypatch.setattr(safe_pickle, 'load', lambda file, *more: read.append(file.name) or load(file, *more))
    path = str(tmp_path / 'checkpoints' / 'step_00000012.pdckpt')
    run(images, tmp_path, 'EVAL', True, 'MODEL.RESUME', path if resume != 'auto' else resume)
    assert read == [path]


@pytest.mark.parametrize('ema, split', [(False, 'val'), (True, 'val_ema')])
def test_table_names_the_evaluated_checkpoint(images, full_run, tmp_path, ema, split):
    path = str(full_run / 'checkpoints' / 'step_00000012.pdckpt')
    table = tmp_path / 'table.csv'
    shutil.copytree(full_run / 'checkpoints', tmp_path / 'checkpoints')
    for resume, name in (('auto', str(tmp_path / 'checkpoints' / 'step_00000012.pdckpt')), (path, path)):
        result = run(images, tmp_path, 'EVAL', True, 'MODEL.RESUME', resume, 'MODEL.PRETRAINED_EMA', ema,
                     'RESULTS', str(table))
        assert result['val']['loss'] == pytest.approx(records(full_run, split)[-1]['loss'], rel=1e-6)
        assert name in table.read_text().splitlines()[-1].split(',')


def test_speed_excludes_the_time_between_epochs(images, tmp_path, monkeypatch):
    ahead, clock, evaluate_all = [0], time.perf_counter, engine.evaluate_all

    def slow(*words):
        ahead[0] += 1e6
        return evaluate_all(*words)

    monkeypatch.setattr(time, 'perf_counter', lambda: clock() + ahead[0])
    monkeypatch.setattr(engine, 'evaluate_all', slow)
    run(images, tmp_path)
    assert min(record['images_per_s'] for record in records(tmp_path, 'train')) > 1e-3


@pytest.mark.parametrize('mode, images_per_step', [('batch', 8), ('half', 4)])
def test_progress_line_counts_the_trained_images(images, tmp_path, monkeypatch, mode, images_per_step):
    counts = []
    monkeypatch.setattr(builders.Monitor, 'step', lambda self, lr, images: counts.append(images))
    run(images, tmp_path, 'TRAIN.MIXUP_ALPHA', 1.0, 'TRAIN.MIXUP_MODE', mode, 'DATA.BATCH_SIZE', 4,
        'TRAIN.ACCUM_ITER', 2)
    assert counts == [images_per_step, images_per_step, images_per_step // 2] * 2    # 5 batches an epoch


def test_skipped_images_of_all_processes_are_logged(monkeypatch, caplog):
    class OneBatch(SimpleNamespace):
        def __len__(self):
            return 1
    batch = paddle.zeros([2, 3]), paddle.zeros([2], 'int64'), [0, 1]
    evaluation = SimpleNamespace(
        loader=OneBatch(epoch=lambda epoch: [batch], skipped=0), stop=SimpleNamespace(requested=False),
        autocast=nullcontext, to_input=lambda x: x, predictions=SimpleNamespace(add=lambda *words: None),
        judge=lambda logits, labels, indices: (logits, labels))
    monkeypatch.setattr(utils, 'gather', lambda value: [value, 2, 1])
    engine.evaluate(paddle.nn.Linear(3, 4), evaluation)
    assert '3 unreadable images were left out' in caplog.text


def test_other_list_is_evaluated(images, full_run, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(images, data)
    lines = (data / 'val_list.txt').read_text().splitlines(keepends=True)
    (data / 'test_list.txt').write_text(''.join(lines[:5]))
    found = run(str(data), tmp_path / 'run', 'EVAL', True, 'DATA.EVAL_LIST', 'test_list.txt',
                'MODEL.PRETRAINED', str(full_run / 'final.pdparams'))
    assert found['val']['images'] == 5
    assert f'{data}/test_list.txt' in (tmp_path / 'run' / 'results.csv').read_text()


def test_evaluation_equals_a_plain_loop(images, full_run, tmp_path):
    config = get_config(None, [*TINY, 'DATA.DATA_PATH', images])
    model = build_halonet(config)
    model.set_state_dict(paddle.load(str(full_run / 'final.pdparams')))
    model.eval()
    losses, right = [], []
    for line in open(os.path.join(images, 'val_list.txt'), encoding='utf-8'):
        path, label = line.split()
        pixels = datasets.eval_pixels(datasets.Image.open(os.path.join(images, path)), 16, 1.0)
        x = (pixels / 255 - config.DATA.MEAN) / config.DATA.STD
        x = paddle.to_tensor(x.transpose(2, 0, 1)[None].astype('float32'))
        logits = model(x).numpy()[0].astype('float64')
        losses.append(math.log(np.exp(logits).sum()) - logits[int(label)])
        right.append(logits.argmax() == int(label))
    result = run(images, tmp_path, 'EVAL', True, 'MODEL.PRETRAINED', str(full_run / 'final.pdparams'))['val']
    assert result['acc1'] == pytest.approx(100 * np.mean(right)) and result['acc5'] == 100
    assert result['loss'] == pytest.approx(np.mean(losses), rel=1e-5)


def test_resuming_at_an_epoch_gives_the_same_bytes(images, full_run, tmp_path):
    """From the checkpoint after epoch 2, beside a torn newer one, with data workers instead of none."""
    shutil.copytree(full_run / 'checkpoints', tmp_path / 'checkpoints')
    shutil.copy(full_run / 'metrics.jsonl', tmp_path / 'metrics.jsonl')
    paths = checkpoint.steps(tmp_path)
    assert [checkpoint.load(path)['progress']['epoch'] for path in paths] == [4, 3, 2, 1]
    os.remove(paths[0])
    with open(paths[1], 'r+b') as file:
        file.truncate(1000)
    run(images, tmp_path, *EVERYTHING, 'MODEL.RESUME', 'auto',
        'DATA.NUM_WORKERS', 2)
    assert f'{os.path.basename(paths[1])}: this is no checkpoint' in (tmp_path / 'log.txt').read_text()
    for name in ('final.pdparams', 'final_ema.pdparams', 'best.pdparams'):
        if name != 'best.pdparams' or (tmp_path / name).exists():    # best may be older than the checkpoint
            assert (tmp_path / name).read_bytes() == (full_run / name).read_bytes()
    assert untimed_records(full_run) == untimed_records(tmp_path)


def test_last_epoch_moves_the_start(images, full_run, tmp_path):
    run(images, tmp_path, *EVERYTHING, 'TRAIN.LAST_EPOCH', 3,
        'MODEL.RESUME', checkpoint.steps(full_run)[2])
    assert {r['epoch'] for r in records(tmp_path)} == {4}


def test_folder_with_a_run_is_not_overwritten(images, full_run, tmp_path):
    shutil.copytree(full_run / 'checkpoints', tmp_path / 'checkpoints')
    with pytest.raises(ValueError, match='holds a run already'):
        run(images, tmp_path)


def test_accumulated_batches_equal_one_batch(images, tmp_path):
    """Also in the last step of an epoch, which has one pass of the two."""
    common = ['MODEL.FREEZE_NORM', True, 'TRAIN.MIXUP_ALPHA', 0.8, 'TRAIN.NUM_EPOCHS', 1,
              'TRAIN.WARMUP_EPOCHS', 0]
    run(images, tmp_path / 'one', *common, 'DATA.BATCH_SIZE', 20)
    run(images, tmp_path / 'five', *common, 'DATA.BATCH_SIZE', 4, 'TRAIN.ACCUM_ITER', 5)
    compare(tmp_path / 'one', tmp_path / 'five', 1e-6)
    run(images, tmp_path / 'short', *common, 'DATA.BATCH_SIZE', 8, 'TRAIN.ACCUM_ITER', 5)
    run(images, tmp_path / 'exact', *common, 'DATA.BATCH_SIZE', 16)
    compare(tmp_path / 'exact', tmp_path / 'short', 1e-6)


def compare(one, other, tolerance):
    one, other = weights_of(one), weights_of(other)
    assert max(np.abs(one[key] - other[key]).max() for key in one) < tolerance


def test_two_processes_equal_one(images, tmp_path):
    """Three steps of 4 + 4 images on two processes and of 8 on one, with the same erasing and mixing."""
    common = [*TINY, 'MODEL.FREEZE_NORM', True, 'TRAIN.MIXUP_ALPHA', 0.8, 'TRAIN.CUTMIX_ALPHA', 1.0,
              'TRAIN.RANDOM_ERASE_PROB', 0.5, 'TRAIN.EMA_DECAY', 0.9,
              'TRAIN.AUTO_AUGMENT', 'rand-m9-mstd0.5-inc1']
    common = options(drop_batch(common))
    flags = ['-data_path', images, '-output']
    two = program('main_multi_gpu.py', *flags, tmp_path / 'two', '-nprocs', 2, '-batch_size', 4, *common)
    one = program('main_single_gpu.py', *flags, tmp_path / 'one', '-batch_size', 8, *common)
    compare(tmp_path / 'one', tmp_path / 'two', 1e-5)
    results = evaluations(one)
    assert results == evaluations(two) and len(results) == 4 and '(11 images)' in results[0]
    again = program('main_multi_gpu.py', *flags, tmp_path / 'eval', '-nprocs', 2, '-eval', '-pretrained',
                    tmp_path / 'two' / 'final', *common)
    assert again.stdout.splitlines()[-1] == results[-2]
    assert (tmp_path / 'two' / 'log_rank1.txt').exists()


def evaluations(done):
    return [line for line in done.stdout.splitlines() if line.startswith(('val  ', 'val_ema  '))]


def drop_batch(opts):
    """-batch_size is given by flag, and -opts may not contradict it."""
    position = opts.index('DATA.BATCH_SIZE')
    return [*opts[:position], *opts[position + 2:]]


def test_main_programs_accept_the_flags_of_paddlevit(images, full_run, tmp_path):
    opts = ['DATA.CROP_PCT', 1.0]
    for key, value in zip(TINY[::2], TINY[1::2]):
        if key.startswith('MODEL'):
            opts += [key, value]
    done = program(
        'main_single_gpu.py', '-dataset=imagenet2012', '-batch_size=8', f'-data_path={images}', '-eval',
        '-amp', f'-pretrained={full_run / "final.pdparams"}', '-image_size=16', '-num_workers=0',
        f'-output={tmp_path}', *options(opts), CUDA_VISIBLE_DEVICES='')
    assert done.stdout.count('no GPU: running on the CPU') == 1
    assert done.stdout.count('mixed precision needs a GPU') == 1
    last = records(full_run, 'val')[-1]
    assert done.stdout.splitlines()[-1] == (
        f'val  acc@1 {last["acc1"]:.2f}  acc@5 {last["acc5"]:.2f}  loss {last["loss"]:.4f}  (11 images)')


SAYS_THREADS = '''
import atexit, sys
def say():
    if 'system.paddle_import' in sys.modules:
        print('threads', sys.modules['system.cpu'].user_threads(), file=sys.stderr)
atexit.register(say)
'''


@pytest.mark.parametrize('count, programs', [(1, 1), (2, 3)])                # with the one that starts two
def test_omp_num_threads_of_paddle_is_not_the_user_s(images, full_run, tmp_path, monkeypatch, count,
                                                     programs):
    """Paddle's import sets OMP_NUM_THREADS to 1: taken for the user's, it left each process one core."""
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    (tmp_path / 'sitecustomize.py').write_text(SAYS_THREADS)
    done = program('main_multi_gpu.py', '-data_path', images, '-eval', '-pretrained', full_run / 'final',
                   '-nprocs', count, '-output', tmp_path / 'run', *options(TINY), PYTHONPATH=str(tmp_path))
    assert done.stderr.count('threads None') == programs and 'threads 1' not in done.stderr
    assert 'Warning' not in done.stderr


def test_processes_of_the_launcher_are_used(images, full_run, tmp_path):
    launch = ['-m', 'paddle.distributed.launch', '--nproc_per_node', 2, '--log_dir', tmp_path / 'launch']
    done = program(*launch, 'main_multi_gpu.py', '-data_path', images, '-eval',
                   '-pretrained', full_run / 'final', '-output', tmp_path / 'run', *options(TINY))
    assert 'cpu x 2' in done.stdout and '(11 images)' in done.stdout


def test_damaged_checkpoints_do_not_displace_new_ones(images, full_run, tmp_path):
    shutil.copytree(full_run / 'checkpoints', tmp_path / 'checkpoints')
    for path in checkpoint.steps(tmp_path):
        os.truncate(path, 1000)
    run(images, tmp_path, *EVERYTHING, 'TRAIN.NUM_EPOCHS', 2, 'TRAIN.WARMUP_EPOCHS', 1, 'SAVE_KEEP', 1,
        'MODEL.RESUME', 'auto')
    assert [os.path.basename(path) for path in checkpoint.steps(tmp_path)] == ['step_00000006.pdckpt']


def test_failed_evaluation_loses_no_training(images, tmp_path):
    shutil.copytree(images, tmp_path / 'data')
    (tmp_path / 'data' / 'val' / '3.png').write_bytes(b'')
    with pytest.raises(ValueError, match='3.png'):
        run(str(tmp_path / 'data'), tmp_path / 'run')
    shutil.copy(os.path.join(images, 'val', '3.png'), tmp_path / 'data' / 'val' / '3.png')
    run(str(tmp_path / 'data'), tmp_path / 'run', 'MODEL.RESUME', 'auto')
    run(images, tmp_path / 'whole')
    repaired, whole = ((tmp_path / name / 'final.pdparams').read_bytes() for name in ('run', 'whole'))
    assert repaired == whole


def test_non_finite_evaluation_is_refused(images, tmp_path):
    with pytest.raises(FloatingPointError, match='loss of the evaluation is not finite'):
        run(images, tmp_path, 'DATA.BATCH_SIZE', 20, 'TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0,
            'TRAIN.BASE_LR', 1e38)
    assert not (tmp_path / 'best.pdparams').exists()


@pytest.mark.parametrize('opts, message', [
    (['OUTPUT', '', 'MODEL.RESUME', 'auto'], '-resume auto needs -output'),
    (['DATA.DATA_PATH', 'nowhere'], 'val_list.txt: no such list file'),
    (['EVAL', True], '-eval needs weights'),
    (['EVAL', True, 'MODEL.PRETRAINED', 'nowhere'], '-pretrained nowhere: no such file'),
    (['DEVICE', 'gpu'], 'Paddle sees no GPU here'),
    (['MODEL.NUM_CLASSES', 0], 'a backbone without a classifier'),
    (['MODEL.RESUME', 'nowhere'], 'nowhere: no such checkpoint'),
    (['EVAL', True, 'MODEL.RESUME', 'auto'], 'holds no good checkpoint'),
    (['DATA.BATCH_SIZE', 21], '20 training images do not fill one batch of 21'),
    (['TRAIN.BASE_LR', 1e30, 'TRAIN.WARMUP_EPOCHS', 0],
     'the loss is not finite: epoch 1, step 2, rank 0, learning rate 7.500e+29'),
])
def test_mistakes_are_reported(images, tmp_path, opts, message):
    with pytest.raises((ValueError, OSError, FloatingPointError), match=re.escape(message)):
        run(images, tmp_path, *opts)
    assert not (tmp_path / 'final.pdparams').exists() and not (tmp_path / 'checkpoints').exists()


def test_mistake_ends_a_program_with_one_line(images, tmp_path):
    done = program('main_single_gpu.py', '-data_path', images, '-output', tmp_path, '-eval',
                   '-pretrained', 'nowhere', *options(TINY), check=False)
    assert done.returncode == 2 and done.stdout.splitlines()[-1] == 'error: -pretrained nowhere: no such file'
    assert 'Traceback' not in done.stdout + done.stderr and 'Traceback' in (tmp_path / 'log.txt').read_text()


def test_unreadable_image_stops_every_process(images, tmp_path):
    shutil.copytree(images, tmp_path / 'data')
    (tmp_path / 'data' / 'train' / '7.png').write_bytes(b'not an image')
    words = ['-data_path', tmp_path / 'data', *options(TINY)]
    for workers in (0, 2):
        done = program('main_multi_gpu.py', '-nprocs', 2, '-output', tmp_path / f'run{workers}', *words,
                       'DATA.BATCH_SIZE', 4, 'DATA.NUM_WORKERS', workers, check=False)
        assert done.returncode == 2
        assert 'train_list.txt:8' in done.stdout + done.stderr and '7.png' in done.stdout + done.stderr
    done = program('main_single_gpu.py', '-output', tmp_path / 'skipped', *words, 'DATA.ON_ERROR', 'skip')
    assert 'left out' in done.stdout and records(tmp_path / 'skipped', 'val')


def test_traced_training_equals_eager_training(images, full_run, tmp_path):
    """With every source of chance on, from the start and from the checkpoint of an eager run."""
    opts = [*EVERYTHING, 'TRAIN.TO_STATIC', True]
    run(images, tmp_path / 'run', *opts)
    eager, traced = ([r['loss'] for r in records(folder, 'train')] for folder in (full_run, tmp_path / 'run'))
    assert traced == pytest.approx(eager, rel=1e-4)
    compare(tmp_path / 'run', full_run, 1e-3)
    newest = sorted((full_run / 'checkpoints').iterdir())
    run(images, tmp_path / 'more', *opts, 'MODEL.RESUME', str(newest[len(newest) // 2]))
    compare(tmp_path / 'more', full_run, 1e-3)


def test_traced_training_on_two_processes_equals_one(images, tmp_path):
    common = options(drop_batch([*TINY, 'MODEL.FREEZE_NORM', True, 'TRAIN.TO_STATIC', True]))
    flags = ['-data_path', images, '-output']
    program('main_multi_gpu.py', *flags, tmp_path / 'two', '-nprocs', 2, '-batch_size', 4, *common)
    program('main_single_gpu.py', *flags, tmp_path / 'one', '-batch_size', 8, *common)
    compare(tmp_path / 'one', tmp_path / 'two', 1e-5)
