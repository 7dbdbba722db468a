"""Operations of RandAugment and AutoAugment: their pixels by Pillow, and their values at a magnitude.

They follow timm 1.0.31. data/opencv.py has most operations with faster pixels.
"""
from __future__ import annotations

from typing import Any, Callable, NamedTuple, Protocol

from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from data import image_files

Box = tuple[int, int, int, int]                     # left, top, width, height
Value = Callable[[float, Generator], Any]           # level, generator -> value


class Sampling(NamedTuple):
    """How a geometric operation makes pixels; other operations ignore it."""

    resample: Image.Resampling                      # the filter
    fillcolor: Any                                  # RGB or grey, where the result shows nothing of the image


class Backend(Protocol):
    """The pixel operations that DATA.BACKEND names; images are of the backend's own type."""

    def read(self, path: str, background: str, max_pixels: int) -> Any:
        """Read an image file; the result has a `size` (width, height).

        Raises nearly anything for a damaged file.
        """

    def resized_crop(self, image: Any, box: Box, size: tuple[int, int]) -> Any:
        """Crop a box out of what `read` returns and resize it to (height, width), bicubic."""

    def mirror(self, image: Any) -> Any:
        """Exchange left and right."""

    def apply(self, image: Any, name: str, value: Any, sampling: Sampling | None = None) -> Any:
        """Apply the operation OPS[name] with a value."""


class PillowBackend:
    """Pixel operations on PIL images of mode RGB or L."""

    read = staticmethod(image_files.read)

    def resized_crop(self, image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
        left, top, width, height = box
        # resize(box=) would be one call, but its filter looks outside the crop and gives other pixels
        crop = image.crop((left, top, left + width, top + height))
        return crop.resize(size[::-1], Image.Resampling.BICUBIC)

    def mirror(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    def apply(self, image: Image.Image, name: str, value: Any,
              sampling: Sampling | None = None) -> Image.Image:
        return OPS[name].apply(image, value, sampling)


PILLOW = PillowBackend()


# ---- pixels of an operation: image, value, sampling -> image

def _autocontrast(image: Image.Image, value: None, sampling: Sampling | None) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, value: None, sampling: Sampling | None) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, value: None, sampling: Sampling | None) -> Image.Image:
    return ImageOps.invert(image)


def _posterize(image: Image.Image, bits: int, sampling: Sampling | None) -> Image.Image:
    """Keep the upper bits of each value. ImageOps.posterize refuses 0 bits, which make a black image."""
    mask = 256 - 2 ** (8 - min(max(bits, 0), 8))
    return image.point([pixel & mask for pixel in range(256)] * len(image.getbands()))


def _solarize(image: Image.Image, threshold: int, sampling: Sampling | None) -> Image.Image:
    return ImageOps.solarize(image, threshold)


def _solarize_add(image: Image.Image, addend: int, sampling: Sampling | None) -> Image.Image:
    """Add a number to the values of the darker half."""
    dark = [min(255, pixel + addend) for pixel in range(128)]
    return image.point([*dark, *range(128, 256)] * len(image.getbands()))


def _enhance(enhancer: Callable) -> Callable:
    """Return the operation of a class of ImageEnhance; its value is the factor."""
    def apply(image: Image.Image, factor: float, sampling: Sampling | None) -> Image.Image:
        return enhancer(image).enhance(factor)
    return apply


def _gaussian_blur(image: Image.Image, radius: float, sampling: Sampling | None) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _rotate(image: Image.Image, degrees: float, sampling: Sampling) -> Image.Image:
    return image.rotate(degrees, resample=sampling.resample, fillcolor=sampling.fillcolor)


def _shear_x(value: float, width: int, height: int) -> tuple:
    return 1, value, 0, 0, 1, 0


def _shear_y(value: float, width: int, height: int) -> tuple:
    return 1, 0, 0, value, 1, 0


def _translate_x(value: float, width: int, height: int) -> tuple:
    return 1, 0, value * width, 0, 1, 0


def _translate_y(value: float, width: int, height: int) -> tuple:
    return 1, 0, 0, 0, 1, value * height


# (value, width, height) -> (a, b, c, d, e, f).
# Pixel (x, y) of the result is pixel (ax + by + c, dx + ey + f) of the image.
MATRICES: dict[str, Callable[[float, int, int], tuple]] = {
    'ShearX': _shear_x,
    'ShearY': _shear_y,
    'TranslateX': _translate_x,
    'TranslateY': _translate_y,
}


def _affine(name: str) -> Callable:
    """Return the operation whose matrix is MATRICES[name]."""
    def apply(image: Image.Image, value: float, sampling: Sampling) -> Image.Image:
        matrix = MATRICES[name](value, *image.size)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, **sampling._asdict())
    return apply


# ---- value of an operation: level, generator -> value. Level 1 is the end of the range.

def _signed(end: float) -> Value:
    """Return the function of values from 0 to `end`, in a random direction."""
    def value(level: float, rng: Generator) -> float:
        return level * end * (1 if rng.random() < 0.5 else -1)
    return value


def _between(start: float, end: float) -> Value:
    """Return the function of values from `start` to `end`."""
    def value(level: float, rng: Generator) -> float:
        return start + level * (end - start)
    return value


_signed_strength = _signed(0.9)


def _increasing_factor(level: float, rng: Generator) -> float:
    return max(0.1, 1 + _signed_strength(level, rng))


def _posterize_bits(level: float, rng: Generator) -> int:
    return int(level * 4)


def _posterize_bits_original(level: float, rng: Generator) -> int:
    return int(level * 4) + 4


def _posterize_bits_increasing(level: float, rng: Generator) -> int:
    return 4 - int(level * 4)


def _solarize_threshold(level: float, rng: Generator) -> int:
    return min(256, int(level * 256))


def _solarize_threshold_increasing(level: float, rng: Generator) -> int:
    return 256 - min(256, int(level * 256))


def _solarize_addend(level: float, rng: Generator) -> int:
    return min(128, int(level * 110))


def _desaturate_factor(level: float, rng: Generator) -> float:
    return max(0, 0.5 - 0.5 * level)


def _blur_radius(level: float, rng: Generator) -> float:
    return min(2.0, 0.1 + 1.9 * level)


def _random_blur_radius(level: float, rng: Generator) -> float:
    return 0.1 + rng.random() * (2.0 * min(1.0, level) - 0.1)


# ---- the table

class Op(NamedTuple):
    """An operation: its pixels and its values.

    Most values are those of AutoAugment's first TPU code, where some effects decrease with the level.
    `increasing` gives values whose effect increases. Where it is None, `value` does so.
    """

    apply: Callable[[Image.Image, Any, Any], Image.Image]
    value: Value | None = None                   # None: the operation has no value
    increasing: Value | None = None

    def draw_value(self, level: float, rng: Generator, increasing: bool) -> Any:
        """Draw the value at a level. None for an operation without values."""
        draw = self.increasing if increasing and self.increasing else self.value
        return draw(level, rng) if draw else None


_factor = _between(0.1, 1.9)
OPS = {
    'AutoContrast': Op(_autocontrast),
    'Equalize': Op(_equalize),
    'Invert': Op(_invert),
    'Rotate': Op(_rotate, _signed(30)),             # degrees
    'Posterize': Op(_posterize, _posterize_bits, _posterize_bits_increasing),
    'Solarize': Op(_solarize, _solarize_threshold, _solarize_threshold_increasing),
    'SolarizeAdd': Op(_solarize_add, _solarize_addend),
    'Color': Op(_enhance(ImageEnhance.Color), _factor, _increasing_factor),
    'Contrast': Op(_enhance(ImageEnhance.Contrast), _factor, _increasing_factor),
    'Brightness': Op(_enhance(ImageEnhance.Brightness), _factor, _increasing_factor),
    'Sharpness': Op(_enhance(ImageEnhance.Sharpness), _factor, _increasing_factor),
    'ShearX': Op(_affine('ShearX'), _signed(0.3)),  # pixels per row or column
    'ShearY': Op(_affine('ShearY'), _signed(0.3)),
    'TranslateX': Op(_affine('TranslateX'), _signed(0.45)),                  # fractions of the side
    'TranslateY': Op(_affine('TranslateY'), _signed(0.45)),
    'Desaturate': Op(_enhance(ImageEnhance.Color), _desaturate_factor),
    'GaussianBlur': Op(_gaussian_blur, _blur_radius),
    'GaussianBlurRand': Op(_gaussian_blur, _random_blur_radius),
    'PosterizeOriginal': Op(_posterize, _posterize_bits_original),
    'PosterizeIncreasing': Op(_posterize, _posterize_bits_increasing),
}
RAND_OPS = tuple(OPS)[:15]                          # RandAugment's, from AutoContrast to TranslateY
