"""From a list file to batches: reading images, their transforms, the order, the loaders.

A sample is named (epoch, index). Its position in the order, its crop and its colours are functions of
the seed and that name. So a run can stop at any batch and go on with another number of processes or
workers: it sees the same pixels.
"""
from __future__ import annotations

import math
import os
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from operator import itemgetter
from typing import Any, Callable, Union

from system import cpu, lifeline, paddle_internals, sizes, stopping
import utils

import numpy as np
import paddle
from numpy.random import Generator
from paddle import Tensor
from PIL import Image

from data import archives, augment, bands, class_names, generators, image_files, protocol
from data.bands import Bands, BandsBackend
from data.list_file import ImageList, read_list
from data.operations import PILLOW, Backend
from data.samplers import EvalSampler, Name, TrainSampler
from data.watch import IDLE, Watch

Policy = Union[augment.RandAugment, augment.AutoAugment]
Transform = Callable[[Any, Generator], np.ndarray]   # image, generator -> uint8 (H, W, C)
Read = Callable[..., Any]                           # path, DATA.BACKGROUND, DATA.MAX_PIXELS -> image
LISTS = ('train_list.txt', 'val_list.txt')
ANY_LABEL = 10 ** 9                                 # more than the classes of any list
READ_AHEAD = 2                                      # batches that a data process makes ahead: Paddle's own
WORKER_PATIENCE = 10                                # seconds that data processes get to finish


class DataError(ValueError):
    """An image cannot be read, and DATA.ON_ERROR does not allow to leave it out."""


# ---- pixels

def choose_read(channels: int) -> Read:
    """Return the function that reads an image file for DATA.CHANNELS, as `eval_pixels` takes it."""
    return image_files.read if channels == 3 else partial(bands.read, channels=channels)


def choose_backend(name: str, channels: int = 3) -> Backend:
    """Return the backend of DATA.BACKEND, pillow or cv2. Raises ValueError without OpenCV."""
    if channels != 3:
        return BandsBackend(channels)
    if name == 'pillow':
        return PILLOW
    try:
        from data import opencv
    except ImportError as error:
        raise ValueError(f'DATA.BACKEND is cv2, but OpenCV is not usable here ({error}); install it by '
                         "python -m pip install 'opencv-python-headless>=4.10,<6', "
                         'or set DATA.BACKEND pillow') from None
    return opencv.OpenCVBackend()


def eval_pixels(image: Image.Image | Bands, image_size: sizes.Size, crop_pct: float,
                background: str = image_files.BACKGROUND) -> np.ndarray:
    """Resize an image and crop its centre, for evaluation; returns uint8 (H, W, C).

    A PIL image of any mode becomes RGB, with C = 3. Bands have their own channels.

    The resized image just covers floor(image_size / crop_pct), bicubic. For a square every pixel equals
    that of torchvision's Resize and CenterCrop as timm combines them. For other sizes the geometry is that
    of timm's ResizeKeepRatio. For other modes than RGB see image_files.to_rgb.
    """
    height, width = sizes.sides(image_size)
    size = _covering(image.size, math.floor(height / crop_pct), math.floor(width / crop_pct))
    left, top = _centre(size[0], width), _centre(size[1], height)
    cut = partial(image_files.resize_and_crop, size=size, box=(left, top, left + width, top + height))
    if isinstance(image, Bands):
        return np.asarray(image.map(cut))
    return np.asarray(cut(image_files.to_rgb(image, background)))


def _covering(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Return the smallest (width, height) of an image of this (width, height) that covers height x width."""
    image_width, image_height = size
    if height != width:
        ratio = min(image_height / height, image_width / width)
        return round(image_width / ratio), round(image_height / ratio)
    if image_width <= image_height:
        return width, int(height * image_height / image_width)
    return int(width * image_width / image_height), height


def _centre(length: int, size: int) -> int:
    """Return where a centre crop of `size` starts, as torchvision rounds it; negative where it pads."""
    if length >= size:
        return round((length - size) / 2)
    return -((size - length) // 2)


def train_pixels(image: Any, rng: Generator, *, backend: Backend, image_size: sizes.Size,
                 scale: tuple[float, float], ratio: tuple[float, float], flip: float, policy: Policy | None,
                 jitter: float, fill: augment.Colour) -> np.ndarray:
    """Augment what `backend.read` returns: random crop, flip, then `policy`, or without one colour jitter.

    Returns uint8 (H, W, C).
    """
    image = augment.random_resized_crop(image, sizes.sides(image_size), rng, scale, ratio, backend)
    image = augment.random_flip(image, rng, flip, backend)
    if policy:
        image = policy(image, rng, fill, backend)
    else:
        image = augment.color_jitter(image, jitter, rng, backend)
    return np.asarray(image)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn uint8 images (B, C, H, W) into float32 ones.

    mean and std are of each channel, or one for all, in [0, 1].
    """
    device = paddle.get_device()
    mean_255, std_255 = _per_channel(tuple(mean), device), _per_channel(tuple(std), device)
    return images.astype('float32').subtract_(mean_255).divide_(std_255)  # in place: twice as fast on a CPU


@lru_cache(maxsize=8)
def _per_channel(values: tuple[float, ...], device: str) -> Tensor:
    """Return 255 * values, which are copied to the device once, in the shape (C, 1, 1)."""
    return paddle.to_tensor(255 * np.asarray(values)[:, None, None], 'float32')


# ---- samples

class ListDataset:
    """The images of a list: dataset[epoch, index] -> uint8 pixels (C, H, W), label, index.

    For an image that cannot be read the result is a text with the reason. It goes to the consumer as
    data: an exception in a data process would arrive without its message. `read` makes an image of a
    path and the options `reading`; `transform` makes uint8 (H, W, C) of an image and a generator.
    `shape` is (C, H, W).
    """

    def __init__(self, samples: ImageList, transform: Transform, shape: tuple[int, int, int], seed: int,
                 read: Read, **reading: Any):
        self.samples, self.transform, self.shape, self.seed = samples, transform, shape, seed
        self.read, self.reading = read, reading

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, name: Name) -> tuple[np.ndarray, int, int] | str:
        epoch, index = name
        image_index = index % len(self.samples)
        path = self.samples.path(image_index)
        try:
            image = self.read(path, **self.reading)
        except Exception as error:                  # Pillow may raise nearly anything for a damaged file
            return self._problem(image_index, path, error)
        rng = generators.rng_for(self.seed, generators.TRANSFORM, epoch, index)
        try:
            pixels = self.transform(image, rng)
        except (OSError, MemoryError) as error:     # OpenCV decodes only now, and may find damage
            return self._problem(image_index, path, error)
        return pixels.transpose(2, 0, 1), int(self.samples.labels[image_index]), index

    def _problem(self, index: int, path: str, error: Exception) -> str:
        return f'{self.samples.where(index)} {path}: {image_files.reason(error)}'

    def batch(self, names: Sequence[Name], note: Callable[[int], None] = lambda index: None) -> list:
        """Read a batch: images (B, C, H, W), labels (B,), indices (B,), texts.

        A sample with a text has zeros elsewhere. `note` gets the index of each image before it is read.
        """
        images: np.ndarray = np.zeros((len(names), *self.shape), np.uint8)
        labels: np.ndarray = np.zeros(len(names), np.int64)
        indices: np.ndarray = np.zeros(len(names), np.int64)
        texts = [''] * len(names)
        for i, name in enumerate(names):
            note(name[1] % len(self.samples))
            item = self[name]
            if isinstance(item, str):
                texts[i] = item
            else:
                images[i], labels[i], indices[i] = item
        return [images, labels, indices, texts]


class _Batches:
    """A dataset whose samples are batches of another one: a data process fills a batch sample by
    sample."""

    def __init__(self, dataset: ListDataset, watch: Watch):
        self.dataset, self.watch = dataset, watch

    def __getitem__(self, names: Sequence[Name]) -> list:
        worker = paddle.io.get_worker_info().id
        images, labels, indices, texts = self.dataset.batch(names, partial(self.watch.note, worker))
        self.watch.note(worker, IDLE)
        return [images, labels, indices.tolist(), texts]      # a DataLoader makes tensors of all arrays


# ---- loader

class Loader:
    """Batches of a dataset in the order of a sampler; len() is their number in an epoch, `limit` at most.

    An unreadable image raises DataError. With on_error='skip' it is left out, counted and logged once.
    `skipped` is the number of samples left out in the last epoch. `protocol` is that of an evaluation.
    """

    def __init__(self, dataset: ListDataset, sampler: TrainSampler | EvalSampler, *, num_workers: int = 0,
                 on_error: str = 'raise', timeout: float = 0):
        self.dataset, self.sampler = dataset, sampler
        self.num_workers, self.on_error, self.timeout = num_workers, on_error, timeout
        self.protocol = protocol.Protocol()
        self.skipped = self.next_epoch = 0
        self.limit: int | None = None
        self._logged: set[str] = set()

    def __len__(self) -> int:
        return len(self.sampler) if self.limit is None else min(len(self.sampler), self.limit)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        """Iterate over the next epoch, from 0 on: see `epoch`."""
        self.next_epoch += 1
        return self.epoch(self.next_epoch - 1)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        """Yield images (B, C, H, W) uint8, labels (B,) int64, indices (B,) int64 from batch `start` on.

        The indices are an array: the host draws random numbers by them, and would wait for a tensor.
        Raises DataError. Raises stopping.Failure if a data process dies, or reads one image for longer
        than `timeout` seconds.
        """
        self.skipped = 0
        batches = islice(self.sampler.batches(epoch, start), max(len(self) - start, 0))
        read = self._read_in_workers if self.num_workers else self._read
        for images, labels, numbers, texts in read(batches):
            indices = np.asarray(numbers, np.int64)
            good = [i for i, text in enumerate(texts) if not text]
            if len(good) == len(texts):
                yield images, labels, indices
                continue
            self._report([text for text in texts if text])
            if good:
                rows = paddle.to_tensor(good)
                yield images.gather(rows), labels.gather(rows), indices[good]
            elif self.sampler.even:                 # the other ranks would wait for this one's step
                raise DataError(f'no image of a whole training batch can be read, the last is {texts[-1]}')

    def _report(self, problems: list[str]) -> None:
        if self.on_error == 'raise':
            raise DataError(f'{problems[0]}; fix the image or its line, '
                            'or set DATA.ON_ERROR skip to train without it')
        self.skipped += len(problems)
        for problem in problems:
            if problem not in self._logged:
                self._logged.add(problem)
                utils.log.warning('left out: %s', problem)

    def _read(self, batches: Iterable[list[Name]]) -> Iterator[tuple]:
        # without workers, paddle.io.DataLoader would wait forever once reading has raised
        for names in batches:
            images, labels, indices, texts = self.dataset.batch(names)
            yield paddle.to_tensor(images), paddle.to_tensor(labels), indices, texts

    def _read_in_workers(self, batches: Iterable[list[Name]]) -> Iterator[tuple]:
        handler = signal.getsignal(signal.SIGCHLD)
        watch = Watch(self.num_workers, self.timeout)
        reader = iter(paddle.io.DataLoader(
            _Batches(self.dataset, watch), batch_sampler=([names] for names in batches),
            collate_fn=itemgetter(0), num_workers=self.num_workers, worker_init_fn=_init_worker))
        # Paddle's handler raises a worker's death in whatever the trainer is doing, such as writing a
        # checkpoint. Without it the next batch raises, after at most 5 s.
        signal.signal(signal.SIGCHLD, handler)
        try:
            yield from reader
        except SystemError as error:                # Paddle's only error, whatever has happened
            raise self._failure(watch.late) from error
        finally:
            watch.stop()
            # its own thread refers to it: without this, its workers would stay
            paddle_internals.shut_down_workers(reader, WORKER_PATIENCE)

    def _failure(self, late: int) -> stopping.Failure:
        """Return the error for a data process that died; `late` is the image that it read too long, or
        IDLE."""
        if late == IDLE:
            return stopping.Failure(
                'a data worker died; if nothing above says why, it probably ran out of memory: look at free '
                'memory and at /dev/shm (df -h /dev/shm), lower DATA.NUM_WORKERS or DATA.BATCH_SIZE')
        samples = self.dataset.samples
        return stopping.Failure(
            f'{samples.where(late)} {samples.path(late)}: it could not be read within DATA.TIMEOUT '
            f'{self.timeout} s; look at its disk or network mount, or raise DATA.TIMEOUT where it is slow')


def _init_worker(worker_id: int) -> None:
    # The launcher sends SIGTERM to the trainer's whole process group. Workers get a group of their own,
    # for the trainer needs their batches to reach its next step and save. And Paddle's worker waits for
    # work without a time limit: it would outlive a trainer that is killed.
    os.setpgrp()
    stopping.Stop.unlisten()
    lifeline.die_with_parent()
    warnings.filterwarnings('ignore', module='PIL')  # odd metadata: every worker would warn in every epoch


def count_classes(data_path: str, read_lists: bool = False) -> tuple[int, str]:
    """Return the number of classes of a data folder, and the file that it is from.

    The file is class_names.txt, or without it, with `read_lists`, a list. The result is (0, '') if
    neither is used. Raises as read_list, and ValueError for labels that cannot count the classes from 0.
    """
    path = os.path.join(data_path, class_names.FILE)
    if archives.is_file(path):
        return len(class_names.read_names(path)), path
    if not read_lists:
        return 0, ''
    paths = [os.path.join(data_path, name) for name in LISTS]
    present = [path for path in paths if archives.is_file(path)]
    present = present or paths[:1]                  # reading it raises the error for a missing list
    lists = [read_list(path, data_path, ANY_LABEL) for path in present]
    largest = max(lists, key=ImageList.count_classes)
    count = largest.count_classes()
    if count > sum(len(samples) for samples in lists):
        where = largest.where(int(largest.labels.argmax()))
        raise ValueError(f'{where}: label {count - 1}, but there are fewer images than that; labels count '
                         'the classes from 0. Fix the line, or set MODEL.NUM_CLASSES')
    return count, largest.list_file


# ---- from the config

def build_train(config: Any, rank: int = 0, world: int = 1) -> Loader:
    """Build the Loader of train_list.txt for one rank. Raises as read_list and TrainSampler."""
    train, data = config.TRAIN, config.DATA
    backend = choose_backend(data.BACKEND, data.CHANNELS)
    policy = augment.parse_auto_augment(train.AUTO_AUGMENT) if train.AUTO_AUGMENT else None
    fill = tuple(min(255, round(255 * value)) for value in bands.per_channel(data.MEAN, data.CHANNELS))
    transform = partial(
        train_pixels, backend=backend, image_size=data.IMAGE_SIZE, scale=train.CROP_SCALE,
        ratio=train.CROP_RATIO, flip=train.HFLIP, policy=policy, jitter=train.COLOR_JITTER, fill=fill)
    dataset = _dataset(config, 'train_list.txt', transform, backend.read)
    sampler = TrainSampler(len(dataset), data.BATCH_SIZE, config.SEED, rank, world,
                           repeats=train.AUG_REPEATS, accum=train.ACCUM_ITER,
                           balance=data.BALANCE, labels=dataset.samples.labels)
    return _loader(config, dataset, sampler)


def build_eval(config: Any, rank: int = 0, world: int = 1) -> Loader:
    """Build the Loader of the list that is evaluated, for one rank. Raises as read_list and protocol.read.

    Its labels are those of the model; images that DATA.EVAL_LABELS gives no right label are left out.
    """
    data, model = config.DATA, config.MODEL

    def transform(image: Any, rng: Generator) -> np.ndarray:
        return eval_pixels(image, data.IMAGE_SIZE, data.CROP_PCT)

    dataset = _dataset(config, data.EVAL_LIST, transform, choose_read(data.CHANNELS))
    dataset.samples, judging = protocol.read(
        data.EVAL_CLASSES, data.EVAL_LABELS, dataset.samples, model.NUM_CLASSES, _weights(config))
    sampler = EvalSampler(len(dataset), data.BATCH_SIZE_EVAL or data.BATCH_SIZE, rank, world,
                          indices=judging.judged())
    loader = _loader(config, dataset, sampler)
    loader.protocol = judging
    return loader


def _weights(config: Any) -> str:
    """Return the path of the weights that are evaluated; the run folder's file for RESUME auto."""
    if config.MODEL.RESUME == 'auto':
        return os.path.join(config.OUTPUT, 'final.pdparams')
    return config.MODEL.RESUME or config.MODEL.PRETRAINED


def _dataset(config: Any, list_name: str, transform: Transform, read: Read) -> ListDataset:
    data = config.DATA
    samples = read_list(os.path.join(data.DATA_PATH, list_name), data.DATA_PATH, config.MODEL.NUM_CLASSES)
    archives.prepare(data.DATA_PATH, samples.text)
    shape = data.CHANNELS, *sizes.sides(data.IMAGE_SIZE)
    return ListDataset(samples, transform, shape, config.SEED, read, background=data.BACKGROUND,
                       max_pixels=data.MAX_PIXELS)


def _loader(config: Any, dataset: ListDataset, sampler: TrainSampler | EvalSampler) -> Loader:
    num_workers = count_workers(config.DATA.NUM_WORKERS)
    return Loader(dataset, sampler, num_workers=num_workers, on_error=config.DATA.ON_ERROR,
                  timeout=config.DATA.TIMEOUT)


def count_workers(num_workers: int) -> int:
    """Return DATA.NUM_WORKERS, or for -1 as many data processes as a training process should have.

    That is 2 on a CPU, which also computes. On a GPU it is its share of the cores but one, 2 to 16.
    """
    if num_workers >= 0:
        return num_workers
    if paddle.get_device() == 'cpu':
        return 2
    processes = max(utils.gpu_count(), utils.local_processes())
    return min(max(cpu.cores() // processes - 1, 2), 16)


def shared_memory_needed(loader: Loader, batch_size: int) -> int:
    """Return the bytes of /dev/shm that batches of one process may take: each worker makes two ahead."""
    return loader.num_workers * READ_AHEAD * batch_size * math.prod(loader.dataset.shape)


def warn_of_small_shared_memory(needed: int, processes: int, folder: str = '/dev/shm') -> None:
    """Log a line if `processes` data loaders, which need so many bytes each, may not fit into `folder`."""
    try:
        facts = os.statvfs(folder)
    except OSError:                                 # not on this system
        return
    free = facts.f_bavail * facts.f_frsize
    if needed * processes > free:
        utils.log.warning(
            '%s has %d MB free, and the data processes may need %d MB: a container gets more by '
            '--shm-size or --ipc=host; or lower DATA.NUM_WORKERS', folder, free >> 20,
            needed * processes >> 20)
