"""Load what a run starts from: the newest good checkpoint, a named one, or pretrained weights."""
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import utils
from utils import log

from paddle import nn

from config import OF_ONE_START, flatten, get_config
from data import class_names
from model import weight_files, weights
from model.safe_pickle import shown
from training import checkpoint
from training.builders import Saver, Start, Training
from training.checkpoint import Progress
from training.records import Metrics

CHANGES_NO_SHAPE = {*OF_ONE_START, 'MODEL.ATTENTION', 'MODEL.DROPOUT', 'MODEL.DROPPATH', 'MODEL.FREEZE',
                    'MODEL.FREEZE_NORM'}


# ---- weights alone

def load_weights(model: nn.Layer, path: str, *, ema: bool, options: Mapping[str, Any],
                 fine_tune: bool = False) -> None:
    """Load the weights at `path`. Raises as weights.load_pretrained, and names the model they are of.

    ema: take the moving average of a checkpoint. options: all of the config, by their keys.
    """
    with misfit_explained(path, options):
        weights.load_pretrained(model, path, ema=ema, fine_tune=fine_tune)


@contextmanager
def misfit_explained(path: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Add to the error about weights that do not fit the model which options of theirs differ."""
    try:
        yield
    except ValueError as error:
        hint = other_model(path, options) if 'do not fit the model' in str(error) else ''
        raise ValueError(f'{error}{hint}') from None


def other_model(path: str, options: Mapping[str, Any]) -> str:
    """Return how the model in the config.yaml beside the weights at `path` differs, or ''."""
    beside = os.path.join(class_names.run_folder_of(path), 'config.yaml')
    try:
        theirs = flatten(get_config(beside))
    except (ValueError, OSError):
        return ''
    differences = []
    for key, ours in options.items():
        if key.startswith('MODEL.') and key not in CHANGES_NO_SHAPE and theirs[key] != ours:
            differences.append(f'{key} {theirs[key]} there and {ours} here')
    if not differences:
        return ''
    return f'\n  {beside} describes another model ({", ".join(differences[:3])}); give that file by -cfg'


# ---- an evaluation

def load_for_evaluation(model: nn.Layer, start: Start, folder: str) -> str:
    """Load the weights that -resume names, or else -pretrained. Returns their path."""
    path, state = find_checkpoint(start.resume, folder)
    if path:
        with misfit_explained(path, start.options):
            load_state(model, state, path, ema=start.ema)
    elif start.resume:
        raise ValueError(f'-eval -resume auto: {folder} holds no good checkpoint')
    elif start.pretrained:
        path = start.pretrained
        load_weights(model, path, ema=start.ema, options=start.options)
    else:
        raise ValueError('-eval needs weights: give -pretrained FILE')
    log.info('evaluating %s', path)
    return path


def find_checkpoint(resume: str, folder: str) -> tuple[str, dict]:
    """Return path and state of the checkpoint that -resume names, ('', {}) if none.

    auto: the newest good one of the run folder. Raises as checkpoint.load.
    """
    if resume == 'auto':
        return checkpoint.load_newest(folder)
    if resume:
        return resume, checkpoint.load(resume)
    return '', {}


def load_state(model: nn.Layer, state: dict, path: str, *, ema: bool) -> None:
    """Load the weights of a checkpoint's state, or their moving average. ValueErrors name the file."""
    try:
        model.set_state_dict(weight_files.choose(state, ema, path))
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


# ---- a training

def restore(training: Training, saver: Saver, start: Start, metrics: Metrics) -> Progress:
    """Load a checkpoint, else pretrained weights, else keep the fresh ones. Returns the Progress."""
    folder, progress = saver.folder, Progress()
    path, state = find_checkpoint(start.resume, folder)
    if path:
        progress = put_back(training, saver, path, state, start.force)
    elif not start.resume and os.path.isdir(os.path.join(folder, checkpoint.FOLDER)):
        raise ValueError(f'{folder} holds a run already; go on with it by -resume auto, '
                         'or choose another folder with -output')
    elif start.pretrained:
        load_weights(training.model, start.pretrained, ema=start.ema, options=start.options,
                     fine_tune=True)
        training.ema.restart(training.model)
        log.info('starting from the weights of %s', start.pretrained)
    elif start.resume:
        log.info('no checkpoint in %s: starting from scratch', folder)
    else:
        log.info('%s: starting from scratch', folder)
    once = start.resume == 'auto'
    progress = move_to_epoch(progress, start.last_epoch, training.steps_per_epoch, once)
    metrics.rewind(progress.step, progress.epoch)
    utils.on_rank_0(checkpoint.tidy, folder, progress.step)
    return progress


def put_back(training: Training, saver: Saver, path: str, state: dict, force: bool) -> Progress:
    """Load the state of the checkpoint at `path` into every part of a training. Returns its Progress.

    Raises ValueError if options or images have changed, unless `force`.
    """
    changes = checkpoint.differences(state['facts'], saver.facts, saver.older_facts)
    if changes and not force:
        raise ValueError(refusal(path, changes))
    for change in changes:
        log.warning('MODEL.RESUME_FORCE: %s', change)
    try:
        progress = checkpoint.put_back(state, training)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = shown(str(error) or type(error).__name__, 200)
        raise ValueError(f'{path}: this checkpoint does not fit the run: {reason}') from error
    log.info('resumed from %s: %d epochs, %d steps done', path, progress.epoch, progress.step)
    if progress.step != progress.epoch * training.steps_per_epoch + progress.steps_of_epoch:
        log.warning('an epoch has %d steps now and had another number of them; the learning rate follows '
                    'the epochs', training.steps_per_epoch)
    return progress


def refusal(path: str, changes: list[str]) -> str:
    """Return in one line why a run does not go on from the checkpoint at `path`, and what to do."""
    text = f'{path} was written with other settings: {"; ".join(changes)}.'
    if any(change.startswith('TRAIN.NUM_EPOCHS was ') for change in changes):
        run_folder = os.path.dirname(os.path.dirname(path))
        final = shlex.quote(os.path.join(run_folder, 'final.pdparams'))
        text += (' The learning rate of every step depends on TRAIN.NUM_EPOCHS: to train longer, finish '
                 f'this run as it is and start another in a new folder with -pretrained {final}.')
    return (f'{text} Go back to the old settings (config.yaml of the run has them), or resume with the '
            'new ones by -opts MODEL.RESUME_FORCE True')


def move_to_epoch(progress: Progress, epoch: int, steps_per_epoch: int, once: bool) -> Progress:
    """Apply -last_epoch: return the Progress after `epoch` epochs, or the given one for -1.

    With `once`, a run that an earlier start has moved there stays where it is: a restart has the same
    options.
    """
    if epoch < 0:
        return progress
    if once and progress.moved_to == epoch:
        log.info('-last_epoch %d: an earlier start of this run did that', epoch)
        return progress
    log.info('going on after epoch %d (-last_epoch)', epoch)
    step = max(progress.step, epoch * steps_per_epoch)   # never back: the newest checkpoint has most steps
    return Progress(epoch, step, best=progress.best, moved_to=epoch)
