"""Augmentation of a batch of tensors: random erasing, soft targets, mixup and cutmix.

Inputs are never changed. Random erasing, mixup and cutmix follow timm 1.0.31 in their ranges and
distributions.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import paddle
import paddle.nn.functional as F
from numpy.random import Generator
from paddle import Tensor

from data.generators import ATTEMPTS, ERASE, random_sides, rng_for

ERASE_AREA = 0.02, 1 / 3                            # range of the fraction of the image
ERASE_RATIO = 0.3, 1 / 0.3                          # range of height/width
Box = tuple[int, int, int, int]
IMAGES_PER_DRAW = {'batch': None, 'pair': 2, 'half': 2, 'elem': 1}           # by MIXUP_MODE; None: all


# ---- random erasing

def erase_box(rng: Generator, height: int, width: int, probability: float) -> Box | None:
    """Draw the (top, left, height, width) of the rectangle to erase in an image, or None."""
    if rng.random() >= probability:
        return None
    for _ in range(ATTEMPTS):
        h, w = random_sides(rng, height * width, ERASE_AREA, ERASE_RATIO)
        if 0 < h < height and 0 < w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return None


def erase(images: Tensor, boxes: Sequence[Box | None], rngs: Sequence[Generator],
          mode: str) -> Tensor:
    """Fill the box of each image and return a new tensor.

    The images (B, C, H, W) are normalised. Mode 'const' fills with 0, the mean colour; 'pixel' fills
    with normal noise of the image's generator. The noise of all images is one copy to the device.
    """
    images = images.clone()
    drawn = [(i, box) for i, box in enumerate(boxes) if box]
    if mode == 'const' or not drawn:
        for i, (top, left, h, w) in drawn:
            images[i, :, top:top + h, left:left + w] = 0.0
        return images
    channels = images.shape[1]
    parts = [rngs[i].standard_normal(channels * h * w, dtype=np.float32) for i, (_, _, h, w) in drawn]
    noise = paddle.to_tensor(np.concatenate(parts)).astype(images.dtype)
    start = 0
    for i, (top, left, h, w) in drawn:
        end = start + channels * h * w
        images[i, :, top:top + h, left:left + w] = noise[start:end].reshape([channels, h, w])
        start = end
    return images


def erase_batch(images: Tensor, indices: np.ndarray, epoch: int, *, seed: int, probability: float,
                mode: str) -> Tensor:
    """Erase a random box of each image; images (B, C, H, W), indices (B,) of the samples.

    Boxes and noise depend on the seed, the epoch and the index of the sample only.
    """
    if probability == 0:
        return images
    height, width = images.shape[2:]
    rngs = [rng_for(seed, ERASE, epoch, index) for index in indices]
    boxes = [erase_box(rng, height, width, probability) for rng in rngs]
    return erase(images, boxes, rngs, mode)


# ---- targets, mixup and cutmix

def one_hot(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Turn labels (B,) into float32 targets (B, num_classes).

    The label has 1 - smoothing; each class has smoothing / num_classes in addition.
    """
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


class NoMix:
    """Leave a batch as it is."""

    def __call__(self, images: Tensor, targets: Tensor, rng: Generator,
                 indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return images, targets


@dataclass(frozen=True)
class Mix:
    """Mix neighbours by mixup or cutmix.

    Images (B, C, H, W) and soft targets (B, K) -> new images and targets.

    A draw chooses mixup or cutmix and a lambda from Beta(alpha, alpha). One draw holds for the batch,
    for a pair, or for an image (mode elem). Mode half is pair, and keeps only the first image of each.
    Cutmix corrects lambda to the fraction of the image outside the box.

    `rng` is the generator of the step. Draws for pairs and images also depend on `indices` (B,), the
    samples. So they are the same however the batch of a step is split.
    """

    mixup_alpha: float
    cutmix_alpha: float
    probability: float = 1.0
    switch_probability: float = 0.5
    mode: str = 'batch'

    def __call__(self, images: Tensor, targets: Tensor, rng: Generator,
                 indices: np.ndarray) -> tuple[Tensor, Tensor]:
        batch, (height, width) = len(images), images.shape[2:]
        per_draw = IMAGES_PER_DRAW[self.mode] or batch
        draws = [self.draw(each, height, width) for each in self._generators(rng, indices)]
        drawn, boxes = zip(*draws)
        lams: np.ndarray = np.repeat(drawn, per_draw)[:batch]
        is_cut: np.ndarray = np.repeat([box is not None for box in boxes], per_draw)[:batch]

        partner = _partners(batch, paddle.get_device())
        weights = np.stack([np.where(is_cut, 0, 1 - lams), 1 - lams])        # of partners: pixels, targets
        on_device = paddle.to_tensor(weights, images.dtype)
        mixed = _blend(images, partner, on_device[0]) if weights[0].any() else images.clone()
        targets = _blend(targets, partner, on_device[1]) if weights[1].any() else targets.clone()
        for i, box in enumerate(boxes):
            if box:
                _paste(mixed, images, partner, slice(i * per_draw, min((i + 1) * per_draw, batch)), box)
        if self.mode == 'half':
            return mixed[::2], targets[::2]
        return mixed, targets

    def _generators(self, rng: Generator, indices: np.ndarray) -> list[Generator]:
        """Return a generator for each draw: the step's own, or those of the first samples of each draw."""
        per_draw = IMAGES_PER_DRAW[self.mode]
        if per_draw is None:
            return [rng]
        key = rng.integers(2 ** 63)
        return [np.random.default_rng([key, int(index)]) for index in indices[::per_draw]]

    def draw(self, rng: Generator, height: int, width: int) -> tuple[float, Box | None]:
        """Draw lambda, the weight of an image itself, and for cutmix the box of its partner, else None.

        The box is (top, bottom, left, right).
        """
        if rng.random() >= self.probability:
            return 1.0, None
        cut = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or rng.random() < self.switch_probability)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        lam = float(rng.beta(alpha, alpha))
        if not cut:
            return lam, None
        box, outside = cut_box(rng, height, width, lam)
        return outside, box


@lru_cache(maxsize=8)
def _partners(batch: int, device: str) -> Tensor:
    """Return the index of each image's partner, (B,); it is copied to the device once."""
    # Neighbours are mixed, i with i ^ 1. Usual is the i-th image with the i-th from the end, but
    # neighbours stay together when a batch is split over processes and accumulated passes of even size.
    # So the result is the same.
    partner = np.arange(batch) ^ 1
    partner = np.where(partner < batch, partner, batch - 1)   # the last of an odd batch is its own partner
    return paddle.to_tensor(partner)


def _blend(x: Tensor, partner: Tensor, weights: Tensor) -> Tensor:
    """Return (1 - weights) * x + weights * partners, with x (B, ...), partner (B,), weights (B,)."""
    weights = weights.astype(x.dtype).reshape([-1] + [1] * (x.ndim - 1))    # (B, 1, ...)
    difference = x.gather(partner) - x
    return difference.multiply_(weights).add_(x)    # in place: four times as fast on a CPU


def _paste(mixed: Tensor, images: Tensor, partner: Tensor, rows: slice, box: Box) -> None:
    """Copy the box of the partners into these rows of `mixed`."""
    top, bottom, left, right = box
    if top >= bottom or left >= right:
        return
    first = rows.start // 2 * 2                     # partners are neighbours
    last = min((rows.stop + 1) // 2 * 2, len(images))
    shape = [last - first, images.shape[1], bottom - top, right - left]
    others = paddle.crop(images, shape, [first, 0, top, left])               # four times as fast as a slice
    mixed[rows, :, top:bottom, left:right] = others.gather(partner[rows] - first)


def cut_box(rng: Generator, height: int, width: int, lam: float) -> tuple[Box, float]:
    """Draw the box (top, bottom, left, right) of cutmix, and return the fraction of the image outside it.

    It has 1 - lam of the area and a random centre; the border of the image cuts it off.
    """
    side = math.sqrt(1 - lam)
    top, bottom = _cut_span(rng, height, int(height * side))
    left, right = _cut_span(rng, width, int(width * side))
    return (top, bottom, left, right), 1 - (bottom - top) * (right - left) / (height * width)


def _cut_span(rng: Generator, length: int, cut: int) -> tuple[int, int]:
    centre = int(rng.integers(length))
    return max(centre - cut // 2, 0), min(centre + (cut + 1) // 2, length)


def make_mix(mixup_alpha: float, cutmix_alpha: float, probability: float = 1.0,
             switch_probability: float = 0.5, mode: str = 'batch') -> Mix | NoMix:
    """Return a Mix, or NoMix if neither alpha is above 0 or the probability is 0."""
    if probability > 0 and (mixup_alpha > 0 or cutmix_alpha > 0):
        return Mix(mixup_alpha, cutmix_alpha, probability, switch_probability, mode)
    return NoMix()
