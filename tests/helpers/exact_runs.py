"""Runs with every source of chance on, and their comparison to the last bit: for tests of resumption."""
import os

import numpy as np
import paddle
from runs import TINY, options, records

from config import get_config
from training import engine

CHANCE = ['TRAIN.MIXUP_ALPHA', 0.8, 'TRAIN.CUTMIX_ALPHA', 1.0, 'TRAIN.EMA_DECAY', 0.9,
          'TRAIN.RANDOM_ERASE_PROB', 0.5, 'TRAIN.AUTO_AUGMENT', 'rand-m9-mstd0.5-inc1',
          'TRAIN.ACCUM_ITER', 2, 'DATA.BATCH_SIZE', 2, 'MODEL.DROPOUT', 0.2, 'MODEL.DROPPATH', 0.2,
          'TRAIN.GRAD_CLIP', 1.0, 'TRAIN.NUM_EPOCHS', 4, 'SAVE_KEEP', 100, 'REPORT_FREQ', 3]
STEPS = 20                                          # of such a run: 4 epochs of 5 steps of 2 x 2 images
TWO = [*CHANCE, 'SAVE_STEPS', 2, 'SAVE_KEEP', 3, 'DATA.NUM_WORKERS', 1, 'DATA.BATCH_SIZE', 1,
       'TRAIN.NUM_EPOCHS', 6, 'MODEL.RESUME', 'auto']        # on two processes: 30 steps of 2 x 2 images
EVERYTHING = [
    'TRAIN.MIXUP_ALPHA', 0.8, 'TRAIN.CUTMIX_ALPHA', 1.0, 'TRAIN.RANDOM_ERASE_PROB', 0.5,
    'TRAIN.AUTO_AUGMENT', 'rand-m9-mstd0.5-inc1', 'TRAIN.EMA_DECAY', 0.9, 'TRAIN.ACCUM_ITER', 2,
    'DATA.BATCH_SIZE', 3, 'MODEL.DROPOUT', 0.2, 'MODEL.DROPPATH', 0.2, 'TRAIN.GRAD_CLIP', 1.0,
    'TRAIN.NUM_EPOCHS', 4, 'SAVE_KEEP', 10]         # 4 epochs of 3 steps of 2 x 3 images
TIMED = ('images_per_s', 'data_wait')               # what differs from run to run in a record


def run(images, output, *opts, stop=None):
    """Run the tiny model in this process. Returns the result of the last evaluation."""
    return engine.run(get_config(None, [*TINY, 'DATA.DATA_PATH', images, 'OUTPUT', str(output), *opts]), stop)


def words(images, output, *opts):
    """The command line of such a run."""
    return ['-data_path', images, '-output', output, *options([*TINY, *opts])]


def untimed_records(folder):
    """The records of a run without its speed."""
    found = records(folder)
    for record in found:
        for key in TIMED:
            record.pop(key, None)
    return found


def assert_same_run(folder, expected):
    """The same weights to the byte, and the same records but for the speed."""
    for name in ('final.pdparams', 'final_ema.pdparams', 'best.pdparams', 'best_ema.pdparams'):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert untimed_records(folder) == untimed_records(expected)


def assert_close_weights(folder, expected, tolerance=1e-5):
    """The same final weights, and averaged ones, to a tolerance."""
    for name in ('final.pdparams', 'final_ema.pdparams'):
        ours, theirs = paddle.load(os.fspath(folder / name)), paddle.load(os.fspath(expected / name))
        assert max(np.abs(ours[key].numpy() - theirs[key].numpy()).max() for key in ours) < tolerance
