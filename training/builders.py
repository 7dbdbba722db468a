"""Build the parts of a run from its config: Start, Evaluation, Training, Saver, RunFolder.

Only these functions and engine.run read the config. All others get the values that they need.
"""
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Union

from system.stopping import Stop
import utils
from utils import log

import numpy as np
import paddle
from paddle import nn
from yacs.config import CfgNode

import datasets
import ops
from config import dump_run, flatten
from data import mixing
from halonet import build_halonet, count_parameters
from model.layers import Traced, check_synchronised, synchronise_norms, use_operators
from training import checkpoint, mixed_precision, optim, records
from training.checkpoint import Progress
from training.judging import Judge
from training.mixed_precision import Autocast, LossScaler
from training.progress import Monitor
from training.run_folder import RunFolder, read_machine


@dataclass(frozen=True)
class Start:
    """The start of a run: from a checkpoint, from pretrained weights, or from fresh ones."""
    resume: str                                     # a checkpoint; auto: the newest good one; or ''
    pretrained: str                                 # a weight file, a name of the hub, or ''
    ema: bool                                       # take the moving average of the weights
    force: bool                                     # resume although options or images have changed
    last_epoch: int                                 # go on after this epoch; -1: the checkpoint's
    options: dict                                   # {'GROUP.KEY': value}, to explain weights that do not fit


@dataclass
class Evaluation:
    """The parts of an evaluation, apart from the model."""
    loader: datasets.Loader
    to_input: Callable                              # uint8 images -> network input
    autocast: Autocast
    predictions: Union[records.Predictions, records.NoPredictions]
    stop: Stop
    judge: Judge                                    # logits and labels -> those of the protocol


@dataclass
class Training:
    """The parts of a training run, and the numbers that follow from them."""
    model: nn.Layer
    parallel: nn.Layer                              # the same network, with gradients of all processes
    optimizer: paddle.optimizer.Optimizer
    scaler: LossScaler
    ema: Union[optim.Ema, optim.NoEma]
    loader: datasets.Loader
    to_input: Callable                              # uint8 images, indices, epoch -> network input
    to_targets: Callable                            # labels -> soft targets
    mix: Callable                                   # input, targets, rng, indices -> input, targets
    loss: optim.Loss
    autocast: Autocast
    monitor: Monitor
    lr_at: Callable[[int], float]                   # optimizer step -> learning rate
    seed: int
    epochs: int
    accum: int                                      # forward passes per optimizer step
    clip: Callable                                  # limits the gradients of a model
    report_freq: int
    validate_freq: int
    patience: int                                   # epochs without a better accuracy; 0: no limit

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one may have fewer forward passes."""
        return steps_of(len(self.loader), self.accum)

    def lr(self, progress: Progress, back: int = 0) -> float:
        """Return the learning rate of the next step, or of one `back` steps before it.

        It follows the epochs, however many steps those already done had.
        """
        return self.lr_at(progress.epoch * self.steps_per_epoch + progress.steps_of_epoch - back)

    def has_ended(self, progress: Progress) -> bool:
        """True after the last epoch, or if the last evaluation is `patience` epochs after the best one."""
        if progress.epoch >= self.epochs:
            return True
        if not self.patience or not progress.best:
            return False
        evaluated = progress.epoch - progress.epoch % self.validate_freq
        best = max(epoch for _, epoch in progress.best.values())
        return evaluated - best >= self.patience


@dataclass
class Saver:
    """The schedule of the checkpoints, their folder, and the facts that they hold."""
    folder: str
    facts: dict                                     # those of checkpoint.facts
    older_facts: dict                               # values that earlier versions wrote for them
    stop: Stop
    freq: int                                       # epochs between checkpoints
    steps: int                                      # optimizer steps between them; 0: no limit
    seconds: float                                  # between them; 0: no limit
    keep: int                                       # the newest so many
    written: float                                  # when the last one was written, or the run began

    def requests(self, step: int) -> tuple[bool, bool]:
        """Return (asked to stop, checkpoint due after `step`), both of this process. Rank 0 has the clock."""
        late = False
        if self.seconds and utils.rank() == 0:
            late = time.monotonic() - self.written >= self.seconds
        due = self.steps > 0 and step % self.steps == 0
        return bool(self.stop.requested), late or due


def steps_of(batches: int, accum: int) -> int:
    """Return the optimizer steps of an epoch with so many batches, `accum` per step, rounded up."""
    return -(-batches // accum)


def build_attention(config: CfgNode, device: str) -> str:
    """Return how to compute attention, a value of MODEL.ATTENTION.

    For auto a resumed run goes on with what it had, on a device of the same kind. Rank 0 decides for all.
    """
    kind = config.MODEL.ATTENTION
    if not config.MODEL.RESUME:
        return kind
    machine = read_machine(config.MODEL.RESUME, config.OUTPUT)
    before = machine.get('attention')               # earlier versions have not recorded it
    recorded = before in ('composed', 'sdpa', 'fused')
    if recorded and kind == 'auto' and str(machine.get('device')).startswith(device):
        kind = before
        if kind == 'fused' and device not in ops.load():
            kind = 'composed'
            log.warning('attention was fused, which cannot be compiled any more: going on with composed')
    elif recorded and kind not in ('auto', before):
        log.warning('attention was %s, and is %s now, as MODEL.ATTENTION says', before, kind)
    return utils.broadcast(kind)


def build_model(config: CfgNode, attention: str) -> nn.Layer:
    """Return the network with fresh weights, which the seed decides. attention: a MODEL.ATTENTION."""
    paddle.seed(config.SEED)
    model = use_operators(build_halonet(config), attention)
    log.info('%s: %.2f M parameters', config.MODEL.NAME, count_parameters(model) / 1e6)
    return model


def build_start(config: CfgNode) -> Start:
    """Return the start that MODEL.RESUME, MODEL.PRETRAINED and TRAIN.LAST_EPOCH describe."""
    model = config.MODEL
    return Start(
        resume=model.RESUME, pretrained=model.PRETRAINED, ema=model.PRETRAINED_EMA, force=model.RESUME_FORCE,
        last_epoch=config.TRAIN.LAST_EPOCH, options=flatten(config))


def build_run_folder(config: CfgNode, device: str, precision: str, path: str) -> RunFolder:
    """Return the run folder at `path`, which exists."""
    return RunFolder(
        path, device=device, precision=precision or 'float32', config=dump_run(config),
        data_path=config.DATA.DATA_PATH, num_classes=config.MODEL.NUM_CLASSES)


def build_columns(config: CfgNode, device: str, precision: str) -> dict[str, Any]:
    """Return the columns of the table of results that are known before the evaluation, {name: value}."""
    data = config.DATA.DATA_PATH
    if config.DATA.EVAL_LIST != 'val_list.txt':
        data = os.path.join(data, config.DATA.EVAL_LIST)
    data = ' + '.join([data, *filter(None, (config.DATA.EVAL_CLASSES, config.DATA.EVAL_LABELS))])
    return {
        'model': config.MODEL.NAME, 'data': data, 'image_size': config.DATA.IMAGE_SIZE,
        'crop_pct': config.DATA.CROP_PCT, 'device': device, 'amp': precision}


def build_precision(config: CfgNode, device: str) -> str:
    """Return the dtype of mixed precision: float16, bfloat16, or '' for float32 alone.

    For AMP_DTYPE auto a resumed run keeps the dtype that it had, also float32. Rank 0 decides for all.
    """
    if not config.AMP:
        return ''
    dtype = config.AMP_DTYPE
    if dtype == 'auto' and config.MODEL.RESUME:
        before = read_machine(config.MODEL.RESUME, config.OUTPUT).get('precision')
        dtype = before if before in ('float16', 'bfloat16', 'float32') else dtype
    return utils.broadcast(mixed_precision.choose_dtype(dtype, device))


def build_evaluation(config: CfgNode, precision: str, folder: str, stop: Stop) -> Evaluation:
    """Return the evaluation of DATA.EVAL_LIST. Raises as datasets.build_eval."""
    keep = records.Predictions(folder) if config.EVAL else records.NoPredictions()
    loader = datasets.build_eval(config, utils.rank(), utils.world_size())
    judged = loader.protocol.judged()
    if judged is not None:
        log.info('%s: %d of %d images have a right label; the others are left out', config.DATA.EVAL_LABELS,
                 len(judged), len(loader.dataset))
    return Evaluation(
        loader=loader,
        to_input=partial(datasets.normalise, mean=config.DATA.MEAN, std=config.DATA.STD),
        autocast=mixed_precision.make_autocast(precision), predictions=keep, stop=stop,
        judge=Judge(loader.protocol, config.MODEL.NUM_CLASSES))


def build_training(config: CfgNode, model: nn.Layer, device: str, precision: str) -> Training:
    """Return the training of `model` on train_list.txt. Raises as datasets.build_train."""
    train = config.TRAIN
    world = utils.world_size()
    loader = datasets.build_train(config, utils.rank(), world)
    log.info('%s: %d images to train on', config.DATA.DATA_PATH, len(loader.dataset))
    if utils.rank() == 0:
        needed = datasets.shared_memory_needed(loader, config.DATA.BATCH_SIZE)
        datasets.warn_of_small_shared_memory(needed, utils.local_processes())
    steps_per_epoch = steps_of(len(loader), train.ACCUM_ITER)
    lr_at = build_lr(config, len(loader), world)
    if train.SYNC_BN and device == 'cpu':
        log.warning('TRAIN.SYNC_BN needs GPUs: each process keeps the statistics of its own images')
    elif train.SYNC_BN:
        synchronise_norms(model)
        if world > 1:
            check_synchronised(nn.SyncBatchNorm(1), utils.rank(), world)
    utils.meet()                                    # some processes may take long to read the list
    return Training(
        model=model,
        parallel=build_parallel(config, model, world),
        optimizer=optim.build_optimizer(config, model),
        scaler=LossScaler(enable=precision == 'float16'),
        ema=optim.build_ema(config, model),
        loader=loader,
        to_input=build_input(config),
        to_targets=partial(mixing.one_hot, num_classes=config.MODEL.NUM_CLASSES, smoothing=train.SMOOTHING),
        mix=build_mix(config),
        loss=optim.build_loss(config, loader.dataset.samples.labels),
        autocast=mixed_precision.make_autocast(precision),
        monitor=Monitor(
            epochs=train.NUM_EPOCHS, steps_per_epoch=steps_per_epoch, num_workers=loader.num_workers),
        lr_at=lr_at,
        seed=config.SEED,
        epochs=train.NUM_EPOCHS,
        accum=train.ACCUM_ITER,
        clip=partial(optim.clip_gradients, limit=train.GRAD_CLIP, mode=train.CLIP_MODE),
        report_freq=config.REPORT_FREQ,
        validate_freq=config.VALIDATE_FREQ,
        patience=train.PATIENCE)


def build_lr(config: CfgNode, batches: int, world: int) -> Callable[[int], float]:
    """Return the schedule, step -> learning rate, for so many batches per epoch and process."""
    train, batch_size = config.TRAIN, config.DATA.BATCH_SIZE
    passes = min(train.ACCUM_ITER, batches)
    if passes < train.ACCUM_ITER:
        log.warning('TRAIN.ACCUM_ITER is %d and an epoch has %d forward passes: it is one step',
                    train.ACCUM_ITER, passes)
    global_batch = batch_size * world * passes
    base_lr = optim.scaled_lr(train.BASE_LR, global_batch, train.LR_BATCH)
    steps_per_epoch = steps_of(batches, train.ACCUM_ITER)
    log.info('training: %d steps per epoch of %d images (%d per forward pass x %d processes x %d passes), '
             'learning rate %.3e', steps_per_epoch, global_batch, batch_size, world, passes, base_lr)
    return optim.build_schedule(config, base_lr, steps_per_epoch)


def build_parallel(config: CfgNode, model: nn.Layer, world: int) -> nn.Layer:
    """Return the network to call: traced with TRAIN.TO_STATIC, with the gradients of all processes."""
    network = Traced(model) if config.TRAIN.TO_STATIC else model
    return paddle.DataParallel(network) if world > 1 else network


def build_mix(config: CfgNode) -> Callable:
    """Return mixup and cutmix as TRAIN says: input, targets, rng, indices -> input, targets."""
    train = config.TRAIN
    return mixing.make_mix(
        train.MIXUP_ALPHA, train.CUTMIX_ALPHA, train.MIXUP_PROB, train.MIXUP_SWITCH_PROB, train.MIXUP_MODE)


def build_input(config: CfgNode) -> Callable[[paddle.Tensor, np.ndarray, int], paddle.Tensor]:
    """Return a function that normalises and erases: uint8 images, indices, epoch -> input (B, C, H, W)."""
    data, train, seed = config.DATA, config.TRAIN, config.SEED

    def to_input(images: paddle.Tensor, indices: np.ndarray, epoch: int) -> paddle.Tensor:
        images = datasets.normalise(images, data.MEAN, data.STD)
        return mixing.erase_batch(images, indices, epoch, seed=seed, probability=train.RANDOM_ERASE_PROB,
                                  mode=train.RANDOM_ERASE_MODE)

    return to_input


def build_saver(config: CfgNode, training: Training, precision: str, folder: str, stop: Stop) -> Saver:
    """Return the Saver of a training, as the SAVE options say."""
    samples = training.loader.dataset.samples
    images_per_step = config.DATA.BATCH_SIZE * utils.world_size() * training.accum
    derived = {'images per step (DATA.BATCH_SIZE x processes x TRAIN.ACCUM_ITER)': images_per_step,
               'train_list.txt': samples.digest(),
               'AMP_DTYPE': precision or 'float16'}  # without mixing, its default in earlier versions
    return Saver(
        folder, facts=checkpoint.facts(flatten(config), **derived),
        older_facts={'train_list.txt': samples.file_digest()}, stop=stop, freq=config.SAVE_FREQ,
        steps=config.SAVE_STEPS, seconds=60 * config.SAVE_MINUTES, keep=config.SAVE_KEEP,
        written=time.monotonic())


# ---- numbers that the config leaves open

def count_passes(global_batch: int, batch_size: int, world: int) -> int:
    """Return the TRAIN.ACCUM_ITER that gives TRAIN.GLOBAL_BATCH images per step.

    Raises ValueError if the images of one forward pass do not divide it.
    """
    in_a_pass = batch_size * world
    if global_batch % in_a_pass:
        raise ValueError(f'TRAIN.GLOBAL_BATCH {global_batch} is no multiple of the {in_a_pass} images of a '
                         f'forward pass, DATA.BATCH_SIZE {batch_size} x {world} processes; '
                         'choose another DATA.BATCH_SIZE')
    return global_batch // in_a_pass


def count_classes(num_classes: int, data_path: str) -> int:
    """Return MODEL.NUM_CLASSES, or the number of classes that the data have if it is -1.

    Raises ValueError for a class_names.txt with more names than outputs, and where the data do not say
    how many.
    """
    count, source = datasets.count_classes(data_path, read_lists=num_classes < 0)
    if num_classes < 0:
        log.info('%d classes, as %s says', count, source)
        return count
    if count > num_classes:
        raise ValueError(f'{source} has {count} names and the model {num_classes} outputs '
                         f'(MODEL.NUM_CLASSES); {_hint(count)}')
    return num_classes


def check_labels(num_classes: int, data_path: str, *loaders: datasets.Loader) -> None:
    """Log a line if class_names.txt, or the lists without one, has fewer classes than the model outputs."""
    count, source = datasets.count_classes(data_path)
    if not source:
        lists = [loader.dataset.samples for loader in loaders]
        count = max(samples.count_classes() for samples in lists)
        source = lists[0].list_file
    if count < num_classes:
        log.warning('%s has %d classes and the model %d outputs (MODEL.NUM_CLASSES); %s',
                    source, count, num_classes, _hint(count))


def _hint(count: int) -> str:
    return f'set it to {count}, or to -1: as many classes as the data have'
