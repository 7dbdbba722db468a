"""Machinery of config.py that knows no option: a row of the table, a relation, files and their BASE.

A flat config is {'GROUP.KEY': value}. The other rooms read the frozen node that `tree` makes of it.
"""
from __future__ import annotations

import ast
import copy
import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

import yaml
from yacs.config import CfgNode

LARGEST = 2 ** 63 - 1                               # of whole numbers: 64 bits hold no larger one
KINDS = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text', list: 'a list'}
SIZE_KINDS = 'a whole number, or [height, width], or a text such as 128x256'
ON_RESUME = ('fixed', 'product', 'free', 'unsaved')


@dataclass(frozen=True)
class Option:
    """One option: a row of the table in config.py, which explains the columns."""

    key: str                                        # GROUP.KEY, or KEY
    default: Any
    comment: str
    choices: tuple[str, ...] = ()
    ge: float | None = None                         # limits of a number, or of each number of a list
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    length: int | None = None                       # of a list
    items: type | None = None                       # type of what is in a list; None: as in the default
    is_size: bool = False                           # a number, or [height, width], which may be 128x256
    hint: str = ''                                  # what to do about a number outside the limits
    path: str = ''                                  # FILE or DIR: a path, where ~ is the home folder
    flag: bool = False                              # True: has a flag on the command line
    on_resume: str = 'fixed'                        # one of ON_RESUME

    @property
    def name(self) -> str:
        """The last part of the key in lower case, which is the name of the flag."""
        return self.key.rpartition('.')[2].lower()

    def parse(self, value: Any, source: str) -> Any:
        """Return a value as the type of the option; text may be a Python literal, unless the type is text.

        Raises ValueError for another type, with the `source` of the value.
        """
        where = f'{source}: {self.key}'
        if self.is_size:
            return _convert_size(value, where)
        if not isinstance(self.default, list):
            return _convert(value, type(self.default), where)
        value = _literal(value)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f'{where} must be a list, got {value!r}')
        items = self.items or type(self.default[0])
        return [_convert(item, items, where) for item in value]

    def check(self, value: Any) -> None:
        """Raise ValueError for a value that is no choice or outside the limits."""
        if self.choices and value not in self.choices:
            raise ValueError(f'{self.key} is {value!r}; it can be ' + ' or '.join(self.choices))
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            self._check_size(number, value)
        wrong_length = self.length is not None and len(numbers) != self.length
        if wrong_length or not all(self._within_limits(number) for number in numbers):
            raise ValueError(f'{self.key} is {value}; it must be {self.limits()}')

    def expand_home(self, path: str) -> str:
        """Return a path with the home folder for ~ or ~user at its start. Raises ValueError without it."""
        expanded = os.path.expanduser(path)
        if expanded.startswith('~'):
            raise ValueError(f'{self.key} is {path}: there is no such user; '
                             f'write ./{path} for a file of that name')
        return expanded

    def limits(self) -> str:
        """Describe the limits and the length in words, with the hint."""
        if self.ge is not None and self.le is not None:
            limits = f'from {self.ge} to {self.le}'
        else:
            words = {'at least': self.ge, 'above': self.gt, 'at most': self.le, 'below': self.lt}
            limits = ' and '.join(f'{word} {limit}' for word, limit in words.items() if limit is not None)
        if isinstance(self.default, list):
            count = '' if self.length is None else f'{self.length} '
            limits = f'a list of {count}numbers, each {limits}'
        return f'{limits}. {self.hint}' if self.hint else limits

    def _check_size(self, number: Any, value: Any) -> None:
        """Raise ValueError for a number of `value` that is not finite, or an integer beyond 64 bits."""
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f'{self.key} is {value}; it must be a finite number')
        if isinstance(number, int) and abs(number) > LARGEST:
            raise ValueError(f'{self.key} is {value}; whole numbers must be at most {LARGEST}')

    def _within_limits(self, number: Any) -> bool:
        """True if a number is within the limits; anything is, where there are none."""
        if self.ge is not None and number < self.ge:
            return False
        if self.gt is not None and number <= self.gt:
            return False
        if self.le is not None and number > self.le:
            return False
        return self.lt is None or number < self.lt


class Relation(NamedTuple):
    """A condition on the values of several options, or one on a single option that limits cannot state."""

    keys: str                                       # separated by spaces
    holds: Callable[..., bool]                      # called with the values of the keys, in this order
    sentence: str                                   # what to do where it does not hold

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError where the condition does not hold in a flat config."""
        keys = self.keys.split()
        if not self.holds(*(values[key] for key in keys)):
            shown = ', '.join(f'{key} is {values[key]!r}' for key in keys)
            raise ValueError(f'{shown}; {self.sentence}')


class Setting(NamedTuple):
    """The value of an option, and the file that states it."""

    value: Any
    source: str


class Table:
    """All options of a program, by key."""

    def __init__(self, options: Iterable[Option], relations: Iterable[Relation]) -> None:
        self.options = {option.key: option for option in options}
        self.relations = tuple(relations)

    def defaults(self) -> dict[str, Any]:
        """Return the default of every option, as a flat config of the caller's own."""
        return {key: copy.deepcopy(option.default) for key, option in self.options.items()}

    def parse(self, key: Any, value: Any, source: str) -> Any:
        """Return a value as the type of the option `key`. Raises ValueError, also for an unknown key."""
        key = str(key)
        if key in self.options:
            return self.options[key].parse(value, source)
        if any(known.startswith(f'{key}.') for known in self.options):
            raise ValueError(f'{source}: {key} is a group of options, not an option')
        close = difflib.get_close_matches(key, self.options, n=1)
        hint = f'; did you mean {close[0]}?' if close else ''
        raise ValueError(f'{source}: unknown option {key}{hint}')

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError where a value of a flat config is outside its limits, or a relation is broken."""
        for key, option in self.options.items():
            option.check(values[key])
        for relation in self.relations:
            relation.check(values)


# ---- config files

def find_file(name: str | os.PathLike, folder: str) -> str:
    """Return the path of a config file: `name`, or the only file in `folder` of this name or this model.

    A model's file is called MODEL_SIZE.yaml. Raises FileNotFoundError, with the nearest name.
    """
    path = os.path.expanduser(os.fspath(name))
    if os.path.isfile(path):
        return path
    parent, stem = os.path.split(path.removesuffix('.yaml'))
    known = sorted(file.removesuffix('.yaml') for file in os.listdir(folder) if file.endswith('.yaml'))
    if parent in ('', os.path.basename(folder)):
        found = [file for file in known if file == stem or re.fullmatch(rf'{re.escape(stem)}_\d+', file)]
        if len(found) == 1:
            return os.path.join(folder, f'{found[0]}.yaml')
    names = {re.sub(r'_\d+$', '', file): file for file in known}        # of models
    names.update({file: file for file in known})
    close = difflib.get_close_matches(stem, names, n=1)
    hint = f'; did you mean {os.path.basename(folder)}/{names[close[0]]}.yaml?' if close else ''
    raise FileNotFoundError(f'{os.path.abspath(path)}: no such config file{hint}')


class ConfigFiles:
    """Read config files, and the files that their BASE names.

    `identity` is the option that only a file of a model states. `clean` is called with the flat content of
    each file and its path, and may remove options from it.
    """

    def __init__(self, table: Table, identity: str, clean: Callable[[dict[str, Any], str], None]) -> None:
        self.table, self.identity, self.clean = table, identity, clean

    def read(self, path: str, above: tuple[str, ...] = ()) -> dict[str, Setting]:
        """Return {key: Setting} of a file and its BASE files. It overrides these, a later one those before.

        `above` are the files that name this one. Raises ValueError and FileNotFoundError.
        """
        path = os.path.abspath(path)
        if path in above:
            raise ValueError('BASE files form a cycle: ' + ' -> '.join(above + (path,)))
        if not os.path.isfile(path):
            hint = f' (a BASE of {above[-1]})' if above else ''
            raise FileNotFoundError(f'{path}: no such config file{hint}')
        content = read_yaml(path)
        self.clean(content, path)
        settings: dict[str, Setting] = {}
        for name in self._names_of_bases(content.pop('BASE', None), path):
            base = self.read(os.path.join(os.path.dirname(path), name), above + (path,))
            self._refuse_overriding(settings, base, name, path)
            settings.update(base)
        for key, value in content.items():
            settings[key] = Setting(self.table.parse(key, value, path), path)
        return settings

    def _names_of_bases(self, base: Any, path: str) -> list[str]:
        """Return the names of the BASE of a file, which may be one name, a list or nothing."""
        if base is None:
            return []
        names = self.table.parse('BASE', [base] if isinstance(base, str) else base, path)
        return [os.path.expanduser(name) for name in names if name]     # the predecessor writes BASE: ['']

    def _refuse_overriding(self, settings: Mapping[str, Setting], base: Mapping[str, Setting], name: str,
                           path: str) -> None:
        """Raise ValueError where `base`, read from `name`, silently overrides an option of an earlier BASE.

        It may change an option in a line of its own, but not by its BASE, which has what it leaves open.
        The recipe of a model's file may not override one that stands before the model.
        """
        own = os.path.abspath(os.path.join(os.path.dirname(path), name))
        is_model = self.identity in base and self.identity not in settings
        for key, new in base.items():
            old = settings.get(key, new)
            if old.value != new.value and (is_model or new.source != own):
                raise ValueError(
                    f'{path}: BASE names {name} too late: it would turn {key} from {old.value!r} '
                    f'(of {old.source}) to {new.value!r} (of {new.source}); '
                    'name it before the file that is to override it')


class _Loader(yaml.SafeLoader):
    """YAML in which a duplicate key is an error: its first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == 'tag:yaml.org,2002:merge':       # <<, which has no value of its own
                continue
            key = self.construct_object(key_node, deep=True)
            if str(key) in seen:
                raise yaml.constructor.ConstructorError(problem=f'duplicate key {key}',
                                                        problem_mark=key_node.start_mark)
            seen.add(str(key))
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict[str, Any]:
    """Return the content of a YAML file as a flat config. Raises ValueError without KEY: VALUE lines."""
    try:
        with open(path, encoding='utf-8') as file:
            content = yaml.load(file, _Loader) or {}
        flat = flatten(content) if isinstance(content, dict) else None
    except OSError:
        raise
    except Exception as error:                      # not only YAMLError: 2001-99-99 raises ValueError
        raise ValueError(f'{path}: not valid YAML: ' + ' '.join(str(error).split())) from None
    if flat is None:
        raise ValueError(f'{path}: expected KEY: VALUE lines, found {type(content).__name__}')
    return flat


# ---- values

def flatten(nested: Mapping, prefix: str = '') -> dict[str, Any]:
    """Return nested dicts as a flat config; `prefix` is put before the keys.

    Raises ValueError for a duplicate key, as in {'A.B': 1, 'A': {'B': 2}}.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        path = f'{prefix}{key}'
        part = flatten(value, f'{path}.') if isinstance(value, dict) else {path: value}
        for duplicate in part.keys() & flat.keys():
            raise ValueError(f'duplicate key {duplicate}')
        flat.update(part)
    return flat


def tree(flat: Mapping[str, Any]) -> CfgNode:
    """Return a flat config as a frozen node; the inverse of `flatten`."""
    root = CfgNode()
    for key, value in flat.items():
        *groups, name = key.split('.')
        node = root
        for group in groups:
            node = node.setdefault(group, CfgNode())
        node[name] = value
    root.freeze()
    return root


def _literal(value: Any) -> Any:
    """Return text as the Python literal that it is; anything else, and other text, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def _convert_size(value: Any, where: str) -> int | list[int]:
    """Return a size of images as system/sizes.py describes it; of equal sides as one number."""
    sides = _literal(value)
    if isinstance(sides, str) and re.fullmatch(r'\d+x\d+', sides.strip(), re.ASCII):
        sides = [int(side) for side in sides.split('x')]
    if not isinstance(sides, (list, tuple)):
        sides = [sides]
    if len(sides) not in (1, 2) or any(type(side) is not int for side in sides):
        raise ValueError(f'{where} must be {SIZE_KINDS}, got {value!r}')
    return sides[0] if len(set(sides)) == 1 else list(sides)


def _convert(value: Any, kind: type, where: str) -> Any:
    """Return a value as a bool, int, float or str. Raises ValueError, which begins with `where`."""
    if kind is not str:
        value = _literal(value)
    if kind is str and type(value) in (int, float):
        value = str(value)                          # a folder may be called 7
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:                       # more digits than a float holds
            value = math.inf
    if type(value) is not kind:
        raise ValueError(f'{where} must be {KINDS[kind]}, got {value!r}')
    return value
