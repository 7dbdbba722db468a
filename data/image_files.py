"""Read image files as RGB pixels: formats, the limit of the size, transparency and bit depth.

Training and tools read images by these functions only.
"""
from __future__ import annotations

import errno
import math
import os
import stat
from contextlib import suppress
from importlib import import_module
from typing import Any, BinaryIO

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageColor,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    features,
)

from data import archives

Image.preinit()                                     # registers JPEG, PNG, GIF, BMP and PPM
for _plugin in ('WebPImagePlugin', 'AvifImagePlugin'):
    with suppress(ImportError):                     # AVIF came with Pillow 11.3
        import_module(f'PIL.{_plugin}')

BACKGROUND, DROP = 'white', 'drop'
NUMPY = b'\x93NUMPY'                               # how a .npy file begins
MAX_PIXELS = 89478485                               # from here on Pillow suspects a decompression bomb
LARGE = 2 ** 25                                     # pixels of a resized image that is computed as a whole
# Pillow's names. JPEG finds MPO; PPM covers PGM, PBM and PFM. Never EPS, which starts another program.
FORMATS = ('JPEG', 'PNG', *(['WEBP'] if features.check('webp') else []), 'GIF', 'BMP', 'TIFF', 'PPM',
           *(['AVIF'] if 'AVIF' in Image.OPEN and features.check('avif') else []))
FOREIGN = (                                         # (offset, bytes, format) of files that are not read
    (0, b'%!PS', 'EPS or PostScript'),
    (0, b'\xc5\xd0\xd3\xc6', 'EPS'),
    (0, b'%PDF', 'PDF'),
    (0, b'8BPS', 'Photoshop (PSD)'),
    (0, b'\0\0\1\0', 'ICO'),
    (0, b'<svg', 'SVG'),
    (0, b'<?xml', 'XML or SVG'),
    (0, b'<!DOCTYPE', 'a web page'),
    (0, b'<!doctype', 'a web page'),
    (0, b'<html', 'a web page'),
    (0, b'PK\3\4', 'a ZIP archive'),
    (0, b'DICM', 'DICOM'),
    (128, b'DICM', 'DICOM'),
    (0, b'\0\0\0\x0cjP  ', 'JPEG 2000'),
    (0, b'\xffO\xffQ', 'JPEG 2000'),
    (0, b'\xff\x0a', 'JPEG XL'),
    (4, b'JXL ', 'JPEG XL'),
    (4, b'ftypavif', 'AVIF, which needs Pillow 11.3 or newer'),
    (4, b'ftyphei', 'HEIC'),
    (4, b'ftyphev', 'HEIC'),
    (4, b'ftypmif1', 'HEIC'),
    (4, b'ftypmsf1', 'HEIC'),
    (4, b'ftyp', 'a video'),
    (0, NUMPY, 'a NumPy array, which is read where DATA.CHANNELS is not 3'),
    (0, b'version https://git-lfs', 'a pointer of Git LFS: fetch its content by git lfs pull'),
)
TRAITS = {                                          # property of an image -> description, effect
    'alpha': ('with transparency',
              'composited on DATA.BACKGROUND, white by default; choose a colour that the drawings lack'),
    '16 bits': ('with 16 bits',
                'scaled to 8 bits; where only the lower 12 bits are used, scale the files first'),
    'CMYK': ('in CMYK', 'converted without a colour profile; convert the files for exact colours'),
    'palette': ('with a palette', 'converted to RGB'),
    'frames': ('with several frames', 'the first frame is read'),
    'orientation': ('with an EXIF orientation',
                    'read as stored, not turned; turn the files if viewers show them upright'),
}
SPECIAL = {stat.S_IFIFO: 'a FIFO', stat.S_IFSOCK: 'a socket', stat.S_IFCHR: 'a device',
           stat.S_IFBLK: 'a device'}
MIN_IS_WHITE = 0                                    # of the TIFF tag PhotometricInterpretation

Image.MAX_IMAGE_PIXELS = None                       # `open_image` has a limit that the user can raise
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY     # a text or ICC profile may have some MB


class ImageError(ValueError):
    """A file cannot be read as an image; the message gives the reason, without its name."""


def open_file(path: str) -> BinaryIO:
    """Open a regular file, or a member of an archive, for reading, as binary.

    Raises OSError, and ImageError for a FIFO or a device, which would block.
    """
    try:
        mode = os.stat(path).st_mode
    except NotADirectoryError:
        return archives.open_member(path)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise ImageError(f'{SPECIAL.get(stat.S_IFMT(mode), "something special")}, not a regular file')
    return open(path, 'rb')


def open_image(file: BinaryIO, max_pixels: float = MAX_PIXELS) -> Image.Image:
    """Read the header of an open image file; Pillow reads the pixels later.

    Its content decides the format, not its name.
    Raises ImageError for another format or more than `max_pixels` pixels.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        raise ImageError(_unknown(file.read(132))) from None
    check_pixels(image.width, image.height, max_pixels)
    return image


def check_pixels(width: int, height: int, max_pixels: float) -> None:
    """Raise ImageError for an image of more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise ImageError(f'{width} x {height} = {width * height} pixels are more than DATA.MAX_PIXELS '
                         f'{max_pixels}, which can be raised')


def _unknown(head: bytes) -> str:
    """Return the reason why a file that begins with these bytes is not read."""
    if not head:
        return 'the file is empty'
    problem = f'not an image in a format that is read here ({", ".join(FORMATS)})'
    for offset, start, kind in FOREIGN:
        if head[offset:].startswith(start):
            return f'{kind}: {problem}'
    return problem


def is_image(path: str) -> bool:
    """True if a file begins as an image of one of FORMATS does; False for one that cannot be opened."""
    try:
        with open_file(path) as file:
            open_image(file, math.inf)
    except Exception:                               # Pillow may raise nearly anything for a damaged header
        return False
    return True


def read(path: str, background: str = BACKGROUND, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as a PIL image of mode RGB, as `to_rgb`. Raises nearly anything for a damaged
    file."""
    with open_file(path) as file:
        return to_rgb(open_image(file, max_pixels), background)


def reason(error: BaseException) -> str:
    """Explain why an image cannot be read, in one line without its name."""
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, MemoryError):
        return 'not enough memory for its pixels'
    return getattr(error, 'strerror', None) or f'{type(error).__name__}: {error}'


# ---- modes

def to_rgb(image: Image.Image, background: str = BACKGROUND) -> Image.Image:
    """Convert a PIL image of any mode to RGB with 8 bits, or load it if it is that already.

    Transparent pixels are composited on the colour `background`; with 'drop' their alpha is ignored.
    16-bit grey is scaled. Raises ImageError for 32-bit values, whose range is unknown.
    """
    image = in_eight_bits(image)
    if background != DROP and image.has_transparency_data:
        rgba = image if image.mode == 'RGBA' else image.convert('RGBA')
        if rgba.getchannel('A').getextrema()[0] < 255:
            flat = Image.new('RGB', image.size, ImageColor.getrgb(background))
            flat.paste(rgba, mask=rgba)
            return flat
        return rgba.convert('RGB')
    if image.mode == 'RGB':
        image.load()
        return image
    return image.convert('RGB')


def in_eight_bits(image: Image.Image) -> Image.Image:
    """Convert a PIL image to a mode with 8 bits per value, if it has another.

    16-bit grey is scaled. Raises ImageError for 32-bit values, whose range is unknown.
    """
    if image.mode[0] == 'I' or image.mode == 'F':
        return _eight_bits(image)
    _scale_transparent_value(image)
    if image.mode == 'La':                          # alpha multiplied in: Pillow converts it only to LA
        return image.convert('LA')
    return image


def _raw_mode(image: Image.Image) -> Any:
    """Return the layout of the pixels in the file, in Pillow's words, such as 'L;4'.

    It is '' for an image that is not of a file.
    """
    tiles = getattr(image, 'tile', None)
    if not tiles:
        return ''
    args = tiles[0][3]
    if isinstance(args, tuple) and args:
        args = args[0]
    return args or ''


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert grey with 16 bits (I;16, I of PNG and PPM) to L, or to LA if the file names a transparent
    value."""
    if image.mode == 'F' or image.mode == 'I' and image.format not in ('PNG', 'PPM'):
        raise ImageError(f'32-bit values (mode {image.mode}) have no range that is known; '
                         'save the picture with 8 or 16 bits')
    values = np.asarray(image)                      # (H, W)
    twelve_bits = str(_raw_mode(image)).startswith('I;12')
    levels = (values >> (4 if twelve_bits else 8)).astype(np.uint8)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == MIN_IS_WHITE:
            levels = 255 - levels
    grey, transparent = Image.fromarray(levels), image.info.get('transparency')
    if transparent is None:
        return grey
    alpha: np.ndarray = np.where(values == transparent, 0, 255)
    return Image.merge('LA', (grey, Image.fromarray(alpha.astype(np.uint8))))


def _scale_transparent_value(image: Image.Image) -> None:
    """Scale the one value that a PNG names as transparent to the range of its pixels.

    Pillow scales pixels of 1, 2 and 4 bits up and those of 16 bits down. It leaves this value as the
    file has it.
    """
    value, raw = image.info.get('transparency'), _raw_mode(image)
    if image.format == 'PNG' and raw in ('1', 'L;2', 'L;4', 'RGB;16B') and value is not None:
        largest = {'1': 1, 'L;2': 3, 'L;4': 15}.get(raw)
        if largest is None:
            image.info['transparency'] = tuple(v >> 8 for v in value)
        elif value <= largest:                      # a newer Pillow has done so for 1 bit
            image.info['transparency'] = value * 255 // largest


def traits(image: Image.Image) -> list[str]:
    """Return the keys of TRAITS that an opened image has, before its pixels are read."""
    found = {
        'alpha': image.has_transparency_data,
        '16 bits': ';16' in str(_raw_mode(image)) or image.mode[0] == 'I',
        'CMYK': image.mode == 'CMYK',
        'palette': image.mode in ('P', 'PA'),
        'frames': getattr(image, 'is_animated', False),
    }
    with suppress(Exception):                       # damaged metadata is no reason to refuse the pixels
        found['orientation'] = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return [name for name, has in found.items() if has]


# ---- sizes

def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (width, height), bicubic: timm's pixels with every version of Pillow.

    The rows come first, then the columns. A resize in one call begins with the columns of some images
    and rounds differently: from Pillow 12.2 on, often from 13 on.
    """
    rows = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
    return rows.resize(size, Image.Resampling.BICUBIC)


def resize_and_crop(image: Image.Image, size: tuple[int, int],
                    box: tuple[int, int, int, int]) -> Image.Image:
    """Resize to (width, height), then crop the box (left, top, right, bottom); outside the image are
    zeros.

    Of a very long or very large result only the box is computed, in one step; its values may differ by 1
    from rounding.
    """
    left, top, right, bottom = box
    if max(size[1], image.height) * size[0] <= max(LARGE, 4 * (right - left) * (bottom - top)):
        return resize(image, size).crop(box)
    shown = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    x, y = shown[:2]
    return _resized_part(image, size, shown).crop((left - x, top - y, right - x, bottom - y))


def _resized_part(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Compute a box of the image resized to `size`, from the source pixels that its filter covers."""
    outer = [0] * 4                                 # the part of the source: left, top, right, bottom
    inner: list[float] = [0.0] * 4                  # the box in that part
    for axis in (0, 1):
        scale = image.size[axis] / size[axis]
        margin = 2 * max(scale, 1) + 1              # bicubic reaches two pixels of the coarser grid
        first, last = box[axis] * scale, box[axis + 2] * scale
        outer[axis] = max(math.floor(first - margin), 0)
        outer[axis + 2] = min(math.ceil(last + margin), image.size[axis])
        inner[axis], inner[axis + 2] = first - outer[axis], last - outer[axis]
    left, top, right, bottom = box
    part = image.crop(tuple(outer))
    return part.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box=tuple(inner))
