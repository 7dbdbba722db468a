"""Training images by OpenCV: a backend for data/augment.py that works on uint8 arrays (H, W, 3), RGB.

Operations that map each value by a table, and flips, give Pillow's pixels. The others come close:
tests/data/test_opencv.py and docs/performance.md say how close.
"""
from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Callable

import cv2
import numpy as np
from PIL import Image

from data import image_files, operations
from data.operations import Box, Sampling

cv2.setNumThreads(0)                                # data processes are parallel; threads survive no fork

START, START_OF_SCAN, END = b'\xff\xd8', 0xDA, b'\xff\xd9'                 # JPEG markers
START_OF_FRAME = {0xC0, 0xC1, 0xC2}                 # of frames that are Huffman coded
LARGEST_FILE = 2 ** 30                              # bytes; a longer JPEG is read by Pillow
REDUCTIONS = (8, 4, 2, 1)                           # of a JPEG: decoding takes a fraction of the time
FILTERS = {Image.Resampling.BILINEAR: cv2.INTER_LINEAR, Image.Resampling.BICUBIC: cv2.INTER_CUBIC}
RAMP = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)   # (1, 256, 3): every value


# ---- reading

@dataclass(frozen=True)
class Photo:
    """An image whose pixels are decoded once the crop is known.

    `decode` takes a reduction and returns uint8 (H, W, 3), BGR: both sides divided by it, rounded up.
    """

    size: tuple[int, int]                           # width, height
    decode: Callable[[int], np.ndarray]
    reductions: tuple[int, ...] = (1,)              # largest first


def read(path: str, background: str = image_files.BACKGROUND,
         max_pixels: int = image_files.MAX_PIXELS) -> Photo:
    """Read a Photo, with the arguments of image_files.read.

    A file that is no ordinary, complete JPEG goes through Pillow, with its pixels and its errors.
    """
    with image_files.open_file(path) as file:
        data = b''
        if file.read(2) == START:
            file.seek(0)
            data = file.read(LARGEST_FILE)
        size = _jpeg_size(data)
        if size and size[0] * size[1] <= max_pixels:
            return Photo(size, partial(_decode_jpeg, data), REDUCTIONS)
        file.seek(0)
        pixels = _decode_by_pillow(file, background, max_pixels)
    return Photo(pixels.shape[1::-1], lambda reduction: pixels)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a grey or YCbCr JPEG with 8 bits per value that has its end, else None.

    OpenCV fills the missing part of a cut file with grey, without an error.
    """
    at, size = len(START), None
    while data.startswith(START) and at + 9 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2:at + 4], 'big')
        if marker in START_OF_FRAME and data[at + 4] == 8 and data[at + 9] in (1, 3):
            height = int.from_bytes(data[at + 5:at + 7], 'big')
            width = int.from_bytes(data[at + 7:at + 9], 'big')
            size = width, height
        if marker == START_OF_SCAN:
            whole = data.rfind(END, at) > 0
            return size if size and min(size) > 0 and whole else None
        at += 2 + length
    return None


def _decode_jpeg(data: bytes, reduction: int) -> np.ndarray:
    flags = getattr(cv2, f'IMREAD_REDUCED_COLOR_{reduction}', cv2.IMREAD_COLOR)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        pixels = None
    if pixels is not None:
        return pixels
    try:                                            # Pillow's reason, or its pixels
        return _decode_by_pillow(io.BytesIO(data))[::reduction, ::reduction]
    except OSError:
        raise
    except Exception as error:                      # Pillow may raise nearly anything for a damaged file
        raise OSError(f'{type(error).__name__}: {error}') from error


def _decode_by_pillow(file: BinaryIO, background: str = image_files.BACKGROUND,
                      max_pixels: float = math.inf) -> np.ndarray:
    image = image_files.to_rgb(image_files.open_image(file, max_pixels), background)
    return cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR)


# ---- the backend

class OpenCVBackend:
    """Pixel operations on uint8 arrays (H, W, 3), RGB; for their meaning see operations.Backend.

    An operation without pixels of its own here is applied by Pillow.
    """

    read = staticmethod(read)

    def resized_crop(self, image: Photo, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Decode the JPEG at the largest reduction that leaves enough pixels for the crop."""
        _, _, width, height = box
        zoom = min(height / size[0], width / size[1])           # pixels of the photo for one of the crop
        enough = [reduction for reduction in image.reductions if reduction <= zoom]
        return _resized_part(image, box, size, reduction=enough[0] if enough else 1)

    def mirror(self, image: np.ndarray) -> np.ndarray:
        return cv2.flip(image, 1)

    def apply(self, image: np.ndarray, name: str, value: Any,
              sampling: Sampling | None = None) -> np.ndarray:
        if name in BY_TABLE:
            return cv2.LUT(image, _by_pillow(name, RAMP, value, sampling)[:, :, 0])
        if name in MATRICES and sampling:
            height, width = image.shape[:2]
            matrix = MATRICES[name](value, width, height)
            return _warp(image, matrix, (width, height), FILTERS[sampling.resample],
                         borderMode=cv2.BORDER_CONSTANT, borderValue=sampling.fillcolor)
        if name in OPS:
            return OPS[name](image, value)
        return _by_pillow(name, image, value, sampling)


def _resized_part(photo: Photo, box: Box, size: tuple[int, int], reduction: int) -> np.ndarray:
    """Decode a photo at a reduction, crop the box and resize it to (height, width), RGB.

    The box is in pixels of the whole photo.
    """
    left, top, width, height = (value / reduction for value in box)          # in pixels of the reduced photo
    x, right = math.floor(left), math.ceil(left + width)
    y, bottom = math.floor(top), math.ceil(top + height)
    part = photo.decode(reduction)[y:bottom, x:right]
    rows, columns = size
    part = _blurred(part, width / columns, height / rows)
    if reduction == 1:
        pixels = cv2.resize(part, (columns, rows), interpolation=cv2.INTER_CUBIC)
    else:                                           # the box need not begin and end at whole pixels
        matrix = (width / columns, 0, left - x, 0, height / rows, top - y)
        pixels = _warp(part, matrix, (columns, rows), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)


def _blurred(pixels: np.ndarray, x_scale: float, y_scale: float) -> np.ndarray:
    """Remove what is too fine for every `scale`-th pixel.

    OpenCV's filter does not widen with the step as Pillow's does. The widths, found by trial, come close
    to Pillow's bicubic.
    """
    sigmas = [0.5 * math.sqrt(max(scale * scale - 1, 0)) for scale in (x_scale, y_scale)]
    if max(sigmas) < 0.25:
        return pixels
    sides = [2 * math.ceil(1.25 * sigma) + 1 for sigma in sigmas]
    return cv2.GaussianBlur(pixels, sides, sigmaX=max(sigmas[0], 0.01), sigmaY=max(sigmas[1], 0.01),
                            borderType=cv2.BORDER_REPLICATE)


def _warp(pixels: np.ndarray, matrix: tuple, size: tuple[int, int], flags: int,
          **border: Any) -> np.ndarray:
    """Transform as Pillow does: (x, y) of the result is the matrix times (x, y, 1) of the source.

    Pixel centres are at .5.
    """
    a, b, c, d, e, f = matrix
    centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    return cv2.warpAffine(pixels, centred, size, flags=flags | cv2.WARP_INVERSE_MAP, **border)


# ---- operations

def _by_pillow(name: str, pixels: np.ndarray, value: Any, sampling: Sampling | None) -> np.ndarray:
    return np.asarray(operations.PILLOW.apply(Image.fromarray(pixels), name, value, sampling))


def _rotation(degrees: float, width: int, height: int) -> tuple:
    """Return the matrix that rotates counterclockwise about the centre, as those of
    operations.MATRICES."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


def _map_channels(pixels: np.ndarray, table_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Map each channel by a table that its values decide."""
    # one table for three interleaved channels takes OpenCV several times longer
    return cv2.merge([cv2.LUT(channel, table_of(channel)) for channel in cv2.split(pixels)])


def _autocontrast(pixels: np.ndarray, value: None) -> np.ndarray:
    return _map_channels(pixels, _stretching)


def _stretching(channel: np.ndarray) -> np.ndarray:
    """Return the table (256,) that spreads the range of values (H, W) over 0 to 255, as Pillow does."""
    low, high = int(channel.min()), int(channel.max())
    if high <= low:
        return RAMP[0, :, 0]
    scale = 255 / (high - low)
    return (np.arange(256) * scale - low * scale).clip(0, 255).astype(np.uint8)


def _equalize(pixels: np.ndarray, value: None) -> np.ndarray:
    return _map_channels(pixels, _equalizing)


def _equalizing(channel: np.ndarray) -> np.ndarray:
    """Return the table (256,) that spreads values (H, W) evenly, as Pillow does."""
    counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).astype(np.int64).ravel()
    step = (channel.size - counts[np.flatnonzero(counts)[-1]]) // 255
    if step == 0:
        return RAMP[0, :, 0]
    return ((step // 2 + counts.cumsum() - counts) // step).clip(0, 255).astype(np.uint8)


def _blend(other: np.ndarray, pixels: np.ndarray, factor: float) -> np.ndarray:
    # Pillow truncates, OpenCV rounds; the thousandth keeps whole numbers unchanged
    return cv2.addWeighted(pixels, factor, other, 1 - factor, -0.499)


def _color(pixels: np.ndarray, factor: float) -> np.ndarray:
    grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _blend(grey, pixels, factor)


def _contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    mean = int(np.asarray(Image.fromarray(pixels).convert('L')).mean() + 0.5)
    grey, ramp = Image.new('L', (256, 1), mean), Image.fromarray(RAMP[:, :, 0])
    return cv2.LUT(pixels, np.asarray(Image.blend(grey, ramp, factor)))


def _sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    kernel: np.ndarray = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = pixels.copy()                          # Pillow's filter leaves the border
    smooth[1:-1, 1:-1] = cv2.filter2D(pixels, -1, kernel / 13)[1:-1, 1:-1]
    return _blend(smooth, pixels, factor)


def _gaussian_blur(pixels: np.ndarray, radius: float) -> np.ndarray:
    return cv2.GaussianBlur(pixels, (0, 0), radius, borderType=cv2.BORDER_REPLICATE)


# All other operations of operations.OPS are applied by Pillow. A table has Pillow's result for each value.
BY_TABLE = frozenset(('Invert', 'Posterize', 'Solarize', 'SolarizeAdd', 'Brightness'))
MATRICES = {**operations.MATRICES, 'Rotate': _rotation}
OPS: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    'AutoContrast': _autocontrast,
    'Equalize': _equalize,
    'Contrast': _contrast,
    'Color': _color,
    'Desaturate': _color,
    'Sharpness': _sharpness,
    'GaussianBlur': _gaussian_blur,
}
