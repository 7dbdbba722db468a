"""Labels of a flat validation folder, by the files of -val_labels and -synsets of tools/make_lists.py."""
from __future__ import annotations

import os
import re

from data import list_file

Sample = tuple[str, int]                            # path, label


def flat_list(part: str, images: list[str], names: list[str], labels_file: str,
              synsets: str | None) -> list[Sample]:
    """Label the images of a flat folder PART by a file.

    `names` are the class folders, in the order of the labels.
    Raises ValueError if images and file do not fit.
    """
    images = [image for image in images if '/' not in image]
    rows = read_rows(labels_file)
    if all(len(row) == 1 for row in rows):
        classes = ids_to_classes(images, rows, labels_file, synsets, names)
    else:
        classes = _named_classes(rows, labels_file)
    # Kaggle's names have no ending
    without_ending = {os.path.splitext(name)[0]: name for name in classes}
    labels = {name: label for label, name in enumerate(names)}
    result = []
    for image in images:
        alias = without_ending.get(os.path.splitext(image)[0], image)
        value = classes.get(image, classes.get(alias))
        if value is None:
            raise ValueError(f'{labels_file} says nothing about {image}')
        label = labels.get(value, int(value) if value.isdecimal() else -1)
        if not 0 <= label < len(names):
            raise ValueError(f'{labels_file}: {image} is said to show {value}, which is neither one of the '
                             f'{len(names)} class folders of the training nor a label in '
                             f'0..{len(names) - 1}')
        result.append((f'{part}/{image}', label))
    return result


def read_rows(path: str) -> list[list[str]]:
    """Read the lines of a text or CSV file as lists of words, without a header as Kaggle's."""
    lines = list_file.read_lines(path, 'lines of words')
    rows = [re.split(r'[\s,]+', line) for line in lines]
    if rows and rows[0][0] == 'ImageId':
        rows = rows[1:]
    if not rows:
        raise ValueError(f'{path}: empty')
    return rows


def _named_classes(rows: list[list[str]], labels_file: str) -> dict[str, str]:
    """Return {image: class or label} of rows 'NAME CLASS ...'. Raises ValueError for a row of one word."""
    classes = {}
    for row in rows:
        if len(row) == 1:
            raise ValueError(f'{labels_file}: the line {row[0]!r} has one word and others have more; '
                             'expected NAME CLASS (-h)')
        classes[os.path.basename(row[0])] = row[1]
    return classes


def ids_to_classes(images: list[str], rows: list[list[str]], labels_file: str, synsets: str | None,
                   names: list[str]) -> dict[str, str]:
    """Return {image: class} for ImageNet's ground truth, an id per image.

    Raises ValueError without `synsets`.
    """
    if not synsets:
        raise ValueError(
            f'{labels_file} has one number per image. Those of ImageNet are ids of its development kit, '
            "not labels, and their order is not that of the class folders: give the kit's meta.mat, or a "
            "table of lines 'ID CLASS', by -synsets FILE; or labels by name (-h)")
    if len(rows) != len(images):
        raise ValueError(f'{labels_file} has {len(rows)} lines, and there are {len(images)} pictures')
    table = read_synsets(synsets)
    unknown = {row[0] for row in rows} - table.keys()
    if unknown:
        raise ValueError(f'{synsets} does not say what class {min(unknown)} is')
    strange = {*table.values()} ^ {*names}
    if strange:
        raise ValueError(f'{synsets} and the class folders of train/ differ in {len(strange)} classes, '
                         f'such as {min(strange)}')
    return {image: table[row[0]] for image, row in zip(images, rows)}


def read_synsets(path: str) -> dict[str, str]:
    """Read {ImageNet's id, as text: class folder}.

    The file is a meta.mat, or has lines 'ID CLASS' or 'CLASS ID'.
    """
    if path.endswith('.mat'):
        return _read_meta(path)
    table: dict[str, str] = {}
    for row in read_rows(path):
        number, name = (row + [''])[:2]
        if not number.isdecimal():
            number, name = name, number
        if not number.isdecimal() or not name or number in table:
            raise ValueError(f"{path}: expected lines 'ID CLASS' or 'CLASS ID', each id once, "
                             f"found {' '.join(row)}")
        table[number] = name
    return table


def _read_meta(path: str) -> dict[str, str]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(f'{path}: reading it needs scipy (pip install scipy); '
                         'a table of text lines does not') from None
    table = {}
    try:
        for row in loadmat(path, squeeze_me=True)['synsets']:
            if row['num_children'] == 0:            # the others are groups of classes
                table[str(row['ILSVRC2012_ID'])] = str(row['WNID'])
    except OSError:
        raise
    except Exception as error:                      # scipy may raise nearly anything for a damaged file
        problem = f'{type(error).__name__}: {error}'
        raise ValueError(f"{path}: not the meta.mat of ImageNet's development kit ({problem})") from None
    return table
