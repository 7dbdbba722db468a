"""Augmentation of one PIL image as pure functions. Inputs are never changed.

Every function that draws takes a numpy Generator (data/generators.py). RandAugment and AutoAugment follow timm 1.0.31 in their
operations, ranges and distributions.
"""
import math
import re
from dataclasses import dataclass
from functools import singledispatch
from typing import Optional

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from data.generators import ATTEMPTS, random_sides

FULL_LEVEL = 10                                     # the magnitude at which an operation reaches the end of its range


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
        h, w = random_sides(rng, width * height, scale, (1 / ratio[1], 1 / ratio[0]))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = max(min(width, round(height * ratio[1])), 1)  # the largest centre crop that keeps to `ratio`
    h = max(min(height, round(width / ratio[0])), 1)
    return (width - w) // 2, (height - h) // 2, w, h


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
