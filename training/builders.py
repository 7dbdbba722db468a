"""What a training or an evaluation consists of, built from the config: Evaluation, Training, Saver."""
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

from system.stopping import Stop
import utils
from utils import log

import paddle
from paddle import nn

import datasets
from config import OF_ONE_START, changed, flatten, get_config
from data import class_names, mixing
from model import weights
from model.layers import Traced, synchronise_norms
from training import checkpoint, optim, records
from training.progress import Monitor

CHANGES_NO_SHAPE = {*OF_ONE_START, 'MODEL.ATTENTION', 'MODEL.DROPOUT', 'MODEL.DROPPATH', 'MODEL.FREEZE', 'MODEL.FREEZE_NORM'}


@dataclass
class Evaluation:
    """What an evaluation needs beside the model."""
    loader: datasets.Loader
    to_input: Callable                              # uint8 images -> network input
    autocast: Callable                              # -> the context of a forward pass
    predictions: Any                                # keeps what the model says about each image
    stop: Stop


@dataclass
class Training:
    """What a training run consists of, and its derived numbers."""
    model: nn.Layer
    parallel: nn.Layer                              # the same network, reducing gradients over the processes
    optimizer: paddle.optimizer.Optimizer
    scaler: paddle.amp.GradScaler
    ema: Any
    loader: datasets.Loader
    to_input: Callable                              # uint8 images, indices, epoch -> network input
    to_targets: Callable                            # labels -> soft targets
    mix: Callable                                   # input, targets, rng, indices -> input, targets
    loss: Callable                                  # logits, targets -> losses
    autocast: Callable
    monitor: Monitor
    lr_at: Callable                                 # optimizer step -> learning rate
    seed: int
    epochs: int
    accum: int                                      # forward passes per optimizer step
    clip: Callable                                  # limits the gradients of a model
    report_freq: int
    validate_freq: int

    @property
    def steps_per_epoch(self):
        return -(-len(self.loader) // self.accum)   # the last step of an epoch may have fewer forward passes

    def lr(self, progress, back=0):
        """Learning rate of the next step, or of one `back` steps before it: it follows the epochs, however many steps they
        had."""
        return self.lr_at(progress.epoch * self.steps_per_epoch + progress.steps_of_epoch - back)


@dataclass
class Saver:
    """When and where checkpoints are written."""
    folder: str
    facts: dict                                     # what decides the results: options, images per step, the list
    older_facts: dict                               # those that earlier versions wrote differently
    stop: Stop
    freq: int                                       # epochs
    steps: int                                      # optimizer steps; 0: never within an epoch for their number
    seconds: float                                  # 0: never for the time
    keep: int
    written: float                                  # when the last one was, or the start

    def wishes(self, step):
        """(this process wishes to stop, it wishes a checkpoint after `step`); the time is rank 0's."""
        late = self.seconds and utils.rank() == 0 and time.monotonic() - self.written >= self.seconds
        return self.stop.requested, late or self.steps and step % self.steps == 0


def settle_classes(config):
    """Return the config with the number of classes that the data have, if MODEL.NUM_CLASSES is -1.

    Raises ValueError for a class_names.txt with more names than outputs, and where the data do not say how many.
    """
    asked = config.MODEL.NUM_CLASSES
    count, source = datasets.count_classes(config.DATA.DATA_PATH, read_lists=asked < 0)
    if count > asked >= 0:
        raise ValueError(f'{source} has {count} names and the model {asked} outputs (MODEL.NUM_CLASSES); {classes_hint(count)}')
    if asked >= 0:
        return config
    log.info('%d classes, as %s says', count, source)
    return changed(config, 'MODEL.NUM_CLASSES', count)


def check_labels(config, *loaders):
    """Log a line if class_names.txt, or the lists without one, has fewer classes than the model outputs."""
    count, source = datasets.count_classes(config.DATA.DATA_PATH)
    if not source:
        lists = [loader.dataset.samples for loader in loaders]
        count, source = max(samples.count_classes() for samples in lists), lists[0].list_file
    if count < config.MODEL.NUM_CLASSES:
        log.warning('%s has %d classes and the model %d outputs (MODEL.NUM_CLASSES); %s', source, count,
                    config.MODEL.NUM_CLASSES, classes_hint(count))


def classes_hint(count):
    return f'set it to {count}, or to -1: as many classes as the data have'


def load_weights(config, model, path, fine_tune=False):
    """Load the weights at `path` as the config says. Raises as weights.load_pretrained, with the model that they are of."""
    try:
        weights.load_pretrained(model, path, ema=config.MODEL.PRETRAINED_EMA, fine_tune=fine_tune)
    except ValueError as error:
        hint = model_beside(config, path) if 'do not fit the model' in str(error) else ''
        raise ValueError(f'{error}{hint}') from None


def model_beside(config, path):
    """Return in words how the config.yaml beside weights describes another model than `config`, or ''."""
    beside = os.path.join(class_names.run_folder_of(path), 'config.yaml')
    try:
        theirs, ours = flatten(get_config(beside)), flatten(config)
    except (ValueError, OSError):
        return ''
    keys = [key for key in ours if key.startswith('MODEL.') and key not in CHANGES_NO_SHAPE and ours[key] != theirs[key]]
    if not keys:
        return ''
    shown = ', '.join(f'{key} {theirs[key]} there and {ours[key]} here' for key in keys[:3])
    return f'\n  {beside} describes another model ({shown}); give that file by -cfg'


def build_autocast(config, device):
    """A function that gives the context of a forward pass: mixed precision with AMP on a GPU, nothing otherwise."""
    if config.AMP and device == 'cpu':
        log.info('-amp: mixed precision needs a GPU; going on in float32')
    if not config.AMP or device == 'cpu':
        return nullcontext
    return partial(paddle.amp.auto_cast, level='O1', dtype=config.AMP_DTYPE)


def build_evaluation(config, device, folder, stop):
    return Evaluation(loader=datasets.build_eval(config, utils.rank(), utils.world_size()),
                      to_input=partial(datasets.normalise, mean=config.DATA.MEAN, std=config.DATA.STD),
                      autocast=build_autocast(config, device), stop=stop,
                      predictions=records.Predictions(folder) if config.EVAL else records.NoPredictions())


def build_training(config, model, device):
    world = utils.world_size()
    loader = datasets.build_train(config, utils.rank(), world)
    train, data = config.TRAIN, config.DATA
    log.info('%s: %d images to train on', data.DATA_PATH, len(loader.dataset))
    passes = min(train.ACCUM_ITER, len(loader))
    if passes < train.ACCUM_ITER:
        log.warning('TRAIN.ACCUM_ITER is %d and an epoch has %d forward passes: it is one step', train.ACCUM_ITER, passes)
    global_batch = data.BATCH_SIZE * world * passes
    base_lr = optim.scaled_lr(train.BASE_LR, global_batch, train.LR_BATCH)
    steps_per_epoch = -(-len(loader) // train.ACCUM_ITER)
    log.info('training: %d steps per epoch of %d images (%d per forward pass x %d processes x %d passes), learning rate %.3e',
             steps_per_epoch, global_batch, data.BATCH_SIZE, world, passes, base_lr)

    def to_input(images, indices, epoch):
        images = datasets.normalise(images, data.MEAN, data.STD)
        return mixing.erase_batch(images, indices, epoch, seed=config.SEED, probability=train.RANDOM_ERASE_PROB,
                                   mode=train.RANDOM_ERASE_MODE)

    if train.SYNC_BN and device == 'cpu':
        log.warning('TRAIN.SYNC_BN needs GPUs: each process keeps the statistics of its own images')
    elif train.SYNC_BN:
        synchronise_norms(model)
    trained = Traced(model) if train.TO_STATIC else model
    utils.meet()                                    # some processes may take long to read the list
    return Training(
        model=model, parallel=paddle.DataParallel(trained) if world > 1 else trained,
        optimizer=optim.build_optimizer(config, model), ema=optim.build_ema(config, model),
        scaler=paddle.amp.GradScaler(enable=config.AMP and device == 'gpu' and config.AMP_DTYPE == 'float16'),
        loader=loader, to_input=to_input, autocast=build_autocast(config, device),
        monitor=Monitor(epochs=train.NUM_EPOCHS, steps_per_epoch=steps_per_epoch, num_workers=data.NUM_WORKERS),
        mix=mixing.make_mix(train.MIXUP_ALPHA, train.CUTMIX_ALPHA, train.MIXUP_PROB, train.MIXUP_SWITCH_PROB,
                             train.MIXUP_MODE),
        to_targets=partial(mixing.one_hot, num_classes=config.MODEL.NUM_CLASSES, smoothing=train.SMOOTHING),
        lr_at=optim.build_schedule(config, base_lr, steps_per_epoch), loss=optim.build_loss(config),
        clip=partial(optim.clip_gradients, limit=train.GRAD_CLIP, mode=train.CLIP_MODE),
        seed=config.SEED, epochs=train.NUM_EPOCHS, accum=train.ACCUM_ITER,
        report_freq=config.REPORT_FREQ, validate_freq=config.VALIDATE_FREQ)


def build_saver(config, training, folder, stop):
    samples = training.loader.dataset.samples
    facts = checkpoint.facts(
        config, **{'images per step (DATA.BATCH_SIZE x processes x TRAIN.ACCUM_ITER)':
                   config.DATA.BATCH_SIZE * utils.world_size() * training.accum,
                   'train_list.txt': samples.digest()})
    return Saver(folder, facts, {'train_list.txt': samples.file_digest()}, stop, freq=config.SAVE_FREQ,
                 steps=config.SAVE_STEPS, seconds=60 * config.SAVE_MINUTES, keep=config.SAVE_KEEP, written=time.monotonic())
