"""Measure the images/s that a processor core reads and augments, by DATA.BACKEND and augmentation.

  taskset -c 0 .venv/bin/python dev/bench_pipeline.py -folder imagenet

DIR has a train_list.txt. Without it, 300 photographs of 500x375 are made from scikit-learn's two, in a
temporary folder. The time is that of the processor, which other jobs on the machine lengthen less than that
of the clock. Quote medians of several calls, made in turn with those to compare with.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import cli

import numpy as np
from PIL import Image

import datasets
from config import get_config

AUGMENTATIONS: dict[str, list] = {
    'crop, flip': [],
    'crop, flip, colour jitter 0.4': ['TRAIN.COLOR_JITTER', 0.4],
    'crop, flip, rand-m9-mstd0.5-inc1': ['TRAIN.AUTO_AUGMENT', 'rand-m9-mstd0.5-inc1'],
}
BACKENDS = ('pillow', 'cv2')
COUNT = 150                                         # images per measurement


def make_photos(folder: str, count: int = 300, width: int = 500, height: int = 375) -> None:
    """Write `count` JPEG files of quality 92 and a train_list.txt: changed parts of two photographs.

    At 500x375 they have about 75 KB.
    """
    from sklearn.datasets import load_sample_images
    sources = [Image.fromarray(image) for image in load_sample_images().images]      # 640x427
    rng = np.random.default_rng(0)
    for i in range(count):
        h = int(rng.uniform(360, 427))
        w = min(640, h * width // height)
        left, top = rng.integers(640 - w + 1), rng.integers(427 - h + 1)
        part = sources[i % 2].crop((left, top, left + w, top + h))
        pixels = np.asarray(part.resize((width, height), Image.Resampling.LANCZOS)) - 128.0
        pixels = pixels * rng.uniform(0.7, 1.1) + 128 + rng.uniform(-25, 25, 3)
        pixels += rng.normal(0, rng.uniform(2, 7), (height, width, 1)) + rng.normal(0, 1, pixels.shape)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(os.path.join(folder, f'{i:03}.jpg'), quality=92)
    with open(os.path.join(folder, 'train_list.txt'), 'w', encoding='utf-8') as file:
        file.write(''.join(f'{i:03}.jpg {i % 10}\n' for i in range(count)))


def dataset(folder: str, backend: str, options: list, size: int) -> Any:
    """Return the dataset of a training with a backend and options of an augmentation."""
    config = get_config(None, [
        'DATA.DATA_PATH', folder, 'DATA.BATCH_SIZE', 1, 'DATA.IMAGE_SIZE', size, 'DATA.BACKEND', backend,
        *options])
    return datasets.build_train(config).dataset


def images_per_second(data: Any, runs: int) -> tuple[float, float]:
    """Return the median speed over `runs` batches, in images/s of processor time and of the clock."""
    count = min(COUNT, len(data))
    data.batch([(0, i) for i in range(count)])      # warms up
    by_cpu, by_clock = [], []
    for epoch in range(runs):
        cpu, clock = time.process_time(), time.perf_counter()
        data.batch([(epoch, i) for i in range(count)])
        by_cpu.append(count / (time.process_time() - cpu))
        by_clock.append(count / (time.perf_counter() - clock))
    return statistics.median(by_cpu), statistics.median(by_clock)


def difference(folder: str, options: list, size: int) -> tuple[float, float, int]:
    """Return mean, 99.9th percentile and maximum of the difference of the backends' pixels, 0 to 255."""
    one, other = (dataset(folder, backend, options, size) for backend in BACKENDS)
    differences = np.abs([one[0, i][0].astype(int) - other[0, i][0] for i in range(min(COUNT, len(one)))])
    return differences.mean(), np.percentile(differences, 99.9), differences.max()


def parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add('folder', 'a folder with a train_list.txt (default: photographs that are made)', metavar='DIR')
    parser.add('runs', 'times that each is measured', type=int, default=4, metavar='N')
    parser.add('size', 'side of the crops, pixels', type=int, default=224, metavar='N')
    return parser


def main(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        if not args.folder:
            make_photos(folder)
        for name, options in AUGMENTATIONS.items():
            for backend in BACKENDS:
                cpu, clock = images_per_second(dataset(folder, backend, options, args.size), args.runs)
                print(f'{name:34} {backend:7} {cpu:7.1f} images/s of processor time '
                      f'{clock:7.1f} of the clock', flush=True)
            mean, high, most = difference(folder, options, args.size)
            print(f'{name:34} differ by {mean:.2f} on average, {high:.0f} at 99.9 %, {most} at most')
    return 0


if __name__ == '__main__':
    parser().run(main)
