"""Samples from a table of files and labels, CSV, TSV or JSON, for tools/make_lists.py."""
from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, str]                                # column: text

FILES = ('file', 'filename', 'file_name', 'filepath', 'file_path', 'path', 'image', 'image_path', 'img',
         'image_id', 'id')                          # usual names of columns, the surest first
LABELS = ('label', 'labels', 'class', 'class_name', 'category', 'target', 'species', 'breed')
SPLITS = ('split', 'subset', 'set', 'fold', 'partition')
PARTS = {                                           # values of a column of splits
    'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'dev': 'val',
    'test': 'test', 'testing': 'test'}
DELIMITERS = ',;\t|'


@dataclass
class Table:
    """The samples of a table: class names in the order of their labels, and (path, label) by part."""
    names: list[str]
    columns: str                                    # which columns were taken, in words
    parts: dict[str, list[tuple[str, int]]] = field(default_factory=dict)    # '' where there is no split


def read_table(path: str, images: list[str], columns: list[str] | None = None) -> Table:
    """Read the table at `path`. images: the paths of all images that it may mean.

    columns: the names of those with the file, the label and perhaps the split; None: by the usual names.
    Raises ValueError for a table that cannot be read, and for files that are not there.
    """
    rows = read_rows(path)
    file, label, split = choose_columns(path, list(rows[0][1]), columns)
    texts = sorted({row[label] for _, row in rows}, key=in_order)
    labels = {text: number for number, text in enumerate(texts)}
    find = Finder(images)
    parts: dict[str, list[tuple[str, int]]] = {}
    seen: dict[str, tuple[int, str]] = {}
    missing = []
    for number, row in rows:
        where = f'{path}:{number}'
        if not row[label]:
            raise ValueError(f'{where}: no label in the column {label}')
        image = find(row[file])
        if not image:
            missing.append(f'{where} {row[file]}')
            continue
        if image in seen:
            before, other = seen[image]
            if other != row[label]:
                raise ValueError(f'{where}: {image} is {row[label]} here and {other} in line {before}')
            continue
        seen[image] = number, row[label]
        parts.setdefault(part_of(where, row.get(split, '')), []).append((image, labels[row[label]]))
    if missing:
        raise ValueError(f'{len(missing)} of {len(rows)} files are no images of this folder: '
                         f'{"; ".join(missing[:5])}')
    taken = [f'{file} (file)', f'{label} (label)', *([f'{split} (split)'] if split else [])]
    return Table(texts, ', '.join(taken), parts)


def in_order(text: str) -> tuple[int, int, str]:
    """Return what sorts labels: whole numbers by their size, before names."""
    return (0, int(text), '') if re.fullmatch('[0-9]+', text) else (1, 0, text)


def part_of(where: str, value: str) -> str:
    """Return train, val or test for a value of the column of splits; '' for none."""
    if value and value.lower() not in PARTS:
        raise ValueError(f'{where}: the split is {value!r}; it can be ' + ', '.join(sorted(PARTS)))
    return PARTS.get(value.lower(), '')


class Finder:
    """Find the image that a table means: by its path, its name, or its name without ending."""

    def __init__(self, images: list[str]):
        self.images = set(images)
        self.by_name: dict[str, list[str]] = {}
        for image in images:
            name = os.path.basename(image)
            for key in {name, os.path.splitext(name)[0]}:
                self.by_name.setdefault(key, []).append(image)

    def __call__(self, text: str) -> str:
        """Return the path of the image, or '' where there is none or more than one of its name."""
        path = os.path.normpath(text.replace('\\', '/'))
        if path in self.images:
            return path
        same = self.by_name.get(os.path.basename(path), [])
        return same[0] if len(same) == 1 else ''


def choose_columns(path: str, names: list[str], columns: list[str] | None) -> tuple[str, str, str]:
    """Return the names of the columns with the file, the label and the split, '' for no split.

    Raises ValueError where they are not there, or their names are not usual ones.
    """
    if columns:
        unknown = [name for name in columns if name not in names]
        if unknown or len(columns) not in (2, 3):
            raise ValueError(f'-columns {" ".join(columns)}: expected FILE LABEL or FILE LABEL SPLIT, of the '
                             f'columns of {path}: {", ".join(names)}')
        return columns[0], columns[1], columns[2] if len(columns) == 3 else ''
    file, label, split = usual(names, FILES), usual(names, LABELS), usual(names, SPLITS)
    if not label and file and len(names) == 2:
        label = names[1 - names.index(file)]
    if not file or not label:
        raise ValueError(f'{path} has the columns {", ".join(names)}: say which of them hold the files and '
                         'the labels by -columns FILE LABEL')
    return file, label, split


def usual(names: list[str], wanted: Iterable[str]) -> str:
    """Return the first of `names` that is one of the `wanted`, in their order and in any case, or ''."""
    for want in wanted:
        for name in names:
            if name.lower().replace(' ', '_') == want:
                return name
    return ''


# ---- files

def read_rows(path: str) -> list[tuple[int, Row]]:
    """Read the rows of a table with their line numbers. Raises ValueError for one without rows."""
    with open(path, encoding='utf-8-sig', newline='') as file:
        try:
            text = file.read()
        except UnicodeDecodeError:
            raise ValueError(f'{path}: not a UTF-8 text file') from None
    if path.lower().endswith(('.json', '.jsonl')):
        rows = rows_of_json(path, text)
    else:
        rows = rows_of_csv(path, text)
    if not rows:
        raise ValueError(f'{path}: no row')
    return rows


def rows_of_csv(path: str, text: str) -> list[tuple[int, Row]]:
    """Return the rows of CSV or TSV. The first line has the names, and its most frequent delimiter counts."""
    first = text.partition('\n')[0]
    delimiter = '\t' if path.lower().endswith('.tsv') else max(DELIMITERS, key=first.count)
    reader = csv.reader(text.splitlines(), delimiter=delimiter, strict=True)
    rows: list[tuple[int, Row]] = []
    try:
        names = [name.strip() for name in next(reader, [])]
        if len(set(names)) < len(names):
            raise ValueError(f'{path}:1: a column occurs twice: {", ".join(names)}')
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise ValueError(f'{path}:{reader.line_num}: {len(cells)} cells, and the first line has '
                                 f'{len(names)}: {", ".join(names)}')
            rows.append((reader.line_num, dict(zip(names, (cell.strip() for cell in cells)))))
    except csv.Error as error:
        raise ValueError(f'{path}:{reader.line_num}: {error}') from None
    return rows


def rows_of_json(path: str, text: str) -> list[tuple[int, Row]]:
    """Return the rows of JSON: a list of objects, one object per line, or an object {file: label}."""
    try:
        content = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{path}: no JSON: {error}') from None
    if isinstance(content, list) and len(content) == 1 and not is_row(content[0]):
        content = content[0]                        # all in one line
    if isinstance(content, dict):
        content = [{'file': file, 'label': label} for file, label in content.items()]
    if not isinstance(content, list) or not all(is_row(row) for row in content):
        raise ValueError(f'{path}: expected a list of objects of text and numbers, or an object '
                         '{file: label}')
    if any(row.keys() != content[0].keys() for row in content):
        raise ValueError(f'{path}: all objects must have the same keys: {", ".join(content[0])}')
    return [(number, {key: str(value) for key, value in row.items()})
            for number, row in enumerate(content, 1)]


def is_row(value: Any) -> bool:
    """True for an object of more than one text or number."""
    return isinstance(value, dict) and len(value) > 1 and all(
        type(cell) in (str, int) for cell in value.values()) and not looks_like_files(value)


def looks_like_files(value: dict) -> bool:
    """True for an object {file: label}: its keys have endings, as names of columns have not."""
    return all(re.search(r'\.\w{2,5}$', key) for key in value)
