"""Read the files of an evaluation's protocol: a subset of the classes, several right labels."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data import class_names
from data.list_file import ImageList, read_lines

NUMBERED = re.compile(r'_val_(\d{8})\b')            # the number of an image of ImageNet's validation set
LABELS_FORMAT = ('{"name of an image": [its right labels], ...}, or a list of lists in the order of '
                 "ImageNet's validation images")


@dataclass(frozen=True)
class Protocol:
    """The classes and the right labels of an evaluation; None where it has them from the list."""

    classes: np.ndarray | None = None               # (k,) int64, the model's classes that take part
    right: np.ndarray | None = None                 # (N, M) int64 labels of each image; -1 where it has fewer

    def judged(self) -> list[int] | None:
        """Return the indices of the images that have a right label, or None for all."""
        return None if self.right is None else np.flatnonzero(self.right[:, 0] >= 0).tolist()


def read(classes_file: str, labels_file: str, samples: ImageList, num_classes: int,
         weights: str) -> tuple[ImageList, Protocol]:
    """Read the files of DATA.EVAL_CLASSES and DATA.EVAL_LABELS; '' stands for none.

    Returns the samples and the protocol, all with the labels of the model. `weights` is the weight file,
    for its class names. Raises OSError, and ValueError for a file that does not fit the model or the list.
    """
    classes, right = None, None
    if classes_file:
        classes = read_classes(classes_file, num_classes, weights)
        largest = int(samples.labels.argmax())
        if samples.labels[largest] >= len(classes):
            raise ValueError(f'{samples.where(largest)}: label {samples.labels[largest]}, but {classes_file} '
                             f'has {len(classes)} lines, for the labels from 0; add the line of this class')
    if labels_file:
        right = read_right_labels(labels_file, samples, num_classes if classes is None else len(classes))
    if classes is not None:
        samples = replace(samples, labels=classes[samples.labels])
        if right is not None:
            right = np.where(right < 0, right, classes[right])
    return samples, Protocol(classes, right)


# ---- a subset of the classes

def read_classes(path: str, num_classes: int, weights: str = '') -> np.ndarray:
    """Return the class of the model for each label of a list: (k,) int64, of the lines of a text file.

    A line is a label of the model, a class name in the class_names.txt beside the weights, or for 1000
    classes a WordNet id or ImageNet's name. Raises OSError, and ValueError with the file and the line.
    """
    labels = known_classes(num_classes, weights)
    seen: dict[int, str] = {}
    for line in read_lines(path, 'a class per line'):
        if line not in labels:
            raise ValueError(f'{path}: {line[:80]!r} is no class of the model: a label in '
                             f'0..{num_classes - 1}, a name in the class_names.txt beside the weights, or '
                             "for 1000 classes a WordNet id or ImageNet's name")
        label = labels[line]
        if label in seen:
            raise ValueError(f'{path}: {seen[label][:80]!r} and {line[:80]!r} are the same class, label '
                             f'{label}; each class has one line')
        seen[label] = line
    if not seen:
        raise ValueError(f'{path}: the file is empty; expected a class per line')
    return np.array(list(seen), np.int64)


def known_classes(num_classes: int, weights: str) -> dict[str, int]:
    """Return the labels of a model by all texts that name them."""
    labels = {str(label): label for label in range(num_classes)}
    if num_classes == class_names.IMAGENET_CLASSES:
        for names in (class_names.imagenet_names(), class_names.imagenet_classes()):
            labels.update((name, label) for label, name in enumerate(names))
    path = os.path.join(class_names.run_folder_of(weights), class_names.FILE)
    if weights and os.path.isfile(path):
        names = class_names.read_names(path)
        if len(names) == num_classes:
            labels.update((name, label) for label, name in enumerate(names))
    return labels


# ---- several right labels

def read_right_labels(path: str, samples: ImageList, num_classes: int) -> np.ndarray:
    """Return the right labels of each image of a list, (N, M) int64; -1 fills the ends of the rows.

    Raises OSError, and ValueError for another format, an image without an entry, and a wrong label.
    """
    content = read_json(path)
    if isinstance(content, list):
        content = {f'{number:08}': labels for number, labels in enumerate(content, 1)}
        found = [labels_of(path, content, number_of(path, samples, i), num_classes, samples.where(i))
                 for i in range(len(samples))]
    elif isinstance(content, dict):
        found = [labels_of(path, content, samples.name(i), num_classes, samples.where(i))
                 for i in range(len(samples))]
    else:
        raise ValueError(f'{path}: expected JSON, {LABELS_FORMAT}')
    most = max(len(labels) for labels in found)
    if not most:
        raise ValueError(f'{path}: no image of {samples.list_file} has a right label there')
    right: np.ndarray = np.full((len(found), most), -1, np.int64)
    for row, labels in zip(right, found):
        row[:len(labels)] = labels
    return right


def read_json(path: str) -> Any:
    """Read a JSON file. Raises OSError, and ValueError with the file if it is none."""
    with open(path, encoding='utf-8-sig') as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:                        # UnicodeDecodeError is one
            reason = ' '.join(str(error).split())[:100]
            raise ValueError(f'{path}: not JSON ({reason}); expected {LABELS_FORMAT}') from None


def number_of(path: str, samples: ImageList, index: int) -> str:
    """Return the 8 digits in the name of one of ImageNet's validation images."""
    number = NUMBERED.search(samples.name(index))
    if not number:
        raise ValueError(f'{path} is a list in the order of ILSVRC2012_val_00000001 and so on, and '
                         f'{samples.where(index)} names no such image; write a JSON object with names')
    return number[1]


def labels_of(path: str, content: Mapping[str, Any], name: str, num_classes: int, where: str) -> list[int]:
    """Return the right labels of the image `name`, by its path in the list or by its file name alone."""
    labels = content.get(name, content.get(os.path.basename(name)))
    if labels is None:
        raise ValueError(f'{path} has no entry for {name}, the image of {where}; an image without a right '
                         'label has []')
    if not isinstance(labels, list):
        raise ValueError(f'{path}: {name} has {str(labels)[:40]!r}; expected a list of labels')
    for label in labels:
        if type(label) is not int or not 0 <= label < num_classes:
            raise ValueError(f'{path}: {name} has the label {str(label)[:40]!r}; expected whole numbers in '
                             f'0..{num_classes - 1}')
    return labels
