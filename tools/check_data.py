"""Read every image of train_list.txt and val_list.txt in a folder, as training does, and report on them.

The report has: bad files with their line; formats, transparency, bit depth and the like, with their effect;
sizes; the balance of the classes; images (by the content of their files) that are both in training and
validation, or have several labels.

  python tools/check_data.py flowers
  python tools/check_data.py imagenet -workers 16 -classes 1000 -json imagenet/report.json

Exit status: 0, or 1 if a file cannot be read, or 2 for a mistake in the command or a bad line in a list.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Callable, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system import cpu, lifeline
from system.console import visible
from tools import cli

import numpy as np

from data import archives, bands, class_names, image_files
from data.list_file import ImageList, read_list

PARTS = {'train': 'training', 'val': 'validation'}
MOST_CLASSES = 1 << 20                              # without -classes; a larger label is a mistake
SHOWN = 20                                          # lines of a kind on the console; the JSON has all
Pairs = list[dict[str, str]]


class Result(NamedTuple):
    """The properties of one file; with an `error` the rest is empty."""
    error: str = ''
    width: int = 0
    height: int = 0
    format: str = ''
    mode: str = ''                                  # Pillow's
    traits: tuple[str, ...] = ()                    # keys of image_files.TRAITS
    digest: str = ''                                # of the file's content


def read(path: str, max_pixels: int, channels: int = 3) -> Result:
    """Read a whole image as training does, with DATA.CHANNELS `channels`."""
    try:
        digest = hashlib.sha256()
        with image_files.open_file(path) as file:
            while data := file.read(1 << 20):
                digest.update(data)
            if channels != 3:
                picture = bands.read(path, max_pixels=max_pixels, channels=channels)
                return Result('', *picture.size, f'of {channels} channels', digest=digest.hexdigest())
            file.seek(0)
            image = image_files.open_image(file, max_pixels)
            mode, traits = image.mode, tuple(image_files.traits(image))
            image_files.to_rgb(image)
            width, height = image.size
            return Result('', width, height, image.format or '', mode, traits, digest.hexdigest())
    except Exception as error:                      # Pillow may raise nearly anything for a damaged file
        return Result(image_files.reason(error))


def read_all(samples: ImageList, workers: int, part: str, read_one: Callable[[str], Result]) -> list[Result]:
    """Read each image of a list by `read_one`, in its order. Raises ValueError if a process dies."""
    paths = [samples.path(i) for i in range(len(samples))]
    if not workers:
        return list(cli.progress(map(read_one, paths), len(paths), part))
    context = multiprocessing.get_context('fork')
    try:
        with ProcessPoolExecutor(workers, context, lifeline.die_with_parent) as pool:
            results = pool.map(read_one, paths, chunksize=16)
            return list(cli.progress(results, len(paths), part))
    except BrokenProcessPool:
        raise ValueError('a reading process died, probably for want of memory: take fewer by -workers, or '
                         'look for the image with -workers 0') from None


# ---- the report

def describe(samples: ImageList, results: Sequence[Result], classes: int) -> dict[str, Any]:
    """Return the report on one list: counts, sizes, formats, images per class."""
    readable = [result for result in results if not result.error]
    report: dict[str, Any] = {
        'images': len(samples),
        'bad': len(samples) - len(readable),
        'formats': dict(Counter(result.format for result in readable)),
        'modes': dict(Counter(result.mode for result in readable)),
        'traits': dict(Counter(trait for result in readable for trait in result.traits)),
    }
    if readable:
        sizes = np.array([(result.width, result.height) for result in readable])     # (n, 2)
        report['size'] = {
            'smallest': _whole(sizes.min(axis=0)),
            'median': _whole(np.median(sizes, axis=0)),
            'largest': _whole(sizes.max(axis=0)),
        }
    counts = np.bincount(samples.labels, minlength=classes).tolist()
    report['per_class'] = {str(label): count for label, count in enumerate(counts)}
    return report


def _whole(numbers: Iterable[float]) -> list[int]:
    return [int(number) for number in numbers]


def compare(lists: dict[str, ImageList],
            results: dict[str, list[Result]]) -> tuple[Pairs, list[list[str]]]:
    """Return pairs of the same image in train and val, and groups of it with several labels."""
    same_content = defaultdict(list)                # digest -> (part, index)
    for part, found in results.items():
        for i, result in enumerate(found):
            if not result.error:
                same_content[result.digest].append((part, i))
    in_both: Pairs = []
    other_label: list[list[str]] = []
    for images in same_content.values():
        names: dict[str, list[str]] = {'train': [], 'val': []}
        labels = set()
        for part, i in images:
            names[part].append(lists[part].name(i))
            labels.add(int(lists[part].labels[i]))
        if names['train']:
            in_both += [{'train': names['train'][0], 'val': name} for name in names['val']]
        if len(labels) > 1:
            other_label.append(names['train'] + names['val'])
    return in_both, other_label


def check(folder: str, classes: int, workers: int, read_one: Callable[[str], Result]) -> dict[str, Any]:
    """Return the whole report on a folder, as the JSON has it. Raises ValueError for a bad list."""
    lists = {}
    for part in PARTS:
        path = os.path.join(folder, f'{part}_list.txt')
        if archives.is_file(path):
            lists[part] = read_list(path, folder, classes or MOST_CLASSES)
    if not lists:
        raise ValueError(f'{folder} has neither train_list.txt nor val_list.txt; '
                         'tools/make_lists.py writes them')
    classes = classes or max(samples.count_classes() for samples in lists.values())
    results = {part: read_all(samples, workers, part, read_one) for part, samples in lists.items()}
    report: dict[str, Any] = {'folder': folder, 'classes': classes}
    for part, samples in lists.items():
        report[part] = describe(samples, results[part], classes)
    report['bad'] = []
    for part, samples in lists.items():
        report['bad'] += _bad_files(samples, results[part])
    report['in_both'], report['other_label'] = compare(lists, results)
    return report


def _bad_files(samples: ImageList, results: Sequence[Result]) -> Iterator[dict[str, str]]:
    for i, result in enumerate(results):
        if result.error:
            yield {'where': samples.where(i), 'path': samples.path(i), 'error': result.error}


# ---- the console

def as_text(report: dict[str, Any], names: Callable[[str], str]) -> str:
    """Return the report as lines; `names` gives the class name of a label."""
    lines = []
    for part in PARTS:
        if part in report:
            lines += part_text(part, report[part], names)
    bad = [f'{file["where"]} {file["path"]}: {file["error"]}' for file in report['bad']]
    lines += listing(bad, 'bad files')
    if all(part in report for part in PARTS):
        in_both = [f'{pair["train"]} = {pair["val"]}' for pair in report['in_both']]
        lines += listing(in_both, 'images in both train and val')
    other_label = [' = '.join(names) for names in report['other_label']]
    lines += listing(other_label, 'images that stand in the lists with several labels')
    return '\n'.join(lines) + '\n'


def part_text(part: str, facts: dict[str, Any], names: Callable[[str], str]) -> list[str]:
    """Return the lines of the report on one list."""
    kinds = ', '.join(f'{count} {kind}' for kind, count in sorted(facts['formats'].items()))
    title = f'{part}: {facts["images"]} images in {len(facts["per_class"])} classes; '
    lines = [title + (kinds or 'none can be read')]
    for trait, (description, effect) in image_files.TRAITS.items():
        if trait in facts['traits']:
            lines.append(f'  {facts["traits"][trait]} {description}: {effect}')
    if 'size' in facts:
        sizes = [f'{name} {width}x{height}' for name, (width, height) in facts['size'].items()]
        lines.append(f'  width x height: {", ".join(sizes)}')
    counts = {label: count for label, count in facts['per_class'].items() if count}
    few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    lines.append(f'  images per class: {counts[few]} ({names(few)}) to {counts[many]} ({names(many)}), '
                 f'{counts[many] / counts[few]:.1f} times as many')
    empty = [names(label) for label, count in facts['per_class'].items() if not count]
    if empty:
        lines.append(f'  classes without a {PARTS[part]} image: {", ".join(empty[:SHOWN])}')
    return lines


def listing(items: list[str], title: str) -> list[str]:
    """Return a line with the number of items, and a line for each of the first SHOWN ones."""
    if not items:
        return [f'no {title}']
    lines = [f'{title}: {len(items)}']
    lines += [f'  {item}' for item in items[:SHOWN]]
    if len(items) > SHOWN:
        lines.append(f'  and {len(items) - SHOWN} more (-json FILE has all)')
    return lines


def parser() -> cli.Parser:
    """Return the parser of the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument('folder', metavar='FOLDER',
                        help='the folder or archive of the lists, as -data_path of the training')
    parser.add('workers', 'processes that read; 0: this one alone (default: one per processor)', type=int,
               default=cpu.cores(), metavar='N')
    parser.add('classes',
               'number of classes, so that larger labels are an error (default: as many as the lists have)',
               type=int, default=0, metavar='N')
    parser.add('max_pixels', 'larger images are bad files, as by DATA.MAX_PIXELS', type=int,
               default=image_files.MAX_PIXELS, metavar='N')
    parser.add('channels', 'channels of the images, as by DATA.CHANNELS', type=int, default=3, metavar='N')
    parser.add('json', 'write the report with all files as JSON; - is the console', metavar='FILE')
    return parser


def main(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    if args.channels < 1:
        raise ValueError(f'-channels {args.channels}: it must be at least 1')
    if min(args.workers, args.classes, args.max_pixels) < 0:
        raise ValueError(f'-workers {args.workers} -classes {args.classes} -max_pixels {args.max_pixels}: '
                         'none can be negative')
    cli.check_outputs(args.json)
    path = os.path.join(args.folder, class_names.FILE)
    names = class_names.read_names(path) if archives.is_file(path) else []

    def name_of(label: str) -> str:
        return names[int(label)] if int(label) < len(names) else label

    read_one = partial(read, max_pixels=args.max_pixels, channels=args.channels)
    report = check(args.folder, args.classes, args.workers, read_one)
    print(visible(as_text(report, name_of)), end='')
    if args.json:
        cli.write_text(args.json, json.dumps(report, indent=1) + '\n')
    return int(bool(report['bad']))


if __name__ == '__main__':
    parser().run(main)
