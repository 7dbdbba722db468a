"""Make the lists of ImageNet for what one downloads, and say what is missing. Archives are read in place.

FOLDER holds one of these forms:
  ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz
  Kaggle's imagenet-object-localization-challenge.zip, or what is in it
  a hub's parquet files, train-00000-of-00294.parquet and so on
  train/n01440764/n01440764_18.JPEG, ... and val/, with class folders or flat

  python tools/prepare_imagenet.py downloads
  python tools/prepare_imagenet.py downloads -unpack imagenet

The images of a flat val/ need Kaggle's LOC_val_solution.csv or the development kit, which it looks for.
Exit status: 0, or 1 if images are missing, or 2 for a mistake in the command.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system.console import visible
from tools import cli, make_lists, val_labels

from data import archives, class_names
from data.class_names import readable

EXPECTED = {'training': 1281167, 'validation': 50000}
TRAIN_IMAGE = re.compile(r'(n\d{8})_\d+(?:_n\d{8})?\.jpe?g', re.IGNORECASE)
VAL_IMAGE = re.compile(r'ILSVRC2012_val_(\d{8})(?:_(n\d{8}))?\.jpe?g', re.IGNORECASE)
CLASS_FOLDER = re.compile(r'n\d{8}')
PARQUET = re.compile(r'(train|val|validation)-\d+-of-\d+.*\.parquet')
SOLUTION = 'LOC_val_solution.csv'
TRUTH, META = 'ILSVRC2012_validation_ground_truth.txt', 'meta.mat'       # of the development kit
COMPRESSED = ('.tar.gz', '.tgz')
SHOWN = 5


@dataclass
class Found:
    """What a folder holds: {path: class, or label of a parquet row} of each part, and other files."""

    train: dict[str, str | int] = field(default_factory=dict)
    val: dict[str, str | int | None] = field(default_factory=dict)       # None: nothing says the class yet
    truths: dict[str, str] = field(default_factory=dict)                 # name of a file with labels -> path
    kits: list[str] = field(default_factory=list)                        # development kits
    compressed: list[str] = field(default_factory=list)                  # cannot be read in place


def walk(folder: str) -> Iterator[str]:
    """Yield the relative paths of all files in a folder, and in its tar and zip archives, in order.

    Links to folders are followed, to each once.
    """
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(names):
            path = os.path.relpath(os.path.join(place, name), folder)
            if name.lower().endswith(('.tar', '.zip')):
                for member in archives.members(os.path.join(folder, path)):
                    yield f'{path}/{member.name}'
            elif not name.startswith('.'):
                yield path


def search(folder: str) -> Found:
    """Find the images of ImageNet in a folder, by their names, and the files with labels."""
    found = Found()
    for path in walk(folder):
        name = os.path.basename(path)
        parent = os.path.basename(os.path.dirname(path))
        if match := TRAIN_IMAGE.fullmatch(name):
            found.train[path] = match[1]
        elif match := VAL_IMAGE.fullmatch(name):
            of_folder = parent if CLASS_FOLDER.fullmatch(parent) else None
            found.val[path] = match[2] or of_folder
        elif match := PARQUET.fullmatch(name):
            part = found.train if match[1] == 'train' else found.val
            for row, label in enumerate(archives.read_labels(os.path.join(folder, path)).tolist()):
                part[f'{path}/{row}'] = label
        elif name in (SOLUTION, TRUTH, META):
            found.truths[name] = os.path.join(folder, path)
        elif name.endswith(COMPRESSED) and 'devkit' in name:
            found.kits.append(path)
        elif name.endswith(COMPRESSED):
            found.compressed.append(path)
    return found


def unpack_kit(folder: str, found: Found, temporary: str) -> None:
    """Copy the two files with labels out of the development kit to a temporary folder."""
    for path in found.kits:
        with tarfile.open(os.path.join(folder, path)) as kit:
            for entry in kit:
                name = os.path.basename(entry.name)
                source = kit.extractfile(entry) if name in (TRUTH, META) else None
                if source:
                    found.truths[name] = os.path.join(temporary, name)
                    with open(found.truths[name], 'wb') as target:
                        shutil.copyfileobj(source, target)


def label_flat(found: Found, names: list[str]) -> None:
    """Give the validation images without a class those of Kaggle's file or of the development kit.

    Raises ValueError if neither is there.
    """
    flat = sorted((os.path.basename(path), path) for path, value in found.val.items() if value is None)
    if not flat:
        return
    truth = found.truths.get(SOLUTION) or found.truths.get(TRUTH)
    if not truth:
        raise ValueError(f'{len(flat)} validation images lie in no class folder, and neither {SOLUTION} nor '
                         'ILSVRC2012_devkit_t12.tar.gz says what they show; put one of them into the folder')
    images = [name for name, _ in flat]
    labels = val_labels.flat_list('val', images, names, truth, found.truths.get(META))
    for (_, path), (_, label) in zip(flat, labels):
        found.val[path] = names[label]


def make_list(values: dict, names: list[str]) -> list[tuple[str, int]]:
    """Return (path, label) of each image, sorted by class. Rows of parquet files have their labels.

    Raises ValueError for a class that is none of `names`.
    """
    labels = {name: label for label, name in enumerate(names)}
    samples = []
    for path, value in values.items():
        label = labels.get(value, -1) if isinstance(value, str) else value
        if not 0 <= label < len(names):
            raise ValueError(f'{path} shows {value}, which is none of the {len(names)} classes')
        samples.append((path, label))
    return sorted(samples, key=lambda sample: sample[1])


def classes_of(found: Found) -> list[str]:
    """Return the class of each label: ImageNet's 1000, also where some are missing, as weights know them.

    Of classes that are not ImageNet-1k's it is those of the training images, sorted.
    """
    present = {value for value in found.train.values() if isinstance(value, str)}
    known = list(class_names.imagenet_classes())
    return known if present <= {*known} else sorted(present)


def missing(found: Found, names: list[str]) -> list[str]:
    """Return a line for each thing that ImageNet has and the folder has not."""
    shown = {value if isinstance(value, str) else names[value] for value in found.train.values()}
    lines = []
    for part, values in (('training', found.train), ('validation', found.val)):
        if len(values) != EXPECTED[part]:
            lines.append(f'{len(values)} of {EXPECTED[part]} {part} images')
    absent = sorted({*names} - shown)
    if absent:
        more = ', ...' if len(absent) > SHOWN else ''
        lines.append(f'{len(absent)} classes without a training image: {", ".join(absent[:SHOWN])}{more}')
    if found.compressed:
        paths = ', '.join(found.compressed[:SHOWN])
        lines.append(f'compressed, so that it is not read: {paths}; make plain tars by gunzip')
    return lines


def unpacked_path(part: str, path: str, class_name: str) -> str:
    """Return PART/CLASS/NAME of an image, the path that it is unpacked to."""
    folder, name = os.path.split(path)
    if folder.endswith(archives.PARQUET):
        name = f'{os.path.basename(folder).removesuffix(archives.PARQUET)}-{name}.JPEG'
    return f'{part}/{class_name}/{name}'


def unpack(folder: str, target: str, part: str, paths: list[tuple[str, str]]) -> None:
    """Copy images, (path in `folder`, path in `target`) of each; those that are there stay."""
    for path, below in cli.progress(paths, len(paths), f'unpacking {part}'):
        written = os.path.join(target, below)
        if os.path.exists(written):                 # an earlier call has written it
            continue
        os.makedirs(os.path.dirname(written), exist_ok=True)
        with archives.open_file(os.path.join(folder, path)) as source, open(f'{written}.part', 'wb') as to:
            shutil.copyfileobj(source, to)
        os.replace(f'{written}.part', written)      # not flushed to the disk: a million times takes hours


def parser() -> cli.Parser:
    """Return the parser of the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument('folder', metavar='FOLDER',
                        help='what was downloaded; the lists are written here, and it becomes -data_path')
    parser.add('unpack', 'write the images to class folders in DIR, and the lists too', metavar='DIR')
    parser.add('force', 'replace lists that are there and differ', action='store_true')
    return parser


def main(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    if not os.path.isdir(args.folder):
        raise ValueError(f'{args.folder}: no such folder')
    found = search(args.folder)
    if not found.train or not found.val:
        part = 'training' if not found.train else 'validation'
        raise ValueError(f'{args.folder}: no {part} image of ImageNet is here{compressed_hint(found)}; '
                         '-h lists the forms that are known')
    names = classes_of(found)
    with tempfile.TemporaryDirectory() as temporary:
        unpack_kit(args.folder, found, temporary)
        label_flat(found, names)
    lists = {'train': make_list(found.train, names), 'val': make_list(found.val, names)}
    target = args.unpack or args.folder
    copies: dict[str, list[tuple[str, str]]] = {}
    if args.unpack:
        for part, samples in lists.items():
            copies[part] = [(path, unpacked_path(part, path, names[label])) for path, label in samples]
            lists[part] = [(below, label) for (_, below), (_, label) in zip(copies[part], samples)]
    texts = {f'{part}_list.txt': make_lists.as_list(samples) for part, samples in lists.items()}
    texts[class_names.FILE] = ''.join(f'{name}\n' for name in readable(names))
    if not args.force:
        for name, text in texts.items():
            make_lists.refuse_to_replace(os.path.join(target, name), text)
    for part, paths in copies.items():
        unpack(args.folder, target, part, paths)
    for name, text in texts.items():
        cli.write_text(os.path.join(target, name), text)
    print(f'{target}: {len(names)} classes, {len(lists["train"])} training and {len(lists["val"])} '
          'validation images')
    lines = missing(found, names)
    for line in lines:
        print(visible(f'missing: {line}'))
    print(f'train with -data_path {target}')
    return int(bool(lines))


def compressed_hint(found: Found) -> str:
    """Return the words about archives that must be plain, or ''."""
    return f'; {found.compressed[0]} is compressed, make it plain by gunzip' if found.compressed else ''


if __name__ == '__main__':
    parser().run(main)
