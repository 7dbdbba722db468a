"""Random generators: one for each purpose and key, and the draw of a rectangle.

A draw depends on the seed and on the sample or step that it is for, and on nothing else. So it is the
same for any number of processes, workers and restarts.
"""
from __future__ import annotations

import math

import numpy as np

ORDER, TRANSFORM, ERASE, MIX, DROPOUT = range(1, 6)  # purposes: the first key of a generator
ATTEMPTS = 10                                       # draws of a rectangle that fits


def rng_for(seed: int, purpose: int, *key: int) -> np.random.Generator:
    """Return the generator of a purpose, such as ORDER, and a key.

    A purpose always takes the same number of keys, or two of its streams could coincide.
    """
    return np.random.default_rng([seed, purpose, *(int(k) for k in key)])


def random_sides(rng: np.random.Generator, area: float, scale: tuple[float, float],
                 ratio: tuple[float, float]) -> tuple[int, int]:
    """Draw the height and width of a rectangle.

    Its area is uniform in `scale`, as fractions of `area`. Its height/width is log-uniform in `ratio`.
    """
    area = rng.uniform(*scale) * area
    ratio_drawn = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(area * ratio_drawn)), round(math.sqrt(area / ratio_drawn))
