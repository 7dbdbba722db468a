"""The checkpoints of a run folder: complete, written whole or not at all, checked when read, the newest few kept."""
import hashlib
import os
import pickle
import re
from dataclasses import dataclass, field, fields

from system import files
import utils

import numpy as np
import paddle

from config import OF_ONE_START, defaults
from model import weights
from model.layers import running_statistics
from model.safe_pickle import shown
from training import optim

FOLDER = 'checkpoints'
NAME = re.compile(r'^step_(\d{8,})\.pdckpt$')
FOOTER = b'sha256:'                                 # follows the pickle, with 64 hex digits; unpicklers stop before it
CONTENT = {'model', 'ema', 'optimizer', 'scaler', 'progress', 'ranks', 'facts'}
FREE = {                                            # options that may change on the way: they do not enter the mathematics
    'of one start': OF_ONE_START,
    'where things are': ('DATA.DATA_PATH', 'MODEL.NAME'),
    'what it runs on': ('DATA.NUM_WORKERS', 'DATA.BATCH_SIZE_EVAL', 'MODEL.ATTENTION', 'TRAIN.RECOMPUTE', 'TRAIN.TO_STATIC'),
    'what is told and kept': ('REPORT_FREQ', 'VALIDATE_FREQ', 'SAVE_FREQ', 'SAVE_KEEP', 'SAVE_STEPS', 'SAVE_MINUTES'),
    'or a broken image could not be left out later': ('DATA.ON_ERROR', 'DATA.MAX_PIXELS', 'DATA.TIMEOUT'),
    'as long as their product with the processes stays': ('DATA.BATCH_SIZE', 'TRAIN.ACCUM_ITER'),
}


@dataclass
class Progress:
    """How far a training run is."""

    epoch: int = 0                                  # epochs done, evaluation and all
    step: int = 0                                   # optimizer steps done
    steps_of_epoch: int = 0                         # those in the epoch under way
    best: dict = field(default_factory=dict)        # split -> [accuracy, epoch]
    moved_to: int = -1                              # the last epoch that -last_epoch has chosen, or -1
    totals: utils.Totals = field(default_factory=utils.Totals)  # since the last report


def capture(training, progress, facts):
    """The state of a run, to be called on every process; the model itself gets the average of the running statistics."""
    model = training.model.state_dict()
    own = to_numpy(running_statistics(training.model))
    ranks = utils.gather({'buffers': own, 'totals': progress.totals.state()})
    averages = {key: sum(rank['buffers'][key] for rank in ranks) / len(ranks) for key in own}
    return {'model': {**model, **averages}, 'ema': training.ema.state_dict(), 'scaler': training.scaler.state_dict(),
            'optimizer': optim.optimizer_state(training.optimizer, training.model),
            'progress': {key: value for key, value in vars(progress).items() if key != 'totals'}, 'ranks': ranks, 'facts': facts}


def put_back(state, training):
    """Inverse of capture, with any number of processes. Returns the Progress."""
    training.model.set_state_dict(state['model'])
    training.ema.load(state['ema'])
    optim.load_optimizer_state(training.optimizer, training.model, state['optimizer'])
    if state['scaler'] and training.scaler.is_enable():
        training.scaler.load_state_dict(state['scaler'])
    progress, ranks = Progress(**state['progress']), state['ranks']
    if len(ranks) == utils.world_size():
        own = ranks[utils.rank()]
        optim.set_values(training.model.state_dict(), own['buffers'])
        progress.totals = utils.Totals.merged([own['totals']])
    elif utils.rank() == 0:                         # the model has the average of the statistics, rank 0 takes all the sums
        progress.totals = utils.Totals.merged([rank['totals'] for rank in ranks])
    return progress


def to_numpy(value):
    """Tensors in nested dicts and lists as numpy arrays."""
    if isinstance(value, dict):
        return {key: to_numpy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_numpy(item) for item in value]
    return value.numpy() if isinstance(value, paddle.Tensor) else value


def save_weights(path, state_dict):
    """A flat state dict for `model.set_state_dict(paddle.load(path))`; the same weights give the same bytes."""
    content = {key: np.ascontiguousarray(value) for key, value in to_numpy(state_dict).items()}
    files.atomic_write(path, lambda file: pickle.dump(content, file, protocol=4))


class _Hashing:
    """A file to write to that hashes what passes."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)


def save(folder, step, state, keep):
    """Write `state` (nested dicts of tensors, arrays, numbers, text) as the checkpoint of `step`; keep the newest `keep`.

    Raises FloatingPointError for weights that are not finite, and OSError; then the checkpoints are as they were.
    """
    state = to_numpy(state)
    bad = next((key for key, value in state['model'].items() if not np.isfinite(value).all()), None)
    if bad:
        raise FloatingPointError(f'after step {step} the weights {bad} are not finite, and nothing was saved; lower '
                                 'TRAIN.BASE_LR or set TRAIN.GRAD_CLIP. The checkpoints before are intact')
    os.makedirs(os.path.join(folder, FOLDER), exist_ok=True)
    files.remove_temporary(os.path.join(folder, FOLDER))

    def write(file):
        hashing = _Hashing(file)
        pickle.dump(state, hashing, protocol=4)
        file.write(FOOTER + hashing.sha256.hexdigest().encode())

    files.atomic_write(os.path.join(folder, FOLDER, f'step_{step:08d}.pdckpt'), write)
    for path in steps(folder)[keep:]:
        os.remove(path)


def steps(folder):
    """Paths of the checkpoints in a run folder, the newest first."""
    folder = os.path.join(folder, FOLDER)
    names = [name for name in os.listdir(folder) if NAME.match(name)] if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: int(NAME.match(name)[1]), reverse=True)]


def tidy(folder, step):
    """Make a run folder ready to go on after `step`: later checkpoints, damaged ones or those of a way that was left, are set
    aside, and what killed writers left behind is removed."""
    for path in steps(folder):
        if int(NAME.match(os.path.basename(path))[1]) > step:
            os.replace(path, f'{path}.aside')
            utils.log.warning('%s is later than where this run goes on: set aside as %s.aside', path, os.path.basename(path))
    files.remove_temporary(folder)


def load(path):
    """The state in a checkpoint, tensors as numpy arrays. Raises ValueError for a damaged file, FileNotFoundError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such checkpoint')
    if not _is_whole(path):
        raise ValueError(f'{path}: this is no checkpoint of this project, or it is damaged (its checksum does not match)')
    state = weights.read_pickle(path)
    if not _has_parts(state):
        raise ValueError(f'{path}: this checkpoint is of another version of this project, or of another project')
    return state


def _is_whole(path):
    """True if a file ends with the checksum of what is before."""
    digest = hashlib.sha256()
    left = os.path.getsize(path) - len(FOOTER) - 64
    with open(path, 'rb') as file:
        file.seek(max(left, 0))
        footer = file.read()
        if not footer.startswith(FOOTER):           # not worth reading, however large it is
            return False
        file.seek(0)
        while left > 0 and (data := file.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
    return footer == FOOTER + digest.hexdigest().encode()


def _has_parts(state):
    """True if `state` has the parts of CONTENT, of the types that `capture` gives them."""
    if type(state) is not dict or set(state) != CONTENT or type(state['ranks']) is not list:
        return False
    parts = [state[name] for name in CONTENT - {'ranks'}] + state['ranks']
    if not all(type(part) is dict and all(type(key) is str for key in part) for part in parts):
        return False
    arrays = [value for name in ('model', 'ema', 'optimizer') for value in state[name].values()]
    best = state['progress'].get('best', {})
    if not all(isinstance(value, np.ndarray) for value in arrays) or type(best) is not dict:
        return False
    counts = [value for key, value in state['progress'].items() if key != 'best']
    totals = [rank['totals'] for rank in state['ranks'] if 'totals' in rank]
    return (state['progress'].keys() <= {part.name for part in fields(Progress)} - {'totals'}
            and all(type(value) is int and -1 <= value < 1 << 48 for value in counts)
            and all(_are_numbers(pair, 2) for pair in best.values())
            and all(type(part) is dict and _are_numbers(part.get('sums'), 4) for part in totals))


def _are_numbers(values, count):
    """True for a list of `count` numbers."""
    return type(values) is list and len(values) == count and all(type(value) in (int, float) for value in values)


def newest(folder):
    """The path of the newest good checkpoint in a run folder, or ''; damaged ones are named in the log."""
    for path in steps(folder):
        try:
            load(path)
            return path
        except (ValueError, OSError) as error:
            utils.log.warning('%s; trying the one before it', error)
    return ''


def facts(config, **derived):
    """Return what decides the results of a run: every option of a config that is not FREE, and the `derived` numbers."""
    free = {key for keys in FREE.values() for key in keys} | {'BASE'}
    return {**{key: value for key, value in _flat(config) if key not in free}, **derived}


def _flat(tree, prefix=''):
    for key, value in tree.items():
        yield from _flat(value, f'{prefix}{key}.') if isinstance(value, dict) else [(prefix + key, value)]


def differences(before, now, older=()):
    """Return a text for each of the facts that changed; `older` has values that earlier versions wrote for the same.

    An option that `before` lacks, because it is newer, had its default.
    """
    older = dict(older)
    before = {**{key: value for key, value in defaults().items() if key in now}, **before}
    return [f'{shown(key)} was {shown(str(before.get(key, "not there")), 200)}, is {now.get(key, "not there")}'
            for key in {**before, **now} if before.get(key) != now.get(key)
            and (key not in older or before.get(key) != older[key])]
