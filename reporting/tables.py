"""Tables of a page, and numbers as people read them."""
import math
from dataclasses import dataclass
from typing import Any, Optional

from markupsafe import Markup

EMPTY = Markup('<i>empty</i>')
DASH = '–'                                          # where there is no value


@dataclass
class Table:
    """A table of a page; the first cell of each row is its heading. `kind` is its class in style.css."""
    head: list[str]
    rows: list[list[str]]
    kind: str


# ---- text

def fixed(value: Optional[float], digits: int) -> str:
    """Format a number with as many decimals as `digits`."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return 'not finite'
    return f'{value:.{digits}f}'


def percent(value: Optional[float], digits: int = 2) -> str:
    """Format a number that is in percent."""
    if value is None or not math.isfinite(value):
        return fixed(value, digits)
    return f'{value:.{digits}f}\u202f%'


def duration(seconds: Optional[float]) -> str:
    """Format a time in its two largest units; '' for None."""
    if seconds is None:
        return ''
    if seconds < 3600:
        return f'{int(seconds // 60)} min {int(seconds % 60)} s'
    days, hours, minutes = int(seconds // 86400), int(seconds // 3600 % 24), int(seconds // 60 % 60)
    if days:
        return f'{days} d {hours} h'
    return f'{hours} h {minutes} min'


def value_text(value: Any) -> str:
    """Format the value of an option; None is an option that this config does not have."""
    if value is None:
        return DASH
    if value == '':
        return EMPTY
    return str(value)
