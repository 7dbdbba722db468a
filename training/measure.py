"""The steps of -check, in the child process that training/dry_run.py starts, and what they took."""
from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from system import console, sizes
from system.stopping import Stop
import utils
from utils import log

import paddle
from paddle import nn
from yacs.config import CfgNode

import datasets
from config import changed
from training import checkpoint, engine
from training.builders import Evaluation, Training
from training.dry_run import FACTS, order

STRETCH = 4                                         # steps of a report; the first ones warm up
STEPS = 3 * STRETCH
TRIAL_STEPS = 2                                     # with another batch, for the memory alone
EVAL_BATCHES = 8
DATA_BATCHES = 8                                    # that are read at least, after those read ahead
DATA_SECONDS = 20                                   # that reading alone takes at most


class Parts(NamedTuple):
    """The parts of a run, whose loaders and epochs `shorten` has limited."""

    model: nn.Layer
    evaluation: Evaluation
    training: Training | None                       # None for -eval


def run(config: CfgNode, stop: Stop) -> None:
    """Run some steps with everything on, an evaluation and a checkpoint. Write FACTS into the folder."""
    folder, batch_size = order()
    values = {'OUTPUT': folder, 'RESULTS': '', 'REPORT_FREQ': STRETCH, 'SAVE_STEPS': 0, 'SAVE_MINUTES': 0.0}
    if batch_size:
        values.update({'DATA.BATCH_SIZE': batch_size, 'TRAIN.GLOBAL_BATCH': 0})
        if config.EVAL:
            values['DATA.BATCH_SIZE_EVAL'] = batch_size
    if not config.EVAL:
        values['MODEL.RESUME'] = ''
    for key, value in values.items():
        config = changed(config, key, value)
    made: list[Parts] = []

    def shorten(model: nn.Layer, evaluation: Evaluation, training: Training | None) -> None:
        made.append(Parts(model, evaluation, training))
        for handler in log.handlers:
            if isinstance(handler, console.Console):
                handler.addFilter(is_progress)
        evaluation.loader.limit = 1 if batch_size else EVAL_BATCHES
        if training:
            training.loader.limit = training.accum * (TRIAL_STEPS if batch_size else STEPS)
            training.epochs = 1

    engine.run(config, stop, shorten)
    parts = made[0]
    facts = {
        'model': config.MODEL.NAME,
        'image_size': sizes.as_text(config.DATA.IMAGE_SIZE),
        'processes': utils.world_size(),
        **memory_facts(),
    }
    if not batch_size:
        facts.update(evaluation_facts(parts.model, parts.evaluation))
        if parts.training:
            facts.update(training_facts(parts.training, folder))
            facts.update(build_lengths(config, parts.training))
    if utils.rank() == 0:
        machine = 'machine.json' if parts.training else 'machine_eval.json'
        with open(os.path.join(folder, machine), encoding='utf-8') as file:
            facts['precision'] = json.load(file)['precision']
        with open(os.path.join(folder, FACTS), 'w', encoding='utf-8') as file:
            json.dump(facts, file)


def is_progress(record: logging.LogRecord) -> bool:
    """True for a line about steps, or a warning. Those about files would name what will be removed."""
    return record.levelno >= logging.WARNING or record.msg.startswith('epoch')


# ---- what the steps took; every rank calls these

def build_lengths(config: CfgNode, training: Training) -> dict[str, Any]:
    """Return the facts about the length of the whole run, whose loader has no limit any more."""
    epochs = config.TRAIN.NUM_EPOCHS
    return {
        'train_images': len(training.loader.dataset),
        'images_per_step': config.DATA.BATCH_SIZE * training.accum * utils.world_size(),
        'steps_per_epoch': training.steps_per_epoch,
        'epochs': epochs,
        'evaluations': -(-epochs // config.VALIDATE_FREQ) * len(training.ema.splits),
        'checkpoints': min(config.SAVE_KEEP, -(-epochs // config.SAVE_FREQ)),
    }


def training_facts(training: Training, folder: str) -> dict[str, Any]:
    """Return the facts about the speed of a training and its files. The limit of its loader is lifted."""
    train_speed, waiting = speed_of_reports(os.path.join(folder, 'metrics.jsonl'))
    training.loader.limit = None
    weights = [entry for entry in os.scandir(folder) if entry.name.endswith('.pdparams')]
    return {
        'train_speed': train_speed,
        'model_speed': train_speed / (1 - waiting),
        'data_speed': of_all_ranks(reading_speed(training.loader)),
        'checkpoint_bytes': os.path.getsize(checkpoint.newest(folder)),
        'weight_bytes': sum(entry.stat().st_size for entry in weights),
    }


def evaluation_facts(model: nn.Layer, evaluation: Evaluation) -> dict[str, Any]:
    """Return the facts about the speed of an evaluation."""
    return {'eval_images': len(evaluation.loader.dataset),
            'eval_speed': of_all_ranks(evaluation_speed(model, evaluation))}


def memory_facts() -> dict[str, Any]:
    """Return the device, and the memory of a GPU in bytes: the most that a process has reserved, and all."""
    device = paddle.get_device().partition(':')[0]
    if device != 'gpu':
        return {'device': device, 'gpu_bytes': 0}
    return {
        'device': device,
        'gpu_bytes': max(utils.gather(paddle.device.cuda.max_memory_reserved())),
        'gpu_total': paddle.device.cuda.get_device_properties().total_memory,
    }


def speed_of_reports(path: str) -> tuple[float, float]:
    """Return images/s and the fraction of time that waited for data, by metrics.jsonl, after the warm-up."""
    with open(path, encoding='utf-8') as file:
        rows = [row for row in map(json.loads, file) if row['split'] == 'train']
    rows = rows[1:] or rows
    seconds = [1 / row['images_per_s'] for row in rows]         # of an image: all reports have as many steps
    waited = sum(row['data_wait'] * share for row, share in zip(rows, seconds))
    return len(rows) / sum(seconds), min(waited / sum(seconds), 0.999)


def of_all_ranks(speed: float) -> float:
    """Return the images/s of all ranks together: the slowest one sets the pace."""
    return min(utils.gather(speed)) * utils.world_size()


def reading_speed(loader: datasets.Loader) -> float:
    """Return the images/s at which this rank reads training data while nothing else runs.

    Batches that the data processes read ahead come at once, so the clock starts after them. An epoch without
    others is measured as a whole.
    """
    ahead = loader.num_workers * datasets.READ_AHEAD
    enough = ahead + 1 + max(DATA_BATCHES, ahead)
    start = time.perf_counter()
    arrivals: list[tuple[float, int]] = []
    for images, _, _ in loader.epoch(0):            # its processes end with the loop
        arrivals.append((time.perf_counter(), len(images)))
        late = time.perf_counter() - start > DATA_SECONDS and len(arrivals) > ahead + 1
        if late or len(arrivals) == enough:
            break
    if len(arrivals) > ahead + 1:
        return speed_between(arrivals[ahead:])
    return speed_between([(start, 0), *arrivals])


def speed_between(arrivals: Iterable[tuple[float, int]]) -> float:
    """Return the images/s after the first of (time, images)."""
    (start, _), *others = arrivals
    return sum(images for _, images in others) / (others[-1][0] - start)


@paddle.no_grad()
def evaluation_speed(model: nn.Layer, evaluation: Evaluation) -> float:
    """Return the images/s at which this rank evaluates; of the first batch only if there is no other."""
    model.eval()
    done = [(time.perf_counter(), 0)]
    for images, _, _ in evaluation.loader.epoch(0):
        with evaluation.autocast():
            logits = model(evaluation.to_input(images))
        logits.numpy()                              # waits for the device
        done.append((time.perf_counter(), len(images)))
    return speed_between(done[1:] if len(done) > 2 else done)
