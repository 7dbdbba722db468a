"""The command line of every program: options with one dash or two, and mistakes in one line."""
from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from system.console import visible


class Parser(argparse.ArgumentParser):
    """Options with one dash or two; a mistake is one line that names the nearest option, and exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self.elsewhere: dict[str, str] = {}         # other words that users try -> what they mean

    def add(self, name: str, help: str, **kwargs: Any) -> None:
        """Add the option -name, which --name means too."""
        self.add_argument(f'-{name}', f'--{name}', help=help, **kwargs)

    def parse_args(  # type: ignore[override]       # argparse has a signature for each type of namespace
            self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f'unrecognized arguments: {" ".join(unknown)}{self._hint(unknown)}')
        return parsed

    def _hint(self, unknown: list[str]) -> str:
        """Return the option that is nearest to the first unknown one, in words, or ''."""
        options = [word for word in unknown if word.startswith('-')]
        if not options:
            return ''
        known = dict(self.elsewhere)
        for name in self._option_string_actions:
            if not name.startswith('--'):
                known[name.lstrip('-')] = name
        close = difflib.get_close_matches(options[0].lstrip('-').split('=')[0], known, n=1, cutoff=0.7)
        return f'; did you mean {known[close[0]]}?' if close else ''

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message} (-h shows the options)\n')

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(status, visible(message) if message else None)
