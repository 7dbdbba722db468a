"""Write scikit-learn's handwritten digits as an image folder with train_list.txt and val_list.txt.

They are 1,797 real scans of 8x8 pixels (Alpaydin and Kaynak, UCI 1998) that come with scikit-learn; nothing
is downloaded. The split is random, so both parts have digits of the same writers. It shows that training
works, and is no benchmark.
"""
import argparse
import io
import os
import sys
from collections.abc import Sequence
from operator import methodcaller
from typing import Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system import files, packages  # noqa: F401  packages reports a missing one

import numpy as np
from PIL import Image


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits: images (1797, 8, 8) uint8 and labels (1797,).

    Its 17 grey levels are scaled to 0 to 255.
    """
    from sklearn.datasets import load_digits
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices for training and validation, each ascending.

    In a fixed random order, every fifth image of each class is for validation.
    """
    order = np.random.RandomState(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind='stable')]
    return np.sort(np.delete(order, np.s_[::5])), np.sort(order[::5])


def digit_files(images: np.ndarray, labels: np.ndarray) -> dict[str, bytes]:
    """Return the folder's content, {relative path: bytes}: images, named by their index, and lists."""
    pictures, lists = {}, {}
    for part, indices in zip(('train', 'val'), split(labels)):
        lines = []
        for i in indices:
            path = f'{part}/{labels[i]}/{i:04d}.png'
            buffer = io.BytesIO()
            Image.fromarray(images[i]).save(buffer, 'PNG')
            pictures[path] = buffer.getvalue()
            lines.append(f'{path} {labels[i]}\n')
        lists[f'{part}_list.txt'] = ''.join(lines).encode()
    names = ''.join(f'{digit}\n' for digit in range(10))
    return {**pictures, **lists, 'class_names.txt': names.encode()}


def write_files(folder: str, contents: dict[str, bytes]) -> None:
    """Write {relative path: content} into `folder`.

    Files that are right stay untouched, so the next run finishes an interrupted one.
    """
    for name, content in contents.items():
        path = os.path.join(folder, name)
        try:
            with open(path, 'rb') as file:
                if file.read() == content:
                    continue
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        files.atomic_write(path, methodcaller('write', content))


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', metavar='DIR', nargs='?', default='demo/digits',
                        help='where to write (default: demo/digits)')
    folder = parser.parse_args(argv).folder
    try:
        contents = digit_files(*read_digits())
    except ImportError as error:
        parser.error(f'{error}; scikit-learn holds the digits: pip install -r requirements-dev.txt')
    try:
        write_files(folder, contents)
    except OSError as error:
        parser.error(f'cannot write {folder}: {error}')
    train = contents['train_list.txt'].count(b'\n')
    val = contents['val_list.txt'].count(b'\n')
    print(f'{folder}: {train} training and {val} validation images of 10 digits')


if __name__ == '__main__':
    main()
