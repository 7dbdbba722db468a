"""Judge the predictions of a run by more than top-1: by class, calibration, confusions.

The definitions are those of scikit-learn. A fraction of no images is 0.
"""
from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from system import files

import numpy as np

from reporting.runs import Predictions, Run

BINS = 15                                           # of the probability, for calibration: as Guo et al. 2017


@dataclass
class Scores:
    """The scores of predictions. Fractions are in 0 to 1; arrays are by class, (K,)."""

    precision: np.ndarray                           # of the images predicted as a class, those of that class
    recall: np.ndarray                              # of the images of a class, those predicted as such
    f1: np.ndarray                                  # harmonic mean of both
    support: np.ndarray                             # images of the class
    confusion: np.ndarray                           # (K, K) images by label and prediction
    bins: np.ndarray                                # (BINS, 3): images, mean probability, accuracy
    temperature: float                              # T of softmax(logits / T); NaN: unknown

    @property
    def accuracy(self) -> float:
        """Fraction of images that are predicted right."""
        return float(np.trace(self.confusion) / max(self.confusion.sum(), 1))

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have images."""
        return float(self.recall[self.support > 0].mean()) if self.support.any() else 0.0

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean distance of probability and accuracy over the bins, by images."""
        images, probability, accuracy = self.bins.T
        return float((images * np.abs(accuracy - probability)).sum() / max(images.sum(), 1))

    def mean(self, name: str, weighted: bool = False) -> float:
        """Return the mean of precision, recall or f1 over classes that occur, or weighted by their images."""
        occurs = (self.support > 0) | (self.confusion.sum(axis=0) > 0)
        weights = self.support if weighted else occurs
        return float((getattr(self, name) * weights).sum() / max(weights.sum(), 1))


def judge(judged: Predictions, classes: int) -> Scores:
    """Return the scores of the predictions of an evaluation with so many classes."""
    confusion: np.ndarray = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (judged['label'], judged['top1']), 1)
    right, support, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    return Scores(
        precision=_fraction(right, predicted),
        recall=_fraction(right, support),
        f1=_fraction(2 * right, support + predicted),
        support=support,
        confusion=confusion,
        bins=_bins(judged['probability'].astype(np.float64), judged['label'] == judged['top1']),
        temperature=float(judged.get('temperature', math.nan)),
    )


def _fraction(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def _bins(probability: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return (BINS, 3) images, mean probability and accuracy of equal ranges of the probability."""
    number = np.clip(np.ceil(probability * BINS).astype(int) - 1, 0, BINS - 1)
    images = np.bincount(number, minlength=BINS)
    sums = [np.bincount(number, weights=values, minlength=BINS) for values in (probability, right)]
    return np.stack([images, *(_fraction(values, images) for values in sums)], axis=1)


# ---- files

def summary(scores: Scores) -> dict[str, Any]:
    """Return the scores of all classes together, as numbers for JSON. Fractions are rounded to 6 digits."""
    means = {f'{kind}_{name}': scores.mean(name, kind == 'weighted')
             for kind in ('macro', 'weighted') for name in ('precision', 'recall', 'f1')}
    values = {'accuracy': scores.accuracy, 'balanced_accuracy': scores.balanced_accuracy, **means,
              'expected_calibration_error': scores.calibration_error}
    known = math.isfinite(scores.temperature)
    return {
        'images': int(scores.support.sum()),
        **{name: round(value, 6) for name, value in values.items()},
        'temperature': round(scores.temperature, 4) if known else None,
        'calibration': [
            {'images': int(images), 'probability': round(probability, 6), 'accuracy': round(accuracy, 6)}
            for images, probability, accuracy in scores.bins.tolist()],
    }


def write_all(run: Run, folder: str) -> dict[str, Scores]:
    """Write the files of all predictions of a run to `folder`; return {split: scores}."""
    found = {split: judge(judged, len(run.classes)) for split, judged in run.predictions.items()
             if len(judged['index'])}
    for split, scores in found.items():
        write(folder, split, scores, run.classes)
    return found


def write(folder: str, split: str, scores: Scores, names: Sequence[str]) -> list[str]:
    """Write metrics_SPLIT.json, classes_SPLIT.csv and confusion_SPLIT.csv; return their names.

    names: of the classes. The confusions are a line for each pair of label and prediction that occurs.
    """
    by_class = zip(names, scores.precision, scores.recall, scores.f1, scores.support)
    texts = {
        f'metrics_{split}.json': json.dumps(summary(scores), indent=1) + '\n',
        f'classes_{split}.csv': _csv(
            ('class', 'precision', 'recall', 'f1', 'images'),
            ((name, *(f'{value:.6f}' for value in values), images) for name, *values, images in by_class)),
        f'confusion_{split}.csv': _csv(
            ('label', 'predicted', 'images'),
            ((names[i], names[j], scores.confusion[i, j]) for i, j in np.argwhere(scores.confusion))),
    }
    for name, text in texts.items():
        _write_text(os.path.join(folder, name), text)
    return list(texts)


def _write_text(path: str, text: str) -> None:
    files.atomic_write(path, lambda file: file.write(text.encode('utf-8', 'backslashreplace')))


def _csv(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(heading)
    writer.writerows(rows)
    return text.getvalue()
