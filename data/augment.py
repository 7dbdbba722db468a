"""Augmentation as pure functions: of one PIL image, and of a batch of tensors. Inputs are never changed.

Every function that draws takes a numpy Generator. Ours come from `rng_for`, which makes each draw a function of the seed
and of what is drawn for (a sample of an epoch, a step), whatever the number of processes, workers and restarts.
RandAugment, AutoAugment, random erasing, mixup and cutmix follow timm 1.0.31 in their operations, ranges and distributions.
"""
import math
import re
from dataclasses import dataclass
from functools import singledispatch
from typing import Optional

import numpy as np
import paddle
import paddle.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

ORDER, TRANSFORM, ERASE, MIX, DROPOUT = range(1, 6)          # what a generator is for: the first of its keys
ATTEMPTS = 10                                       # to find a rectangle that fits
ERASE_AREA, ERASE_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
FULL_LEVEL = 10                                     # the magnitude at which an operation reaches the end of its range


def rng_for(seed, purpose, *key):
    """The generator of one purpose (ORDER, ...) and key; a purpose always takes as many keys, or streams could coincide."""
    return np.random.default_rng([seed, purpose, *(int(k) for k in key)])


# One image: PIL RGB -> PIL RGB. What draws is apart from what makes pixels, which another module can do for other types of image.

def random_resized_crop(image, size, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """A crop with a share of the area in `scale` and width/height in `ratio`, resized to (size, size); bicubic."""
    return resized_crop(image, _crop_box(*image.size, rng, scale, ratio), size)


@singledispatch
def resized_crop(image, box, size):
    """The (left, top, width, height) of an image, resized to (size, size); bicubic."""
    left, top, width, height = box
    # resize(box=) would be one call, but its filter looks outside the crop and gives other pixels
    return image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)


def _crop_box(width, height, rng, scale, ratio):
    for _ in range(ATTEMPTS):
        h, w = _random_sides(rng, width * height, scale, (1 / ratio[1], 1 / ratio[0]))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = max(min(width, round(height * ratio[1])), 1)  # the largest centre crop that keeps to `ratio`
    h = max(min(height, round(width / ratio[0])), 1)
    return (width - w) // 2, (height - h) // 2, w, h


def _random_sides(rng, area, scale, ratio):
    """Height and width of a rectangle: its area uniform in `scale` of `area`, height/width log-uniform in `ratio`."""
    area = rng.uniform(*scale) * area
    ratio = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))


def random_flip(image, rng, probability=0.5):
    """The image, mirrored left to right with this probability."""
    return mirrored(image) if rng.random() < probability else image


@singledispatch
def mirrored(image):
    """The image, left and right exchanged."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def color_jitter(image, strength, rng):
    """Brightness, contrast and saturation in random order, each by a factor uniform in [max(0, 1 - strength), 1 + strength]."""
    if strength == 0:
        return image
    for i in rng.permutation(3):
        image = enhanced(image, ('Brightness', 'Contrast', 'Color')[i], rng.uniform(max(0, 1 - strength), 1 + strength))
    return image


@singledispatch
def enhanced(image, name, factor):
    """The image through Pillow's ImageEnhance of this name."""
    return getattr(ImageEnhance, name)(image).enhance(factor)


# RandAugment and AutoAugment

def _affine(matrix):
    return lambda image, value, how: image.transform(image.size, Image.Transform.AFFINE, matrix(value, *image.size), **how)


def _enhance(enhancer):
    return lambda image, value, how: enhancer(image).enhance(value)


def _lookup(new):
    return lambda image, value, how: image.point([new(i, value) for i in range(256)] * 3)


def _signed(end):
    return lambda level, rng: level * end * (1 if rng.random() < 0.5 else -1)


def _between(start, end):
    return lambda level, rng: start + level * (end - start)


def _strength(level, rng):
    return max(0.1, 1 + _signed(0.9)(level, rng))


def _posterize(pixel, bits):
    return pixel & (256 - 2 ** (8 - min(max(bits, 0), 8)))  # ImageOps.posterize refuses 0 bits, a black image


# name: (image, value, how -> image), (level, rng -> value), and where it differs the value whose effect increases with the
# level, 0 to 1. `how` holds resample and fillcolor. Most values are as in the first TPU code, where some effects decrease.
OPS = {
    'AutoContrast': (lambda image, value, how: ImageOps.autocontrast(image), None),
    'Equalize': (lambda image, value, how: ImageOps.equalize(image), None),
    'Invert': (lambda image, value, how: ImageOps.invert(image), None),
    'Rotate': (lambda image, value, how: image.rotate(value, **how), _signed(30)),
    'Posterize': (_lookup(_posterize), lambda level, rng: int(level * 4), lambda level, rng: 4 - int(level * 4)),
    'Solarize': (lambda image, value, how: ImageOps.solarize(image, value), lambda level, rng: min(256, int(level * 256)),
                 lambda level, rng: 256 - min(256, int(level * 256))),
    'SolarizeAdd': (_lookup(lambda pixel, value: min(255, pixel + value) if pixel < 128 else pixel),
                    lambda level, rng: min(128, int(level * 110))),
    'Color': (_enhance(ImageEnhance.Color), _between(0.1, 1.9), _strength),
    'Contrast': (_enhance(ImageEnhance.Contrast), _between(0.1, 1.9), _strength),
    'Brightness': (_enhance(ImageEnhance.Brightness), _between(0.1, 1.9), _strength),
    'Sharpness': (_enhance(ImageEnhance.Sharpness), _between(0.1, 1.9), _strength),
    'ShearX': (_affine(lambda value, width, height: (1, value, 0, 0, 1, 0)), _signed(0.3)),
    'ShearY': (_affine(lambda value, width, height: (1, 0, 0, value, 1, 0)), _signed(0.3)),
    'TranslateX': (_affine(lambda value, width, height: (1, 0, value * width, 0, 1, 0)), _signed(0.45)),
    'TranslateY': (_affine(lambda value, width, height: (1, 0, 0, 0, 1, value * height)), _signed(0.45)),
    'Desaturate': (_enhance(ImageEnhance.Color), lambda level, rng: max(0, 0.5 - 0.5 * level)),
    'GaussianBlur': (lambda image, value, how: image.filter(ImageFilter.GaussianBlur(value)),
                     lambda level, rng: min(2.0, 0.1 + 1.9 * level)),
    'GaussianBlurRand': (lambda image, value, how: image.filter(ImageFilter.GaussianBlur(value)),
                         lambda level, rng: 0.1 + rng.random() * (2.0 * min(1.0, level) - 0.1)),
    'PosterizeOriginal': (_lookup(_posterize), lambda level, rng: int(level * 4) + 4),
    'PosterizeIncreasing': (_lookup(_posterize), lambda level, rng: 4 - int(level * 4)),
}
RAND_OPS = tuple(OPS)[:15]
WEIGHTS_0 = {'Rotate': 0.3, 'ShearX': 0.2, 'ShearY': 0.2, 'TranslateX': 0.1, 'TranslateY': 0.1, 'Color': 0.025,
             'Sharpness': 0.025, 'AutoContrast': 0.025, 'Solarize': 0.005, 'SolarizeAdd': 0.005, 'Contrast': 0.005,
             'Brightness': 0.005, 'Equalize': 0.005}
OP_SETS = {                                         # name: weights; timm gives these sets increasing operations
    'weights': {'Rotate': 3, 'ShearX': 2, 'ShearY': 2, 'TranslateX': 1, 'TranslateY': 1, 'Color': 0.25, 'Sharpness': 0.25,
                'AutoContrast': 0.25, 'Solarize': 0.05, 'SolarizeAdd': 0.05, 'Contrast': 0.05, 'Brightness': 0.05,
                'Equalize': 0.05, 'Posterize': 0.05, 'Invert': 0.05},
    '3a': dict.fromkeys(('Solarize', 'Desaturate', 'GaussianBlur')),
    '3aw': {'Solarize': 6, 'Desaturate': 6, 'GaussianBlur': 6, 'Rotate': 3, 'ShearX': 2, 'ShearY': 2, 'Posterize': 1,
            'AutoContrast': 1, 'Color': 1, 'Sharpness': 1, 'Contrast': 1, 'Brightness': 1, 'Equalize': 1, 'Invert': 1},
}
# AutoAugment: pairs 'operation probability magnitude', of which an image gets one. original is ImageNet's in Cubuk et al. 2018
# (arXiv 1805.09501), v0 that of the first TPU code; the r sets posterize more with the magnitude; 3a is DeiT III's.
POLICIES = {
    'originalr': """
        PosterizeIncreasing .4 8, Rotate .6 9; Solarize .6 5, AutoContrast .6 5; Equalize .8 8, Equalize .6 3;
        PosterizeIncreasing .6 7, PosterizeIncreasing .6 6; Equalize .4 7, Solarize .2 4; Equalize .4 4, Rotate .8 8;
        Solarize .6 3, Equalize .6 7; PosterizeIncreasing .8 5, Equalize 1 2; Rotate .2 3, Solarize .6 8;
        Equalize .6 8, PosterizeIncreasing .4 6; Rotate .8 8, Color .4 0; Rotate .4 9, Equalize .6 2;
        Equalize 0 7, Equalize .8 8; Invert .6 4, Equalize 1 8; Color .6 4, Contrast 1 8; Rotate .8 8, Color 1 2;
        Color .8 8, Solarize .8 7; Sharpness .4 7, Invert .6 8; ShearX .6 5, Equalize 1 9; Color .4 0, Equalize .6 3;
        Equalize .4 7, Solarize .2 4; Solarize .6 5, AutoContrast .6 5; Invert .6 4, Equalize 1 8; Color .6 4, Contrast 1 8;
        Equalize .8 8, Equalize .6 3""",
    'v0': """
        Equalize .8 1, ShearY .8 4; Color .4 9, Equalize .6 3; Color .4 1, Rotate .6 8; Solarize .8 3, Equalize .4 7;
        Solarize .4 2, Solarize .6 2; Color .2 0, Equalize .8 8; Equalize .4 8, SolarizeAdd .8 3; ShearX .2 9, Rotate .6 8;
        Color .6 1, Equalize 1 2; Invert .4 9, Rotate .6 0; Equalize 1 9, ShearY .6 3; Color .4 7, Equalize .6 0;
        Posterize .4 6, AutoContrast .4 7; Solarize .6 8, Color .6 9; Solarize .2 4, Rotate .8 9; Rotate 1 7, TranslateY .8 9;
        ShearX 0 0, Solarize .8 4; ShearY .8 0, Color .6 4; Color 1 0, Rotate .6 2; Equalize .8 4, Equalize 0 8;
        Equalize 1 4, AutoContrast .6 2; ShearY .4 7, SolarizeAdd .6 7; Posterize .8 2, Solarize .6 10;
        Solarize .6 8, Equalize .6 1; Color .8 6, Rotate .4 5""",
    '3a': 'Solarize 1 5; Desaturate 1 10; GaussianBlurRand 1 10',
}
POLICIES['original'] = POLICIES['originalr'].replace('PosterizeIncreasing', 'PosterizeOriginal')
POLICIES['v0r'] = POLICIES['v0'].replace('Posterize', 'PosterizeIncreasing')
GRAMMAR = ('rand, then any of -mN (magnitude), -nN (operations per image), -pX (probability of each), -mstdX (deviation of the '
           'magnitude; above 100: uniform), -mmaxX (largest magnitude), -inc0 or -inc1 (effects increase with the magnitude), '
           '-w0 (weighted choice), -tNAME (a set of operations: ' + ', '.join(OP_SETS) + '); such as rand-m9-mstd0.5-inc1; or '
           + ', '.join(POLICIES) + ' (AutoAugment), then perhaps -mstdX')


def _draw_magnitude(rng, magnitude, deviation, largest=FULL_LEVEL):
    magnitude = rng.uniform(0, magnitude) if math.isinf(deviation) else rng.normal(magnitude, deviation)
    return min(max(magnitude, 0.0), largest)


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations per image, drawn from `ops` (without replacement where they have weights), each applied with
    `probability` at a magnitude that is normal about `magnitude`, uniform below it for an infinite `deviation`."""

    ops: tuple = RAND_OPS
    weights: Optional[tuple] = None
    increasing: bool = False
    magnitude: float = 10
    deviation: float = 0.0
    largest: float = FULL_LEVEL
    layers: int = 2
    probability: float = 0.5

    def __call__(self, image, rng, fill=(128, 128, 128)):
        """The image after the operations that are drawn; `fill` is the colour of what moves into view."""
        for i in rng.choice(len(self.ops), self.layers, replace=self.weights is None, p=self.weights):
            if rng.random() < self.probability:
                magnitude = _draw_magnitude(rng, self.magnitude, self.deviation, self.largest)
                image = apply_op(image, self.ops[i], magnitude, rng, fill, self.increasing)
        return image


@dataclass(frozen=True)
class AutoAugment:
    """One of `choices` per image: operations (name, probability, magnitude), the magnitude normal with `deviation`."""

    choices: tuple
    deviation: float = 0.0

    def __call__(self, image, rng, fill=(128, 128, 128)):
        """The image after the operations that are drawn; `fill` is the colour of what moves into view."""
        for name, probability, magnitude in self.choices[rng.integers(len(self.choices))]:
            if rng.random() < probability:
                image = apply_op(image, name, _draw_magnitude(rng, magnitude, self.deviation), rng, fill, False)
        return image


def _policy(text):
    """'Invert .6 4, Equalize 1 8; ...' -> ((('Invert', 0.6, 4.0), ('Equalize', 1.0, 8.0)), ...)"""
    choices = [[operation.split() for operation in choice.split(',')] for choice in text.split(';')]
    return tuple(tuple((name, float(chance), float(magnitude)) for name, chance, magnitude in choice) for choice in choices)


def parse_auto_augment(text):
    """A string in timm's grammar, such as rand-m9-mstd0.5-inc1 or original-mstd0.5 -> RandAugment or AutoAugment.

    Raises ValueError, saying what is allowed.
    """
    start, *parts = text.split('-')
    given = {}
    for part in parts:
        match = re.fullmatch(r'(mstd|mmax|m|p)(\d+\.?\d*)|(inc|n|w)(\d+)|(t)(\w+)', part, re.ASCII)
        key, value = [group for group in match.groups() if group] if match else ('', '')
        if not match or key in given:
            problem = 'given twice' if match else 'unknown'
            raise ValueError(f'AUTO_AUGMENT {text!r}: {part!r} is {problem}; write {GRAMMAR}')
        given[key] = value if key == 't' else float(value)
    layers, deviation = int(given.get('n', 2)), given.get('mstd', 0.0)
    if start in POLICIES and not given.keys() - {'mstd'}:
        return AutoAugment(_policy(POLICIES[start]), deviation)
    weights = WEIGHTS_0 if 'w' in given else OP_SETS.get(given.get('t'), dict.fromkeys(RAND_OPS))
    weighted = None not in weights.values()
    wrong = (start != 'rand' or layers < 1 or given.get('p', 0) > 1 or given.get('mmax', 1) <= 0 or given.get('inc', 0) > 1
             or given.get('w', 0) > 0 or 't' in given and (given['t'] not in OP_SETS or 'w' in given))
    if wrong or weighted and layers > len(weights):
        raise ValueError(f'AUTO_AUGMENT is {text!r}; write {GRAMMAR}')
    return RandAugment(
        ops=tuple(weights), weights=tuple(weight / sum(weights.values()) for weight in weights.values()) if weighted else None,
        increasing=bool(given.get('inc')) or 't' in given, magnitude=given.get('m', 10.0),
        deviation=math.inf if deviation > 100 else deviation, largest=given.get('mmax', FULL_LEVEL), layers=layers,
        probability=given.get('p', 0.5))


def apply_op(image, name, magnitude, rng, fill, increasing):
    """One operation of OPS at a magnitude (FULL_LEVEL: the end of its range), its direction and filter drawn from `rng`."""
    values = OPS[name][1:]
    value = values[-1] if increasing else values[0]
    value = value(magnitude / FULL_LEVEL, rng) if value else None
    resample = Image.Resampling.BILINEAR if rng.random() < 0.5 else Image.Resampling.BICUBIC
    return perform(image, name, value, {'resample': resample, 'fillcolor': fill})


@singledispatch
def perform(image, name, value, how):
    """The operation of OPS with a value that was drawn."""
    return OPS[name][0](image, value, how)


# A batch: random erasing

def erase_box(rng, height, width, probability):
    """(top, left, height, width) of the rectangle to erase in an image of height x width, or None for none."""
    if rng.random() >= probability:
        return None
    for _ in range(ATTEMPTS):
        h, w = _random_sides(rng, height * width, ERASE_AREA, ERASE_RATIO)
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
