"""Augmentation of one image: random crop, flip, colour jitter, RandAugment, AutoAugment.

The functions are pure: inputs are never changed, and draws are of a numpy Generator (data/generators.py).
A backend makes the pixels, by default Pillow's; the draws are the same for each backend.
RandAugment and AutoAugment follow timm 1.0.31.
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from numpy.random import Generator
from PIL import Image

from data.generators import ATTEMPTS, random_sides
from data.operations import OPS, PILLOW, RAND_OPS, Backend, Box, Sampling

FULL_LEVEL = 10                                     # magnitude at the end of an operation's range
GREY = (128, 128, 128)

Colour = tuple[int, ...]                            # a number from 0 to 255 for each channel


# ---- crop, flip, colours

def random_resized_crop(image: Any, size: tuple[int, int], rng: Generator,
                        scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3),
                        backend: Backend = PILLOW) -> Any:
    """Crop a random box and resize it to `size`, (height, width), bicubic.

    `scale` is the range of the box's fraction of the area, `ratio` that of its width/height.
    """
    width, height = image.size
    return backend.resized_crop(image, _crop_box(width, height, rng, scale, ratio), size)


def _crop_box(width: int, height: int, rng: Generator, scale: tuple[float, float],
              ratio: tuple[float, float]) -> Box:
    for _ in range(ATTEMPTS):
        h, w = random_sides(rng, width * height, scale, (1 / ratio[1], 1 / ratio[0]))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = max(min(width, round(height * ratio[1])), 1)  # the largest centre crop that keeps to `ratio`
    h = max(min(height, round(width / ratio[0])), 1)
    return (width - w) // 2, (height - h) // 2, w, h


def random_flip(image: Any, rng: Generator, probability: float = 0.5, backend: Backend = PILLOW) -> Any:
    """Mirror an image left to right with this probability."""
    return backend.mirror(image) if rng.random() < probability else image


def color_jitter(image: Any, strength: float, rng: Generator, backend: Backend = PILLOW) -> Any:
    """Change brightness, contrast and saturation in random order.

    Each factor is uniform in [max(0, 1 - strength), 1 + strength].
    """
    if strength == 0:
        return image
    for i in rng.permutation(3):
        factor = rng.uniform(max(0, 1 - strength), 1 + strength)
        image = backend.apply(image, ('Brightness', 'Contrast', 'Color')[i], factor)
    return image


# ---- RandAugment and AutoAugment

def apply_op(image: Any, name: str, magnitude: float, rng: Generator, *, fill: Colour,
             increasing: bool, backend: Backend = PILLOW) -> Any:
    """Apply an operation of OPS at a magnitude, 0 to FULL_LEVEL; draw its direction and filter."""
    value = OPS[name].draw_value(magnitude / FULL_LEVEL, rng, increasing)
    resample = Image.Resampling.BILINEAR if rng.random() < 0.5 else Image.Resampling.BICUBIC
    return backend.apply(image, name, value, Sampling(resample, fill))


def _draw_magnitude(rng: Generator, magnitude: float, deviation: float,
                    largest: float = FULL_LEVEL) -> float:
    if math.isinf(deviation):
        drawn = rng.uniform(0, magnitude)
    else:
        drawn = rng.normal(magnitude, deviation)
    return min(max(drawn, 0.0), largest)


@dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk et al. 2019, arXiv 1909.13719): `layers` operations per image, drawn from `ops`.

    They are drawn without replacement where they have weights. Each is applied with `probability`.
    The magnitude is normal around `magnitude`, or for an infinite `deviation` uniform from 0 to it.
    """

    ops: tuple[str, ...] = RAND_OPS
    weights: tuple[float, ...] | None = None     # of each of `ops`; their sum is 1
    increasing: bool = False                        # take values whose effect increases with the magnitude
    magnitude: float = 10
    deviation: float = 0.0
    largest: float = FULL_LEVEL
    layers: int = 2
    probability: float = 0.5

    def __call__(self, image: Any, rng: Generator, fill: Colour = GREY,
                 backend: Backend = PILLOW) -> Any:
        """Draw operations and apply them; `fill` is the colour of pixels from outside the image."""
        for i in rng.choice(len(self.ops), self.layers, replace=self.weights is None, p=self.weights):
            if rng.random() < self.probability:
                magnitude = _draw_magnitude(rng, self.magnitude, self.deviation, self.largest)
                image = apply_op(image, self.ops[i], magnitude, rng, fill=fill, increasing=self.increasing,
                                 backend=backend)
        return image


@dataclass(frozen=True)
class AutoAugment:
    """AutoAugment (Cubuk et al. 2018, arXiv 1805.09501): one of `choices` per image.

    A choice is a tuple of operations (name, probability, magnitude). Magnitudes deviate by `deviation`.
    """

    choices: tuple[tuple[tuple[str, float, float], ...], ...]
    deviation: float = 0.0

    def __call__(self, image: Any, rng: Generator, fill: Colour = GREY,
                 backend: Backend = PILLOW) -> Any:
        """Draw operations and apply them; `fill` is the colour of pixels from outside the image."""
        for name, probability, magnitude in self.choices[rng.integers(len(self.choices))]:
            if rng.random() < probability:
                magnitude = _draw_magnitude(rng, magnitude, self.deviation)
                image = apply_op(image, name, magnitude, rng, fill=fill, increasing=False, backend=backend)
        return image


# ---- the strings of TRAIN.AUTO_AUGMENT

WEIGHTS_0 = {'Rotate': 0.3, 'ShearX': 0.2, 'ShearY': 0.2, 'TranslateX': 0.1, 'TranslateY': 0.1,
             'Color': 0.025, 'Sharpness': 0.025, 'AutoContrast': 0.025, 'Solarize': 0.005,
             'SolarizeAdd': 0.005, 'Contrast': 0.005, 'Brightness': 0.005, 'Equalize': 0.005}
# timm takes increasing operations for all named sets
UNWEIGHTED_OP_SETS: dict[str, tuple[str, ...]] = {  # name: operations
    '3a': ('Solarize', 'Desaturate', 'GaussianBlur'),
}
WEIGHTED_OP_SETS: dict[str, dict[str, float]] = {   # name: {operation: weight}
    'weights': {'Rotate': 3, 'ShearX': 2, 'ShearY': 2, 'TranslateX': 1, 'TranslateY': 1, 'Color': 0.25,
                'Sharpness': 0.25, 'AutoContrast': 0.25, 'Solarize': 0.05, 'SolarizeAdd': 0.05,
                'Contrast': 0.05, 'Brightness': 0.05, 'Equalize': 0.05, 'Posterize': 0.05, 'Invert': 0.05},
    '3aw': {'Solarize': 6, 'Desaturate': 6, 'GaussianBlur': 6, 'Rotate': 3, 'ShearX': 2, 'ShearY': 2,
            'Posterize': 1, 'AutoContrast': 1, 'Color': 1, 'Sharpness': 1, 'Contrast': 1, 'Brightness': 1,
            'Equalize': 1, 'Invert': 1},
}
# AutoAugment: choices of operations "name probability magnitude"; an image gets one choice. `original`
# is the paper's policy for ImageNet, v0 that of the first TPU code, 3a that of DeiT III. Those with r
# posterize more with the magnitude.
POLICIES = {
    'originalr': """
        PosterizeIncreasing .4 8, Rotate .6 9; Solarize .6 5, AutoContrast .6 5;
        Equalize .8 8, Equalize .6 3; PosterizeIncreasing .6 7, PosterizeIncreasing .6 6;
        Equalize .4 7, Solarize .2 4; Equalize .4 4, Rotate .8 8; Solarize .6 3, Equalize .6 7;
        PosterizeIncreasing .8 5, Equalize 1 2; Rotate .2 3, Solarize .6 8;
        Equalize .6 8, PosterizeIncreasing .4 6; Rotate .8 8, Color .4 0;
        Rotate .4 9, Equalize .6 2; Equalize 0 7, Equalize .8 8; Invert .6 4, Equalize 1 8;
        Color .6 4, Contrast 1 8; Rotate .8 8, Color 1 2; Color .8 8, Solarize .8 7;
        Sharpness .4 7, Invert .6 8; ShearX .6 5, Equalize 1 9; Color .4 0, Equalize .6 3;
        Equalize .4 7, Solarize .2 4; Solarize .6 5, AutoContrast .6 5; Invert .6 4, Equalize 1 8;
        Color .6 4, Contrast 1 8; Equalize .8 8, Equalize .6 3""",
    'v0': """
        Equalize .8 1, ShearY .8 4; Color .4 9, Equalize .6 3; Color .4 1, Rotate .6 8;
        Solarize .8 3, Equalize .4 7; Solarize .4 2, Solarize .6 2; Color .2 0, Equalize .8 8;
        Equalize .4 8, SolarizeAdd .8 3; ShearX .2 9, Rotate .6 8; Color .6 1, Equalize 1 2;
        Invert .4 9, Rotate .6 0; Equalize 1 9, ShearY .6 3; Color .4 7, Equalize .6 0;
        Posterize .4 6, AutoContrast .4 7; Solarize .6 8, Color .6 9; Solarize .2 4, Rotate .8 9;
        Rotate 1 7, TranslateY .8 9; ShearX 0 0, Solarize .8 4; ShearY .8 0, Color .6 4;
        Color 1 0, Rotate .6 2; Equalize .8 4, Equalize 0 8; Equalize 1 4, AutoContrast .6 2;
        ShearY .4 7, SolarizeAdd .6 7; Posterize .8 2, Solarize .6 10; Solarize .6 8, Equalize .6 1;
        Color .8 6, Rotate .4 5""",
    '3a': 'Solarize 1 5; Desaturate 1 10; GaussianBlurRand 1 10',
}
POLICIES['original'] = POLICIES['originalr'].replace('PosterizeIncreasing', 'PosterizeOriginal')
POLICIES['v0r'] = POLICIES['v0'].replace('Posterize', 'PosterizeIncreasing')
GRAMMAR = (
    'rand, then any of -mN (magnitude), -nN (operations per image), -pX (probability of each), '
    '-mstdX (deviation of the magnitude; above 100: uniform), -mmaxX (largest magnitude), '
    '-inc0 or -inc1 (effects increase with the magnitude), -w0 (weighted choice), '
    '-tNAME (a set of operations: weights, 3a, 3aw); such as rand-m9-mstd0.5-inc1; or '
    f'{", ".join(POLICIES)} (AutoAugment), then perhaps -mstdX')
PART = re.compile(r'(mstd|mmax|m|p)(\d+\.?\d*)|(inc|n|w)(\d+)|(t)(\w+)', re.ASCII)


def parse_auto_augment(text: str) -> RandAugment | AutoAugment:
    """Parse a string in timm's grammar, such as rand-m9-mstd0.5-inc1 or original-mstd0.5.

    Raises ValueError with what is allowed.
    """
    start, *parts = text.split('-')
    numbers, op_set = _parse_parts(text, parts)
    deviation = numbers.get('mstd', 0.0)
    if start in POLICIES and not op_set and not numbers.keys() - {'mstd'}:
        return AutoAugment(_parse_policy(POLICIES[start]), deviation)
    layers, probability = int(numbers.get('n', 2)), numbers.get('p', 0.5)
    largest = numbers.get('mmax', FULL_LEVEL)
    increasing, weighted = numbers.get('inc', 0), numbers.get('w')
    if (start != 'rand' or layers < 1 or probability > 1 or largest <= 0 or increasing > 1
            or weighted not in (None, 0) or weighted == 0 and op_set):
        raise ValueError(f'AUTO_AUGMENT is {text!r}; write {GRAMMAR}')
    ops, weights = _find_ops(op_set, weighted == 0)
    if not ops or weights and layers > len(weights):
        raise ValueError(f'AUTO_AUGMENT is {text!r}; write {GRAMMAR}')
    return RandAugment(
        ops=ops,
        weights=weights,
        increasing=bool(increasing) or op_set != '',
        magnitude=numbers.get('m', 10.0),
        deviation=math.inf if deviation > 100 else deviation,
        largest=largest,
        layers=layers,
        probability=probability)


def _parse_parts(text: str, parts: list[str]) -> tuple[dict[str, float], str]:
    """Return {key: number} of the parts such as m9, and the name of the set of operations of -t, or ''."""
    numbers: dict[str, float] = {}
    op_set = ''
    for part in parts:
        match = PART.fullmatch(part)
        if not match:
            raise ValueError(f'AUTO_AUGMENT {text!r}: {part!r} is unknown; write {GRAMMAR}')
        key, value = [group for group in match.groups() if group]
        if key in numbers or key == 't' and op_set:
            raise ValueError(f'AUTO_AUGMENT {text!r}: {part!r} is given twice; write {GRAMMAR}')
        if key == 't':
            op_set = value
        else:
            numbers[key] = float(value)
    return numbers, op_set


def _find_ops(op_set: str, use_weights_0: bool) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Return the names of operations and their weights.

    The weights are None where all are drawn alike. Both are empty for an unknown name.
    """
    if use_weights_0:
        weights = WEIGHTS_0
    elif op_set in WEIGHTED_OP_SETS:
        weights = WEIGHTED_OP_SETS[op_set]
    elif op_set:
        return UNWEIGHTED_OP_SETS.get(op_set, ()), None
    else:
        return RAND_OPS, None
    total = sum(weights.values())
    return tuple(weights), tuple(weight / total for weight in weights.values())


def _parse_policy(text: str) -> tuple[tuple[tuple[str, float, float], ...], ...]:
    """Parse 'Invert .6 4, Equalize 1 8; ...' to ((('Invert', 0.6, 4.0), ('Equalize', 1.0, 8.0)), ...)."""
    choices = []
    for choice in text.split(';'):
        operations = []
        for operation in choice.split(','):
            name, probability, magnitude = operation.split()
            operations.append((name, float(probability), float(magnitude)))
        choices.append(tuple(operations))
    return tuple(choices)
