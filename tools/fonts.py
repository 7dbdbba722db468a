"""A font for texts in any script: Pillow's own where it has all letters, else one of the system's; else escapes."""
import functools
import subprocess

from PIL import ImageFont

USUAL = ('DejaVuSans.ttf', 'NotoSansCJK-Regular.ttc', 'NotoSans-Regular.ttf')    # where fontconfig is not there


class Writer:
    """Fonts of several sizes for a set of texts, and those texts as these fonts can show them."""

    def __init__(self, texts: list[str]):
        letters = sorted({letter for text in texts for letter in text})
        candidates = [(None, 0)] + ([] if ''.join(letters).isascii() else system_fonts(letters))
        lacking = [missing(candidate, letters) for candidate in candidates]
        best = min(range(len(candidates)), key=lambda i: len(lacking[i]))        # the first of equal ones
        self.candidate = candidates[best]
        self.escapes = {ord(letter): letter.encode('unicode_escape').decode() for letter in lacking[best]}

    def font(self, size: int) -> ImageFont.FreeTypeFont:
        return load(self.candidate, size)

    def shown(self, text: str) -> str:
        """Return the text with an escape, such as \\u98df, for each letter that the font lacks."""
        return text.translate(self.escapes)


def system_fonts(letters: list[str]) -> list[tuple[str, int]]:
    """Return fonts, as (file, number inside of it), that may have the letters, the most likely first."""
    wanted = ' '.join(f'{ord(letter):x}' for letter in letters if not letter.isascii())
    command = ['fc-match', '--format=%{file}\n%{index}', f'sans:charset={wanted}']
    found = []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        file, index = done.stdout.splitlines()
        found = [(file, int(index))]
    except (OSError, ValueError, subprocess.SubprocessError):                    # no fontconfig, or it knows no font
        pass
    return [font for font in [*found, *((name, 0) for name in USUAL)] if loads(font)]


@functools.lru_cache(None)
def load(candidate: tuple, size: int) -> ImageFont.FreeTypeFont:
    file, index = candidate
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size, index)


def loads(candidate: tuple) -> bool:
    try:
        load(candidate, 30)
    except OSError:                                 # not there, or without letters of this size
        return False
    return True


def missing(candidate: tuple, letters: list[str]) -> list[str]:
    """Return the letters that a font draws as it draws one that no font has, and those that are no letters to print."""
    font = load(candidate, 30)
    unknown = bytes(font.getmask('\U0010ffff'))     # a noncharacter
    return [letter for letter in letters
            if not letter.isprintable() or (not letter.isascii() and bytes(font.getmask(letter)) == unknown)]
