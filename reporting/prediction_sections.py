"""The sections of a run's page about its predictions: confusions, classes, calibration, confident errors."""
import math
import os
from typing import Any

import numpy as np

from reporting import pictures, scores
from reporting.charts import Series, line_chart
from reporting.runs import SPLITS, Predictions, Run
from reporting.tables import Table, percent

FEW_CLASSES = 30                                    # up to so many: the confusion matrix and every class
NUMBERED = 16                                       # up to so many: larger cells of the matrix
PAIRS, WORST, ERRORS = 20, 20, 24                   # most that are shown: pairs, classes, errors
MOST_NAME_WIDTH = 18                                # characters of a class name beside its bar


def sections(run: Run, judged: Predictions, split: str) -> dict[str, Any]:
    """Return the sections of the predictions of a split, by their names in templates/run.html."""
    scored = scores.judge(judged, len(run.classes))
    return {
        'confusion': confusion(scored.confusion, run.classes),
        'classes': class_accuracies(scored.confusion, run.classes),
        'calibration': calibration(scored),
        'errors': confident_errors(run, judged, split),
    }


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


