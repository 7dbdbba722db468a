"""The checkpoints of a run: written whole or not at all, checked when read, the newest few kept."""
import hashlib
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, BinaryIO, Optional

from system import files
import utils
from utils import log

import numpy as np
import paddle

from config import FREE_ON_RESUME, defaults
from model import weights
from model.layers import running_statistics
from model.safe_pickle import shown
from training import optim

if TYPE_CHECKING:
    from training.builders import Training

FOLDER = 'checkpoints'
NAME = re.compile(r'^step_(\d{8,})\.pdckpt$')
FOOTER = b'sha256:'                                 # follows the pickle, with 64 hex digits
CONTENT = {'model', 'ema', 'optimizer', 'scaler', 'progress', 'ranks', 'facts'}


@dataclass
class Progress:
    """The progress of a training run: epochs and steps done, best results, running totals."""
    epoch: int = 0                                  # epochs done, evaluation and all
    step: int = 0                                   # optimizer steps done
    steps_of_epoch: int = 0                         # those in the epoch under way
    best: dict = field(default_factory=dict)        # split -> [accuracy, epoch]
    moved_to: int = -1                              # the last epoch that -last_epoch has chosen, or -1
    totals: utils.Totals = field(default_factory=utils.Totals)               # since the last report


# ---- the state of a run

def capture(training: 'Training', progress: Progress, facts: Mapping[str, Any]) -> dict:
    """Return the state of a run. Every process has to call it.

    'model' has the mean of the running statistics over all processes; 'ranks' has what belongs to each
    process.
    """
    model = training.model.state_dict()
    own = to_numpy(running_statistics(training.model))
    ranks = utils.gather({'buffers': own, 'totals': progress.totals.state()})
    averages = {}
    for key in own:
        averages[key] = sum(rank['buffers'][key] for rank in ranks) / len(ranks)
    counts = {key: value for key, value in vars(progress).items() if key != 'totals'}
    return {
        'model': {**model, **averages},
        'ema': training.ema.state_dict(),
        'scaler': training.scaler.state_dict(),
        'optimizer': optim.optimizer_state(training.optimizer, training.model),
        'progress': counts,
        'ranks': ranks,
        'facts': facts,
    }


def put_back(state: dict, training: 'Training') -> Progress:
    """Load what `capture` returned, with any number of processes. Returns the Progress."""
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
    elif utils.rank() == 0:                         # the statistics are the mean; rank 0 takes all totals
        progress.totals = utils.Totals.merged([rank['totals'] for rank in ranks])
    return progress


def to_numpy(value: Any) -> Any:
    """Return nested dicts and lists with numpy arrays instead of tensors."""
    if isinstance(value, dict):
        return {key: to_numpy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_numpy(item) for item in value]
    return value.numpy() if isinstance(value, paddle.Tensor) else value


# ---- writing

def save_weights(path: str, state_dict: Mapping[str, Any]) -> None:
    """Write a flat state dict for `model.set_state_dict(paddle.load(path))`.

    The same weights give the same bytes.
    """
    content = {key: np.ascontiguousarray(value) for key, value in to_numpy(state_dict).items()}
    files.atomic_write(path, lambda file: pickle.dump(content, file, protocol=4))


class _Hashing:
    """A file to write to that hashes what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def save(folder: str, step: int, state: dict, keep: int) -> None:
    """Write `state` as the checkpoint of `step`; keep the newest `keep`.

    state: nested dicts of tensors, arrays, numbers and text. Raises FloatingPointError for weights that
    are not finite, and OSError; then the checkpoints are as they were.
    """
    state = to_numpy(state)
    for key, value in state['model'].items():
        if not np.isfinite(value).all():
            raise FloatingPointError(
                f'after step {step} the weights {key} are not finite, and nothing was saved; lower '
                'TRAIN.BASE_LR or set TRAIN.GRAD_CLIP. The checkpoints before are intact')
    os.makedirs(os.path.join(folder, FOLDER), exist_ok=True)
    files.remove_temporary(os.path.join(folder, FOLDER))

    def write(file: BinaryIO) -> None:
        hashing = _Hashing(file)
        pickle.dump(state, hashing, protocol=4)
        file.write(FOOTER + hashing.sha256.hexdigest().encode())

    files.atomic_write(os.path.join(folder, FOLDER, f'step_{step:08d}.pdckpt'), write)
    for path in steps(folder)[keep:]:
        os.remove(path)


# ---- finding

def steps(folder: str) -> list[str]:
    """Return the paths of the checkpoints in a run folder, the newest first."""
    folder = os.path.join(folder, FOLDER)
    if not os.path.isdir(folder):
        return []
    names = [name for name in os.listdir(folder) if NAME.match(name)]
    return [os.path.join(folder, name) for name in sorted(names, key=_step_of, reverse=True)]


def _step_of(path: str) -> int:
    """Return the step in the name of a checkpoint."""
    match = NAME.match(os.path.basename(path))
    assert match
    return int(match[1])


def tidy(folder: str, step: int) -> None:
    """Prepare a run folder to go on after `step`.

    Later checkpoints, damaged ones or those of a run that was given up, are set aside. Temporary files
    that killed processes left are removed.
    """
    for path in steps(folder):
        if _step_of(path) > step:
            os.replace(path, f'{path}.aside')
            log.warning('%s is later than where this run goes on: set aside as %s.aside', path,
                        os.path.basename(path))
    files.remove_temporary(folder)


def newest(folder: str) -> str:
    """Return the path of the newest good checkpoint in a run folder, or ''. The log names damaged ones."""
    return _read_newest(folder)[0]


def load_newest(folder: str) -> tuple[str, dict]:
    """Return path and state of the newest good checkpoint on every rank; ('', {}) where there is none.

    Rank 0 chooses it; each rank reads it once.
    """
    found: list[tuple[str, dict]] = []

    def search() -> str:
        found.append(_read_newest(folder))
        return found[0][0]

    path = utils.on_rank_0(search)
    if found:                                       # on rank 0, which has read it already
        return found[0]
    return (path, load(path)) if path else ('', {})


def _read_newest(folder: str) -> tuple[str, dict]:
    for path in steps(folder):
        try:
            return path, load(path)
        except (ValueError, OSError) as error:
            log.warning('%s; trying the one before it', error)
    return '', {}


# ---- reading

def load(path: str) -> dict:
    """Return the state in a checkpoint, tensors as numpy arrays.

    Raises ValueError for a damaged file, FileNotFoundError.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such checkpoint')
    if not _is_whole(path):
        raise ValueError(f'{path}: this is no checkpoint of this project, or it is damaged '
                         '(its checksum does not match)')
    state = weights.read_pickle(path)
    if not _has_parts(state):
        raise ValueError(f'{path}: this checkpoint is of another version of this project, '
                         'or of another project')
    return state


def _is_whole(path: str) -> bool:
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


def _has_parts(state: Any) -> bool:
    """True if `state` has the parts of CONTENT, of the types that `capture` gives them."""
    if type(state) is not dict or set(state) != CONTENT or type(state['ranks']) is not list:
        return False
    parts = [state[name] for name in CONTENT - {'ranks'}] + state['ranks']
    if not all(_has_names(part) for part in parts):
        return False
    for name in ('model', 'ema', 'optimizer'):
        if not all(isinstance(value, np.ndarray) for value in state[name].values()):
            return False
    for rank in state['ranks']:
        if 'totals' in rank and not _are_totals(rank['totals']):
            return False
    return _is_progress(state['progress'])


def _has_names(part: Any) -> bool:
    """True for a dict whose keys are text."""
    return type(part) is dict and all(type(key) is str for key in part)


def _is_progress(values: dict) -> bool:
    """True for the fields of a Progress, apart from its totals."""
    known = {part.name for part in fields(Progress)} - {'totals'}
    best = values.get('best', {})
    if not values.keys() <= known or type(best) is not dict:
        return False
    counts = [value for key, value in values.items() if key != 'best']
    are_counts = all(type(value) is int and -1 <= value < 1 << 48 for value in counts)
    return are_counts and all(_are_numbers(pair, 2) for pair in best.values())


def _are_totals(value: Any) -> bool:
    """True for what Totals.state() returns."""
    return type(value) is dict and _are_numbers(value.get('sums'), 4)


def _are_numbers(values: Any, count: int) -> bool:
    """True for a list of `count` numbers."""
    if type(values) is not list or len(values) != count:
        return False
    return all(type(value) in (int, float) for value in values)


# ---- facts

def facts(options: Mapping[str, Any], **derived: Any) -> dict[str, Any]:
    """Return what decides the results of a run: all options outside FREE_ON_RESUME, and `derived`.

    options: a whole config as {'GROUP.KEY': value}.
    """
    deciding = {key: value for key, value in options.items() if key not in FREE_ON_RESUME}
    return {**deciding, **derived}


def differences(before: Mapping[str, Any], now: Mapping[str, Any],
                older: Optional[Mapping[str, Any]] = None) -> list[str]:
    """Return a text for each of the facts that changed.

    An option that `before` lacks, because it is newer, had its default. older: values that earlier
    versions wrote for some facts.
    """
    older = older or {}
    before = {**{key: value for key, value in defaults().items() if key in now}, **before}
    texts = []
    for key in {**before, **now}:
        old, new = before.get(key, 'not there'), now.get(key, 'not there')
        if before.get(key) == now.get(key) or (key in older and old == older[key]):
            continue
        texts.append(f'{shown(key)} was {shown(str(old), 200)}, is {new}')
    return texts
