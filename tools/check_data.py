"""Read every image that train_list.txt and val_list.txt of a folder name, as training would, and report on them.

Bad files with their line; formats, transparency, bit depth and the like, with what becomes of them; the sizes; the balance of
the classes; images (by the content of their files) that are both in training and validation, and those that have two labels.

  python tools/check_data.py flowers
  python tools/check_data.py imagenet -workers 16 -classes 1000 -json imagenet/report.json

Exit status: 0, or 1 if a file cannot be read, or 2 for a mistake in the command or a bad line in a list.
"""
import hashlib
import json
import multiprocessing
import os
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system import cpu, lifeline
from system.console import visible
from tools import cli

import numpy as np

from data import image_files
from data.class_names import read_names
from data.list_file import read_list

MOST_CLASSES = 1 << 20                              # where -classes does not say; a larger label is a mistake
SHOWN = 20                                          # lines of a kind on the console; the JSON has all


class Result(NamedTuple):
    """What was found in one file; with an `error` the rest is empty."""
    error: str = ''
    width: int = 0
    height: int = 0
    format: str = ''
    mode: str = ''                                  # Pillow's
    traits: tuple = ()                              # keys of image_files.TRAITS
    digest: str = ''                                # of the file's content


def read(path: str, max_pixels: int) -> Result:
    """Read a whole image as training does."""
    try:
        digest = hashlib.sha256()
        with image_files.open_file(path) as file:
            while data := file.read(1 << 20):
                digest.update(data)
            file.seek(0)
            image = image_files.open_image(file, max_pixels)
            mode, traits = image.mode, tuple(image_files.traits(image))
            image_files.to_rgb(image)
            width, height = image.size
            return Result('', width, height, image.format, mode, traits, digest.hexdigest())
    except Exception as error:                      # Pillow may raise nearly anything for a damaged file
        return Result(image_files.reason(error))


def read_all(samples, workers, what, max_pixels):
    """`read` each sample of an ImageList, in its order. Raises ValueError where a process dies."""
    paths = [samples.path(i) for i in range(len(samples))]
    read_one = partial(read, max_pixels=max_pixels)
    if not workers:
        return list(cli.progress(map(read_one, paths), len(paths), what))
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context('fork'), lifeline.die_with_parent) as pool:
            return list(cli.progress(pool.map(read_one, paths, chunksize=16), len(paths), what))
    except BrokenProcessPool:
        raise ValueError('a reading process died, probably for want of memory: take fewer by -workers, or look for the '
                         'image with -workers 0') from None


def describe(samples, results, classes):
    """What the report says about one list: counts, sizes, formats, images per class."""
    readable = [result for result in results if not result.error]
    good = np.array([(result.width, result.height) for result in readable]).reshape(-1, 2)
    report = {'images': len(samples), 'bad': len(samples) - len(good),
              'formats': dict(Counter(result.format for result in readable)),
              'modes': dict(Counter(result.mode for result in readable)),
              'traits': dict(Counter(trait for result in readable for trait in result.traits))}
    if len(good):
        report['size'] = {name: [int(value) for value in function(good, axis=0)]
                          for name, function in (('smallest', np.min), ('median', np.median), ('largest', np.max))}
    counts = np.bincount(samples.labels, minlength=classes)
    return {**report, 'per_class': {str(label): int(count) for label, count in enumerate(counts)}}


def compare(lists, results):
    """Pairs of the same image in train and val, and groups of the same image with several labels."""
    places = defaultdict(list)                      # content -> (part, index)
    for part, found in results.items():
        for i, result in enumerate(found):
            if not result.error:
                places[result.digest].append((part, i))
    in_both, other_label = [], []
    for same in places.values():
        train, val = ([lists[part].name(i) for part, i in same if part == wanted] for wanted in ('train', 'val'))
        if train and val:
            in_both += [{'train': train[0], 'val': name} for name in val]
        if len({int(lists[part].labels[i]) for part, i in same}) > 1:
            other_label.append([lists[part].name(i) for part, i in same])
    return in_both, other_label


def check(folder, classes, workers, max_pixels):
    """Make the whole report on a folder, as it is in the JSON. Raises ValueError for a bad list."""
    parts = [part for part in ('train', 'val') if os.path.isfile(os.path.join(folder, f'{part}_list.txt'))]
    if not parts:
        raise ValueError(f'{folder} has neither train_list.txt nor val_list.txt; tools/make_lists.py writes them')
    most = classes or MOST_CLASSES
    lists = {part: read_list(os.path.join(folder, f'{part}_list.txt'), folder, most) for part in parts}
    classes = classes or 1 + max(int(samples.labels.max()) for samples in lists.values())
    results = {part: read_all(lists[part], workers, part, max_pixels) for part in parts}
    in_both, other_label = compare(lists, results)
    bad = [{'where': lists[part].where(i), 'path': lists[part].path(i), 'error': result.error}
           for part in parts for i, result in enumerate(results[part]) if result.error]
    return {'folder': folder, 'classes': classes, **{part: describe(lists[part], results[part], classes) for part in parts},
            'bad': bad, 'in_both': in_both, 'other_label': other_label}


# ---- the console

def as_text(report, names):
    """The report as lines."""
    lines = []
    for part in ('train', 'val'):
        if part in report:
            lines += part_text(part, report[part], names)
    lines += listing(report['bad'], 'bad files', lambda bad: f'{bad["where"]} {bad["path"]}: {bad["error"]}')
    if 'train' in report and 'val' in report:
        lines += listing(report['in_both'], 'images in both train and val', lambda pair: f'{pair["train"]} = {pair["val"]}')
    lines += listing(report['other_label'], 'images that stand in the lists with several labels', ' = '.join)
    return '\n'.join(lines) + '\n'


def part_text(part, facts, names):
    kinds = ', '.join(f'{count} {kind}' for kind, count in sorted(facts['formats'].items()))
    lines = [f'{part}: {facts["images"]} images in {len(facts["per_class"])} classes; {kinds or "none can be read"}']
    lines += [f'  {facts["traits"][trait]} {what}: {outcome}' for trait, (what, outcome) in image_files.TRAITS.items()
              if trait in facts['traits']]
    if 'size' in facts:
        lines.append('  width x height: ' + ', '.join(f'{name} {w}x{h}' for name, (w, h) in facts['size'].items()))
    counts = {label: count for label, count in facts['per_class'].items() if count}
    few, many = min(counts, key=counts.get), max(counts, key=counts.get)
    lines.append(f'  images per class: {counts[few]} ({names(few)}) to {counts[many]} ({names(many)}), '
                 f'{counts[many] / counts[few]:.1f} times as many')
    empty = [names(label) for label, count in facts['per_class'].items() if not count]
    kind = {'train': 'training', 'val': 'validation'}[part]
    return lines + ([f'  classes without a {kind} image: ' + ', '.join(empty[:SHOWN])] if empty else [])


def listing(items, what, text):
    if not items:
        return [f'no {what}']
    more = [f'  and {len(items) - SHOWN} more (-json FILE has all)'] if len(items) > SHOWN else []
    return [f'{what}: {len(items)}', *(f'  {text(item)}' for item in items[:SHOWN]), *more]


def parser():
    parser = cli.Parser(__doc__)
    parser.add_argument('folder', metavar='FOLDER', help='the folder of the lists, as -data_path of the training')
    parser.add('workers', 'processes that read; 0: this one alone (default: one per processor)', type=int,
               default=cpu.cores(), metavar='N')
    parser.add('classes', 'number of classes, so that larger labels are an error (default: as many as the lists have)',
               type=int, default=0, metavar='N')
    parser.add('max_pixels', 'larger images are bad files, as by DATA.MAX_PIXELS', type=int, default=image_files.MAX_PIXELS,
               metavar='N')
    parser.add('json', 'write the report with all files as JSON; - is the console', metavar='FILE')
    return parser


def main(args):
    if min(args.workers, args.classes, args.max_pixels) < 0:
        raise ValueError(f'-workers {args.workers} -classes {args.classes} -max_pixels {args.max_pixels}: none can be negative')
    cli.check_outputs(args.json)
    path = os.path.join(args.folder, 'class_names.txt')
    names = read_names(path) if os.path.isfile(path) else []
    report = check(args.folder, args.classes, args.workers, args.max_pixels)
    print(visible(as_text(report, lambda label: names[int(label)] if int(label) < len(names) else label)), end='')
    if args.json:
        cli.write_text(args.json, json.dumps(report, indent=1) + '\n')
    return int(bool(report['bad']))


if __name__ == '__main__':
    parser().run(main)
