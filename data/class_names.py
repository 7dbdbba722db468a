"""Class names: the text files that hold them, and the choice of the file for the labels of a model."""
import os
from collections.abc import Sequence
from typing import Callable, Optional

from data import archives
from data.list_file import read_lines, read_list

FILE = 'class_names.txt'                            # one name per line, in the order of the labels
IMAGENET = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'imagenet_classes.txt')
IMAGENET_CLASSES = 1000


def read_names(path: str) -> list[str]:
    """Read a file of class names. Raises as list_file.read_lines."""
    return read_lines(path, 'a class name per line')


def imagenet_classes() -> dict[str, str]:
    """Return ImageNet's 1000 classes in the order of its labels: {WordNet id: names, the usual one
    first}."""
    return dict(line.split(' ', 1) for line in read_names(IMAGENET))


def readable(names: list[str]) -> list[str]:
    """Replace WordNet ids by ImageNet's words, if all of `names` are such ids."""
    words = imagenet_classes()
    if not all(name in words for name in names):
        return names
    return [words[name].split(', ')[0] for name in names]


def find(count: int, *, file: Optional[str] = None, run_folder: str = '', data_path: str = '',
         warn: Callable[[str], None] = lambda text: None) -> Optional[list[str]]:
    """Return the `count` class names of a model in the order of its labels, or None.

    The first of these sources decides:
      1. `file`, which the user has named;
      2. class_names.txt of `run_folder`, where training has put it beside the weights;
      3. the data folder: its class_names.txt, or its class folders, if they name `count` classes;
      4. ImageNet's names for 1000 classes.
    The data may have changed since the training, so it decides only for weights without names.
    A class_names.txt with another number of names, or one that cannot be read, is reported by `warn`.
    The result is then None, for the file may belong to other labels.
    Raises ValueError for a `file` with another number of names.
    """
    if file:
        names = read_names(file)
        if len(names) != count:
            raise ValueError(f'{file}: {len(names)} names for {count} classes; it needs one per line, '
                             'in the order of the labels')
        return names
    for folder in (run_folder, data_path):
        path = os.path.join(folder, FILE)
        if not archives.is_file(path):
            continue
        names, problem = _try_read(path, count)
        if not problem:
            return names
        warn(f'{problem}; it is not used, and labels are shown as numbers')
        return None
    of_folders = names_of_folders(data_path, count)
    if not of_folders and count == IMAGENET_CLASSES:
        return imagenet_names()
    return of_folders


def _try_read(path: str, count: int) -> tuple[list[str], str]:
    """Return the names in a file, and the reason why they cannot name `count` classes, or ''."""
    try:
        names = read_names(path)
    except (ValueError, OSError) as error:
        return [], str(error)
    if len(names) != count:
        return names, f'{path}: {len(names)} names for {count} classes'
    return names, ''


def imagenet_names() -> list[str]:
    """Return the usual name of each of ImageNet's classes, in the order of its labels."""
    return [names.split(', ')[0] for names in imagenet_classes().values()]


def names_of_folders(data_path: str, count: int) -> Optional[list[str]]:
    """Return the class folders of a data folder, if each of `count` labels has a folder of its own."""
    for list_name in ('val_list.txt', 'train_list.txt'):
        folders = _folders(os.path.join(data_path, list_name), data_path, count)
        names: list[str] = []
        for label in sorted(folders):
            if len(folders[label]) == 1:
                names += folders[label]
        if len(names) == len({*names}) == count > 1:
            return readable(names)
    return None


def _folders(list_file: str, data_path: str, count: int) -> dict[int, set[str]]:
    """Return {label: folders of its images} of a list file; {} if it is missing or has a bad line."""
    found: dict[int, set[str]] = {}
    try:
        samples = read_list(list_file, data_path, count)
    except (OSError, ValueError):
        return {}
    for index, label in enumerate(samples.labels.tolist()):
        folder = os.path.basename(os.path.dirname(samples.name(index)))
        found.setdefault(label, set()).add(folder)
    return found


def run_folder_of(weights: str) -> str:
    """Return the run folder that a weight file lies in; checkpoints are one folder deeper."""
    folder = os.path.dirname(weights)
    return os.path.dirname(folder) if os.path.basename(folder) == 'checkpoints' else folder


def for_a_run(data_path: str, count: int) -> Optional[list[str]]:
    """Return the names for a run of `count` classes, or None if the data folder has no file of names.

    Labels that the file does not reach are called 'class N'.
    Raises ValueError if it has more than `count` names.
    """
    path = os.path.join(data_path, FILE)
    if not archives.is_file(path):
        return None
    names = read_names(path)
    if len(names) > count:
        raise ValueError(f'{path}: {len(names)} names for {count} classes')
    return names + numbered(count)[len(names):]


def of_a_subset(data_path: str, count: int, classes: Sequence[int]) -> Optional[list[str]]:
    """Return names for a model of `count` classes, of which the data have `classes`, by their labels.

    ImageNet's classes have their usual names. All others are called 'class N', also where the data folder has
    no name for each of `classes`. The result is None if it has no file of names.
    """
    path = os.path.join(data_path, FILE)
    if not archives.is_file(path):
        return None
    names = read_names(path)
    if count == IMAGENET_CLASSES and {*readable(names)} <= {*imagenet_names()}:
        return imagenet_names()
    found = numbered(count)
    if len(names) == len(classes):
        for label, name in zip(classes, names):
            found[label] = name
    return found


def numbered(count: int) -> list[str]:
    """Return 'class 0', 'class 1', ... for classes without names."""
    return [f'class {label}' for label in range(count)]


def first_difference(ours: list[str], others: list[str]) -> str:
    """Return in words where two lists of class names differ first, or ''."""
    if len(ours) != len(others):
        return f'{len(ours)} and {len(others)} names'
    for label, (one, other) in enumerate(zip(ours, others)):
        if one != other:
            return f'label {label} is {one!r} and {other!r}'
    return ''
