"""Write train_list.txt, val_list.txt and class_names.txt for a folder of images, as training and evaluation read them.

A folder with one subfolder per class is split by chance, the same for the same -seed and stratified by class. A folder with
train/ and val/ is taken as it is; a flat val/, as ImageNet's, needs -val_labels. Their names may be Train, valid, validation and
so on; without a val/, test/ or testing/ is taken. Labels count the class folders in the order of their names, as everywhere
(ImageNet's: n01440764 is 0). Only list files are written; images stay where they are.

Files with the endings of images are images; of all other files the content decides. What is left out is counted: files of
other kinds, hidden ones, thumbnails, links to what is listed already.

  python tools/make_lists.py flowers                             flowers/daisy/1.jpg ...: a fifth of each class for validation
  python tools/make_lists.py flowers -val_share 0.1 -seed 1
  python tools/make_lists.py imagenet                            imagenet/train/n01440764/..., imagenet/val/n01440764/...
  python tools/make_lists.py imagenet -val_labels LOC_val_solution.csv
  python tools/make_lists.py imagenet -val_labels ILSVRC2012_validation_ground_truth.txt -synsets meta.mat

-val_labels FILE says what the images of a flat val/ show, by lines of one of these kinds:
  NAME CLASS     the class folder's name                 ILSVRC2012_val_00000001.JPEG n01751748, or Kaggle's LOC_val_solution.csv
  NAME LABEL     the label, counted from 0               ILSVRC2012_val_00000001.JPEG 65
  ID             ImageNet's own ground truth, one number from 1 to 1000 per image in the order of the names. These numbers are
                 not labels: -synsets must say which class each of them is, by the meta.mat of ImageNet's development kit
                 (needs scipy) or by lines 'ID CLASS' or 'CLASS ID ...', such as map_clsloc.txt

Exit status: 0, or 2 for a mistake in the command or the files; nothing is written then.
"""
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system.console import visible
from tools import (
    cli,
    finding,
)

import numpy as np

from data.class_names import FILE, readable
from data.list_file import name_of_file

TRAIN = ('train', 'training')
VALIDATION = (('val', 'valid', 'validation'), ('test', 'testing'))           # the second kind only if there is none of the first
SHOWN = 20                                          # folders or classes named in a remark
WRITTEN = ('train_list.txt', 'val_list.txt', FILE)
FORBIDDEN = re.compile('[\0-\x1f\x7f-\x9f\u2028\u2029]')             # control characters, line separators


def subfolders(folder):
    """List the names of the subfolders that count, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not finding.is_hidden(entry.name))


def find_layout(folder: str) -> tuple:
    """Return the names of the subfolders for training and validation; two empty texts for one folder per class.

    Raises ValueError where it is not clear whether a subfolder is a split or a class.
    """
    names = subfolders(folder)
    train = [name for name in names if name.lower() in TRAIN]
    kinds = [[name for name in names if name.lower() in kind] for kind in VALIDATION]
    held_out = kinds[0] or kinds[1]
    if not train and not held_out:
        return '', ''
    for same in (train, held_out):
        if len(same) > 1:
            raise ValueError(f'{folder}: {" and ".join(same)} are the same split; keep or rename one')
    if not train:
        raise ValueError(f'{folder}: {held_out[0]}/ looks like a split, and there is no train/; if it is a class, rename it')
    if not held_out:
        raise ValueError(f'{folder} has {train[0]}/ and no val/; name {folder}/{train[0]} itself to split it, or rename it '
                         'if it is a class')
    return train[0], held_out[0]


def by_class(images):
    """Relative paths CLASS/... -> {class: its paths}, sorted by class; without those in no folder."""
    classes = {}
    for path in images:
        name, slash, _ = path.partition('/')
        if slash:
            classes.setdefault(name, []).append(path)
    return {name: classes[name] for name in sorted(classes)}


def search(folder, parts=('',)):
    """Find the images of a folder -> {part: those in it, as text, relative to the part}, and what was left out."""
    found = finding.find_images(folder, parts, WRITTEN)
    texts = sorted(map(name_of_file, found.images))
    return {part: [text[len(part):].lstrip('/') for text in texts if text.startswith(f'{part}/') or not part]
            for part in parts}, found


def split(count, share, rng):
    """Which of `count` images are for validation: `share` of them, at least one where there are two, and never all."""
    held = min(max(round(share * count), 1), count - 1)
    return {*rng.permutation(count)[:held].tolist()}


def split_lists(images, share, seed):
    """Images of one folder per class -> class names, training and validation lists of (path, label)."""
    content = by_class(images)
    train, val = [], []
    for label, paths in enumerate(content.values()):
        held = split(len(paths), share, np.random.default_rng([seed, label]))
        for i, path in enumerate(paths):
            (val if i in held else train).append((path, label))
    return list(content), train, val


def part_list(part, images, names):
    """Images of PART with one folder per class -> (path, label) pairs; `names` are the classes of the training.

    Raises ValueError for another class.
    """
    content = by_class(images)
    unknown = [name for name in content if name not in names]
    if unknown:
        raise ValueError(f'{part}/ has {len(unknown)} classes that the training has not: ' + ', '.join(unknown[:5]))
    labels = {name: label for label, name in enumerate(names)}
    return [(f'{part}/{path}', labels[name]) for name, paths in content.items() for path in paths]


# ---- a flat folder and its labels

def flat_list(part, pictures, names, labels_file, synsets):
    """Images of a flat PART, labelled by `labels_file` -> (path, label) pairs. Raises ValueError where the two do not fit."""
    pictures = [picture for picture in pictures if '/' not in picture]
    lines = read_lines(labels_file)
    if all(len(line) == 1 for line in lines):
        told = ids_to_classes(pictures, lines, labels_file, synsets, names)
    else:
        short = next((line[0] for line in lines if len(line) == 1), None)
        if short:
            raise ValueError(f'{labels_file}: the line {short!r} has one word and others have more; expected NAME CLASS (-h)')
        told = {os.path.basename(line[0]): line[1] for line in lines}
    stems = {os.path.splitext(name)[0]: name for name in told}               # Kaggle's names lack the ending
    labels = {name: label for label, name in enumerate(names)}
    result = []
    for picture in pictures:
        value = told.get(picture, told.get(stems.get(os.path.splitext(picture)[0])))
        if value is None:
            raise ValueError(f'{labels_file} says nothing about {picture}')
        label = labels.get(value, int(value) if value.isdecimal() else -1)
        if not 0 <= label < len(names):
            raise ValueError(f'{labels_file}: {picture} is said to show {value}, which is neither one of the {len(names)} class '
                             f'folders of the training nor a label in 0..{len(names) - 1}')
        result.append((f'{part}/{picture}', label))
    return result


def read_lines(path):
    """The lines of a text or CSV file as lists of words; a heading as Kaggle's is left out."""
    with open(path, encoding='utf-8-sig', newline='') as file:
        try:
            text = file.read()
        except UnicodeDecodeError:
            raise ValueError(f'{path}: not a UTF-8 text file') from None
    rows = [re.split(r'[\s,]+', line.strip()) for line in text.splitlines() if line.strip() and not line.startswith('#')]
    rows = rows[1:] if rows and rows[0][0] == 'ImageId' else rows
    if not rows:
        raise ValueError(f'{path}: empty')
    return rows


def ids_to_classes(pictures, lines, labels_file, synsets, names):
    """ImageNet's ground truth, an id per picture -> {picture: class}. Raises ValueError without a table of the ids."""
    if not synsets:
        raise ValueError(f'{labels_file} has one number per image. Those of ImageNet are ids of its development kit, not labels, '
                         "and their order is not that of the class folders: give the kit's meta.mat, or a table of lines "
                         "'ID CLASS', by -synsets FILE; or labels by name (-h)")
    if len(lines) != len(pictures):
        raise ValueError(f'{labels_file} has {len(lines)} lines, and there are {len(pictures)} pictures')
    table = read_synsets(synsets)
    unknown = {line[0] for line in lines} - table.keys()
    if unknown:
        raise ValueError(f'{synsets} does not say what class {min(unknown)} is')
    strange = {*table.values()} ^ {*names}
    if strange:
        raise ValueError(f'{synsets} and the class folders of train/ differ in {len(strange)} classes, such as {min(strange)}')
    return {picture: table[line[0]] for picture, line in zip(pictures, lines)}


def read_synsets(path):
    """ImageNet's ids, as text -> class folders: of a meta.mat, or of lines 'ID CLASS' or 'CLASS ID'."""
    if path.endswith('.mat'):
        try:
            from scipy.io import loadmat
        except ImportError:
            raise ValueError(f'{path}: reading it needs scipy (pip install scipy); a table of text lines does not') from None
        try:
            rows = loadmat(path, squeeze_me=True)['synsets']
            return {str(row['ILSVRC2012_ID']): str(row['WNID']) for row in rows if row['num_children'] == 0}
        except OSError:
            raise
        except Exception as error:                  # scipy may raise nearly anything for a damaged file
            problem = f'{type(error).__name__}: {error}'
            raise ValueError(f"{path}: not the meta.mat of ImageNet's development kit ({problem})") from None
    table = {}
    for line in read_lines(path):
        number, name = line[:2] if line[0].isdecimal() else (line + [''])[1::-1]
        if not number.isdecimal() or not name or number in table:
            raise ValueError(f"{path}: expected lines 'ID CLASS' or 'CLASS ID', each id once, found {' '.join(line)}")
        table[number] = name
    return table


# ---- what is written

def as_list(samples):
    """(path, label) pairs as a list file. Raises ValueError for a name that such a file cannot hold."""
    check_names(path for path, _ in samples)
    return ''.join(f'{path} {label}\n' for path, label in samples)


def check_names(names):
    """Raise ValueError for a name, of a file or a class, that a line of a list cannot hold."""
    for name in names:
        if name != name.strip() or name.startswith('#') or FORBIDDEN.search(name):
            raise ValueError(f'{ascii(name)}: a list cannot hold a name that starts with # or has spaces around it or control '
                             'characters or line separators; rename it')
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f'{visible(name)}: a list is UTF-8 text, and this name is not; rename it') from None


def make_lists(folder, share=None, seed=0, val_labels=None, synsets=None):
    """Return class names, training list, validation list of a folder, as the help says, and lines about what is not in them.

    Raises ValueError, OSError.
    """
    train_part, val_part = find_layout(folder)
    if not train_part and (val_labels or synsets) or train_part and share is not None or synsets and not val_labels:
        raise ValueError(f'{folder} has {"" if train_part else "no "}train/: -val_labels, and -synsets with it, are for a folder '
                         'with train/ and val/, -val_share for one without')
    if not train_part:
        parts, found = search(folder)
        loose = sum('/' not in path for path in parts[''])
        names, train, val = split_lists(parts[''], 0.2 if share is None else share, seed)
    else:
        parts, found = search(folder, (train_part, val_part))
        loose = sum('/' not in path for path in parts[train_part])
        names = list(by_class(parts[train_part]))
        train = part_list(train_part, parts[train_part], names)
        refuse_nested_splits(f'{folder}/{train_part}', parts[train_part])
        if val_labels:
            val = flat_list(val_part, parts[val_part], names, val_labels, synsets)
        else:
            val = part_list(val_part, parts[val_part], names)
            if not val:
                raise ValueError(f'{folder}/{val_part} has no class folders with pictures; where it is flat, -val_labels FILE '
                                 f'says what its images show (-h){found.explain("; left out: ")}')
    if loose:
        found.left_out['images in no class folder'] += loose
    if len(names) < 2:
        raise ValueError(f'{folder}: expected a subfolder with pictures per class, found {len(names)}'
                         f'{found.explain("; left out: ")}')
    if not val:
        raise ValueError(f'{folder}: no class has two images, so none can be held out for validation')
    return names, train, val, remarks(folder, names, val, found, train_part, val_part)


def refuse_nested_splits(where, images):
    """Raise ValueError for a class folder that is named as a split and has its images only in subfolders."""
    for name, paths in by_class(images).items():
        if name.lower() in {*TRAIN, *VALIDATION[0], *VALIDATION[1]} and all(path.count('/') > 1 for path in paths):
            raise ValueError(f'{where}/{name} looks like a split in a split; name the folder that holds the class folders, or '
                             'rename it if it is a class')


def remarks(folder, names, val, found, train_part, val_part):
    """Say in lines what is not in the lists, and which classes have no image for validation or none at all."""
    lines = [found.explain('left out: ')] if found.left_out else []
    known, labels = {*names}, {label for _, label in val}
    others = set(subfolders(folder)) - {train_part, val_part} if train_part else ()
    for text, listed in (
            ('folders without images, which are no classes',
             [name for name in map(name_of_file, subfolders(os.path.join(folder, train_part))) if name not in known]),
            ('classes without a validation image', [name for label, name in enumerate(names) if label not in labels]),
            ('folders that are not listed', sorted(others))):
        if listed:
            more = f' and {len(listed) - SHOWN} more' if len(listed) > SHOWN else ''
            lines.append(f'{text}: {", ".join(listed[:SHOWN])}{more}')
    return lines


def parser():
    parser = cli.Parser(__doc__)
    parser.add_argument('folder', metavar='FOLDER', help='the images; the lists are written here, and it becomes -data_path')
    parser.add('val_share', 'share of each class that is held out, where there is no val/ (default: 0.2)', type=float,
               metavar='X')
    parser.add('seed', 'decides which images are held out', type=int, default=0, metavar='N')
    parser.add('val_labels', 'what the images of a flat val/ show', metavar='FILE')
    parser.add('synsets', 'what the ids in that file mean', metavar='FILE')
    parser.add('force', 'replace lists that are there and differ', action='store_true')
    return parser


def main(args):
    if not os.path.isdir(args.folder):
        raise ValueError(f'{args.folder}: no such folder')
    if args.val_share is not None and not 0 < args.val_share < 1 or args.seed < 0:
        raise ValueError(f'-val_share {args.val_share} -seed {args.seed}: the share must lie between 0 and 1, and the seed '
                         'cannot be negative')
    names, train, val, lines = make_lists(args.folder, args.val_share, args.seed, args.val_labels, args.synsets)
    names = readable(names)
    check_names(names)
    files = {'train_list.txt': as_list(train), 'val_list.txt': as_list(val),
             'class_names.txt': ''.join(f'{name}\n' for name in names)}
    for name, text in files.items():
        path = os.path.join(args.folder, name)
        if os.path.exists(path) and not args.force:
            with open(path, encoding='utf-8', errors='replace', newline='') as file:
                if file.read() != text:
                    raise ValueError(f'{path} is there already, and differs; -force replaces it')
    for name, text in files.items():
        cli.write_text(os.path.join(args.folder, name), text)
    print(f'{args.folder}: {len(names)} classes, {len(train)} training and {len(val)} validation images')
    print(visible('\n'.join(lines)), end='\n' if lines else '')
    print(f'train with -data_path {args.folder} -opts MODEL.NUM_CLASSES {len(names)}')
    return 0


if __name__ == '__main__':
    parser().run(main)
