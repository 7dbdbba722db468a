"""Make the HTML of a run's page, one self-contained file: the values of templates/run.html, from a Run."""
import math
import os
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np
from markupsafe import Markup

from config import defaults
from reporting import pictures, scores
from reporting.charts import BUCKETS, Series, has_points, line_chart, number
from reporting.runs import SPLITS, Predictions, Run, differences
from reporting.templates import render

FEW_CLASSES = 30                                    # up to so many: the confusion matrix and every class
NUMBERED = 16                                       # up to so many: larger cells of the matrix
PAIRS, WORST, ERRORS = 20, 20, 24                   # most that are shown: pairs, classes, errors
PERCENT = {'unit': '\u202f%', 'top': 100, 'linear': True}
CURVES: tuple[tuple[str, str, tuple[str, ...], int, dict[str, Any]], ...] = (
    # title, key of metrics.jsonl, splits, factor, options of line_chart
    ('Top-1 accuracy', 'acc1', tuple(SPLITS), 1, PERCENT),
    ('Loss', 'loss', tuple(SPLITS), 1, {}),
    ('Top-5 accuracy', 'acc5', tuple(SPLITS), 1, PERCENT),
    ('Learning rate', 'lr', ('train',), 1, {'digits': 3, 'linear': True}),
    ('Training speed, images/s', 'images_per_s', ('train',), 1, {'linear': True}),
    ('Time spent waiting for data', 'data_wait', ('train',), 100, {**PERCENT, 'digits': 2}),
)
ALWAYS_DRAWN = ('loss', 'acc1', 'lr')               # even before there is a record
STYLE = {'train': (2, 1, -1), 'val': (0, 0, 0), 'val_ema': (1, 0, 1)}        # split -> colour, dash, marker
STYLE_ALONE = (0, 0, -1)
MOST_NAME_WIDTH = 18                                # characters of a class name beside its bar
LONG = 60                                           # letters of a value that gets the whole width
EMPTY = Markup('<i>empty</i>')
DASH = '–'                                          # where there is no value


@dataclass
class Table:
    """A table of a page; the first cell of each row is its heading. `kind` is its class in style.css."""
    head: list[str]
    rows: list[list[str]]
    kind: str


# ---- text

def fixed(value: Optional[float], digits: int) -> str:
    """Format a number with as many decimals as `digits`."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return 'not finite'
    return f'{value:.{digits}f}'


def percent(value: Optional[float], digits: int = 2) -> str:
    """Format a number that is in percent."""
    if value is None or not math.isfinite(value):
        return fixed(value, digits)
    return f'{value:.{digits}f}\u202f%'


def duration(seconds: Optional[float]) -> str:
    """Format a time in its two largest units; '' for None."""
    if seconds is None:
        return ''
    if seconds < 3600:
        return f'{int(seconds // 60)} min {int(seconds % 60)} s'
    days, hours, minutes = int(seconds // 86400), int(seconds // 3600 % 24), int(seconds // 60 % 60)
    if days:
        return f'{days} d {hours} h'
    return f'{hours} h {minutes} min'


def value_text(value: Any) -> str:
    """Format the value of an option; None is an option that this config does not have."""
    if value is None:
        return DASH
    if value == '':
        return EMPTY
    return str(value)


# ---- the page

def run_page(run: Run) -> str:
    """Return the page of a run."""
    split, judged = run.judged
    values: dict[str, Any] = {'confusion': None}
    if judged is not None:
        scored = scores.judge(judged, len(run.classes))
        values = {'confusion': confusion(scored.confusion, run.classes),
                  'classes': class_accuracies(scored.confusion, run.classes),
                  'calibration': calibration(scored),
                  'errors': confident_errors(run, judged, split)}
    return render(
        'run.html',
        title=f'{run.title} · {run.name}',
        script='hover.js',
        run=run,
        state=status(run),
        facts=facts(run),
        tiles=tiles(run),
        curves=curves(run),
        evaluations=evaluations(run),
        configuration=configuration(run),
        machine=machine(run),
        **values,
    )


@dataclass
class State:
    """How far a run came: `kind` is 'done', 'part' or 'none'."""
    kind: str
    text: str


def status(run: Run) -> State:
    """Describe how far a run came."""
    planned = run.config.get('TRAIN.NUM_EPOCHS')
    if not run.records and run.predictions:
        return State('done', 'evaluation only')
    if not run.records:
        return State('none', 'nothing recorded yet')
    last = run.records[-1]
    if last['epoch'] != planned:
        reached = f'epoch {last["epoch"]} of {planned or "?"}, step {last["step"]:,}'
        return State('part', f'not complete: {reached}')
    if not run.finished:
        return State('part', f'all {planned} epochs recorded, but no final weights')
    return State('done', f'complete: {planned} epochs')


def facts(run: Run) -> list[str]:
    """List when a run was made, how long it took and how often it was resumed, as far as known."""
    texts = []
    if 'first' in run.log:
        first, last = run.log['first'][:16], run.log['last'][:16]
        if last[:10] == first[:10]:
            last = last[11:]                        # the same day: the time alone
        texts.append(f'{first} to {last}')
        texts.append(duration(run.log['seconds']))
    times = run.log['resumed']
    if times == 1:
        texts.append('resumed once')
    elif times:
        texts.append(f'resumed {times} times')
    return texts


@dataclass
class Tile:
    """A large number at the top of the page."""
    name: str
    value: str
    note: str


def tiles(run: Run) -> list[Tile]:
    """List the numbers one looks for first.

    Accuracies are those of the best epochs, whose weights are kept, with the last epoch's beside them.
    """
    found = []
    for split in ('val', 'val_ema'):
        best = run.best(split)
        if best:
            note = f'best, epoch {best[1]}; last {percent(run.last(split, "acc1"))}'
            found.append(Tile(f'Top-1, {SPLITS[split]}', percent(best[0]), note))
    best = run.best('val')
    top5 = run.at('val', 'acc5', best[1]) if best else None
    if best and top5 is not None:
        note = f'epoch {best[1]}; last {percent(run.last("val", "acc5"))}'
        found.append(Tile('Top-5, val', percent(top5), note))
    _, judged = run.judged
    if judged is not None and not run.records:
        top1 = percent(100 * float(np.mean(judged['label'] == judged['top1'])))
        found.append(Tile('Top-1', top1, f'{len(judged["index"]):,} images'))
    speed = run.median_speed
    if speed is not None:
        found.append(Tile('Training loss', number(run.last('train', 'loss')), 'of augmented images'))
        waits = run.values('train', 'data_wait')
        note = 'median, training'
        if waits:
            note = f'{100 * np.mean(waits):.0f}\u202f% waiting for data'
        found.append(Tile('Images/s', f'{speed:,.0f}', note))
    return found


def curves(run: Run) -> dict[str, Any]:
    """Draw the charts of a run, with a note."""
    x_label = 'epoch' if run.steps_per_epoch else 'step'
    charts = []
    for title, key, splits, factor, options in CURVES:
        series = []
        for split in splits:
            style = STYLE[split] if len(splits) > 1 else STYLE_ALONE
            series.append(Series(SPLITS[split], run.curve(split, key, factor), *style))
        if key in ALWAYS_DRAWN or has_points(series):
            charts.append(line_chart(title, series, x_label=x_label, **options))
    note = ('Training loss and accuracy are those of augmented images with smoothed or mixed labels, '
            'averaged over the steps since the previous record.')
    if len(run.curve('train', 'loss')) > 2 * BUCKETS:
        note += ' A long curve shows means of adjacent records; its band is their range.'
    return {'charts': charts, 'note': note}


def evaluations(run: Run) -> Table:
    """List the numbers of every evaluation."""
    splits = [split for split in ('val', 'val_ema') if run.curve(split, 'loss')]
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for record in run.records:
        if record['split'] in splits:
            found.setdefault((record['epoch'], record['step']), {})[record['split']] = record
    head = ['epoch', 'step']
    for split in splits:
        name = SPLITS[split]
        head += [f'top-1 ({name})', f'top-5 ({name})', f'loss ({name})']
    rows = []
    for (epoch, step), records in sorted(found.items()):
        row = [str(epoch), f'{step:,}']
        for split in splits:
            record = records.get(split, {})
            row += [fixed(record.get('acc1'), 2), fixed(record.get('acc5'), 2), fixed(record.get('loss'), 4)]
        rows.append(row)
    return Table(head, rows, 'numbers')


# ---- errors

def confusion(matrix: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Return the section of a confusion matrix (C, C), or of many classes the most confused pairs."""
    count, total = len(names), int(matrix.sum())
    note = f'{total - int(np.trace(matrix)):,} of {total:,} images are misclassified.'
    if count > FEW_CLASSES:
        return {'title': 'Most confused classes', 'note': note, 'pairs': confused_pairs(matrix, names)}
    note += ' Rows are labels, columns are predictions. The colour shows the fraction of the row.'
    short = max(len(name) for name in names) <= 3
    kind = 'confusion'
    if count <= NUMBERED:
        kind += ' few'
    if not short:
        kind += ' named'
    return {'title': 'Confusion', 'note': note, 'pairs': None, 'names': names, 'short': short,
            'kind': kind, 'rows': confusion_cells(matrix, names)}


def confusion_cells(matrix: np.ndarray, names: list[str]) -> list[list[dict[str, Any]]]:
    """Return the cells of a confusion matrix (C, C): their count, text, and strength of colour in 0 to 1.

    Errors are scaled by the largest fraction of errors, so that few of them are visible.
    """
    fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    worst = max((fractions - np.diag(np.diag(fractions))).max(), 1e-9)
    rows = []
    for i, name in enumerate(names):
        row = []
        for j, predicted in enumerate(names):
            count = int(matrix[i, j])
            if i == j:
                kind, text, strength = 'right', f'{name} correct: {count}', fractions[i, j]
            else:
                kind, text = 'wrong', f'{name} predicted as {predicted}: {count}'
                strength = fractions[i, j] / worst
            if strength > 0.6:
                kind += ' strong'
            row.append({'count': count, 'text': text, 'kind': kind, 'strength': strength})
        rows.append(row)
    return rows


def confused_pairs(matrix: np.ndarray, names: list[str]) -> Table:
    """List the pairs of classes that are confused most often."""
    errors = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-errors, axis=None, kind='stable')[:PAIRS]
    rows = []
    for i, j in zip(*np.unravel_index(order, errors.shape)):
        if errors[i, j]:
            fraction = 100 * errors[i, j] / matrix[i].sum()
            rows.append([names[i], names[j], str(errors[i, j]), percent(fraction, 0), str(errors[j, i])])
    head = ['class', 'predicted as', 'images', 'of the class', 'the other way']
    return Table(head, rows, 'numbers second-text')


def calibration(judged: scores.Scores) -> dict[str, Any]:
    """Return the reliability diagram, and the means over classes as a table."""
    points = [(100 * probability, 100 * accuracy) for images, probability, accuracy in judged.bins if images]
    diagonal = [(0.0, 0.0), (100.0, 100.0)]
    diagram = line_chart(
        'Accuracy by probability', [Series('accuracy', points), Series('calibrated', diagonal, 1, 1, -1)],
        x_label='probability of the prediction, %', unit=' %', top=100, linear=True)
    note = (f'The expected calibration error over {scores.BINS} ranges of the probability is '
            f'{percent(100 * judged.calibration_error, 1)}.')
    if math.isfinite(judged.temperature):
        note += f' softmax(logits / {judged.temperature:.2f}) has the lowest loss on these images.'
    rows = [[text, *(percent(100 * judged.mean(name, weighted), 2) for name in ('precision', 'recall', 'f1'))]
            for text, weighted in (('mean over classes', False), ('weighted by images', True))]
    means = Table(['', 'precision', 'recall', 'F1'], rows, 'numbers')
    return {'note': note, 'diagram': diagram, 'means': means}


def class_accuracies(matrix: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Return the accuracy of each class, the lowest first; of many classes the lowest, and a table of all.

    matrix: the confusion matrix (C, C).
    """
    counts = zip(names, np.diag(matrix).tolist(), matrix.sum(axis=1).tolist())
    rows = [row for row in counts if row[2]]
    rows.sort(key=lambda row: row[1] / row[2])
    shown, note, all_rows = rows, 'Lowest accuracy first.', None
    if len(rows) > FEW_CLASSES:
        shown, note = rows[:WORST], f'The {WORST} lowest of {len(rows):,}.'
        all_rows = Table(['class', 'correct', 'images', 'accuracy'], [], 'numbers')
        for name, right, images in rows:
            all_rows.rows.append([name, str(right), str(images), percent(100 * right / images)])
    bars = []
    name_width = count_width = 0                    # in characters
    for row in shown:
        bar = class_bar(*row)
        bars.append(bar)
        name_width = max(name_width, len(bar['name']) + 1)
        count_width = max(count_width, len(bar['counts']))
    return {
        'note': f'{note} The line is the 95\u202f% confidence interval (Wilson).',
        'bars': bars,
        'name_width': min(name_width, MOST_NAME_WIDTH),
        'count_width': count_width,
        'all': all_rows,
    }


def class_bar(name: str, right: int, images: int) -> dict[str, Any]:
    """Return the accuracy of a class and its interval, in percent."""
    low, high = wilson(right, images)
    return {'name': name, 'accuracy': 100 * right / images, 'low': 100 * low, 'high': 100 * high,
            'counts': f'{right:,} of {images:,}'}


def wilson(right: int, images: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a fraction; 95 % by default."""
    p, square = right / images, z * z / images
    half = z * math.sqrt(p * (1 - p) / images + square / (4 * images))
    low, high = (p + square / 2 - half) / (1 + square), (p + square / 2 + half) / (1 + square)
    return max(low, 0.0), min(high, 1.0)


def confident_errors(run: Run, judged: Predictions, split: str) -> dict[str, Any]:
    """Return the errors with the highest probability: hard images, or wrong labels."""
    wrong = np.flatnonzero(judged['label'] != judged['top1'])
    order = wrong[np.argsort(-judged['probability'][wrong], kind='stable')][:ERRORS]
    note = (f'Misclassified images with the highest predicted probability ({SPLITS.get(split, split)}): '
            'hard images, or wrong labels.')
    if run.samples is None:
        note += ' The images are not shown: the list file of the evaluation is missing, or it has changed.'
    return {'note': note, 'cards': [error_card(run, judged, k) for k in order]}


def error_card(run: Run, judged: Predictions, k: int) -> dict[str, Any]:
    """Return the picture, the prediction, the label and the line in the list of the k-th prediction."""
    index, label = int(judged['index'][k]), int(judged['label'][k])
    where, line, picture = f'image {index}', '', None
    if run.samples is not None:
        where = os.path.basename(run.samples.where(index))
        line = f'{run.samples.name(index)} {label}'
        picture = pictures.thumbnail(run.samples.path(index))
    return {
        'picture': picture,
        'predicted': run.classes[int(judged['top1'][k])],
        'probability': percent(100 * float(judged['probability'][k]), 1),
        'label': run.classes[label],
        'label_probability': percent(100 * float(judged['label_probability'][k]), 1),
        'where': where,
        'line': line,
    }


# ---- how it was made

@dataclass
class Configuration:
    """The options of a run: a note, those that differ from the nearest config file, and all of them."""
    note: Union[str, Markup]
    differing: Table
    all: Table


def configuration(run: Run) -> Configuration:
    """Compare the options of a run with those of its nearest config file, or else with the defaults."""
    standard = defaults()
    head = ['option', 'this run', 'default']
    named = Markup('the defaults of <code>config.py</code>')
    if run.base:
        head = ['option', 'this run', os.path.basename(run.base_name), 'default']
        named = Markup('<code>{}</code>').format(run.base_name)
    rows = []
    for key in differences(run.config, run.base or standard):
        row = [key, value_text(run.config.get(key))]
        if run.base:
            row.append(value_text(run.base.get(key)))
        rows.append([*row, value_text(standard.get(key))])
    everything = []
    for key, value in sorted(run.config.items()):
        if key != 'BASE':
            default = standard.get(key)
            other = '' if value == default else value_text(default)
            everything.append([key, value_text(value), other])
    note = Markup('No option differs from {}.').format(named)
    if rows:
        note = Markup('Options that differ from {}:').format(named)
    return Configuration(
        note=note,
        differing=Table(head, rows, 'options own'),
        all=Table(['option', 'this run', 'default, where it differs'], everything, 'options own'),
    )


def machine(run: Run) -> list[tuple[str, str, bool]]:
    """List the facts of machine.json as (name, value, whether it is long), the long ones last."""
    facts = [(str(key), str(value) or DASH, len(str(value)) > LONG) for key, value in run.machine.items()]
    return sorted(facts, key=lambda fact: fact[2])
