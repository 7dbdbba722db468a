"""Augmentation of a batch of tensors: random erasing, soft targets, mixup and cutmix. Inputs are never changed.

Random erasing, mixup and cutmix follow timm 1.0.31 in their ranges and distributions.
"""
import math
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F

from data.generators import ATTEMPTS, ERASE, random_sides, rng_for

ERASE_AREA, ERASE_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


# A batch: random erasing

def erase_box(rng, height, width, probability):
    """(top, left, height, width) of the rectangle to erase in an image of height x width, or None for none."""
    if rng.random() >= probability:
        return None
    for _ in range(ATTEMPTS):
        h, w = random_sides(rng, height * width, ERASE_AREA, ERASE_RATIO)
        if 0 < h < height and 0 < w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return None


def erase(images, boxes, rngs, mode):
    """Normalised float images (B, 3, H, W) with the box of each filled: by 'const' with 0, the mean colour, by 'pixel' with
    normal noise from the generator of each. New tensor."""
    images = images.clone()
    for i, (box, rng) in enumerate(zip(boxes, rngs)):
        if box is not None:
            top, left, h, w = box
            noise = rng.standard_normal((3, h, w), dtype=np.float32) if mode == 'pixel' else np.zeros((3, h, w), np.float32)
            images[i, :, top:top + h, left:left + w] = paddle.to_tensor(noise).astype(images.dtype)
    return images


def erase_batch(images, indices, epoch, *, seed, probability, mode):
    """`erase` with boxes and noise that depend on (seed, epoch, index of the sample) only; images (B, 3, H, W), indices (B,)."""
    if probability == 0:
        return images
    rngs = [rng_for(seed, ERASE, epoch, index) for index in np.asarray(indices)]
    return erase(images, [erase_box(rng, *images.shape[2:], probability) for rng in rngs], rngs, mode)


# A batch: targets, mixup and cutmix

def one_hot(labels, num_classes, smoothing=0.0):
    """Labels (B,) -> float32 targets (B, num_classes): 1 - smoothing on the label, plus smoothing / num_classes on each class."""
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


class NoMix:
    """The mixing that leaves a batch as it is."""

    def __call__(self, images, targets, rng, indices):
        return images, targets


SHARING = {'batch': None, 'pair': 2, 'half': 2, 'elem': 1}   # how many neighbours share a draw; None: all


@dataclass(frozen=True)
class Mix:
    """mixup or cutmix of neighbours: images (B, 3, H, W), soft targets (B, K) -> new images, new targets.

    What shares a draw, of mixup or cutmix and of a lambda from Beta(alpha, alpha), is the batch, a pair or an image (mode
    elem); half is pair, and leaves only the first image of each. For cutmix, lambda is corrected to the part of the image
    that stays. `rng` is that of the step; other draws than those for a whole batch depend on it and on `indices` (B,), the
    samples, so that they are the same however the batch of a step is split.
    """

    mixup_alpha: float
    cutmix_alpha: float
    probability: float = 1.0
    switch_probability: float = 0.5
    mode: str = 'batch'

    def __call__(self, images, targets, rng, indices):
        batch, (height, width) = len(images), images.shape[2:]
        shared = SHARING[self.mode] or batch
        key = rng.integers(2 ** 63) if self.mode != 'batch' else None
        rngs = [rng] if key is None else [np.random.default_rng([key, int(i)]) for i in np.asarray(indices)[::shared]]
        draws = [self.draw(rng, height, width) for rng in rngs]
        lams = np.array([lam for lam, _ in draws]).repeat(shared)[:batch]
        blends = np.array([lam if box is None else 1 for lam, box in draws]).repeat(shared)[:batch]
        partner = _partners(batch)
        mixed = _blend(images, partner, blends)
        for i, (_, box) in enumerate(draws):
            if box:
                _paste(mixed, images, partner, slice(i * shared, min((i + 1) * shared, batch)), box)
        keep = slice(None, None, 2 if self.mode == 'half' else 1)
        return mixed[keep], _blend(targets, partner, lams)[keep]

    def draw(self, rng, height, width):
        """lambda, the share of an image itself, and for cutmix the box (top, bottom, left, right) of its partner, else None."""
        if rng.random() >= self.probability:
            return 1.0, None
        cut = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or rng.random() < self.switch_probability)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        lam = float(rng.beta(alpha, alpha))
        return cut_box(rng, height, width, lam)[::-1] if cut else (lam, None)


def _partners(batch):
    # Neighbours are mixed, i with i ^ 1, not i with the i-th from behind as is usual: neighbours stay together however a
    # global batch is split over processes and accumulated passes (of even size), so the result does not depend on it.
    partner = np.arange(batch) ^ 1
    return np.where(partner < batch, partner, batch - 1)      # the last of an odd batch is its own partner


def _blend(x, partner, lams):
    """lams * x + (1 - lams) * partners: x (B, ...), partner (B,), lams (B,)"""
    if (lams == 1).all():
        return x.clone()
    share = paddle.to_tensor(1 - lams, x.dtype).reshape([-1] + [1] * (x.ndim - 1))   # (B, 1, ...)
    return (x.gather(paddle.to_tensor(partner)) - x).multiply_(share).add_(x)        # in place: four times as fast on a CPU


def _paste(mixed, images, partner, rows, box):
    """Give `mixed`, in these rows, the box of the partners."""
    top, bottom, left, right = box
    if top < bottom and left < right:
        partner = partner[rows]
        first, shape = partner.min(), [np.ptp(partner) + 1, images.shape[1], bottom - top, right - left]
        others = paddle.crop(images, list(map(int, shape)), [int(first), 0, top, left])      # four times as fast as a slice
        mixed[rows, :, top:bottom, left:right] = others.gather(paddle.to_tensor(partner - first))


def cut_box(rng, height, width, lam):
    """(top, bottom, left, right) of a box with 1 - lam of the area about a random centre, cut off at the border; and the
    share of the image outside it."""
    side = math.sqrt(1 - lam)
    (top, bottom), (left, right) = (_cut_span(rng, length, int(length * side)) for length in (height, width))
    return (top, bottom, left, right), 1 - (bottom - top) * (right - left) / (height * width)


def _cut_span(rng, length, cut):
    centre = int(rng.integers(length))
    return max(centre - cut // 2, 0), min(centre + (cut + 1) // 2, length)


def make_mix(mixup_alpha, cutmix_alpha, probability=1.0, switch_probability=0.5, mode='batch'):
    """Mix, or NoMix where neither alpha is above 0."""
    on = (mixup_alpha > 0 or cutmix_alpha > 0) and probability > 0
    return Mix(mixup_alpha, cutmix_alpha, probability, switch_probability, mode) if on else NoMix()
