"""A resumed run ends as one without interruption, or is refused with a reason."""
import os
import random
import resource
import shutil
from types import SimpleNamespace

from system import stopping

import paddle
import pytest
from exact_runs import CHANCE, STEPS, assert_close_weights, assert_same_run, run, words
from runs import make_images, program, records

from config import FREE_ON_RESUME, flatten, get_config
from training import builders, checkpoint, engine, optim

DRAW = random.Random(4)                             # the steps at which runs are killed


class StopAfter(stopping.Stop):
    """A wish to stop that comes with the `count`-th question."""

    def __init__(self, count):
        self.left = count

    @property
    def requested(self):
        self.left -= 1
        return 'SIGTERM' if self.left <= 0 else ''


# ---- exactness

@pytest.mark.parametrize('step', sorted(DRAW.sample(range(1, STEPS), 4)) + [STEPS])
def test_resumed_run_is_bit_identical(images, whole, tmp_path, step):
    """With another number of data workers, and with the later records and best weights that a kill leaves."""
    shutil.copytree(whole, tmp_path / 'run')
    for path in checkpoint.steps(tmp_path / 'run')[:STEPS - step]:
        os.remove(path)
    for name in ('final.pdparams', 'final_ema.pdparams'):
        os.remove(tmp_path / 'run' / name)
    opts = ['SAVE_STEPS', 1, 'MODEL.RESUME', 'auto', 'DATA.NUM_WORKERS', step % 3]
    run(images, tmp_path / 'run', *CHANCE, *opts)
    assert_same_run(tmp_path / 'run', whole)


def test_run_does_not_depend_on_its_checkpoints(images, whole, tmp_path):
    run(images, tmp_path / 'run', *CHANCE)
    assert len(checkpoint.steps(tmp_path / 'run')) == 4
    assert_same_run(tmp_path / 'run', whole)


@pytest.mark.parametrize('count', [1, 8, 16])
def test_stopped_and_resumed_run_is_bit_identical(images, whole, tmp_path, count):
    """An epoch asks 5 times after steps, up to 6 times in each of 2 evaluations, and once after each."""
    starts = 1
    while True:
        try:
            stop = StopAfter(count if starts < 4 else 10 ** 6)
            run(images, tmp_path, *CHANCE, 'MODEL.RESUME', 'auto', stop=stop)
            break
        except stopping.Stopped:
            starts += 1
    assert starts == 4
    assert_same_run(tmp_path, whole)


def test_stop_during_an_evaluation_saves_the_epoch(images, whole, tmp_path):
    with pytest.raises(stopping.Stopped, match='evaluation'):
        run(images, tmp_path, *CHANCE, stop=StopAfter(8))
    state = checkpoint.load(checkpoint.newest(tmp_path))
    progress = state['progress']
    assert progress['epoch'] == 0 and progress['steps_of_epoch'] == progress['step'] == 5
    assert state['optimizer'].keys() == checkpoint.load(checkpoint.steps(whole)[0])['optimizer'].keys()


def test_checkpoint_every_save_minutes(images, tmp_path, monkeypatch):
    def monotonic():
        return clock.pop(0) if len(clock) > 1 else clock[0]
    for module in (builders, engine):
        monkeypatch.setattr(module, 'time', SimpleNamespace(monotonic=monotonic))
    clock = [0, 30, 59, 60, 60, 119, 120, 120, 150]  # the start, then each question and each checkpoint
    run(images, tmp_path, 'TRAIN.NUM_EPOCHS', 3, 'SAVE_MINUTES', 1.0, 'SAVE_FREQ', 3, 'SAVE_KEEP', 100)
    saved = [os.path.basename(path)[5:13] for path in checkpoint.steps(tmp_path)]
    assert saved == ['00000006', '00000005', '00000003']


def test_resume_with_another_accum_iter(tmp_path):
    """8 images a step, in one pass and then in two: the same images, mixing and weights."""
    images = make_images(tmp_path / 'data', train=16)
    opts = ['MODEL.FREEZE_NORM', True, 'TRAIN.MIXUP_ALPHA', 0.8, 'TRAIN.EMA_DECAY', 0.9,
            'TRAIN.NUM_EPOCHS', 3, 'SAVE_STEPS', 1, 'SAVE_KEEP', 100]
    run(images, tmp_path / 'one', *opts, 'DATA.BATCH_SIZE', 8)
    step3 = checkpoint.steps(tmp_path / 'one')[3]   # of 6, in the middle of an epoch
    run(images, tmp_path / 'two', *opts, 'DATA.BATCH_SIZE', 4, 'TRAIN.ACCUM_ITER', 2, 'MODEL.RESUME', step3)
    assert [record['step'] for record in records(tmp_path / 'two', 'train')] == [4, 5, 6]
    assert_close_weights(tmp_path / 'one', tmp_path / 'two')


def test_global_batch_decides_the_passes(tmp_path):
    """8 images a step of one pass, then stated for passes of 4; the run folder keeps what was stated."""
    images = make_images(tmp_path / 'data', train=16)
    opts = ['MODEL.FREEZE_NORM', True, 'TRAIN.MIXUP_ALPHA', 0.8, 'TRAIN.EMA_DECAY', 0.9,
            'TRAIN.NUM_EPOCHS', 3, 'SAVE_STEPS', 1, 'SAVE_KEEP', 100]
    run(images, tmp_path / 'one', *opts, 'DATA.BATCH_SIZE', 8)
    step3 = checkpoint.steps(tmp_path / 'one')[3]
    run(images, tmp_path / 'two', *opts, 'DATA.BATCH_SIZE', 4, 'TRAIN.GLOBAL_BATCH', 8, 'MODEL.RESUME', step3)
    assert [record['step'] for record in records(tmp_path / 'two', 'train')] == [4, 5, 6]
    assert_close_weights(tmp_path / 'one', tmp_path / 'two')
    assert get_config(tmp_path / 'two' / 'config.yaml').TRAIN.GLOBAL_BATCH == 8
    with pytest.raises(ValueError, match='GLOBAL_BATCH 8 is no multiple of the 3 images .* x 1 processes'):
        run(images, tmp_path / 'three', 'DATA.BATCH_SIZE', 3, 'TRAIN.GLOBAL_BATCH', 8)
    with pytest.raises(ValueError, match='leave TRAIN.GLOBAL_BATCH 0, or TRAIN.ACCUM_ITER 1'):
        get_config(None, ['TRAIN.GLOBAL_BATCH', 8, 'TRAIN.ACCUM_ITER', 2])


@pytest.mark.slow
def test_global_batch_stays_on_another_number_of_processes(tmp_path):
    """The same command on two processes, then on one: the steps of a run on one."""
    images = make_images(tmp_path / 'data', train=16)
    opts = ['MODEL.FREEZE_NORM', True, 'TRAIN.MIXUP_ALPHA', 0.8, 'TRAIN.EMA_DECAY', 0.9, 'SAVE_STEPS', 1,
            'TRAIN.NUM_EPOCHS', 3, 'SAVE_KEEP', 100, 'DATA.BATCH_SIZE', 2, 'TRAIN.GLOBAL_BATCH', 8]
    run(images, tmp_path / 'one', *opts)
    program('main_multi_gpu.py', '-nprocs', 2, *words(images, tmp_path / 'two', *opts))
    assert_close_weights(tmp_path / 'one', tmp_path / 'two')
    step3 = checkpoint.steps(tmp_path / 'two')[3]
    run(images, tmp_path / 'more', *opts, 'MODEL.RESUME', step3)
    assert_close_weights(tmp_path / 'one', tmp_path / 'more')


# ---- an early end

CONSTANT = ['MODEL.FREEZE_NORM', True, 'TRAIN.BASE_LR', 0.0, 'TRAIN.WARMUP_LR', 0.0, 'TRAIN.END_LR', 0.0,
            'TRAIN.NUM_EPOCHS', 9, 'SAVE_FREQ', 4]   # the accuracy stays that of the first epoch


def test_training_ends_without_a_better_accuracy(images, tmp_path):
    run(images, tmp_path / 'run', *CONSTANT, 'TRAIN.PATIENCE', 2)
    assert [record['epoch'] for record in records(tmp_path / 'run', 'val')] == [1, 2, 3]
    assert 'no better accuracy in 2 epochs: the training ends' in (tmp_path / 'run' / 'log.txt').read_text()
    final = (tmp_path / 'run' / 'final.pdparams').read_bytes()
    assert (tmp_path / 'run' / 'predictions_val.npz').exists()
    run(images, tmp_path / 'run', *CONSTANT, 'TRAIN.PATIENCE', 2, 'MODEL.RESUME', 'auto')
    assert len(records(tmp_path / 'run', 'val')) == 3            # it has ended
    assert (tmp_path / 'run' / 'final.pdparams').read_bytes() == final
    run(images, tmp_path / 'run', *CONSTANT, 'TRAIN.PATIENCE', 4, 'MODEL.RESUME', 'auto')
    assert [record['epoch'] for record in records(tmp_path / 'run', 'val')] == [1, 2, 3, 4, 5]


def test_training_ends_after_an_evaluation_only(images, tmp_path):
    """Epochs that are not evaluated say nothing: 5 is not the end, although the best epoch is 3."""
    run(images, tmp_path, *CONSTANT, 'TRAIN.PATIENCE', 2, 'VALIDATE_FREQ', 3)
    assert [record['epoch'] for record in records(tmp_path, 'val')] == [3, 6]
    assert records(tmp_path, 'train')[-1]['epoch'] == 6


def test_stopped_run_ends_as_early(images, tmp_path):
    with pytest.raises(stopping.Stopped):
        run(images, tmp_path / 'run', *CONSTANT, 'TRAIN.PATIENCE', 3, stop=StopAfter(6))
    run(images, tmp_path / 'run', *CONSTANT, 'TRAIN.PATIENCE', 3, 'MODEL.RESUME', 'auto')
    assert [record['epoch'] for record in records(tmp_path / 'run', 'val')] == [1, 2, 3, 4]


# ---- other settings

@pytest.mark.parametrize('key', flatten(get_config()))
def test_changed_option_is_reported_unless_free(key):
    before, after = flatten(get_config()), flatten(get_config())
    after[key] = 'another value'
    changes = checkpoint.differences(checkpoint.facts(before, images=8), checkpoint.facts(after, images=8))
    assert len(changes) == (key not in FREE_ON_RESUME)
    assert all(change.startswith(f'{key} was ') and change.endswith('is another value') for change in changes)


def test_resume_with_changed_options_needs_resume_force(images, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')

    def content():
        paths = [path for path in (tmp_path / 'run').rglob('*.*') if path.name != 'log.txt']
        return {path: path.read_bytes() for path in paths}

    before = content()
    other = [*CHANCE, 'TRAIN.BASE_LR', 0.01, 'DATA.BATCH_SIZE', 4, 'TRAIN.HFLIP', 0.0, 'MODEL.RESUME', 'auto']
    with pytest.raises(ValueError) as error:
        run(images, tmp_path / 'run', *other)
    for text in ('step_00000020.pdckpt was written with other settings: ', 'was 4, is 8', 'images per step',
                 'TRAIN.BASE_LR was 0.001, is 0.01; ', 'TRAIN.HFLIP was 0.5, is 0.0', 'RESUME_FORCE True'):
        assert text in str(error.value)
    assert '\n' not in str(error.value) and 'NUM_EPOCHS' not in str(error.value)
    assert content() == before
    run(images, tmp_path / 'run', *other, 'MODEL.RESUME_FORCE', True, 'TRAIN.NUM_EPOCHS', 5)
    assert {record['epoch'] for record in records(tmp_path / 'run', 'val')} == {1, 2, 3, 4, 5}
    newest = os.path.basename(checkpoint.newest(tmp_path / 'run'))
    assert newest == 'step_00000023.pdckpt'         # three steps after the 20th


def test_resume_with_another_list_is_refused(images, whole, tmp_path):
    shutil.copytree(images, tmp_path / 'data')
    path = tmp_path / 'data' / 'train_list.txt'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(lines[1:] + lines[:1]))
    with pytest.raises(ValueError, match='train_list.txt was '):
        run(str(tmp_path / 'data'), tmp_path / 'run', *CHANCE, 'MODEL.RESUME', checkpoint.steps(whole)[0])


# ---- full disks

def test_full_disk_keeps_the_checkpoints(images, whole, tmp_path):
    size = os.path.getsize(checkpoint.steps(whole)[0])
    run(images, tmp_path / 'run', *CHANCE, 'TRAIN.NUM_EPOCHS', 4, 'SAVE_FREQ', 4)
    for path in checkpoint.steps(tmp_path / 'run'):
        os.remove(path)
    shutil.copy(checkpoint.steps(whole)[12], tmp_path / 'run' / 'checkpoints')
    before = {path.name: path.read_bytes() for path in (tmp_path / 'run').rglob('*.pd*')}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))        # Python ignores its signal
    try:
        message = 'cannot write: File too large; what was there before is intact: .*step_00000009'
        with pytest.raises(OSError, match=message):
            run(images, tmp_path / 'run', *CHANCE, 'SAVE_STEPS', 1, 'MODEL.RESUME', 'auto')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / 'run').rglob('*.pd*')} == before
    run(images, tmp_path / 'run', *CHANCE, 'MODEL.RESUME', 'auto')
    assert_same_run(tmp_path / 'run', whole)


def test_temporary_files_of_killed_writers_are_removed(images, tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'step_00000001.pdckpt.tmp1234').write_bytes(b'half')
    run(images, tmp_path, 'MODEL.RESUME', 'auto')
    assert not [name for name in os.listdir(tmp_path / 'checkpoints') if 'tmp' in name]


# ---- weights and losses that are not finite

def test_nonfinite_weights_are_not_saved(images, tmp_path, monkeypatch):
    """The loss is finite, and the step makes the weights infinite."""
    clip = optim.clip_gradients

    def spoil(model, **kwargs):
        clip(model, **kwargs)
        if spoil.steps == 2:
            model.head.fc.bias.grad.set_value(paddle.full([4], float('nan')))
        spoil.steps += 1
    spoil.steps = 0
    monkeypatch.setattr(optim, 'clip_gradients', spoil)
    with pytest.raises(FloatingPointError, match='after step 3 the weights head.fc.bias are not finite'):
        run(images, tmp_path, 'SAVE_STEPS', 1, 'TRAIN.NUM_EPOCHS', 3)
    assert checkpoint.newest(tmp_path).endswith('step_00000002.pdckpt')
