"""Training and evaluation: `run(config)` builds everything, then goes through the epochs; both main programs call it."""
import math
import os
import platform
import shlex
import time
from contextlib import closing, nullcontext

from system import files
from system.stopping import Stop, Stopped
import utils
from utils import log

import paddle
from paddle import nn

from config import dump_run
from data import generators
from halonet import build_halonet, count_parameters
from model.layers import running_statistics
from model.safe_pickle import shown
from training import checkpoint, optim, records
from training.builders import build_evaluation, build_saver, build_training, check_labels, load_weights, settle_classes
from training.checkpoint import Progress
from training.progress import evaluation_batches
from training.results import check_table, save_result


@paddle.utils.unique_name.guard()                   # Paddle numbers optimizer state by what the process has built before
def run(config, stop=None):
    """Train, or with EVAL only evaluate, as the config says. Returns the last evaluation: {'val': {'acc1': ..., ...}, ...}.

    Raises ValueError or OSError, saying what to mend, for input that does not fit, and Stopped once `stop`, a
    Stop, is requested and what is done is saved.
    """
    if not config.MODEL.NUM_CLASSES:
        raise ValueError('MODEL.NUM_CLASSES is 0, a backbone without a classifier: there is nothing to train or to evaluate')
    if config.MODEL.RESUME == 'auto' and not config.OUTPUT:
        raise ValueError('-resume auto needs -output, the run folder to go on in')
    stop = stop or Stop()
    device = utils.start(config.DEVICE)
    made = utils.broadcast(utils.missing_folders(config.OUTPUT or config.SAVE))
    folder = utils.make_run_folder(config.OUTPUT, config.SAVE, f'{"eval" if config.EVAL else "train"}-{config.MODEL.NAME}')
    made = made if config.OUTPUT else [folder, *made]
    with utils.reserved(folder):
        with utils.undone_by_mistakes(folder, made):
            utils.setup_logger(folder)
            describe(config, device, folder)
            if config.EVAL:
                return run_evaluation(config, folder, device, stop)
            parts = prepare_training(config, folder, device, stop)
        training, *_ = parts
        with training.monitor.watch(folder):
            return train(*parts)


def run_evaluation(config, folder, device, stop):
    """Evaluate as the config says, and write what is kept of it to the run folder. Returns {'val': result}."""
    config = settle_classes(config)
    evaluation = build_evaluation(config, device, folder, stop)
    check_labels(config, evaluation.loader)
    model, metrics = build_model(config), records.Metrics(folder)
    table = config.RESULTS or os.path.join(folder, 'results.csv')
    check_table(table)                              # before the evaluation, not after it
    path = load_for_evaluation(model, config, folder)
    write_config(config, folder, 'config_eval.yaml')
    records.write_machine(os.path.join(folder, 'machine_eval.json'), device)
    records.keep_names_of_weights(folder, path, config.DATA.DATA_PATH, config.MODEL.NUM_CLASSES)
    result = evaluate(model, evaluation)
    evaluation.predictions.save('eval')
    records.write_report(folder)
    report(result, metrics, 'val', epoch=0, step=0)                          # the last line on the console
    save_result(table, config, model, path, result, device)
    return {'val': result}


def prepare_training(config, folder, device, stop):
    """Build and restore all that `train` takes; the run folder gets its config.yaml last, when nothing can be wrong."""
    config = settle_classes(config)
    evaluation = build_evaluation(config, device, folder, stop)
    model, metrics = build_model(config), records.Metrics(folder)
    training = build_training(config, model, device)
    check_labels(config, training.loader, evaluation.loader)
    saver = build_saver(config, training, folder, stop)
    progress = restore(training, saver, config, metrics)
    write_config(config, folder, 'config.yaml')
    records.write_machine(os.path.join(folder, 'machine.json'), device)
    records.keep_class_names(folder, config.DATA.DATA_PATH, config.MODEL.NUM_CLASSES, resumed=progress.step > 0)
    return training, evaluation, progress, saver, metrics


def build_model(config):
    """Return the network with fresh weights, which the seed decides."""
    paddle.seed(config.SEED)
    model = build_halonet(config)
    log.info('%s: %.2f M parameters', config.MODEL.NAME, count_parameters(model) / 1e6)
    return model


@utils.plain_errors()
def main(config, stop):
    """`run` for a command line: mistakes, failures and a stop end it with one line and an exit code of system.stopping."""
    run(config, stop)


# ---- restoring

def load_for_evaluation(model, config, folder):
    """Load the weights that -resume names, or else -pretrained. Returns their path."""
    path = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if path == 'auto':
        path = utils.on_rank_0(checkpoint.newest, folder)
        if not path:
            raise ValueError(f'-eval -resume auto: {folder} holds no good checkpoint')
    if not path:
        raise ValueError('-eval needs weights: give -pretrained FILE')
    if config.MODEL.RESUME:
        checkpoint.load(path)                       # raises where it is damaged
    load_weights(config, model, path)
    log.info('evaluating %s', path)
    return path


def restore(training, saver, config, metrics):
    """Go on from a checkpoint, else start from pretrained weights, else from scratch. Returns the Progress."""
    resume, folder, progress = config.MODEL.RESUME, saver.folder, Progress()
    path = utils.on_rank_0(checkpoint.newest, folder) if resume == 'auto' else resume
    if path:
        progress = load_checkpoint(training, saver, path, config.MODEL.RESUME_FORCE)
    elif not resume and os.path.isdir(os.path.join(folder, checkpoint.FOLDER)):
        raise ValueError(f'{folder} holds a run already; go on with it by -resume auto, or choose another folder with -output')
    elif config.MODEL.PRETRAINED:
        load_weights(config, training.model, config.MODEL.PRETRAINED, fine_tune=True)
        training.ema = optim.build_ema(config, training.model)               # it starts at these weights
        log.info('starting from the weights of %s', config.MODEL.PRETRAINED)
    else:
        log.info('no checkpoint in %s: starting from scratch' if resume else '%s: starting from scratch', folder)
    progress = move_to_epoch(progress, config.TRAIN.LAST_EPOCH, training.steps_per_epoch, once=resume == 'auto')
    metrics.rewind(progress.step, progress.epoch)
    utils.on_rank_0(checkpoint.tidy, folder, progress.step)
    return progress


def move_to_epoch(progress, epoch, steps_per_epoch, once):
    """Apply -last_epoch: the Progress after `epoch` epochs, or the given one for -1.

    With `once`, a run that an earlier start has moved there stays where it is: a restart has the same options.
    """
    if epoch < 0:
        return progress
    if once and progress.moved_to == epoch:
        log.info('-last_epoch %d: an earlier start of this run did that', epoch)
        return progress
    log.info('going on after epoch %d (-last_epoch)', epoch)
    step = max(progress.step, epoch * steps_per_epoch)    # never back: the newest checkpoint is the one of most steps
    return Progress(epoch, step, best=progress.best, moved_to=epoch)


def load_checkpoint(training, saver, path, force):
    """Put a checkpoint's state everywhere. Returns its Progress. Raises ValueError if options or images have changed."""
    state = checkpoint.load(path)
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
        log.warning('an epoch has %d steps now and had another number of them; the learning rate follows the epochs',
                    training.steps_per_epoch)
    return progress


def refusal(path, changes):
    """Return why a run does not go on from the checkpoint at `path`, and what to do, in one line."""
    text = f'{path} was written with other settings: {"; ".join(changes)}.'
    epochs, run_folder = 'TRAIN.NUM_EPOCHS was ', os.path.dirname(os.path.dirname(path))
    if any(change.startswith(epochs) for change in changes):
        final = shlex.quote(os.path.join(run_folder, 'final.pdparams'))
        text += (' The learning rate of every step depends on TRAIN.NUM_EPOCHS: to train longer, finish this run as it is and '
                 f'start another in a new folder with -pretrained {final}.')
    return (f'{text} Go back to the old settings (config.yaml of the run has them), or resume with the new ones by '
            '-opts MODEL.RESUME_FORCE True')


# ---- training

def train(training, evaluation, progress, saver, metrics):
    """The epochs that are left, each with its evaluation and checkpoint. Returns the last evaluation."""
    results = {}
    while progress.epoch < training.epochs:
        train_one_epoch(training, progress, saver, metrics)
        utils.average(running_statistics(training.model).values())           # every rank evaluates and saves the same model
        epoch = progress.epoch + 1
        last = epoch == training.epochs
        if last:
            evaluation.predictions = records.Predictions(saver.folder)
        due, evaluated = last or epoch % saver.freq == 0, last or epoch % training.validate_freq == 0
        if due and evaluated:
            save_checkpoint(training, progress, saver)                       # an evaluation may fail
        if evaluated:
            try:
                results = evaluate_all(training, evaluation, progress, saver.folder, metrics)
            except Stopped:
                save_checkpoint(training, progress, saver)                   # of an epoch that misses its evaluation
                raise
        progress.epoch, progress.steps_of_epoch = epoch, 0
        if due:
            save_checkpoint(training, progress, saver)
    for split in training.ema.splits:
        with training.ema.applied(training.model, split):
            save_weights(training.model, saver.folder, 'final', split)
    log.info('weights: %s', os.path.join(saver.folder, 'final.pdparams'))
    for split, (accuracy, epoch) in progress.best.items():
        log.info('best %s: acc@1 %.2f after epoch %d', split, accuracy, epoch)
    return results


def train_one_epoch(training, progress, saver, metrics):
    """The steps of an epoch that are left."""
    model, rank = training.parallel, utils.rank()
    model.train()
    if progress.steps_of_epoch == 0:
        progress.totals = utils.Totals()            # its clock leaves out what was between the epochs
    start = progress.steps_of_epoch * training.accum
    batches_of_epoch = training.monitor.batches(training.loader.epoch(progress.epoch, start), progress)
    for batches in grouped(batches_of_epoch, training.accum):
        lr = training.lr(progress)
        training.optimizer.set_lr(lr)
        paddle.seed(int(generators.rng_for(training.seed, generators.DROPOUT, progress.step, rank).integers(2 ** 31)))
        for i, (images, labels, indices) in enumerate(batches):
            images = training.to_input(images, indices, progress.epoch)
            images, targets = training.mix(images, training.to_targets(labels), mix_rng(training, progress), indices)
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
        training.optimizer.clear_grad()
        training.ema.update(training.model, progress.step)
        progress.step += 1
        progress.steps_of_epoch += 1
        training.monitor.step(lr, losses.shape[0] * len(batches))        # mixing may leave fewer images than were read
        if is_report_due(progress.steps_of_epoch, training.steps_per_epoch, training.report_freq):
            report_training(training, progress, lr, metrics)
        stop, save = utils.any_rank(*saver.wishes(progress.step))
        if stop or save:
            save_checkpoint(training, progress, saver)
        if stop:
            raise Stopped(f'stopped after step {progress.step}; to go on: {records.command_to_go_on(saver.folder)}')


def mix_rng(training, progress):
    """The same for all passes and processes of a step, so that the mixing does not depend on how the step is split."""
    return generators.rng_for(training.seed, generators.MIX, progress.step)


def grouped(items, size):
    """Lists of `size` items; the last one may be shorter."""
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def reduced_last(model, i, count):
    """Gradients are summed over the processes in the last of `count` backward passes only."""
    return model.no_sync() if i + 1 < count and isinstance(model, paddle.DataParallel) else nullcontext()


def refuse_non_finite(training, progress):
    """Stop every process, together, where the loss of one was not finite since the last report."""
    bad = progress.totals.first_nonfinite()
    if bad:
        step, rank = bad
        lr = training.lr(progress, back=progress.step - step)
        raise FloatingPointError(
            f'the loss is not finite: epoch {progress.epoch + 1}, step {step + 1}, rank {rank}, learning rate {lr:.3e}; '
            'lower TRAIN.BASE_LR, set TRAIN.GRAD_CLIP or look at the data. The checkpoints before it are intact')


def is_report_due(steps, steps_per_epoch, freq):
    """True after each `freq` steps of an epoch and at its end. A rest of less than half of `freq` gets no line of its own."""
    left = steps_per_epoch - steps
    return left == 0 or (steps % freq == 0 and 2 * left >= freq)


def report_training(training, progress, lr, metrics):
    """Log the stretch since the last report, and begin another."""
    refuse_non_finite(training, progress)
    result, seconds = progress.totals.reduce(), progress.totals.seconds()
    images_per_s = result['images'] / seconds
    log.info('epoch %d/%d  step %d/%d  loss %.4f  acc@1 %.2f  lr %.3e  %.1f images/s', progress.epoch + 1, training.epochs,
             progress.step, training.epochs * training.steps_per_epoch, result['loss'], result['acc1'], lr, images_per_s)
    metrics.write(epoch=progress.epoch + 1, step=progress.step, split='train', loss=result['loss'], acc1=result['acc1'],
                  acc5=result['acc5'], lr=lr, images_per_s=images_per_s,
                  data_wait=training.monitor.report(result['loss'], images_per_s, seconds))
    progress.totals = utils.Totals()


# ---- evaluation

@paddle.no_grad()
def evaluate(model, evaluation, split='val'):
    """Loss and accuracy over the whole list, exact for any number of processes; adds 'images_per_s' to Totals.reduce().

    A terminal shows a progress line, named `split`.

    Raises Stopped on every process where one is asked to stop, and FloatingPointError where the loss is no number.
    """
    model.eval()
    totals = utils.Totals()
    with closing(evaluation_batches(evaluation.loader, split)) as batches:
        for images, labels, indices in batches:
            if evaluation.stop.requested:
                break
            with evaluation.autocast():
                logits = model(evaluation.to_input(images))
            losses = nn.functional.cross_entropy(logits.astype('float32'), labels, reduction='none').flatten()
            totals.add(losses, logits, labels)
            evaluation.predictions.add(indices, labels, logits)
    utils.meet()                                    # some processes may have more to do than others
    skipped = sum(utils.gather(evaluation.loader.skipped))
    if skipped:
        log.warning('%d unreadable images were left out of the evaluation', skipped)
    if any(utils.any_rank(evaluation.stop.requested)):
        raise Stopped('stopped during an evaluation, which has no result: start again, a training by -resume auto')
    result = totals.reduce()
    if not math.isfinite(result['loss']):
        raise FloatingPointError('the loss of the evaluation is not finite: the weights give no usable numbers on these images')
    return {**result, 'images_per_s': result['images'] / totals.seconds()}


def evaluate_all(training, evaluation, progress, folder, metrics):
    """Evaluate the weights and their moving average, where there is one; keep the best of each. Returns {split: result}."""
    results = {}
    for split in training.ema.splits:
        with training.ema.applied(training.model, split):
            result = results[split] = evaluate(training.model, evaluation, split)
            report(result, metrics, split, progress.epoch + 1, progress.step)
            evaluation.predictions.save(split)
            if result['acc1'] > progress.best.get(split, [-1])[0]:
                progress.best[split] = [result['acc1'], progress.epoch + 1]
                save_weights(training.model, folder, 'best', split)
    return results


def report(result, metrics, split, epoch, step):
    log.info('%s  acc@1 %.2f  acc@5 %.2f  loss %.4f  (%d images)', split, result['acc1'], result['acc5'], result['loss'],
             result['images'])
    metrics.write(epoch=epoch, step=step, split=split, lr=None, **{k: v for k, v in result.items() if k != 'images'})
    return result


# ---- saving

def save_weights(model, folder, name, split):
    """best or final weights -> NAME.pdparams, and those of the moving average -> NAME_ema.pdparams."""
    path = os.path.join(folder, f'{name}{split[len("val"):]}.pdparams')
    utils.on_rank_0(checkpoint.save_weights, path, model.state_dict())


def save_checkpoint(training, progress, saver):
    """Write all that a run needs to go on as if nothing had happened."""
    refuse_non_finite(training, progress)
    state = checkpoint.capture(training, progress, saver.facts)
    utils.on_rank_0(checkpoint.save, saver.folder, progress.step, state, saver.keep)
    saver.written = time.monotonic()


def write_config(config, folder, name):
    utils.on_rank_0(files.atomic_write, os.path.join(folder, name), lambda file: file.write(dump_run(config).encode()))


def describe(config, device, folder):
    """Log what runs where, and how it was started."""
    log.debug('started by: %s', records.command())
    if device == 'cpu' and config.DEVICE == 'auto':
        log.info('no GPU: running on the CPU')
    log.info('run folder %s, Python %s, Paddle %s, %s x %d', folder, platform.python_version(), paddle.__version__, device,
             utils.world_size())
