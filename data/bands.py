"""Images of other channels than RGB: reading them, and a backend for data/augment.py.

DATA.CHANNELS selects it for every number but 3. Each channel is a grey picture of its own, and all get the
same geometry. One channel is the brightness of any image. For more, the file has as many: grey with alpha,
RGBA, CMYK, or a NumPy array uint8 (H, W, C) in a .npy file.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from data import image_files
from data.image_files import ImageError
from data.operations import PILLOW, Box, Sampling

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Bands:
    """An image as one grey picture per channel, all of one size."""

    pictures: tuple[Image.Image, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Return (width, height), as PIL images do."""
        return self.pictures[0].size

    def map(self, function: Callable[[Image.Image], Image.Image]) -> Bands:
        """Apply a function to each channel."""
        return Bands(tuple(map(function, self.pictures)))

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """Return uint8 (H, W, C), for np.asarray."""
        pixels = np.stack([np.asarray(picture) for picture in self.pictures], axis=-1)
        return pixels if dtype is None else pixels.astype(dtype)


def per_channel(values: Sequence[float], channels: int) -> list[float]:
    """Return DATA.MEAN or DATA.STD with a number for each channel, where one may stand for all."""
    return list(values) * channels if len(values) == 1 else list(values)


# ---- reading

def read(path: str, background: str = image_files.BACKGROUND, max_pixels: float = image_files.MAX_PIXELS, *,
         channels: int) -> Bands:
    """Read an image file as so many channels.

    `background` is for one channel only: with more, alpha is a channel itself. Raises ImageError for a file
    with another number of channels, and nearly anything for a damaged one.
    """
    with image_files.open_file(path) as file:
        if file.read(len(image_files.NUMPY)) == image_files.NUMPY:
            file.seek(0)
            pictures = _pictures_of_array(file, max_pixels)
            kind = 'a NumPy array'
        else:
            file.seek(0)
            image = image_files.open_image(file, max_pixels)
            kind = image.mode
            if channels == 1:
                pictures = (image_files.to_rgb(image, background).convert('L'),)
            else:
                pictures = _pictures_of_image(image)
    if len(pictures) != channels:
        raise ImageError(f'it has {len(pictures)} channels ({kind}), and DATA.CHANNELS is {channels}')
    return Bands(pictures)


def is_array(path: str) -> bool:
    """True for a .npy file with pixels, uint8 (H, W, C); False for one that cannot be opened."""
    with suppress(Exception), image_files.open_file(path) as file:
        shape, dtype = _header(file)
        return dtype == np.uint8 and len(shape) == 3 and 0 not in shape
    return False


def _pictures_of_image(image: Image.Image) -> tuple[Image.Image, ...]:
    """Split a PIL image into its channels with 8 bits; a palette is looked up."""
    image = image_files.in_eight_bits(image)
    if image.mode in ('P', 'PA'):
        image = image.convert('RGBA' if image.has_transparency_data else 'RGB')
    elif image.mode in ('1', 'RGBa'):
        image = image.convert({'1': 'L', 'RGBa': 'RGBA'}[image.mode])
    return image.split()


def _pictures_of_array(file: BinaryIO, max_pixels: float) -> tuple[Image.Image, ...]:
    """Read the channels of a .npy file."""
    height, width, channels = _shape_of_array(file, max_pixels)
    file.seek(0)
    pixels = np.load(file, allow_pickle=False).reshape(height, width, channels)
    return tuple(Image.fromarray(np.ascontiguousarray(pixels[:, :, i])) for i in range(channels))


def _shape_of_array(file: BinaryIO, max_pixels: float) -> tuple[int, int, int]:
    """Return (height, width, channels) of a .npy file by its header. Raises ImageError for other arrays."""
    shape, dtype = _header(file)
    if dtype != np.uint8 or len(shape) not in (2, 3) or 0 in shape:
        raise ImageError(f'a NumPy array {dtype} {shape}; an image is uint8 (H, W) or (H, W, channels)')
    height, width = shape[:2]
    image_files.check_pixels(width, height, max_pixels)
    return height, width, (shape[2] if len(shape) == 3 else 1)


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Read the shape and the type of a .npy file. Raises ValueError for another file."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ImageError(f'a NumPy array in version {version} of its format')
    shape, _, dtype = HEADERS[version](file)
    return shape, dtype


# ---- the backend

class BandsBackend:
    """Pixel operations on Bands: Pillow's, on each channel by itself.

    For their meaning see operations.Backend. What mixes colours has no effect on a single channel: Color and
    Desaturate.
    """

    def __init__(self, channels: int) -> None:
        self.read = partial(read, channels=channels)

    def resized_crop(self, image: Bands, box: Box, size: tuple[int, int]) -> Bands:
        return image.map(lambda picture: PILLOW.resized_crop(picture, box, size))

    def mirror(self, image: Bands) -> Bands:
        return image.map(PILLOW.mirror)

    def apply(self, image: Bands, name: str, value: Any, sampling: Sampling | None = None) -> Bands:
        if sampling is None:
            return image.map(lambda picture: PILLOW.apply(picture, name, value))
        return Bands(tuple(
            PILLOW.apply(picture, name, value, Sampling(sampling.resample, fill))
            for picture, fill in zip(image.pictures, sampling.fillcolor)))
