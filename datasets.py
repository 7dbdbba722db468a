"""From a list file to batches: reading images, their transforms, the order, the loaders.

A sample is named (epoch, index). Its order, crop and colours are functions of the seed and that name, so a run can stop
and go on at any batch, with another number of processes or workers, and see the same pictures. With repeated augmentation
copy c of image i has the index i + c * len(list).
"""
import math
import multiprocessing
import os
import signal
import threading
import warnings
from contextlib import suppress
from functools import partial
from operator import itemgetter
from typing import Any, Optional, Union

from system import lifeline, stopping
import utils

import numpy as np
import paddle
from PIL import Image

from data import augment, class_names, generators, image_files
from data.list_file import ImageList, read_list
from data.operations import PILLOW, Backend

Policy = Union[augment.RandAugment, augment.AutoAugment]
IDLE = -1                                           # instead of the index of an image that is read
LISTS = ('train_list.txt', 'val_list.txt')
ANY_LABEL = 10 ** 9                                  # more than any list has
WORKER_PATIENCE = 10                                # seconds a worker gets to finish its batch when nobody wants it any more


class DataError(ValueError):
    """An image that cannot be read, and DATA.ON_ERROR does not allow to leave it out."""


# Pixels

def choose_backend(name: str) -> Backend:
    """Return the backend of DATA.BACKEND, pillow or cv2. Raises ValueError without OpenCV."""
    if name == 'pillow':
        return PILLOW
    try:
        from data import opencv
    except ImportError as error:
        raise ValueError(f'DATA.BACKEND is cv2, but OpenCV is not usable here ({error}); install it by '
                         "python -m pip install 'opencv-python-headless>=4.10,<6', "
                         'or set DATA.BACKEND pillow') from None
    return opencv.OpenCVBackend()


def eval_pixels(image: Image.Image, image_size: int, crop_pct: float, background: str = image_files.BACKGROUND) -> np.ndarray:
    """A PIL image of any mode -> uint8 (H, W, 3): shorter side to floor(image_size / crop_pct), bicubic, then the centre.

    Equal to torchvision's Resize and CenterCrop as timm combines them, pixel by pixel; for images of another mode than RGB
    see image_files.to_rgb.
    """
    image = image_files.to_rgb(image, background)
    width, height = image.size
    side = math.floor(image_size / crop_pct)
    if width <= height:
        size = side, int(side * height / width)
    else:
        size = int(side * width / height), side
    left, top = (_centre(length, image_size) for length in size)
    return np.asarray(image_files.resize_and_crop(image, size, (left, top, left + image_size, top + image_size)))


def _centre(length, size):
    return round((length - size) / 2) if length >= size else -((size - length) // 2)


def train_pixels(image: Any, rng: np.random.Generator, *, backend: Backend, image_size: int,
                 scale: tuple[float, float], ratio: tuple[float, float], flip: float, policy: Optional[Policy],
                 jitter: float, fill: tuple[int, int, int]) -> np.ndarray:
    """Augment what `backend.read` returns: random crop, flip, then `policy`, or without one colour jitter.

    Returns uint8 (H, W, 3).
    """
    image = augment.random_resized_crop(image, image_size, rng, scale, ratio, backend)
    image = augment.random_flip(image, rng, flip, backend)
    if policy:
        image = policy(image, rng, fill, backend)
    else:
        image = augment.color_jitter(image, jitter, rng, backend)
    return np.asarray(image)


def normalise(images, mean, std):
    """uint8 images (B, 3, H, W) -> float32; mean and std are of RGB in [0, 1]."""
    mean, std = (paddle.to_tensor(255 * np.asarray(value)[:, None, None], 'float32') for value in (mean, std))  # (3, 1, 1)
    return images.astype('float32').subtract_(mean).divide_(std)             # in place: twice as fast on a CPU


# Samples

class ListDataset:
    """dataset[epoch, index] -> uint8 pixels (3, S, S), label, index; or, for an image that cannot be read, what is wrong.

    The text goes to the consumer as data: an exception in a reading process reaches it without its message.
    `read` makes an image of a path and the options `reading`, `transform` uint8 (S, S, 3) of an image and a generator.
    """

    def __init__(self, samples, transform, image_size, seed, read=image_files.read, **reading):
        self.samples, self.transform, self.image_size, self.seed = samples, transform, image_size, seed
        self.read, self.reading = read, reading

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, index = key
        image_index = index % len(self.samples)
        path = self.samples.path(image_index)
        try:
            image = self.read(path, **self.reading)
        except Exception as error:                  # Pillow may raise nearly anything for a damaged file
            return self._problem(image_index, path, error)
        try:
            pixels = self.transform(image, generators.rng_for(self.seed, generators.TRANSFORM, epoch, index))
        except (OSError, MemoryError) as error:     # a reader that decodes what the crop needs may find damage only now
            return self._problem(image_index, path, error)
        return pixels.transpose(2, 0, 1), self.samples.labels[image_index], index

    def _problem(self, index, path, error):
        return f'{self.samples.where(index)} {path}: {image_files.reason(error)}'

    def batch(self, keys, note=lambda index: None):
        """Images (B, 3, S, S), labels (B,), indices (B,), texts; a sample with a text has zeros elsewhere.

        `note` gets the index of each image before it is read.
        """
        images = np.zeros((len(keys), 3, self.image_size, self.image_size), np.uint8)
        labels, indices, texts = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64), [''] * len(keys)
        for i, key in enumerate(keys):
            note(key[1] % len(self.samples))
            item = self[key]
            if isinstance(item, str):
                texts[i] = item
            else:
                images[i], labels[i], indices[i] = item
        return [images, labels, indices, texts]


class _Batches:
    """A dataset whose samples are the batches of another one: a data process fills a batch sample by sample."""

    def __init__(self, dataset, watch):
        self.dataset, self.watch = dataset, watch

    def __getitem__(self, keys):
        worker = paddle.io.get_worker_info().id
        batch = self.dataset.batch(keys, partial(self.watch.note, worker))
        self.watch.note(worker, IDLE)
        return batch


class Watch:
    """A time limit for the reading of one image, in seconds; 0: none. `late` is the index of one that exceeded it, or IDLE.

    Each data process notes in shared memory which image it reads. A thread of the trainer looks at the notes every second
    and kills a process whose note stays too long: a read from a network mount that is gone never returns.
    """

    def __init__(self, workers: int, limit: float):
        self.notes = np.frombuffer(multiprocessing.RawArray('q', 3 * workers), np.int64).reshape(workers, 3)
        self.notes[:, 1] = IDLE                     # each row: process, index, number of notes so far
        self.limit, self.late, self._done = limit, IDLE, threading.Event()
        if limit:
            threading.Thread(target=self._look, daemon=True).start()

    def note(self, worker: int, index: int):
        """Note, in a data process, that it begins to read the image `index`, or that it is IDLE."""
        self.notes[worker] = os.getpid(), index, self.notes[worker, 2] + 1

    def stop(self):
        """Look no longer."""
        self._done.set()

    def _look(self):
        before, seconds = self.notes.copy(), np.zeros(len(self.notes))
        while not self._done.wait(1):
            now = self.notes.copy()
            unchanged = (now == before).all(axis=1) & (now[:, 1] != IDLE)
            before, seconds = now, np.where(unchanged, seconds + 1, 0)       # a clock would count the time of a stopped trainer
            if seconds.max() >= self.limit:
                process, self.late, _ = now[seconds.argmax()].tolist()
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(process, signal.SIGKILL)
                return


# Order

def repeated_order(num_samples, repeats, step_size, rng):
    """Repeated augmentation (Hoffer et al. 2020, Berman et al. 2019): (num_samples,) indices, `repeats` copies of each image.

    The copies of an image are in the same optimizer step of `step_size` images, but where its end parts them. A step has all
    first copies in random order, then all second ones, ...: neighbours, which mixup mixes, are different images.
    """
    place = np.arange(num_samples)
    image, copy = rng.permutation(num_samples)[place // repeats], place % repeats
    return (image + copy * num_samples)[np.argsort(place // step_size * repeats + copy + rng.random(num_samples))]


class TrainSampler:
    """Micro-batches of (epoch, index) for one rank, in an order that is a function of seed and epoch.

    Micro-batch k of all ranks together is the k-th slice of the order, so it does not depend on how many processes share it;
    with `repeats` it depends on the images per optimizer step, which are those of `accum` micro-batches. The tail that does
    not fill a micro-batch of every rank is left out. Raises ValueError where nothing else is left.
    """

    even = True                                     # every rank draws the same number of batches

    def __init__(self, num_samples, batch_size, seed, rank=0, world=1, *, repeats=1, accum=1):
        if num_samples < batch_size * world:
            most = num_samples // world
            smaller = f'lower DATA.BATCH_SIZE to {most} or less, or ' if most else ''
            raise ValueError(f'{num_samples} training images do not fill one batch of {batch_size} on each of {world} '
                             f'process(es); {smaller}use fewer processes or more images')
        self.num_samples, self.batch_size, self.seed, self.rank, self.world = num_samples, batch_size, seed, rank, world
        self.repeats, self.step_size = repeats, batch_size * world * accum

    def __len__(self):
        return self.num_samples // (self.batch_size * self.world)

    def batches(self, epoch, start=0):
        rng = generators.rng_for(self.seed, generators.ORDER, epoch)
        order = rng.permutation(self.num_samples) if self.repeats == 1 else \
            repeated_order(self.num_samples, self.repeats, self.step_size, rng)
        for k in range(start, len(self)):
            first = (k * self.world + self.rank) * self.batch_size
            yield [(epoch, index) for index in order[first:first + self.batch_size].tolist()]


class EvalSampler:
    """Batches of (epoch, index) of every world-th sample from `rank` on, in order, each sample on exactly one rank."""

    even = False

    def __init__(self, num_samples, batch_size, rank=0, world=1):
        self.indices, self.batch_size = range(rank, num_samples, world), batch_size

    def __len__(self):
        return math.ceil(len(self.indices) / self.batch_size)

    def batches(self, epoch, start=0):
        for first in range(start * self.batch_size, len(self.indices), self.batch_size):
            yield [(epoch, index) for index in self.indices[first:first + self.batch_size]]


# Loader

class Loader:
    """Batches of a dataset in a sampler's order; len() of them in an epoch. `skipped` counts samples left out in the last one.

    An unreadable image raises DataError, or with on_error='skip' is left out, counted, and logged once.
    """

    def __init__(self, dataset, sampler, *, num_workers=0, on_error='raise', timeout=0):
        self.dataset, self.sampler, self.num_workers, self.on_error = dataset, sampler, num_workers, on_error
        self.timeout = timeout
        self.skipped, self._logged = 0, set()

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch, start=0):
        """Yield images (B, 3, S, S) uint8, labels (B,) int64, indices (B,) int64 from batch `start` on.

        Raises DataError, and stopping.Failure where a data process died or read one image for more than `timeout` seconds.
        """
        self.skipped = 0
        batches = self.sampler.batches(epoch, start)
        for *tensors, texts in self._read(batches) if self.num_workers == 0 else self._read_in_workers(batches):
            good = [i for i, text in enumerate(texts) if not text]
            if len(good) < len(texts):
                self._report([text for text in texts if text])
                if not good and self.sampler.even:  # one rank without this step would leave the others waiting for it
                    raise DataError(f'no image of a whole training batch can be read, the last is {texts[-1]}')
                if not good:
                    continue
                tensors = [tensor.gather(paddle.to_tensor(good)) for tensor in tensors]
            yield tuple(tensors)

    def _report(self, problems):
        if self.on_error == 'raise':
            raise DataError(f'{problems[0]}; mend the image or its line, or set DATA.ON_ERROR skip to train without it')
        self.skipped += len(problems)
        for problem in problems:
            if problem not in self._logged:
                self._logged.add(problem)
                utils.log.warning('left out: %s', problem)

    def _read(self, batches):
        # by hand: without workers, paddle.io.DataLoader waits forever once reading has raised
        for keys in batches:
            *arrays, texts = self.dataset.batch(keys)
            yield *(paddle.to_tensor(array) for array in arrays), texts

    def _read_in_workers(self, batches):
        handler = signal.getsignal(signal.SIGCHLD)
        watch = Watch(self.num_workers, self.timeout)
        reader = iter(paddle.io.DataLoader(_Batches(self.dataset, watch), batch_sampler=([keys] for keys in batches),
                                           collate_fn=itemgetter(0), num_workers=self.num_workers, worker_init_fn=_init_worker))
        # Paddle's handler raises a worker's death in whatever the trainer is doing, such as writing a checkpoint; without it
        # the next batch raises, after at most 5 s
        signal.signal(signal.SIGCHLD, handler)
        try:
            yield from reader
        except SystemError as error:                # all that Paddle tells, whatever happened
            if watch.late != IDLE:
                samples = self.dataset.samples
                raise stopping.Failure(
                    f'{samples.where(watch.late)} {samples.path(watch.late)}: it could not be read within DATA.TIMEOUT '
                    f'{self.timeout} s; look at its disk or network mount, or raise DATA.TIMEOUT where it is slow') from error
            raise stopping.Failure(
                'a data worker died; if nothing above says why, it probably ran out of memory: look at free memory and '
                'at /dev/shm (df -h /dev/shm), lower DATA.NUM_WORKERS or DATA.BATCH_SIZE') from error
        finally:
            watch.stop()
            reader._try_shutdown_all(WORKER_PATIENCE)  # its own thread holds on to it: left alone, its workers stay for good


def _init_worker(worker_id):
    # The launcher sends SIGTERM to the trainer's whole process group; without a group of their own the workers would die
    # of it, and with them the batches that the trainer needs to reach its next step and save. And Paddle's worker waits
    # for work without a time limit: it would outlive a trainer that is killed.
    os.setpgrp()
    stopping.Stop.unlisten()
    lifeline.die_with_parent()
    warnings.filterwarnings('ignore', module='PIL')  # odd metadata, which every worker would tell anew in every epoch


def count_classes(data_path: str, read_lists: bool = False) -> tuple[int, str]:
    """Return how many classes a data folder has, and the file that says so: class_names.txt, else with `read_lists` the lists.

    (0, '') where nothing says it. Raises as read_list, and ValueError for labels that cannot count the classes from 0.
    """
    path = os.path.join(data_path, class_names.FILE)
    if os.path.isfile(path):
        return len(class_names.read_names(path)), path
    if not read_lists:
        return 0, ''
    paths = [os.path.join(data_path, name) for name in LISTS]
    lists = [read_list(path, data_path, ANY_LABEL) for path in paths if os.path.isfile(path)] or \
        [read_list(paths[0], data_path, ANY_LABEL)]
    largest = max(lists, key=ImageList.count_classes)
    count = largest.count_classes()
    if count > sum(len(samples) for samples in lists):
        where = largest.where(int(largest.labels.argmax()))
        raise ValueError(f'{where}: label {count - 1}, but there are fewer images than that; labels count the classes from 0. '
                         'Mend the line, or set MODEL.NUM_CLASSES')
    return count, largest.list_file


def build_train(config, rank=0, world=1):
    """The Loader of train_list.txt for one rank, as the config says. Raises as read_list and TrainSampler."""
    train, data = config.TRAIN, config.DATA
    backend = choose_backend(data.BACKEND)
    policy = augment.parse_auto_augment(train.AUTO_AUGMENT) if train.AUTO_AUGMENT else None
    fill = tuple(min(255, round(255 * value)) for value in data.MEAN)
    transform = partial(
        train_pixels, backend=backend, image_size=data.IMAGE_SIZE, scale=train.CROP_SCALE, ratio=train.CROP_RATIO,
        flip=train.HFLIP, policy=policy, jitter=train.COLOR_JITTER, fill=fill)
    dataset = _dataset(config, 'train_list.txt', transform, backend.read)
    sampler = TrainSampler(len(dataset), data.BATCH_SIZE, config.SEED, rank, world, repeats=train.AUG_REPEATS,
                           accum=train.ACCUM_ITER)
    return Loader(dataset, sampler, num_workers=data.NUM_WORKERS, on_error=data.ON_ERROR, timeout=data.TIMEOUT)


def build_eval(config, rank=0, world=1):
    """The Loader of val_list.txt for one rank, as the config says. Raises as read_list."""
    data = config.DATA

    def transform(image, rng):
        return eval_pixels(image, data.IMAGE_SIZE, data.CROP_PCT)

    dataset = _dataset(config, 'val_list.txt', transform, image_files.read)
    sampler = EvalSampler(len(dataset), data.BATCH_SIZE_EVAL or data.BATCH_SIZE, rank, world)
    return Loader(dataset, sampler, num_workers=data.NUM_WORKERS, on_error=data.ON_ERROR, timeout=data.TIMEOUT)


def _dataset(config, name, transform, read):
    samples = read_list(os.path.join(config.DATA.DATA_PATH, name), config.DATA.DATA_PATH, config.MODEL.NUM_CLASSES)
    return ListDataset(samples, transform, config.DATA.IMAGE_SIZE, config.SEED, read,
                       background=config.DATA.BACKGROUND, max_pixels=config.DATA.MAX_PIXELS)
