"""The order of samples, as micro-batches of names (epoch, index) for one rank.

Where an image occurs more than once in an epoch, copy c of image i has the index i + c * (number of images).
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.random import Generator

from data.generators import ORDER, rng_for

Name = tuple[int, int]                              # epoch, index


def repeated_order(num_samples: int, repeats: int, step_size: int, rng: Generator) -> np.ndarray:
    """Return (num_samples,) indices with `repeats` copies of each image that occurs.

    Repeated augmentation is of Hoffer et al. 2020 and Berman et al. 2019. The copies of an image are in
    the same optimizer step of `step_size` images. Only the end of a step may separate them. A step has
    all first copies in random order, then all second ones, and so on: neighbours, which mixup mixes, are
    different images.
    """
    position: np.ndarray = np.arange(num_samples)
    images: np.ndarray = rng.permutation(num_samples)
    image: np.ndarray = images[position // repeats]
    copy: np.ndarray = position % repeats
    step: np.ndarray = position // step_size
    order = np.argsort(step * repeats + copy + rng.random(num_samples))
    return (image + copy * num_samples)[order]


def balanced_order(labels: np.ndarray, balance: float, rng: Generator) -> np.ndarray:
    """Return (n,) indices in random order, where a class of m of the n images occurs as m ** (1 - balance).

    balance 1: every class as often; 0: every image once. An image of a class has its next copy when all
    others of the class have had theirs.
    """
    counts = np.bincount(labels)
    present: np.ndarray = counts > 0
    shares = np.where(present, np.maximum(counts, 1) ** (1.0 - balance), 0.0)
    edges = np.rint(len(labels) * np.cumsum(shares) / shares.sum()).astype(int)
    drawn = np.diff(edges, prepend=0)               # images of each class; their sum is n
    parts = []
    for label in np.flatnonzero(present):
        images = np.flatnonzero(labels == label)
        rounds = -(-drawn[label] // len(images))
        copies = [rng.permutation(images) + copy * len(labels) for copy in range(rounds)]
        parts += [np.concatenate(copies)[:drawn[label]]] if copies else []
    return rng.permutation(np.concatenate(parts))


class TrainSampler:
    """The training order of one rank: a function of seed and epoch.

    Micro-batch k of all ranks together is the k-th slice of the order. So the order does not depend on
    the number of processes; with `repeats` it depends on the images per optimizer step, those of `accum`
    micro-batches. The last images, too few for a micro-batch of every rank, are left out. Raises
    ValueError if there are too few images for one.

    With `balance` above 0 the `labels` (num_samples,) decide how often an image occurs: balanced_order.
    """

    even = True                                     # every rank draws the same number of batches

    def __init__(self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, *,
                 repeats: int = 1, accum: int = 1, balance: float = 0.0, labels: np.ndarray | None = None):
        if num_samples < batch_size * world:
            most = num_samples // world
            smaller = f'lower DATA.BATCH_SIZE to {most} or less, or ' if most else ''
            raise ValueError(f'{num_samples} training images do not fill one batch of {batch_size} on each '
                             f'of {world} process(es); {smaller}use fewer processes or more images')
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world = rank, world
        self.repeats, self.step_size = repeats, batch_size * world * accum
        self.balance, self.labels = balance, labels

    def __len__(self) -> int:
        return self.num_samples // (self.batch_size * self.world)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[Name]]:
        """Yield the micro-batches of an epoch from number `start` on."""
        rng = rng_for(self.seed, ORDER, epoch)
        if self.balance and self.labels is not None:
            order = balanced_order(self.labels, self.balance, rng)
        elif self.repeats == 1:
            order = rng.permutation(self.num_samples)
        else:
            order = repeated_order(self.num_samples, self.repeats, self.step_size, rng)
        for k in range(start, len(self)):
            first = (k * self.world + self.rank) * self.batch_size
            yield [(epoch, index) for index in order[first:first + self.batch_size].tolist()]


class EvalSampler:
    """The evaluation order of one rank: every world-th sample, so that each sample is on exactly one rank.

    With `indices` these are the only samples.
    """

    even = False                                    # ranks may draw different numbers of batches

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world: int = 1, *,
                 indices: Sequence[int] | None = None):
        everything = range(num_samples) if indices is None else indices
        self.indices, self.batch_size = everything[rank::world], batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[Name]]:
        """Yield the batches from number `start` on."""
        for first in range(start * self.batch_size, len(self.indices), self.batch_size):
            yield [(epoch, index) for index in self.indices[first:first + self.batch_size]]
