"""Images/s that one processor core reads and augments for training, by DATA.BACKEND and augmentation.

  taskset -c 0 .venv/bin/python dev/bench_pipeline.py -folder imagenet

DIR has a train_list.txt; without it 300 photographs of 500x375 are made from scikit-learn's two, in a folder that is removed.
Counts processor seconds, which other jobs on the machine lengthen less than those of the clock. Quote medians of several
calls, made in turn with what they are compared with.
"""
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import cli

import numpy as np
from PIL import Image

import datasets
from config import get_config

AUGMENTATIONS = {
    'crop, flip': [],
    'crop, flip, colour jitter 0.4': ['TRAIN.COLOR_JITTER', 0.4],
    'crop, flip, rand-m9-mstd0.5-inc1': ['TRAIN.AUTO_AUGMENT', 'rand-m9-mstd0.5-inc1'],
}
BACKENDS = ('pillow', 'cv2')


def make_photos(folder, count=300, width=500, height=375):
    """`count` JPEG files of quality 92 and about 75 KB (at 500x375), and a train_list.txt: parts of two photographs, with
    other colours and sensor noise."""
    from sklearn.datasets import load_sample_images
    sources = [Image.fromarray(image) for image in load_sample_images().images]      # 640x427
    rng = np.random.default_rng(0)
    for i in range(count):
        h = int(rng.uniform(360, 427))
        w = min(640, h * width // height)
        left, top = rng.integers(640 - w + 1), rng.integers(427 - h + 1)
        image = sources[i % 2].crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.LANCZOS)
        pixels = (np.asarray(image) - 128.0) * rng.uniform(0.7, 1.1) + 128 + rng.uniform(-25, 25, 3)
        pixels += rng.normal(0, rng.uniform(2, 7), (height, width, 1)) + rng.normal(0, 1, pixels.shape)
        pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(os.path.join(folder, f'{i:03}.jpg'), quality=92)
    with open(os.path.join(folder, 'train_list.txt'), 'w', encoding='utf-8') as file:
        file.write(''.join(f'{i:03}.jpg {i % 10}\n' for i in range(count)))


def dataset(folder, backend, options, size):
    config = get_config(None, ['DATA.DATA_PATH', folder, 'DATA.BATCH_SIZE', 1, 'DATA.IMAGE_SIZE', size, 'DATA.BACKEND', backend,
                               *options])
    return datasets.build_train(config).dataset


def images_per_second(data, runs, count=150):
    """Median over `runs` of batches of `count` images, in images per second of processor time and of the clock."""
    count = min(count, len(data))
    data.batch([(0, i) for i in range(count)])
    rates = []
    for epoch in range(runs):
        cpu, clock = time.process_time(), time.perf_counter()
        data.batch([(epoch, i) for i in range(count)])
        rates.append((count / (time.process_time() - cpu), count / (time.perf_counter() - clock)))
    return [statistics.median(column) for column in zip(*rates)]


def difference(folder, options, size, count=150):
    """Mean, 99.9th percentile and maximum of what the backends' pixels differ by, 0 to 255, over `count` images."""
    both = [dataset(folder, backend, options, size) for backend in BACKENDS]
    pairs = [[data[0, i][0].astype(int) for data in both] for i in range(min(count, len(both[0])))]
    differences = np.abs([one - other for one, other in pairs])
    return differences.mean(), np.percentile(differences, 99.9), differences.max()


def parser():
    parser = cli.Parser(__doc__)
    parser.add('folder', 'a folder with a train_list.txt (default: photographs that are made)', metavar='DIR')
    parser.add('runs', 'times that each is measured', type=int, default=4, metavar='N')
    parser.add('size', 'side of the crops, pixels', type=int, default=224, metavar='N')
    return parser


def main(args):
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        if not args.folder:
            make_photos(folder)
        for name, options in AUGMENTATIONS.items():
            for backend in BACKENDS:
                cpu, clock = images_per_second(dataset(folder, backend, options, args.size), args.runs)
                print(f'{name:34} {backend:7} {cpu:7.1f} images/s of processor time {clock:7.1f} of the clock', flush=True)
            print(f'{name:34} differ by %.2f on average, %.0f at 99.9 %%, %d at most' % difference(folder, options, args.size))
    return 0


if __name__ == '__main__':
    parser().run(main)
