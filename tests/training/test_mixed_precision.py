"""Mixed precision on a pretended GPU: its dtype, skipped steps, the scale of the loss, what is recorded."""
import json

import numpy as np
import paddle
import pytest
from exact_runs import CHANCE, STEPS, run, untimed_records
from pretended_gpu import pretend_gpu
from runs import TINY, records

from config import get_config
from training import builders, checkpoint
from training.mixed_precision import LossScaler, choose_dtype
from training.records import SCALARS

AMP = [*CHANCE, 'AMP', True, 'AMP_DTYPE', 'float16', 'REPORT_FREQ', 1, 'SAVE_STEPS', 1,
       'MODEL.ATTENTION', 'composed']             # the rule of auto would look at the true device
FIRST_SCALE = 2.0 ** 22                             # so high that the gradients of the first steps overflow
FLOAT16_MAX = 65504


def overflow_as_float16(monkeypatch):
    """A pretended GPU: gradients beyond the range of float16 become infinite, and the scale starts high."""
    pretend_gpu(monkeypatch)
    init, unscale = LossScaler.__init__, LossScaler.unscale_

    @paddle.no_grad()
    def unscale_in_range(self, optimizer):
        for group in optimizer._param_groups:
            for parameter in group['params']:
                gradient = parameter.grad
                infinite = paddle.full_like(gradient, float('inf'))
                inside = gradient.abs() <= FLOAT16_MAX
                gradient.add_(paddle.where(inside, paddle.zeros_like(gradient), infinite))
        unscale(self, optimizer)

    def start_high(self, enable):
        init(self, enable, init_loss_scaling=FIRST_SCALE)

    monkeypatch.setattr(LossScaler, '__init__', start_high)
    monkeypatch.setattr(LossScaler, 'unscale_', unscale_in_range)


@pytest.fixture
def high_scale(monkeypatch):
    overflow_as_float16(monkeypatch)


@pytest.fixture(scope='module')
def overflowing_run(images, tmp_path_factory):
    """A run whose first steps overflow, with a checkpoint of each step; tests do not change it."""
    folder = tmp_path_factory.mktemp('overflow') / 'run'
    with pytest.MonkeyPatch.context() as monkeypatch:
        overflow_as_float16(monkeypatch)
        run(images, folder, *AMP)
    return folder


def checkpoint_of(folder, step):
    return str(folder / 'checkpoints' / f'step_{step:08d}.pdckpt')


def trained(state):
    """The arrays of a checkpoint's model that the optimizer changes."""
    return {key: value for key, value in state['model'].items() if not key.endswith(('_mean', '_variance'))}


def test_overflow_skips_the_step_and_halves_the_scale(overflowing_run):
    rows = records(overflowing_run, 'train')
    assert [row['skipped_steps'] for row in rows[:2]] == [1, 2] and rows[-1]['skipped_steps'] < STEPS
    assert all(row['loss_scale'] == FIRST_SCALE / 2 ** row['skipped_steps'] for row in rows)
    assert 'loss_scale' in SCALARS                  # it is drawn by TensorBoard
    log = (overflowing_run / 'log.txt').read_text()
    assert log.count('gradients of a step overflowed') == rows[-1]['skipped_steps']
    first, second, last = (checkpoint.load(checkpoint_of(overflowing_run, step)) for step in (1, 2, STEPS))
    for key, value in trained(first).items():
        assert np.array_equal(value, second['model'][key]), key
    assert not all(np.array_equal(value, last['model'][key]) for key, value in trained(first).items())


def test_overflow_prints_nothing_besides_the_log(images, tmp_path, high_scale, capfd):
    run(images, tmp_path, *AMP, 'TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0)
    shown = capfd.readouterr()
    assert 'Found inf' not in shown.out + shown.err
    assert 'the step is skipped, the loss scale is 2.09715e+06 now' in shown.out


@pytest.mark.parametrize('step', [2, 9], ids=['among skipped steps', 'after them'])
def test_run_with_skipped_steps_resumes_exactly(images, overflowing_run, tmp_path, high_scale, step):
    path = checkpoint_of(overflowing_run, step)
    assert checkpoint.load(path)['scaler']['skipped'] >= 2
    run(images, tmp_path, *AMP, 'MODEL.RESUME', path)
    left = [record for record in untimed_records(overflowing_run) if record['step'] > step]
    assert untimed_records(tmp_path) == left
    for name in ('final.pdparams', 'final_ema.pdparams'):
        assert (tmp_path / name).read_bytes() == (overflowing_run / name).read_bytes()


def test_scaled_training_equals_float32_training(images, tmp_path, monkeypatch):
    """The scale is a power of two, so float32 gradients keep every bit."""
    run(images, tmp_path / 'plain', *CHANCE)
    pretend_gpu(monkeypatch)
    run(images, tmp_path / 'scaled', *CHANCE, 'AMP', True, 'AMP_DTYPE', 'float16')
    plain, scaled = (tmp_path / name / 'final.pdparams' for name in ('plain', 'scaled'))
    assert plain.read_bytes() == scaled.read_bytes()
    assert records(tmp_path / 'scaled', 'train')[-1]['skipped_steps'] == 0


def test_gradients_that_overflow_at_every_scale_end_the_run(images, tmp_path, monkeypatch):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr('training.mixed_precision.LEAST_SCALE', 2.0 ** 14)
    scale = LossScaler.scale
    monkeypatch.setattr(LossScaler, 'scale', lambda self, loss: scale(self, loss) * float('inf'))
    with pytest.raises(FloatingPointError, match='not finite at any loss scale, even 8192; lower'):
        run(images, tmp_path, *AMP)
    assert not (tmp_path / 'final.pdparams').exists()


def test_scaler_that_is_off_keeps_and_records_nothing():
    scaler = LossScaler(enable=False)
    assert scaler.state_dict() == {} and scaler.record() == {}


# ---- the dtype

@pytest.mark.parametrize('asked, capability, expected', [
    ('auto', (9, 0), 'bfloat16'), ('auto', (8, 0), 'bfloat16'), ('auto', (7, 5), 'float16'),
    ('float16', (9, 0), 'float16'), ('bfloat16', (8, 6), 'bfloat16'), ('float16', (7, 0), 'float16')])
def test_dtype_of_a_gpu(monkeypatch, asked, capability, expected):
    pretend_gpu(monkeypatch, capability)
    assert choose_dtype(asked, 'gpu') == expected


@pytest.mark.parametrize('asked, capability, needed', [
    ('auto', (6, 1), '7.0'), ('float16', (6, 1), '7.0'), ('bfloat16', (7, 5), '8.0')])
def test_gpu_without_the_dtype_is_said_to_compute_in_float32(monkeypatch, caplog, asked, capability, needed):
    pretend_gpu(monkeypatch, capability)
    assert choose_dtype(asked, 'gpu') == ''
    has = '.'.join(map(str, capability))
    assert f'needs a GPU of compute capability {needed}, and this one has {has}' in caplog.text


def test_resumed_run_keeps_its_dtype_on_another_gpu(images, tmp_path, monkeypatch):
    mixed = [*CHANCE, 'AMP', True]
    pretend_gpu(monkeypatch, (7, 5))
    run(images, tmp_path, *mixed)
    assert json.loads((tmp_path / 'machine.json').read_text())['precision'] == 'float16'
    pretend_gpu(monkeypatch, (9, 0))
    config = get_config(None, [*TINY, *mixed, 'MODEL.RESUME', 'auto', 'OUTPUT', str(tmp_path)])
    assert builders.build_precision(config, 'gpu') == 'float16'
    path = checkpoint_of(tmp_path, 10)
    config = get_config(None, [*TINY, *mixed, 'MODEL.RESUME', path])
    assert builders.build_precision(config, 'gpu') == 'float16'
    with pytest.raises(ValueError, match='AMP_DTYPE was float16, is bfloat16'):
        run(images, tmp_path / 'more', *mixed, 'AMP_DTYPE', 'bfloat16', 'MODEL.RESUME', path)
    assert builders.build_precision(get_config(None, [*TINY, *mixed]), 'gpu') == 'bfloat16'


def test_run_that_began_on_a_cpu_goes_on_in_float32_on_a_gpu(images, tmp_path, monkeypatch):
    run(images, tmp_path / 'run', *CHANCE, 'AMP', True)
    path = checkpoint_of(tmp_path / 'run', 10)
    pretend_gpu(monkeypatch, (9, 0))
    run(images, tmp_path / 'more', *CHANCE, 'AMP', True, 'MODEL.RESUME', path)
    log = (tmp_path / 'more' / 'log.txt').read_text()
    assert 'the run began in float32 and goes on so' in log
    whole, resumed = ((tmp_path / name / 'final.pdparams').read_bytes() for name in ('run', 'more'))
    assert whole == resumed


@pytest.mark.parametrize('content', [
    '{"precision": ["float16"]}', '[]', '{', '[' * 100_000, '{"precision": 1}'])
def test_strange_machine_json_is_as_none(tmp_path, monkeypatch, content):
    pretend_gpu(monkeypatch, (9, 0))
    (tmp_path / 'machine.json').write_text(content)
    config = get_config(None, [*TINY, 'AMP', True, 'MODEL.RESUME', 'auto', 'OUTPUT', str(tmp_path)])
    assert builders.build_precision(config, 'gpu') == 'bfloat16'
    assert builders.build_attention(config, 'gpu') == 'auto'
