"""Tell the worth of a network's features for a data set: k-nearest neighbours and a linear probe.

The network stays as it is. Its features are what its classifier would see, of the pixels of an evaluation.
The images of train_list.txt classify those of the list that is evaluated. They may have any classes.
  knn     the nearest training images vote, each with the weight exp(cosine / temperature)
  linear  scikit-learn's logistic regression on standardised features, with an L2 penalty of 1 / C. A fifth of
          the training images chooses C, then all of them are fitted.
Each adds a line to the table of `-eval -results`.

  python tools/probe.py -pretrained demo/run/final.pdparams -data_path demo/digits -features demo/features
  python tools/probe.py -cfg halonet_26t -pretrained halonet_26t_256.pdparams -data_path flowers -methods knn

Exit status: 0, or 2 for a mistake in the command or the data.
"""
import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import cli

import numpy as np

import config as options

METHODS = ('knn', 'linear')
STRENGTHS = tuple(float(c) for c in np.logspace(-6, 2, 9))     # values of C that are tried
STEPS = 1000                                        # of the solver, at most
HELD_OUT = 5                                        # one image of so many chooses C
SCORES_AT_A_TIME = 1 << 26                          # cosines in memory: 256 MiB
TOP = 5


@dataclass
class Features:
    """The features of the images of a list, in its order, without those that cannot be read."""
    values: np.ndarray                              # (N, C) float32
    labels: np.ndarray                              # (N,) int64
    seconds: float                                  # that they took


# ---- features

def extract(model: Any, config: Any, list_name: str) -> Features:
    """Compute the features of the images of a list in DATA.DATA_PATH, in batches of DATA.BATCH_SIZE_EVAL.

    Raises as datasets.build_eval and its Loader.
    """
    import paddle

    import datasets
    values = {'DATA.EVAL_LIST': list_name, 'DATA.EVAL_CLASSES': '', 'DATA.EVAL_LABELS': '',
              'MODEL.NUM_CLASSES': datasets.ANY_LABEL}
    for key, value in values.items():
        config = options.changed(config, key, value)
    loader = datasets.build_eval(config)
    start = time.perf_counter()
    rows, labels = [], []
    with paddle.no_grad():
        for images, found, _ in cli.progress(loader.epoch(0), len(loader), list_name):
            images = datasets.normalise(images, config.DATA.MEAN, config.DATA.STD)
            rows.append(model(images).astype('float32').numpy())
            labels.append(found.numpy())
    if not rows:
        raise ValueError(f'{loader.dataset.samples.list_file}: none of its images can be read')
    features = Features(np.concatenate(rows), np.concatenate(labels), time.perf_counter() - start)
    if not np.isfinite(features.values).all():
        raise ValueError(f'{config.MODEL.PRETRAINED}: the weights give features that are not finite')
    return features


# ---- nearest neighbours

def nearest_classes(train: Features, values: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """Return the classes that the k nearest training images vote for: features (T, C) -> (T, TOP) int64.

    The class with the most votes is first; of equal ones the smaller. -1 stands for no further class.
    """
    unit = normalised(train.values)
    classes, index = np.unique(train.labels, return_inverse=True)            # labels may have gaps
    found: list[np.ndarray] = []
    size = max(SCORES_AT_A_TIME // len(unit), 1)
    for first in range(0, len(values), size):
        cosines = normalised(values[first:first + size]) @ unit.T            # (B, N)
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(cosines, nearest, axis=1).astype(np.float64) / temperature)
        votes: np.ndarray = np.zeros((len(cosines), len(classes)))
        np.add.at(votes, (np.arange(len(cosines))[:, None], index[nearest]), weights)
        order = ranked(votes, votes > 0)
        found.append(np.where(order < 0, -1, classes[order]))
    return np.concatenate(found)


def normalised(values: np.ndarray) -> np.ndarray:
    """Divide each row by its Euclidean norm."""
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def ranked(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the columns of the largest scores of each row, (T, TOP); -1 where `counts` is False."""
    order = np.argsort(-scores, axis=1, kind='stable')[:, :TOP]
    order = np.where(np.take_along_axis(counts, order, axis=1), order, -1)
    return np.pad(order, ((0, 0), (0, TOP - order.shape[1])), constant_values=-1)


# ---- the linear probe

def linear_classes(train: Features, values: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """Fit a logistic regression: features (T, C) -> the most probable classes (T, TOP), and its C.

    Raises ValueError for training images of one class, or of classes with one image each.
    """
    kept, held = split(train.labels, seed)
    scores = {}
    for c in STRENGTHS:
        classes, probabilities = fit(train.values[kept], train.labels[kept], train.values[held], c)
        right = classes == train.labels[held, None]                          # each has one
        loss = -np.log(np.maximum(probabilities[right], np.finfo(np.float32).tiny)).mean()
        top1 = 100 * (classes[probabilities.argmax(axis=1)] == train.labels[held]).mean()
        scores[c] = top1, -loss                     # of equal accuracies the smaller loss decides
        print(f'  C {c:g}: top-1 {top1:.2f}  loss {loss:.4f}  ({len(held)} held-out images)')
    best = max(scores, key=scores.__getitem__)
    if best in (STRENGTHS[0], STRENGTHS[-1]):
        print(f'  C {best:g} is the best and at the end of the range')
    classes, probabilities = fit(train.values, train.labels, values, best)
    order = ranked(probabilities, probabilities >= 0)
    return np.where(order < 0, -1, classes[order]), best


def split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the images to fit and of those held out: in each class, one of HELD_OUT.

    A class with at least two images has images in both. Raises ValueError where none can be held out.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind='stable')]
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    position = np.arange(len(labels)) - np.repeat(first, counts)             # of an image in its class
    held = position % HELD_OUT == 1
    if len(counts) < 2 or not held.any():
        raise ValueError(f'train_list.txt: {len(labels)} images of {len(counts)} classes; a linear probe '
                         'needs two classes or more, and two images of a class')
    return np.sort(order[~held]), np.sort(order[held])


def fit(train: np.ndarray, labels: np.ndarray, values: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Fit features (N, C) to labels (N,). Returns the classes (K,) and probabilities of `values` (T, K)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    scaler = StandardScaler().fit(train)
    regression = LogisticRegression(C=c, max_iter=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ConvergenceWarning)
        regression.fit(scaler.transform(train), labels)
    if regression.n_iter_.max() >= STEPS:
        print(f'  C {c:g}: the fit has not converged in {STEPS} steps')
    return regression.classes_, regression.predict_proba(scaler.transform(values))


def accuracy(classes: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return top-1 and top-5 in percent: classes (T, TOP), labels (T,)."""
    hits = classes == labels[:, None]
    return 100 * float(hits[:, 0].mean()), 100 * float(hits.any(axis=1).mean())


# ---- the command

def parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_model()
    parser.add('data_path', 'folder with train_list.txt and val_list.txt', required=True, metavar='DIR')
    parser.add('methods', 'what to do (default: both)', nargs='+', choices=METHODS, default=METHODS)
    parser.add('k', 'knn: neighbours that vote', type=int, default=20, metavar='N')
    parser.add('temperature', 'knn: of the weights of the votes', type=float, default=0.07, metavar='X')
    parser.add('results', 'the CSV file that gets a line per method (default: results.csv)',
               default='results.csv', metavar='FILE')
    parser.add('features', 'folder for the features and labels, as train_features.npy (N, C) float32, '
               'train_labels.npy (N,) int64, val_features.npy and val_labels.npy', metavar='DIR')
    parser.add('batch_size', 'images per forward pass', type=int, default=32, metavar='N')
    return parser


def main(args: argparse.Namespace) -> int:
    for name in ('k', 'batch_size'):
        if getattr(args, name) < 1:
            raise ValueError(f'-{name} {getattr(args, name)}: it must be at least 1')
    if not args.temperature > 0:
        raise ValueError(f'-temperature {args.temperature}: it must be above 0')
    if 'linear' in args.methods:
        check_scikit_learn()
    flags = {'DATA.DATA_PATH': args.data_path, 'DATA.BATCH_SIZE_EVAL': args.batch_size}
    args.opts = options.with_opts(flags, args.opts)
    config = cli.config_of(args)
    os.makedirs(os.path.dirname(args.results) or '.', exist_ok=True)
    cli.check_outputs(args.results)
    if args.features:
        os.makedirs(args.features, exist_ok=True)
        cli.check_outputs(os.path.join(args.features, 'train_features.npy'))
    from training import builders, results  # late, because they import Paddle
    results.check_table(args.results)
    model, device = cli.load_model(config)
    model.reset_classifier(0)
    train = extract(model, config, 'train_list.txt')
    if 'knn' in args.methods and args.k > len(train.labels):
        raise ValueError(f'-k {args.k}: there are {len(train.labels)} training images; lower it')
    if 'linear' in args.methods:
        split(train.labels, config.SEED)            # raises before the second list is read
    val = extract(model, config, config.DATA.EVAL_LIST)
    if args.features:
        save(args.features, train, val)
    speed = (len(train.labels) + len(val.labels)) / (train.seconds + val.seconds)
    columns = builders.build_columns(config, device, '')
    for name, classes in judged(train, val, args, config.SEED):
        top1, top5 = accuracy(classes, val.labels)
        result = {'acc1': top1, 'acc5': top5, 'loss': 0.0, 'images': len(val.labels), 'images_per_s': speed}
        row = results.row({**columns, 'model': f'{config.MODEL.NAME} {name}'}, model,
                          config.MODEL.PRETRAINED, result)
        results.save_result(args.results, {**row, 'loss': ''})               # neither method has one
        print(f'{name}: top-1 {top1:.2f}  top-5 {top5:.2f}  ({len(val.labels)} images, {len(train.labels)} '
              f'training images, {train.values.shape[1]} features)')
    return 0


def judged(train: Features, val: Features, args: argparse.Namespace,
           seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each method's name in the table and the classes that it predicts, (T, TOP)."""
    if 'knn' in args.methods:
        yield f'knn k={args.k}', nearest_classes(train, val.values, args.k, args.temperature)
    if 'linear' in args.methods:
        classes, c = linear_classes(train, val.values, seed)
        yield f'linear C={c:g}', classes


def save(folder: str, train: Features, val: Features) -> None:
    """Write features and labels as .npy files."""
    from system import files
    for split_name, features in (('train', train), ('val', val)):
        for kind, array in (('features', features.values), ('labels', features.labels)):
            path = os.path.join(folder, f'{split_name}_{kind}.npy')
            files.atomic_write(path, partial(_save_array, array))


def _save_array(array: np.ndarray, file: BinaryIO) -> None:
    np.save(file, array)


def check_scikit_learn() -> None:
    """Raise ValueError, with the command that installs it, where scikit-learn cannot be imported."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise ValueError(f'scikit-learn cannot be imported ({error}); python -m pip install -r '
                         'requirements-dev.txt brings it, and -methods knn needs none') from None


if __name__ == '__main__':
    parser().run(main)
