"""Training images by OpenCV: the pixel work of data/augment.py on uint8 arrays (H, W, 3), RGB, for the same draws as on Pillow's.

`read` gives a Photo, which takes the part of a PIL image in data/augment.py; the functions there turn to the ones registered here
by the type of what they get. Operations that map each value by a table, and flips, give Pillow's pixels; the others come
close, as tests/data/test_pipeline.py and docs/performance.md say.
"""
import io
import math
from dataclasses import dataclass
from functools import partial
from typing import Callable

import cv2
import numpy as np
from PIL import Image

from data import augment, image_files

cv2.setNumThreads(0)                                # data processes are the parallelism; and its threads do not survive a fork

START, START_OF_SCAN, END = b'\xff\xd8', 0xDA, b'\xff\xd9'                 # JPEG markers
START_OF_FRAME = {0xC0, 0xC1, 0xC2}                 # of frames that are Huffman coded
LARGEST_FILE = 2 ** 30                              # bytes that are read; a longer JPEG lacks its end and goes through Pillow
REDUCTIONS = (8, 4, 2, 1)                           # at which a JPEG can be decoded, at a fraction of the time
FILTERS = {Image.Resampling.BILINEAR: cv2.INTER_LINEAR, Image.Resampling.BICUBIC: cv2.INTER_CUBIC}
RAMP = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)   # every value of every channel, (1, 256, 3)


# Reading

@dataclass(frozen=True)
class Photo:
    """An image whose pixels are decoded when it is known which of them are needed."""

    size: tuple                                     # width, height
    decode: Callable                                # reduction -> uint8 (H, W, 3), BGR, both sides over it, rounded up
    reductions: tuple = (1,)


def read(path, background=image_files.BACKGROUND, max_pixels=image_files.MAX_PIXELS):
    """Read a Photo, with the arguments of image_files.read.

    A file that is no ordinary, complete JPEG goes through Pillow, with its pixels and its errors.
    """
    with image_files.open_file(path) as file:
        data = file.read(LARGEST_FILE) if file.read(2) == START and file.seek(0) == 0 else b''
        size = _jpeg_size(data)
        if size and size[0] * size[1] <= max_pixels:
            return Photo(size, partial(_decode_jpeg, data), REDUCTIONS)
        file.seek(0)
        pixels = _decode_by_pillow(file, background, max_pixels)
    return Photo(pixels.shape[1::-1], lambda reduction: pixels)


def _jpeg_size(data):
    """(width, height) of a grey or YCbCr JPEG with 8 bits per value that has its end; None for anything else.

    OpenCV fills what is missing of a cut file with grey and does not say so.
    """
    at, size = 2, None
    while data[:2] == START and at + 9 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2:at + 4], 'big')
        if marker in START_OF_FRAME and data[at + 4] == 8 and data[at + 9] in (1, 3):
            size = int.from_bytes(data[at + 7:at + 9], 'big'), int.from_bytes(data[at + 5:at + 7], 'big')
        if marker == START_OF_SCAN:
            return size if size and min(size) > 0 and data.rfind(END, at) > 0 else None
        at += 2 + length
    return None


def _decode_jpeg(data, reduction):
    flags = getattr(cv2, f'IMREAD_REDUCED_COLOR_{reduction}', cv2.IMREAD_COLOR)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        pixels = None
    if pixels is not None:
        return pixels
    try:                                            # Pillow's reason, or its pixels
        return _decode_by_pillow(io.BytesIO(data))[::reduction, ::reduction]
    except Exception as error:                      # Pillow may raise nearly anything for a damaged file
        raise error if isinstance(error, OSError) else OSError(f'{type(error).__name__}: {error}') from error


def _decode_by_pillow(file, background=image_files.BACKGROUND, max_pixels=math.inf):
    image = image_files.to_rgb(image_files.open_image(file, max_pixels), background)
    return cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR)


@augment.resized_crop.register
def _(photo: Photo, box, size):
    left, top, width, height = box
    reduction = next((r for r in photo.reductions if r * size <= min(width, height)), 1)
    left, top, width, height = (value / reduction for value in box)          # in pixels of what is decoded
    x, y, right, bottom = math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height)
    part = photo.decode(reduction)[y:bottom, x:right]
    part = _blurred(part, width / size, height / size)
    if reduction == 1:
        pixels = cv2.resize(part, (size, size), interpolation=cv2.INTER_CUBIC)
    else:                                           # the box need not begin and end at whole pixels
        matrix = (width / size, 0, left - x, 0, height / size, top - y)
        pixels = _warp(part, matrix, (size, size), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)


def _blurred(pixels, x_scale, y_scale):
    """Pixels ready to be sampled at every `scale`-th: OpenCV's filter does not widen with the step as Pillow's does, and
    would pass on what is too fine for the new grid. The widths come close to Pillow's bicubic, found by trial."""
    sigmas = [0.5 * math.sqrt(max(scale * scale - 1, 0)) for scale in (x_scale, y_scale)]
    if max(sigmas) < 0.25:
        return pixels
    sides = [2 * math.ceil(1.25 * sigma) + 1 for sigma in sigmas]
    return cv2.GaussianBlur(pixels, sides, sigmaX=max(sigmas[0], 0.01), sigmaY=max(sigmas[1], 0.01),
                            borderType=cv2.BORDER_REPLICATE)


def _warp(pixels, matrix, size, **how):
    """Pillow's affine transform: (x, y) of the result is the matrix times (x, y, 1) of the source, pixel centres at .5."""
    a, b, c, d, e, f = matrix
    centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    return cv2.warpAffine(pixels, centred, size, **{**how, 'flags': how['flags'] | cv2.WARP_INVERSE_MAP})


# Operations

@augment.mirrored.register
def _(pixels: np.ndarray):
    return cv2.flip(pixels, 1)


@augment.enhanced.register
def _(pixels: np.ndarray, name, factor):
    return OPS[name](pixels, factor, {})


@augment.perform.register
def _(pixels: np.ndarray, name, value, how):
    return OPS.get(name, partial(_by_pillow, name))(pixels, value, how)


def _by_pillow(name, pixels, value, how):
    return np.asarray(augment.OPS[name][0](Image.fromarray(pixels), value, how))


def _pointwise(name):
    """The operation as a table: what Pillow makes of every value."""
    return lambda pixels, value, how: cv2.LUT(pixels, _by_pillow(name, RAMP, value, how)[:, :, 0])


def _geometric(name):
    """The operation with Pillow's matrix, which it hands to the transform() of what it is given."""
    return lambda pixels, value, how: augment.OPS[name][0](_Canvas(pixels), value, how)


@dataclass(frozen=True)
class _Canvas:
    pixels: np.ndarray

    @property
    def size(self):
        return self.pixels.shape[1::-1]

    def transform(self, size, method, matrix, resample, fillcolor):
        return _warp(self.pixels, matrix, size, flags=FILTERS[resample], borderMode=cv2.BORDER_CONSTANT, borderValue=fillcolor)

    def rotate(self, angle, resample, fillcolor):
        """Counterclockwise by `angle` degrees about the centre."""
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        x, y = (length / 2 for length in self.size)
        matrix = cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y
        return self.transform(self.size, Image.Transform.AFFINE, matrix, resample, fillcolor)


def _by_channel(table_for):
    """The operation whose table for a channel is `table_for` of its values."""
    # one table for three interleaved channels takes OpenCV several times longer
    return lambda pixels, value, how: cv2.merge([cv2.LUT(channel, table_for(channel)) for channel in cv2.split(pixels)])


def _stretching(channel):
    """Values (H, W) -> the table (256,) that spreads their range over 0 to 255, as ImageOps.autocontrast does."""
    low, high = int(channel.min()), int(channel.max())
    if high <= low:
        return RAMP[0, :, 0]
    scale = 255 / (high - low)
    return (np.arange(256) * scale - low * scale).clip(0, 255).astype(np.uint8)


def _equalizing(channel):
    """Values (H, W) -> the table (256,) that spreads them evenly, as ImageOps.equalize does."""
    counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).astype(np.int64).ravel()
    step = (channel.size - counts[np.flatnonzero(counts)[-1]]) // 255
    if step == 0:
        return RAMP[0, :, 0]
    return ((step // 2 + counts.cumsum() - counts) // step).clip(0, 255).astype(np.uint8)


def _blend(other, pixels, factor):
    # Pillow cuts fractions off where OpenCV rounds; the thousandth keeps whole numbers what they are
    return cv2.addWeighted(pixels, factor, other, 1 - factor, -0.499)


def _color(pixels, factor, how):
    return _blend(cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), pixels, factor)


def _contrast(pixels, factor, how):
    gray = int(np.asarray(Image.fromarray(pixels).convert('L')).mean() + 0.5)
    return cv2.LUT(pixels, np.asarray(Image.blend(Image.new('L', (256, 1), gray), Image.fromarray(RAMP[:, :, 0]), factor)))


def _sharpness(pixels, factor, how):
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = pixels.copy()                          # Pillow's filter leaves the border
    smooth[1:-1, 1:-1] = cv2.filter2D(pixels, -1, kernel / 13)[1:-1, 1:-1]
    return _blend(smooth, pixels, factor)


def _gaussian_blur(pixels, radius, how):
    return cv2.GaussianBlur(pixels, (0, 0), radius, borderType=cv2.BORDER_REPLICATE)


OPS = {                                             # pixels, value, how -> pixels; for the values and `how` of augment.OPS
    **{name: _pointwise(name) for name in ('Invert', 'Posterize', 'Solarize', 'SolarizeAdd', 'Brightness')},
    **{name: _geometric(name) for name in ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')},
    'AutoContrast': _by_channel(_stretching), 'Equalize': _by_channel(_equalizing), 'Contrast': _contrast,
    'Color': _color, 'Desaturate': _color, 'Sharpness': _sharpness, 'GaussianBlur': _gaussian_blur,
}
