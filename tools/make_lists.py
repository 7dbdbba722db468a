"""Write train_list.txt, val_list.txt and class_names.txt for a folder of images, as training and evaluation read them.

A folder with one subfolder per class is split by chance, the same for the same -seed and stratified by class. A folder with
train/ and val/ is taken as it is; a flat val/, as ImageNet's, needs -val_labels. Labels count the class folders in the
order of their names, as everywhere (ImageNet's: n01440764 is 0). Only list files are written; images stay where they are.

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

from tools import cli  # noqa: E402  isort: skip  (first: it reports a missing package)

import numpy as np  # noqa: E402

from class_names import readable  # noqa: E402


def class_folders(folder):
    """Names of the subfolders of `folder` that hold pictures, sorted, and {name: relative paths of its pictures}."""
    content = {entry.name: cli.pictures_below(entry.path) for entry in os.scandir(folder)
               if entry.is_dir() and not entry.name.startswith('.')}
    return {name: content[name] for name in sorted(content) if content[name]}


def split(count, share, rng):
    """Which of `count` images are for validation: `share` of them, at least one where there are two, and never all."""
    held = min(max(round(share * count), 1), count - 1)
    return {*rng.permutation(count)[:held].tolist()}


def split_lists(folder, share, seed):
    """One folder per class -> class names, training and validation lists of (path, label)."""
    content = class_folders(folder)
    train, val = [], []
    for label, (name, pictures) in enumerate(content.items()):
        held = split(len(pictures), share, np.random.default_rng([seed, label]))
        for i, picture in enumerate(pictures):
            (val if i in held else train).append((f'{name}/{picture}', label))
    return list(content), train, val


def part_list(folder, part, names):
    """The list of FOLDER/part with one folder per class; `names` are the classes. Raises ValueError for another class."""
    content = class_folders(os.path.join(folder, part))
    unknown = [name for name in content if name not in names]
    if unknown:
        raise ValueError(f'{folder}/{part} has {len(unknown)} classes that {folder}/train has not: ' + ', '.join(unknown[:5]))
    labels = {name: label for label, name in enumerate(names)}
    return [(f'{part}/{name}/{picture}', labels[name]) for name in content for picture in content[name]]


# ---- a flat folder and its labels

def flat_list(folder, names, labels_file, synsets):
    """The list of a flat FOLDER/val, whose labels `labels_file` tells. Raises ValueError where the two do not fit."""
    pictures = sorted(name for name in os.listdir(os.path.join(folder, 'val')) if cli.is_picture(name))
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
                             f'folders of {folder}/train nor a label in 0..{len(names) - 1}')
        result.append((f'val/{picture}', label))
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
            raise ValueError(f"{path}: not the meta.mat of ImageNet's development kit ({cli.reason(error)})") from None
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
        if name != name.strip() or name.startswith('#') or not name.isprintable():
            raise ValueError(f'{ascii(name)}: a list cannot hold a name that starts with # or has spaces around it or control '
                             'characters; rename it')


def make_lists(folder, share=None, seed=0, val_labels=None, synsets=None):
    """(class names, training list, validation list) of a folder, as the help says. Raises ValueError, OSError."""
    split = not os.path.isdir(os.path.join(folder, 'train'))
    if split and (val_labels or synsets) or not split and share is not None or synsets and not val_labels:
        raise ValueError(f'{folder} has {"no " if split else ""}train/: -val_labels, and -synsets with it, are for a folder with '
                         'train/ and val/, -val_share for one without')
    if split:
        names, train, val = split_lists(folder, 0.2 if share is None else share, seed)
    else:
        names = list(class_folders(os.path.join(folder, 'train')))
        train = part_list(folder, 'train', names)
        if not os.path.isdir(os.path.join(folder, 'val')):
            raise ValueError(f'{folder} has train/ and no val/; name {folder}/train itself to split it')
        if val_labels:
            val = flat_list(folder, names, val_labels, synsets)
        else:
            val = part_list(folder, 'val', names)
            if not val:
                raise ValueError(f'{folder}/val has no class folders with pictures; where it is flat, -val_labels FILE says what '
                                 'its images show (-h)')
    if len(names) < 2:
        raise ValueError(f'{folder}: expected a subfolder with pictures per class, found {len(names)} ({" ".join(cli.PICTURES)})')
    if not val:
        raise ValueError(f'{folder}: no class has two images, so none can be held out for validation')
    return names, train, val


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
    names, train, val = make_lists(args.folder, args.val_share, args.seed, args.val_labels, args.synsets)
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
    print(f'train with -data_path {args.folder} -opts MODEL.NUM_CLASSES {len(names)}')
    return 0


if __name__ == '__main__':
    parser().run(main)
