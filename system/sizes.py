"""Sizes of images in pixels: one number for a square, or [height, width]."""
from collections.abc import Sequence
from typing import Union

Size = Union[int, Sequence[int]]


def sides(size: Size) -> tuple[int, int]:
    """Return (height, width) of a size."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def as_text(size: Size) -> str:
    """Return a size as the command line takes it: '256', or '128x256' for a height of 128."""
    height, width = sides(size)
    return str(height) if height == width else f'{height}x{width}'
