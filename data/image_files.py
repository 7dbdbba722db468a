"""Picture files to RGB pixels: the formats, the limit of the size, transparency and bit depth; for training and tools alike."""
import errno
import math
import os
import stat
from contextlib import suppress
from importlib import import_module

import numpy as np
from PIL import ExifTags, Image, ImageColor, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError, features

Image.preinit()                                     # registers JPEG, PNG, GIF, BMP and PPM
for _plugin in ('WebPImagePlugin', 'AvifImagePlugin'):
    with suppress(ImportError):                     # AVIF came with Pillow 11.3
        import_module(f'PIL.{_plugin}')

BACKGROUND, DROP = 'white', 'drop'
MAX_PIXELS = 89478485                               # the size from which Pillow suspects a decompression bomb
LARGE = 2 ** 25                                     # pixels of a resized image that is computed as a whole
# Pillow's names. MPO is found by JPEG; PPM covers PGM, PBM and PFM. Never EPS, which starts another program.
FORMATS = ('JPEG', 'PNG', *(['WEBP'] if features.check('webp') else []), 'GIF', 'BMP', 'TIFF', 'PPM',
           *(['AVIF'] if 'AVIF' in Image.OPEN and features.check('avif') else []))
FOREIGN = (                                         # (offset, bytes, what it is): files that people take for pictures
    (0, b'%!PS', 'EPS or PostScript'), (0, b'\xc5\xd0\xd3\xc6', 'EPS'), (0, b'%PDF', 'PDF'), (0, b'8BPS', 'Photoshop (PSD)'),
    (0, b'\0\0\1\0', 'ICO'), (0, b'<svg', 'SVG'), (0, b'<?xml', 'XML or SVG'), (0, b'<!DOCTYPE', 'a web page'),
    (0, b'<!doctype', 'a web page'), (0, b'<html', 'a web page'), (0, b'PK\3\4', 'a ZIP archive'), (0, b'DICM', 'DICOM'),
    (128, b'DICM', 'DICOM'), (0, b'\0\0\0\x0cjP  ', 'JPEG 2000'), (0, b'\xffO\xffQ', 'JPEG 2000'), (0, b'\xff\x0a', 'JPEG XL'),
    (4, b'JXL ', 'JPEG XL'), (4, b'ftypavif', 'AVIF, which needs Pillow 11.3 or newer'), (4, b'ftyphei', 'HEIC'),
    (4, b'ftyphev', 'HEIC'), (4, b'ftypmif1', 'HEIC'), (4, b'ftypmsf1', 'HEIC'), (4, b'ftyp', 'a video'),
    (0, b'version https://git-lfs', 'a pointer of Git LFS: fetch its content by git lfs pull'),
)
TRAITS = {                                          # what an image may have -> what it is, and what becomes of it
    'alpha': ('with transparency', 'composited on DATA.BACKGROUND, white by default; choose a colour that the drawings lack'),
    '16 bits': ('with 16 bits', 'scaled to 8 bits; where only the lower 12 bits are used, scale the files first'),
    'CMYK': ('in CMYK', 'converted without a colour profile; convert the files for exact colours'),
    'palette': ('with a palette', 'converted to RGB'),
    'frames': ('with several frames', 'the first frame is read'),
    'orientation': ('with an EXIF orientation', 'read as stored, not turned; turn the files if viewers show them upright'),
}
KINDS = {stat.S_IFIFO: 'a FIFO', stat.S_IFSOCK: 'a socket', stat.S_IFCHR: 'a device', stat.S_IFBLK: 'a device'}
MIN_IS_WHITE = 0                                    # of the TIFF tag PhotometricInterpretation

Image.MAX_IMAGE_PIXELS = None                       # `open_image` has its own limit, which the user can raise
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY               # a text or ICC profile of some MB is read


class ImageError(ValueError):
    """A file that cannot be read as a picture; the message says why, without its name."""


def open_file(path):
    """Open a regular file for reading, as binary. Raises ImageError for a FIFO or a device, which would block; OSError."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise ImageError(f'{KINDS.get(stat.S_IFMT(mode), "something special")}, not a regular file')
    return open(path, 'rb')


def open_image(file, max_pixels=MAX_PIXELS):
    """Read the header of a picture in an open binary file -> a PIL image, whose pixels are read later.

    Its content decides the format, not its name. Raises ImageError for another format or more than `max_pixels` pixels.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        raise ImageError(_unknown(file.read(132))) from None
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f'{width} x {height} = {width * height} pixels are more than DATA.MAX_PIXELS {max_pixels}, '
                         'which can be raised')
    return image


def _unknown(head):
    if not head:
        return 'the file is empty'
    kind = next((kind for at, start, kind in FOREIGN if head[at:at + len(start)] == start), '')
    return f'{kind + ": " if kind else ""}not an image in a format that is read here ({", ".join(FORMATS)})'


def is_image(path: str) -> bool:
    """True if a file begins as a picture of one of FORMATS does; False for one that cannot be opened."""
    try:
        with open_file(path) as file:
            open_image(file, math.inf)
    except Exception:                               # Pillow may raise nearly anything for a damaged header
        return False
    return True


def read(path, background=BACKGROUND, max_pixels=MAX_PIXELS):
    """Read a picture file as a PIL image of mode RGB, as `to_rgb`. Raises nearly anything for a damaged file."""
    with open_file(path) as file:
        return to_rgb(open_image(file, max_pixels), background)


def reason(error):
    """Explain why a picture cannot be read, in one line without its name."""
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, MemoryError):
        return 'not enough memory for its pixels'
    return getattr(error, 'strerror', None) or f'{type(error).__name__}: {error}'


# ---- modes

def to_rgb(image, background=BACKGROUND):
    """Convert a PIL image of any mode to RGB with 8 bits; the image itself, loaded, where it is that already.

    Transparent pixels are composited on the colour `background`; with 'drop' their alpha is ignored. 16-bit grey is scaled.
    Raises ImageError for 32-bit values, whose range is unknown.
    """
    if image.mode[0] == 'I' or image.mode == 'F':
        image = _eight_bits(image)
    else:
        image = _with_scaled_key(image)
    if background != DROP and image.has_transparency_data:
        # Pillow converts La and RGBa (alpha multiplied in) only to LA and RGBA
        rgba = image.convert('LA') if image.mode == 'La' else image
        rgba = rgba if rgba.mode == 'RGBA' else rgba.convert('RGBA')
        if rgba.getchannel('A').getextrema()[0] < 255:
            flat = Image.new('RGB', image.size, ImageColor.getrgb(background))
            flat.paste(rgba, mask=rgba)
            return flat
        return rgba.convert('RGB')
    if image.mode == 'RGB':
        image.load()
        return image
    return (image.convert('LA') if image.mode == 'La' else image).convert('RGB')


def _raw_mode(image):
    """The layout of the pixels in the file, in Pillow's words, such as 'L;4'; '' for an image that is not of a file."""
    args = image.tile[0][3] if getattr(image, 'tile', None) else ''
    return (args[0] if isinstance(args, tuple) and args else args) or ''


def _eight_bits(image):
    """Grey with 16 bits (I;16, I of PNG and PPM) -> L, or LA where the file names a transparent value."""
    raw = str(_raw_mode(image))
    if image.mode == 'F' or image.mode == 'I' and image.format not in ('PNG', 'PPM'):
        raise ImageError(f'32-bit values (mode {image.mode}) have no range that is known; save the picture with 8 or 16 bits')
    values = np.asarray(image)                      # (H, W)
    levels = (values >> (4 if raw.startswith('I;12') else 8)).astype(np.uint8)
    if image.format == 'TIFF' and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == MIN_IS_WHITE:
        levels = 255 - levels
    grey, transparent = Image.fromarray(levels), image.info.get('transparency')
    if transparent is None:
        return grey
    return Image.merge('LA', (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def _with_scaled_key(image):
    """The image with the one value that a PNG names as transparent in the range of its pixels.

    Pillow scales pixels of 1, 2 and 4 bits up and those of 16 bits down, and leaves this value as the file has it.
    """
    value, raw = image.info.get('transparency'), _raw_mode(image)
    if image.format == 'PNG' and raw in ('1', 'L;2', 'L;4', 'RGB;16B') and value is not None:
        largest = {'1': 1, 'L;2': 3, 'L;4': 15}.get(raw)
        if largest is None:
            image.info['transparency'] = tuple(v >> 8 for v in value)
        elif value <= largest:                      # a newer Pillow has done so for 1 bit
            image.info['transparency'] = value * 255 // largest
    return image


def traits(image: Image.Image) -> list:
    """Name the keys of TRAITS that an opened image has, before its pixels are read."""
    found = {'alpha': image.has_transparency_data, '16 bits': ';16' in str(_raw_mode(image)) or image.mode[0] == 'I',
             'CMYK': image.mode == 'CMYK', 'palette': image.mode in ('P', 'PA'), 'frames': getattr(image, 'is_animated', False)}
    with suppress(Exception):                       # damaged metadata is no reason to refuse the pixels
        found['orientation'] = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return [name for name, has in found.items() if has]


# ---- sizes

def resize(image: Image.Image, size: tuple) -> Image.Image:
    """Resize to (width, height), bicubic, first the rows, then the columns: timm's pixels, with every version of Pillow.

    A resize in one call begins with the columns of some images (from Pillow 12.2 on, often from 13 on) and rounds differently.
    """
    return image.resize((size[0], image.height), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC)


def resize_and_crop(image: Image.Image, size: tuple, box: tuple) -> Image.Image:
    """Resize to (width, height), then crop the box (left, top, right, bottom); outside the image are zeros.

    Of a very long or very large result only the box is computed, in one step; its values may differ by 1 from rounding.
    """
    left, top, right, bottom = box
    if max(size[1], image.height) * size[0] <= max(LARGE, 4 * (right - left) * (bottom - top)):
        return resize(image, size).crop(box)
    shown = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    x, y = shown[:2]
    return _resized_part(image, size, shown).crop((left - x, top - y, right - x, bottom - y))


def _resized_part(image, size, box):
    """The box of an image resized to `size`, from the source pixels that its filter covers."""
    first, last, outer_first, outer_last = [], [], [], []
    for axis in (0, 1):
        scale = image.size[axis] / size[axis]
        margin = 2 * max(scale, 1) + 1              # bicubic reaches two pixels of the coarser grid
        first.append(box[axis] * scale)
        last.append(box[axis + 2] * scale)
        outer_first.append(max(math.floor(first[axis] - margin), 0))
        outer_last.append(min(math.ceil(last[axis] + margin), image.size[axis]))
    inner = [value - outer_first[i % 2] for i, value in enumerate(first + last)]
    part = image.crop((*outer_first, *outer_last))
    return part.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC, box=inner)
