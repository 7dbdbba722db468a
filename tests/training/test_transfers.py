"""What a training step copies to a device and reads from it, counted on a pretended GPU."""
from collections import Counter

import pytest
from pretended_gpu import pretend_gpu
from runs import TINY, make_images
from transfers import copies, counted, reads

from config import get_config
from training import engine
from training.mixed_precision import LossScaler

SMALL = [*TINY, 'TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0, 'REPORT_FREQ', 1000]
RECIPE = ['AMP', True, 'TRAIN.EMA_DECAY', 0.999, 'TRAIN.RANDOM_ERASE_PROB', 0.9, 'TRAIN.GRAD_CLIP', 1.0,
          'TRAIN.MIXUP_ALPHA', 0.2, 'TRAIN.CUTMIX_ALPHA', 1.0]
BATCH = 2                                           # images and labels, which the reader copies ahead


@pytest.fixture(scope='module')
def many_images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('many') / 'data', train=80)


@pytest.fixture
def count_steps(many_images, tmp_path, monkeypatch):
    """A function that trains with these options and returns the counts of each step after the first."""
    def count(*opts):
        pretend_gpu(monkeypatch, (7, 5))
        totals = []
        update = LossScaler.update
        with counted() as counts:
            def update_and_note(scaler):
                update(scaler)
                totals.append(Counter(counts))
            monkeypatch.setattr(LossScaler, 'update', update_and_note)
            engine.run(get_config(None, [*SMALL, *RECIPE, *opts, 'DATA.DATA_PATH', many_images,
                                         'OUTPUT', str(tmp_path / 'run')]))
        return [after - before for before, after in zip(totals, totals[1:])]
    return count


@pytest.mark.parametrize('opts', [
    [], ['TRAIN.MIXUP_MODE', 'elem'], ['TRAIN.CLIP_MODE', 'agc', 'TRAIN.OPTIMIZER', 'lamb'],
    ['TRAIN.OPTIMIZER', 'sgd', 'MODEL.STAGES', ['bot', 'lambda halo'], 'MODEL.HEADS', [2, 2]],
    ['DATA.NUM_WORKERS', 1]], ids=['recipe', 'elem', 'lamb', 'blocks', 'workers'])
def test_step_makes_few_copies_and_waits_rarely(count_steps, opts):
    steps = count_steps(*opts)
    assert len(steps) == 9
    loaded = 0 if 'DATA.NUM_WORKERS' in opts else BATCH       # without workers by to_tensor, which is counted
    assert max(copies(step) for step in steps) - loaded + BATCH <= 5
    assert max(reads(step) for step in steps) <= 2


def test_counter_sees_copies_and_reads(count_steps, monkeypatch):
    """Or the test above could not fail."""

    from training import optim
    update = optim.Ema.update

    def wasteful(ema, model, step):
        update(ema, model, step)
        for value in ema.average.values():
            value.lerp_(value, 0.5)
            float(value.sum())

    monkeypatch.setattr(optim.Ema, 'update', wasteful)
    steps = count_steps()
    assert min(copies(step) for step in steps) > 20 and min(reads(step) for step in steps) > 20
