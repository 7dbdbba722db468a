"""Training and evaluation: `run(config)` builds everything and trains or evaluates; both mains call it."""
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, Optional

from system import lifeline
from system.stopping import Stop, Stopped
import utils
from utils import log

import numpy as np
import paddle
from paddle import nn
from yacs.config import CfgNode

from config import changed
from data import generators
from model.layers import operators_of, running_statistics
from training import builders, checkpoint, records, results
from training.builders import Evaluation, Saver, Start, Training
from training.checkpoint import Progress
from training.progress import evaluation_batches
from training.records import Metrics
from training.restoring import load_for_evaluation, restore
from training.run_folder import RunFolder


@paddle.utils.unique_name.guard()                   # Paddle numbers the layers that a process has built
def run(config: CfgNode, stop: Optional[Stop] = None, shorten: Optional[Callable] = None) -> dict[str, dict]:
    """Train, or with EVAL only evaluate. Returns the last evaluation, {split: {name: value}}.

    `shorten` is called with the model, the evaluation and the training or None, and may limit their loaders.
    Raises ValueError or OSError for input that does not fit, with the fix. Raises Stopped once `stop` is
    requested and what is done is saved.
    """
    if not config.MODEL.NUM_CLASSES:
        raise ValueError('MODEL.NUM_CLASSES is 0, a backbone without a classifier: there is nothing to train '
                         'or to evaluate')
    if config.MODEL.RESUME == 'auto' and not config.OUTPUT:
        raise ValueError('-resume auto needs -output, the run folder to go on in')
    stop = stop or Stop()
    device = utils.start(config.DEVICE)
    made = utils.broadcast(utils.missing_folders(config.OUTPUT or config.SAVE))
    task = 'eval' if config.EVAL else 'train'
    path = utils.make_run_folder(config.OUTPUT, config.SAVE, f'{task}-{config.MODEL.NAME}')
    if not config.OUTPUT:
        made = [path, *made]
    with utils.reserved(path):
        with utils.undone_by_mistakes(path, made):
            utils.setup_logger(path)
            log_start(path, device, chosen=config.DEVICE != 'auto')
            precision = builders.build_precision(config, device)
            num_classes = builders.count_classes(config.MODEL.NUM_CLASSES, config.DATA.DATA_PATH)
            config = changed(config, 'MODEL.NUM_CLASSES', num_classes)
            folder = builders.build_run_folder(config, device, precision, path)
            metrics = Metrics(path)
            start = builders.build_start(config)
            evaluation = builders.build_evaluation(config, precision, path, stop)
            model = builders.build_model(config, builders.build_attention(config, device))
            if config.EVAL:
                if shorten:
                    shorten(model, evaluation, None)
                table = config.RESULTS or os.path.join(path, 'results.csv')
                columns = builders.build_columns(config, device, precision)
                return run_evaluation(
                    model, evaluation, start, folder, metrics, table=table, columns=columns)
            if config.TRAIN.GLOBAL_BATCH:
                passes = builders.count_passes(
                    config.TRAIN.GLOBAL_BATCH, config.DATA.BATCH_SIZE, utils.world_size())
                config = changed(config, 'TRAIN.ACCUM_ITER', passes)
            training = builders.build_training(config, model, device, precision)
            if shorten:
                shorten(model, evaluation, training)
            saver = builders.build_saver(config, training, precision, path, stop)
            progress = prepare_training(training, evaluation, saver, start, folder, metrics)
        try:
            with training.monitor.shown():
                return train(training, evaluation, progress, saver, metrics)
        finally:
            records.write_page(path)


@utils.plain_errors()
def main(config: CfgNode, stop: Stop) -> None:
    """`run` for a command line: mistakes, failures and a stop end it with one line and an exit code."""
    try:
        if config.CHECK or config.CHECK_BATCH:
            from training import measure  # late, because it calls the other `run`
            measure.run(config, stop)
        else:
            run(config, stop)
    except Stopped:
        lifeline.say_goodbye()                      # all have saved, and end
        raise
    lifeline.say_goodbye()


def log_start(folder: str, device: str, *, chosen: bool) -> None:
    """Log what runs where, and how it was started. chosen: the user asked for this device."""
    log.debug('started by: %s', records.command())
    if device == 'cpu' and not chosen:
        log.info('no GPU: running on the CPU')
    log.info('run folder %s, Python %s, Paddle %s, %s x %d', folder, platform.python_version(),
             paddle.__version__, device, utils.world_size())


def run_evaluation(model: nn.Layer, evaluation: Evaluation, start: Start, folder: RunFolder,
                   metrics: Metrics, *, table: str, columns: dict[str, Any]) -> dict[str, dict]:
    """Load weights, evaluate them and record the result. Returns {'val': result}.

    table: the CSV file that gets a row. columns: those of the row that are known already.
    """
    classes = evaluation.loader.protocol.classes
    if classes is None:
        builders.check_labels(folder.num_classes, folder.data_path, evaluation.loader)
    results.check_table(table)                      # before the evaluation, not after it
    weights = load_for_evaluation(model, start, folder.path)
    folder.record_evaluation(weights, attention=operators_of(model), classes=classes)
    result = evaluate(model, evaluation)
    evaluation.predictions.save('eval')
    records.write_page(folder.path)
    report_evaluation(result, metrics, 'val', epoch=0, step=0)       # the last line on the console
    results.save_result(table, results.row(columns, model, weights, result))
    return {'val': result}


def prepare_training(training: Training, evaluation: Evaluation, saver: Saver, start: Start,
                     folder: RunFolder, metrics: Metrics) -> Progress:
    """Restore the training and return its Progress. Record the start last, when no input can be wrong."""
    builders.check_labels(folder.num_classes, folder.data_path, training.loader, evaluation.loader)
    progress = restore(training, saver, start, metrics)
    folder.record_training(resumed=progress.step > 0, attention=operators_of(training.model))
    return progress


# ---- training

def train(training: Training, evaluation: Evaluation, progress: Progress, saver: Saver,
          metrics: Metrics) -> dict[str, dict]:
    """Run the epochs that are left, with evaluations and checkpoints. Returns the last evaluation."""
    found: dict[str, dict] = {}
    while not training.has_ended(progress):
        train_one_epoch(training, progress, saver, metrics)
        utils.average(running_statistics(training.model).values())   # every rank evaluates the same model
        epoch = progress.epoch + 1
        last = epoch == training.epochs
        if last or training.patience:               # then any evaluation may be the last
            evaluation.predictions = records.Predictions(saver.folder)
        save_due = last or epoch % saver.freq == 0
        evaluation_due = last or epoch % training.validate_freq == 0
        if save_due and evaluation_due:
            save_checkpoint(training, progress, saver)               # an evaluation may fail
        if evaluation_due:
            try:
                found = evaluate_all(training, evaluation, progress, saver.folder, metrics)
            except Stopped:
                save_checkpoint(training, progress, saver)           # the epoch still lacks its evaluation
                raise
        progress.epoch, progress.steps_of_epoch = epoch, 0
        if save_due or training.has_ended(progress):
            save_checkpoint(training, progress, saver)
    if progress.epoch < training.epochs:
        log.info('no better accuracy in %d epochs: the training ends', training.patience)
    for split in training.ema.splits:
        with training.ema.applied(training.model, split):
            save_weights(training.model, saver.folder, 'final', split)
    log.info('weights: %s', os.path.join(saver.folder, 'final.pdparams'))
    for split, (accuracy, epoch) in progress.best.items():
        log.info('best %s: acc@1 %.2f after epoch %d', split, accuracy, epoch)
    return found


def train_one_epoch(training: Training, progress: Progress, saver: Saver, metrics: Metrics) -> None:
    """Run the optimizer steps that are left of an epoch. Raises Stopped, after a checkpoint, on request."""
    model = training.parallel
    model.train()
    if progress.steps_of_epoch == 0:
        progress.totals = utils.Totals()            # its clock leaves out the time between the epochs
    first = progress.steps_of_epoch * training.accum
    batches_of_epoch = training.monitor.batches(training.loader.epoch(progress.epoch, first), progress)
    for batches in grouped(batches_of_epoch, training.accum):
        lr = training.lr(progress)
        training.optimizer.set_lr(lr)
        paddle.seed(dropout_seed(training, progress))
        for i, (images, labels, indices) in enumerate(batches):
            images = training.to_input(images, indices, progress.epoch)
            targets = training.to_targets(labels)
            images, targets = training.mix(images, targets, mix_rng(training, progress), indices)
            with reduced_last(model, i, len(batches)):
                with training.autocast():
                    logits = model(images)
                losses = training.loss(logits, targets)
                training.scaler.scale(losses.mean() / len(batches)).backward()
            progress.totals.add(losses, logits, targets.argmax(-1), progress.step)
        training.scaler.unscale_(training.optimizer)
        training.clip(training.model)
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.optimizer.clear_grad(set_to_zero=False)             # zeros would be written, then added to
        training.ema.update(training.model, progress.step)
        progress.step += 1
        progress.steps_of_epoch += 1
        training.monitor.step(lr, losses.shape[0] * len(batches))    # mixing may leave fewer images than read
        if is_report_due(progress.steps_of_epoch, training.steps_per_epoch, training.report_freq):
            report_training(training, progress, lr, metrics)
        stop, save = utils.any_rank(*saver.requests(progress.step))
        if stop or save:
            save_checkpoint(training, progress, saver)
        if stop:
            go_on = records.command_to_go_on(saver.folder)
            raise Stopped(f'stopped after step {progress.step}; to go on: {go_on}')


def dropout_seed(training: Training, progress: Progress) -> int:
    """Return the seed of dropout and stochastic depth in the next step, another one for each rank."""
    rng = generators.rng_for(training.seed, generators.DROPOUT, progress.step, utils.rank())
    return int(rng.integers(2 ** 31))


def mix_rng(training: Training, progress: Progress) -> np.random.Generator:
    """Return the generator of the next step's mixing.

    It is the same for all passes and processes of a step, so the mixing does not depend on how the step
    is split.
    """
    return generators.rng_for(training.seed, generators.MIX, progress.step)


def grouped(items: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` items; the last one may be shorter."""
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def reduced_last(model: nn.Layer, i: int, count: int) -> AbstractContextManager:
    """Return the context of backward pass i of `count`: only the last one sums gradients over processes."""
    if i + 1 < count and isinstance(model, paddle.DataParallel):
        return model.no_sync()
    return nullcontext()


def refuse_non_finite(training: Training, progress: Progress) -> None:
    """Raise FloatingPointError on every process if a loss of one was not finite since the last report."""
    bad = progress.totals.first_nonfinite()
    if bad:
        step, rank = bad
        lr = training.lr(progress, back=progress.step - step)
        raise FloatingPointError(
            f'the loss is not finite: epoch {progress.epoch + 1}, step {step + 1}, rank {rank}, '
            f'learning rate {lr:.3e}; lower TRAIN.BASE_LR, set TRAIN.GRAD_CLIP or look at the data. '
            'The checkpoints before it are intact')


def is_report_due(steps: int, steps_per_epoch: int, freq: int) -> bool:
    """True after each `freq` steps of an epoch and at its end.

    A rest of less than half of `freq` gets no line of its own.
    """
    left = steps_per_epoch - steps
    return left == 0 or (steps % freq == 0 and 2 * left >= freq)


def report_training(training: Training, progress: Progress, lr: float, metrics: Metrics) -> None:
    """Log and record the steps since the last report."""
    refuse_non_finite(training, progress)
    result, seconds = progress.totals.reduce(), progress.totals.seconds()
    images_per_s = result['images'] / seconds
    steps = training.epochs * training.steps_per_epoch
    log.info('epoch %d/%d  step %d/%d  loss %.4f  acc@1 %.2f  lr %.3e  %.1f images/s',
             progress.epoch + 1, training.epochs, progress.step, steps, result['loss'], result['acc1'], lr,
             images_per_s)
    data_wait = training.monitor.report(result['loss'], images_per_s, seconds)
    metrics.write(
        epoch=progress.epoch + 1, step=progress.step, split='train', loss=result['loss'], acc1=result['acc1'],
        acc5=result['acc5'], lr=lr, images_per_s=images_per_s, data_wait=data_wait,
        **training.scaler.record())
    progress.totals = utils.Totals()


# ---- evaluation

@paddle.no_grad()
def evaluate(model: nn.Layer, evaluation: Evaluation, split: str = 'val') -> dict[str, Any]:
    """Compute loss and accuracy over the whole list, exact for any number of processes.

    Returns Totals.reduce() and 'images_per_s'. A terminal shows a progress line, named `split`. Raises
    Stopped on every process where one is asked to stop, and FloatingPointError where the loss is not
    finite.
    """
    model.eval()
    totals = utils.Totals()
    with closing(evaluation_batches(evaluation.loader, split)) as batches:
        for images, labels, indices in batches:
            if evaluation.stop.requested:
                break
            with evaluation.autocast():
                logits = model(evaluation.to_input(images))
            logits, labels = evaluation.judge(logits, labels, indices)
            losses = nn.functional.cross_entropy(logits.astype('float32'), labels, reduction='none')
            totals.add(losses.flatten(), logits, labels)
            evaluation.predictions.add(indices, labels, logits)
    utils.meet()                                    # some processes may have more to do than others
    skipped = sum(utils.gather(evaluation.loader.skipped))
    if skipped:
        log.warning('%d unreadable images were left out of the evaluation', skipped)
    if any(utils.any_rank(evaluation.stop.requested)):
        raise Stopped('stopped during an evaluation, which has no result: start again, a training by '
                      '-resume auto')
    result = totals.reduce()
    if not math.isfinite(result['loss']):
        raise FloatingPointError('the loss of the evaluation is not finite: the weights give no usable '
                                 'numbers on these images')
    return {**result, 'images_per_s': result['images'] / totals.seconds()}


def evaluate_all(training: Training, evaluation: Evaluation, progress: Progress, folder: str,
                 metrics: Metrics) -> dict[str, dict]:
    """Evaluate the weights and any moving average, and save the best of each. Returns {split: result}."""
    found = {}
    for split in training.ema.splits:
        with training.ema.applied(training.model, split):
            result = evaluate(training.model, evaluation, split)
            report_evaluation(result, metrics, split, progress.epoch + 1, progress.step)
            evaluation.predictions.save(split)
            if result['acc1'] > progress.best.get(split, [-1])[0]:
                progress.best[split] = [result['acc1'], progress.epoch + 1]
                save_weights(training.model, folder, 'best', split)
            found[split] = result
    return found


def report_evaluation(result: dict[str, Any], metrics: Metrics, split: str, epoch: int,
                      step: int) -> None:
    """Log and record the result of an evaluation."""
    log.info('%s  acc@1 %.2f  acc@5 %.2f  loss %.4f  (%d images)', split, result['acc1'], result['acc5'],
             result['loss'], result['images'])
    values = {key: value for key, value in result.items() if key != 'images'}
    metrics.write(epoch=epoch, step=step, split=split, lr=None, **values)


# ---- saving

def save_weights(model: nn.Layer, folder: str, name: str, split: str) -> None:
    """Write weights to NAME.pdparams; those of the moving average, split val_ema, to NAME_ema.pdparams."""
    suffix = split[len('val'):]
    path = os.path.join(folder, f'{name}{suffix}.pdparams')
    utils.on_rank_0(checkpoint.save_weights, path, model.state_dict())


def save_checkpoint(training: Training, progress: Progress, saver: Saver) -> None:
    """Write all that a run needs to go on as if it had not been interrupted."""
    refuse_non_finite(training, progress)
    state = checkpoint.capture(training, progress, saver.facts)
    utils.on_rank_0(checkpoint.save, saver.folder, progress.step, state, saver.keep)
    saver.written = time.monotonic()
