"""Write train_list.txt, val_list.txt and class_names.txt for a folder of images.

A folder with one subfolder per class is split by chance: the same for the same -seed, and stratified by
class. A folder with train/ and val/ keeps its split; a flat val/, as ImageNet's, needs -val_labels. Their
names may be Train, valid, validation and so on. Without a val/, test/ or testing/ is taken. Labels count
the class folders in the order of their names, as everywhere (ImageNet's: n01440764 is 0). Only list files
are written; images stay where they are.

Files with the endings of images are images; of all other files the content decides. What is left out is
counted: files of other kinds, hidden ones, thumbnails, links to what is listed already.

  python tools/make_lists.py flowers                  # flowers/daisy/1.jpg ...: a fifth for validation
  python tools/make_lists.py flowers -val_share 0.1 -seed 1
  python tools/make_lists.py imagenet                 # train/n01440764/..., val/n01440764/...
  python tools/make_lists.py imagenet -val_labels LOC_val_solution.csv
  python tools/make_lists.py imagenet -val_labels ILSVRC2012_validation_ground_truth.txt -synsets meta.mat

  python tools/make_lists.py birds -table birds.csv   # files and labels in CSV, TSV, JSON or JSON lines
  python tools/make_lists.py birds -table birds.csv -columns image_id species split

-table FILE has a row per image. Its columns of files, labels and splits are guessed by usual names, and the
tool says which it took; -columns names them. A file is named by its path in FOLDER, or by its name, with or
without ending, if that is the only one. Whole numbers as labels keep their order, other labels are sorted. A
split (train, val or test) is kept, and test images go to test_list.txt. Without one it is drawn by class.

-val_labels FILE gives the classes of the images in a flat val/, by lines of one of these kinds:
  NAME CLASS     the class folder's name: ILSVRC2012_val_00000001.JPEG n01751748,
                 or Kaggle's LOC_val_solution.csv
  NAME LABEL     the label, counted from 0: ILSVRC2012_val_00000001.JPEG 65
  ID             ImageNet's own ground truth: a number from 1 to 1000 per image, in the order of the names.
                 These numbers are not labels. -synsets must map them to classes: by the meta.mat of
                 ImageNet's development kit (needs scipy), or by lines 'ID CLASS' or 'CLASS ID ...', such as
                 map_clsloc.txt

Exit status: 0, or 2 for a mistake in the command or the files; nothing is written then.
"""
from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system.console import visible
from tools import (
    cli,
    finding,
    tables,
    val_labels,
)

import numpy as np

from data.class_names import FILE, readable
from data.list_file import name_of_file

TRAIN = ('train', 'training')
VALIDATION = ('val', 'valid', 'validation')
TEST = ('test', 'testing')                          # for validation, if there is no folder of VALIDATION
VAL_FRACTION = 0.2
SHOWN = 20                                          # folders or classes named in a remark
TEST_LIST = 'test_list.txt'
WRITTEN = ('train_list.txt', 'val_list.txt', TEST_LIST, FILE)
FORBIDDEN = re.compile('[\0-\x1f\x7f-\x9f\u2028\u2029]')             # control characters, line separators

Sample = tuple[str, int]                            # path, label


# ---- folders

def subfolders(folder: str) -> list[str]:
    """Return the names of the subfolders that are not hidden, sorted."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    return sorted(name for name in names if not finding.is_hidden(name))


def find_layout(folder: str) -> tuple[str, str]:
    """Return the names of the subfolders for training and validation.

    Both are empty for a folder with one subfolder per class.
    Raises ValueError where it is not clear if a subfolder is a split or a class.
    """
    names = subfolders(folder)
    train = [name for name in names if name.lower() in TRAIN]
    held_out = [name for name in names if name.lower() in VALIDATION]
    held_out = held_out or [name for name in names if name.lower() in TEST]
    if not train and not held_out:
        return '', ''
    for same in (train, held_out):
        if len(same) > 1:
            raise ValueError(f'{folder}: {" and ".join(same)} are the same split; keep or rename one')
    if not train:
        raise ValueError(f'{folder}: {held_out[0]}/ looks like a split, and there is no train/; '
                         'if it is a class, rename it')
    if not held_out:
        raise ValueError(f'{folder} has {train[0]}/ and no val/; name {folder}/{train[0]} itself to split '
                         'it, or rename it if it is a class')
    return train[0], held_out[0]


def by_class(images: Iterable[str]) -> dict[str, list[str]]:
    """Group paths CLASS/... by class, sorted by class; without those in no folder."""
    classes: dict[str, list[str]] = {}
    for path in images:
        name, slash, _ = path.partition('/')
        if slash:
            classes.setdefault(name, []).append(path)
    return {name: classes[name] for name in sorted(classes)}


def search(folder: str, parts: tuple[str, ...] = ('',)) -> tuple[dict[str, list[str]], finding.Found]:
    """Find the images of a folder.

    Returns {part: texts of the paths in it, relative to the part}, and what was found and left out.
    """
    found = finding.find_images(folder, parts, WRITTEN)
    texts = sorted(map(name_of_file, found.images))
    images = {}
    for part in parts:
        prefix = f'{part}/' if part else ''
        images[part] = [text[len(prefix):] for text in texts if text.startswith(prefix)]
    return images, found


def refuse_nested_splits(where: str, images: list[str]) -> None:
    """Raise ValueError for a class folder with the name of a split and images only in subfolders."""
    for name, paths in by_class(images).items():
        is_split = name.lower() in {*TRAIN, *VALIDATION, *TEST}
        if is_split and all(path.count('/') > 1 for path in paths):
            raise ValueError(f'{where}/{name} looks like a split in a split; name the folder that holds '
                             'the class folders, or rename it if it is a class')


# ---- lists

def split(count: int, fraction: float, rng: np.random.Generator) -> set[int]:
    """Draw a fraction of `count` images for validation: at least one if there are two, and never all."""
    held_out = min(max(round(fraction * count), 1), count - 1)
    return {*rng.permutation(count)[:held_out].tolist()}


def split_lists(images: list[str], fraction: float,
                seed: int) -> tuple[list[str], list[Sample], list[Sample]]:
    """Split images of one folder per class; returns class names, training list and validation list."""
    content = by_class(images)
    train, val = draw_split(list(content.values()), fraction, seed)
    return list(content), train, val


def draw_split(classes: list[list[str]], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split the images of each class by chance; returns training list and validation list."""
    train: list[Sample] = []
    val: list[Sample] = []
    for label, paths in enumerate(classes):
        held_out = split(len(paths), fraction, np.random.default_rng([seed, label]))
        for i, path in enumerate(paths):
            samples = val if i in held_out else train
            samples.append((path, label))
    return train, val


def part_list(part: str, images: list[str], names: list[str]) -> list[Sample]:
    """Label the images of PART, with one folder per class; `names` are the classes of the training.

    Raises ValueError for another class.
    """
    content = by_class(images)
    unknown = [name for name in content if name not in names]
    if unknown:
        raise ValueError(f'{part}/ has {len(unknown)} classes that the training has not: '
                         f'{", ".join(unknown[:5])}')
    labels = {name: label for label, name in enumerate(names)}
    samples = []
    for name, paths in content.items():
        samples += [(f'{part}/{path}', labels[name]) for path in paths]
    return samples


class Lists(NamedTuple):
    """Class names in the order of their labels, the lists, and what was found and left out."""
    names: list[str]
    train: list[Sample]
    val: list[Sample]
    found: finding.Found
    test: Sequence[Sample] = ()


def split_folder(folder: str, fraction: float, seed: int) -> Lists:
    """Make the lists of a folder with one subfolder per class."""
    parts, found = search(folder)
    return Lists(*split_lists(parts[''], fraction, seed), count_loose(parts[''], found))


def keep_split(folder: str, train_part: str, val_part: str, labels_file: str | None,
               synsets: str | None) -> Lists:
    """Make the lists of a folder with subfolders for training and validation, and perhaps for tests."""
    tests = test_folders(folder, val_part)
    parts, found = search(folder, (train_part, val_part, *tests))
    images = parts[train_part]
    names = list(by_class(images))
    train = part_list(train_part, images, names)
    refuse_nested_splits(f'{folder}/{train_part}', images)
    if labels_file:
        val = val_labels.flat_list(val_part, parts[val_part], names, labels_file, synsets)
    else:
        val = part_list(val_part, parts[val_part], names)
        if not val:
            raise ValueError(f'{folder}/{val_part} has no class folders with pictures; where it is flat, '
                             '-val_labels FILE says what its images show (-h)'
                             f'{found.explain("; left out: ")}')
    test = []
    for part in tests:
        test += part_list(part, parts[part], names)
    return Lists(names, train, val, count_loose(images, found), test)


def test_folders(folder: str, val_part: str) -> list[str]:
    """Return the folder with test images by class beside the one for validation, as a list; or none.

    ImageNet's test/ is flat: its images have no labels.
    """
    names = [name for name in subfolders(folder) if name.lower() in TEST and name != val_part]
    return [name for name in names if subfolders(os.path.join(folder, name))][:1]


def follow_table(folder: str, path: str, columns: list[str] | None, fraction: float | None,
                 seed: int) -> tuple[Lists, list[str]]:
    """Make the lists of a folder by a table, and remarks. Raises as tables.read_table."""
    images, found = search(folder)
    table = tables.read_table(path, images[''], columns)
    parts = table.parts
    lines = [f'columns of {path}: {table.columns}']
    listed = sum(map(len, parts.values()))
    if listed < len(images['']):
        found.left_out['images that the table does not name'] += len(images['']) - listed
    if '' not in parts:
        if fraction is not None:
            raise ValueError(f'{path} says which images are for validation: leave -val_share out')
        val = parts.pop('val', None) or parts.pop('test', [])
        lists = Lists(table.names, parts.get('train', []), val, found, parts.get('test', ()))
        if not lists.train:
            raise ValueError(f'{path} has no row for training')
    elif len(parts) > 1:
        raise ValueError(f'{path}: some rows have a split and others have none')
    else:
        classes: list[list[str]] = [[] for _ in table.names]
        for image, label in sorted(parts['']):
            classes[label].append(image)
        train, val = draw_split(classes, VAL_FRACTION if fraction is None else fraction, seed)
        lists = Lists(table.names, train, val, found)
    return lists, [*lines, *line_of_left_out(lists), *line_of_classes(lists)]


def count_loose(images: list[str], found: finding.Found) -> finding.Found:
    """Add the images in no class folder to those left out."""
    loose = sum('/' not in path for path in images)
    if loose:
        found.left_out['images in no class folder'] += loose
    return found


def make_lists(folder: str, fraction: float | None = None, seed: int = 0, labels_file: str | None = None,
               synsets: str | None = None, table: str | None = None,
               columns: list[str] | None = None) -> tuple[Lists, list[str]]:
    """Make the lists of a folder, and remarks on what they do not have. Raises ValueError and OSError."""
    if table:
        if labels_file or synsets:
            raise ValueError('-table says the class of every image: leave -val_labels and -synsets out')
        lists, lines = follow_table(folder, table, columns, fraction, seed)
        check_lists(folder, lists)
        return lists, lines
    if columns:
        raise ValueError('-columns names those of a -table; give it')
    train_part, val_part = find_layout(folder)
    if synsets and not labels_file:
        is_misused = True
    elif train_part:
        is_misused = fraction is not None
    else:
        is_misused = bool(labels_file)
    if is_misused:
        found_train = 'train/' if train_part else 'no train/'
        raise ValueError(f'{folder} has {found_train}: -val_labels, and -synsets with it, are for a folder '
                         'with train/ and val/, -val_share for one without')
    if train_part:
        lists = keep_split(folder, train_part, val_part, labels_file, synsets)
    else:
        lists = split_folder(folder, VAL_FRACTION if fraction is None else fraction, seed)
    if len(lists.names) < 2:
        raise ValueError(f'{folder}: expected a subfolder with pictures per class, found {len(lists.names)}'
                         f'{lists.found.explain("; left out: ")}')
    check_lists(folder, lists)
    return lists, remarks(folder, lists, train_part, val_part)


def check_lists(folder: str, lists: Lists) -> None:
    """Raise ValueError for lists with one class or without a validation image."""
    if len(lists.names) < 2:
        raise ValueError(f'{folder}: expected two classes or more, found {len(lists.names)}')
    if not lists.val:
        raise ValueError(f'{folder}: no class has two images, so none can be held out for validation')


def remarks(folder: str, lists: Lists, train_part: str, val_part: str) -> list[str]:
    """Return lines about what is not in the lists, and about classes without images."""
    class_folders = map(name_of_file, subfolders(os.path.join(folder, train_part)))
    listed = {train_part, val_part, *(path.partition('/')[0] for path, _ in lists.test)}
    others = {*subfolders(folder)} - listed if train_part else set()
    return [
        *line_of_left_out(lists),
        *shortened('folders without images, which are no classes', sorted({*class_folders} - {*lists.names})),
        *line_of_classes(lists),
        *shortened('folders that are not listed', sorted(others))]


def line_of_left_out(lists: Lists) -> list[str]:
    """Return a line about what was left out, no line if that is nothing."""
    return [lists.found.explain('left out: ')] if lists.found.left_out else []


def line_of_classes(lists: Lists) -> list[str]:
    """Return a line about classes without a validation image, no line if there are none."""
    labels = {label for _, label in lists.val}
    missing = [name for label, name in enumerate(lists.names) if label not in labels]
    return shortened('classes without a validation image', missing)


def shortened(title: str, items: list[str]) -> list[str]:
    """Return a line with the first SHOWN of the items, no line without any."""
    if not items:
        return []
    more = f' and {len(items) - SHOWN} more' if len(items) > SHOWN else ''
    return [f'{title}: {", ".join(items[:SHOWN])}{more}']


# ---- files

def as_list(samples: list[Sample]) -> str:
    """Return the text of a list file. Raises ValueError for a name that such a file cannot hold."""
    check_names(path for path, _ in samples)
    return ''.join(f'{path} {label}\n' for path, label in samples)


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name, of a file or a class, that a line of a list cannot hold."""
    for name in names:
        if name != name.strip() or name.startswith('#') or FORBIDDEN.search(name):
            raise ValueError(f'{ascii(name)}: a list cannot hold a name that starts with # or has spaces '
                             'around it or control characters or line separators; rename it')
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f'{visible(name)}: a list is UTF-8 text, and this name is not; rename it') from None


def refuse_to_replace(path: str, text: str) -> None:
    """Raise ValueError if a file exists and has another text."""
    if not os.path.exists(path):
        return
    with open(path, encoding='utf-8', errors='replace', newline='') as file:
        if file.read() != text:
            raise ValueError(f'{path} is there already, and differs; -force replaces it')


def parser() -> cli.Parser:
    """Return the parser of the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument('folder', metavar='FOLDER',
                        help='the images; the lists are written here, and it becomes -data_path')
    parser.add('val_share', 'fraction of each class that is held out, where there is no val/ '
               f'(default: {VAL_FRACTION})', type=float, metavar='X')
    parser.add('seed', 'decides which images are held out', type=int, default=0, metavar='N')
    parser.add('val_labels', 'the classes of the images in a flat val/', metavar='FILE')
    parser.add('synsets', 'the classes that the ids in that file mean', metavar='FILE')
    parser.add('table', 'the files and their labels, in CSV, TSV or JSON', metavar='FILE')
    parser.add('columns', 'of the table, those with the files, the labels and perhaps the splits',
               nargs='+', metavar='NAME')
    parser.add('force', 'replace lists that are there and differ', action='store_true')
    return parser


def main(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    if not os.path.isdir(args.folder):
        raise ValueError(f'{args.folder}: no such folder')
    is_fraction = args.val_share is None or 0 < args.val_share < 1
    if not is_fraction or args.seed < 0:
        raise ValueError(f'-val_share {args.val_share} -seed {args.seed}: the share must lie between 0 and '
                         '1, and the seed cannot be negative')
    lists, lines = make_lists(args.folder, args.val_share, args.seed, args.val_labels, args.synsets,
                              args.table, args.columns)
    names = readable(lists.names)
    check_names(names)
    texts = {'train_list.txt': as_list(lists.train), 'val_list.txt': as_list(lists.val),
             FILE: ''.join(f'{name}\n' for name in names)}
    if lists.test:
        texts[TEST_LIST] = as_list(list(lists.test))
    texts = {os.path.join(args.folder, name): text for name, text in texts.items()}
    if not args.force:
        for path, text in texts.items():
            refuse_to_replace(path, text)
    for path, text in texts.items():
        cli.write_text(path, text)
    tested = f', {len(lists.test)} test images in {TEST_LIST}' if lists.test else ''
    print(f'{args.folder}: {len(names)} classes, {len(lists.train)} training and '
          f'{len(lists.val)} validation images{tested}')
    print(visible('\n'.join(lines)), end='\n' if lines else '')
    print(f'train with -data_path {args.folder} -opts MODEL.NUM_CLASSES {len(names)}')
    return 0


if __name__ == '__main__':
    parser().run(main)
