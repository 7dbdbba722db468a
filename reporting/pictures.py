"""Embed pictures in a page as data URIs."""
import base64
import io
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image

from data import image_files

SIDE = 160                                          # longest side of a thumbnail: two pixels per CSS pixel
TINY = 64                                           # up to this side a page shows every pixel, as a square
QUALITY = 85                                        # of the JPEGs


class Embedded(NamedTuple):
    """A picture as the `src` of an <img>; a `tiny` one is shown pixel by pixel."""
    uri: str
    tiny: bool


def as_picture(pixels: np.ndarray) -> Image.Image:
    """Return uint8 pixels (H, W, C) as an RGB image, to look at: the first three channels, or the first."""
    shown = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, 0]
    return Image.fromarray(shown).convert('RGB')


def embed(image: Image.Image) -> Embedded:
    """Encode an image: PNG if it is tiny, else JPEG."""
    tiny = max(image.size) <= TINY
    kind = 'png' if tiny else 'jpeg'
    file = io.BytesIO()
    image.save(file, kind, quality=QUALITY)
    return Embedded(f'data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}', tiny)


def thumbnail(path: str) -> Optional[Embedded]:
    """Embed an image file, at most SIDE pixels wide and high. Returns None if it cannot be read."""
    try:
        image = image_files.read(path)
    except Exception:                               # Pillow may raise nearly anything for a damaged file
        return None
    image.thumbnail((SIDE, SIDE))
    return embed(image)
