"""Choose a font for texts in any script, and escapes for the letters that it lacks."""
import functools
import subprocess
from typing import Optional

from PIL import ImageFont

USUAL = ('DejaVuSans.ttf', 'NotoSansCJK-Regular.ttc', 'NotoSans-Regular.ttf')    # tried without fontconfig


Candidate = tuple[Optional[str], int]               # font file, index of the font in it
PILLOWS: Candidate = (None, 0)                      # Pillow's own


class Writer:
    """Draw a set of texts in one font of several sizes, with escapes for the letters that it lacks."""

    def __init__(self, texts: list[str]):
        letters = sorted({letter for text in texts for letter in text})
        candidates: list[Candidate] = [PILLOWS]
        if not ''.join(letters).isascii():
            candidates += system_fonts(letters)
        lacking = [missing(candidate, letters) for candidate in candidates]
        best = min(range(len(candidates)), key=lambda i: len(lacking[i]))        # the first of equals
        self.candidate = candidates[best]
        self.escapes = {ord(letter): letter.encode('unicode_escape').decode() for letter in lacking[best]}

    def font(self, size: int) -> ImageFont.FreeTypeFont:
        return load(self.candidate, size)

    def shown(self, text: str) -> str:
        """Return the text with an escape, such as \\u98df, for each letter that the font lacks."""
        return text.translate(self.escapes)


def system_fonts(letters: list[str]) -> list[Candidate]:
    """Return fonts of the system that may have the letters, the most likely first."""
    wanted = ' '.join(f'{ord(letter):x}' for letter in letters if not letter.isascii())
    command = ['fc-match', '--format=%{file}\n%{index}', f'sans:charset={wanted}']
    found: list[Candidate] = []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        file, index = done.stdout.splitlines()
        found = [(file, int(index))]
    except (OSError, ValueError, subprocess.SubprocessError):                    # no fontconfig, or no font
        pass
    found += [(name, 0) for name in USUAL]
    return [font for font in found if loads(font)]


@functools.lru_cache(None)
def load(candidate: Candidate, size: int) -> ImageFont.FreeTypeFont:
    """Load a font in a size. Raises OSError where the file is absent or has no such size."""
    file, index = candidate
    if file is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(file, size, index)


def loads(candidate: Candidate) -> bool:
    """True if a font can be loaded."""
    try:
        load(candidate, 30)
    except OSError:                                 # not there, or without letters of this size
        return False
    return True


def missing(candidate: Candidate, letters: list[str]) -> list[str]:
    """Return the letters that a font lacks, and those that are not printable.

    A font draws every letter that it lacks in the same way.
    """
    font = load(candidate, 30)
    unknown = bytes(font.getmask('\U0010ffff'))     # a noncharacter
    lacking = []
    for letter in letters:
        if not letter.isprintable():
            lacking.append(letter)
        elif not letter.isascii() and bytes(font.getmask(letter)) == unknown:
            lacking.append(letter)
    return lacking
