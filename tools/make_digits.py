"""Write scikit-learn's handwritten digits as an image folder with train_list.txt and val_list.txt.

They are 1,797 real scans of 8x8 pixels (Alpaydin and Kaynak, UCI 1998) that come with scikit-learn: nothing is downloaded.
The split is ours and random, so both parts hold digits of the same writers: it shows that training works, and is no benchmark.
"""
import argparse
import io
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system import files, packages  # noqa: F401  packages reports a missing one

import numpy as np
from PIL import Image


def read_digits():
    """scikit-learn's digits: images (1797, 8, 8) uint8, its 17 grey levels spread over 0 to 255, and labels (1797,)."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


def split(labels):
    """Indices (train, val), each ascending: every fifth image of each class in a fixed random order is for validation."""
    order = np.random.RandomState(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind='stable')]
    return np.sort(np.delete(order, np.s_[::5])), np.sort(order[::5])


def digit_files(images, labels):
    """The folder's content, {relative path: bytes}: a PNG per image, named by its index in `images`, then the lists."""
    files, lists = {}, {}
    for part, indices in zip(('train', 'val'), split(labels)):
        lines = []
        for i in indices:
            path = f'{part}/{labels[i]}/{i:04d}.png'
            buffer = io.BytesIO()
            Image.fromarray(images[i]).save(buffer, 'PNG')
            files[path] = buffer.getvalue()
            lines.append(f'{path} {labels[i]}\n')
        lists[f'{part}_list.txt'] = ''.join(lines).encode()
    return {**files, **lists, 'class_names.txt': ''.join(f'{digit}\n' for digit in range(10)).encode()}


def write_files(folder, contents):
    """Make `folder` hold {name: content}; what is right already stays, so the next run finishes an interrupted one."""
    for name, content in contents.items():
        path = os.path.join(folder, name)
        try:
            with open(path, 'rb') as file:
                if file.read() == content:
                    continue
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        files.atomic_write(path, lambda file, content=content: file.write(content))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', metavar='DIR', nargs='?', default='demo/digits', help='where to write (default: demo/digits)')
    folder = parser.parse_args(argv).folder
    try:
        contents = digit_files(*read_digits())
    except ImportError as error:
        parser.error(f'{error}; scikit-learn holds the digits: pip install -r requirements-dev.txt')
    try:
        write_files(folder, contents)
    except OSError as error:
        parser.error(f'cannot write {folder}: {error}')
    train, val = (contents[f'{part}_list.txt'].count(b'\n') for part in ('train', 'val'))
    print(f'{folder}: {train} training and {val} validation images of 10 digits')


if __name__ == '__main__':
    main()
