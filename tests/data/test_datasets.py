"""datasets.py: evaluation pixels as timm's, and loaders that never hang."""
import collections
import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

from system import stopping
import utils

import numpy as np
import paddle
import pytest
from PIL import Image

import datasets
from config import get_config
from data import augment
from data.operations import PILLOW

FIXTURES = Path(__file__).parent.parent / 'fixtures' / 'eval_pixels'
HASHES = {key: value for key, value in json.loads((FIXTURES / 'sha256.json').read_text()).items()
          if key != 'about'}


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# pixels

@pytest.mark.parametrize('key', HASHES)
def test_evaluation_pixels_equal_timm(key):
    name, size, crop = re.fullmatch(r'(.*\.(?:jpg|png))\.(\d+)\.(.*)', key).groups()
    pixels = datasets.eval_pixels(Image.open(FIXTURES / name), int(size), float(crop))
    assert pixels.shape == (int(size), int(size), 3) and pixels.dtype == np.uint8
    assert hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest() == HASHES[key]


@pytest.mark.parametrize('mode, color, expected', [
    ('L', 7, (7, 7, 7)), ('CMYK', (0, 255, 255, 0), (255, 0, 0)),
    ('RGBA', (10, 20, 30, 255), (10, 20, 30)), ('P', 0, (1, 2, 3)),
    ('I;16', 9 * 257, (9, 9, 9)), ('LA', (5, 0), (255, 255, 255)), ('1', 1, (255, 255, 255))])
def test_all_modes_become_rgb(mode, color, expected):
    image = Image.new(mode, (12, 9), color)
    if mode == 'P':
        image.putpalette([1, 2, 3])
    assert (datasets.eval_pixels(image, 8, 1.0) == expected).all()
    assert image.mode == mode and image.size == (12, 9)


def test_orientation_in_the_metadata_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                          # a viewer turns it by 90 degrees
    picture(20, 20).save(tmp_path / 'turned.png', exif=exif)
    with Image.open(tmp_path / 'turned.png') as image:
        assert image.getexif()[0x0112] == 6
        assert np.array_equal(datasets.eval_pixels(image, 20, 1.0), np.asarray(picture(20, 20)))


@pytest.mark.parametrize('length, size, start', [
    (269, 256, 6), (271, 256, 8), (256, 256, 0), (257, 256, 0), (5, 8, -1), (5, 10, -2)])
def test_centre_rounds_as_torchvision(length, size, start):
    # halves go to the even pixel; padding is rounded down
    assert datasets._centre(length, size) == start


def test_shorter_side_is_rounded_down():
    image = picture(40, 30)                                   # 15 / 0.9 = 16.67
    expected = image.resize((21, 16), Image.Resampling.BICUBIC).crop((3, 0, 18, 15))
    assert np.array_equal(datasets.eval_pixels(image, 15, 0.9), np.asarray(expected))


@pytest.mark.parametrize('size, target, crop, resized, corner', [
    ((90, 60), [16, 32], 1.0, (32, 21), (0, 2)),              # timm's ResizeKeepRatio: rounded, 21.3 -> 21
    ((60, 90), [16, 32], 1.0, (32, 48), (0, 16)),
    ((90, 31), [16, 32], 0.9, (49, 17), (8, 0)),              # covers 17 x 35; the height decides
    ((50, 77), [40, 24], 0.8, (32, 50), (4, 5))])             # covers 50 x 30; 32.47 -> 32
def test_evaluation_pixels_of_other_shapes_cover_the_target(size, target, crop, resized, corner):
    """The image keeps its proportions. Of both scales the one that covers the target is taken."""
    image, (height, width), (left, top) = picture(*size), target, corner
    expected = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    pixels = datasets.eval_pixels(image, target, crop)
    assert pixels.shape == (height, width, 3)
    assert np.array_equal(pixels, np.asarray(expected))
    assert np.array_equal(datasets.eval_pixels(image, [32, 32], 0.9), datasets.eval_pixels(image, 32, 0.9))


def test_crop_larger_than_the_image_is_padded_with_zeros():
    image = picture(5, 5)
    expected = np.pad(np.asarray(image), ((1, 2), (1, 2), (0, 0)))
    assert np.array_equal(datasets.eval_pixels(image, 8, 1.6), expected)


def test_training_pixels_without_randomness_are_a_resize():
    image = picture(40, 30)
    options = {'backend': PILLOW, 'image_size': 16, 'scale': (1.0, 1.0),
               'ratio': (4 / 3, 4 / 3), 'policy': None, 'jitter': 0, 'fill': (0, 0, 0)}
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(datasets.train_pixels(image, np.random.default_rng(0), flip=0, **options), expected)
    options_wide = {**options, 'image_size': [9, 20]}
    wide = datasets.train_pixels(image, np.random.default_rng(0), flip=0, **options_wide)
    assert np.array_equal(wide, np.asarray(image.resize((20, 9), Image.Resampling.BICUBIC)))
    assert np.array_equal(datasets.train_pixels(image, np.random.default_rng(0), flip=1, **options),
                          expected[:, ::-1])
    options['policy'] = augment.RandAugment(ops=('Invert',), probability=1, layers=1)
    assert np.array_equal(datasets.train_pixels(image, np.random.default_rng(0), flip=0, **options),
                          255 - expected)
    options.update(policy=None, jitter=0.4)
    assert not np.array_equal(datasets.train_pixels(image, np.random.default_rng(0), flip=0, **options),
                              expected)


def test_normalise_equals_float64_arithmetic():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), np.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    tensor = paddle.to_tensor(images)
    out = datasets.normalise(tensor, mean, std)
    expected = (images / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert out.dtype == paddle.float32
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert np.array_equal(tensor.numpy(), images)


# loaders

BAD = {'gone.png': 'No such file', 'empty.png': 'the file is empty', 'text.png': 'not an image',
       'cut.png': 'truncated', 'folder.png': 'directory'}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """24 good images in train_list.txt and val_list.txt, and bad_list.txt, which has BAD as well."""
    folder = tmp_path_factory.mktemp('data')
    for i in range(24):
        picture(20 + i, 40 - i, i).save(folder / f'{i}.png')
    (folder / 'empty.png').touch()
    (folder / 'text.png').write_text('no image')
    (folder / 'cut.png').write_bytes((folder / '0.png').read_bytes()[:-600])
    (folder / 'folder.png').mkdir()
    good = [f'{i}.png {i % 10}' for i in range(24)]
    for name in ('train_list.txt', 'val_list.txt'):
        (folder / name).write_text('\n'.join(good))
    (folder / 'bad_list.txt').write_text('\n'.join(good[:10] + [f'{name} 1' for name in BAD] + good[10:]))
    return folder


def config(data, *opts):
    return get_config(None, [
        'DATA.DATA_PATH', str(data), 'DATA.IMAGE_SIZE', 16, 'DATA.BATCH_SIZE', 4, 'DATA.BATCH_SIZE_EVAL', 5,
        'MODEL.NUM_CLASSES', 10, 'DATA.NUM_WORKERS', 0, 'TRAIN.AUTO_AUGMENT', 'rand-m9-mstd0.5-inc1', *opts])


def arrays(batches):
    return [[np.asarray(values) for values in batch] for batch in batches]


def equal(ours, theirs):
    if len(ours) != len(theirs):
        return False
    return all(np.array_equal(a, b) for one, other in zip(ours, theirs) for a, b in zip(one, other))


def test_training_batches_do_not_depend_on_workers_ranks_or_start(data):
    loader = datasets.build_train(config(data))
    whole = arrays(loader.epoch(1))
    assert len(whole) == len(loader) == 6
    for images, labels, indices in whole:
        assert images.shape == (4, 3, 16, 16) and images.dtype == np.uint8
        assert labels.dtype == indices.dtype == np.int64 and (labels == indices % 10).all()
    for workers in (1, 2):
        assert equal(arrays(datasets.build_train(config(data, 'DATA.NUM_WORKERS', workers)).epoch(1)), whole)
    assert equal(arrays(datasets.build_train(config(data, 'DATA.NUM_WORKERS', 2)).epoch(1, start=4)),
                 whole[4:])
    halves = [arrays(datasets.build_train(config(data, 'DATA.BATCH_SIZE', 2), rank, 2).epoch(1))
              for rank in (0, 1)]
    assert equal([[np.concatenate(pair) for pair in zip(*step)] for step in zip(*halves)], whole)
    assert not equal(arrays(loader.epoch(2)), whole)
    assert not equal(arrays(datasets.build_train(config(data, 'SEED', 1)).epoch(1)), whole)


def test_limit_ends_an_epoch_early(data):
    """-check takes some batches only. A resumed run may start behind the last batch of a list that shrank."""
    loader = datasets.build_train(config(data))
    whole = arrays(loader.epoch(1))
    loader.limit = 4
    assert len(loader) == 4 and equal(arrays(loader.epoch(1)), whole[:4])
    assert equal(arrays(loader.epoch(1, 3)), whole[3:4])
    for start in (4, 9):
        assert arrays(loader.epoch(1, start)) == []
    loader.limit = 99
    assert len(loader) == len(whole) and equal(arrays(loader.epoch(1)), whole)


def test_sample_has_another_crop_in_each_epoch(data):
    dataset = datasets.build_train(config(data)).dataset
    (first, label, index), (second, _, _) = dataset[0, 3], dataset[1, 3]
    assert (label, index) == (3, 3) and not np.array_equal(first, second)
    assert np.array_equal(first, dataset[0, 3][0])


def test_repeated_augmentation_does_not_depend_on_how_a_step_is_split(data):
    def steps(batch, world, accum):
        opts = ['DATA.BATCH_SIZE', batch, 'TRAIN.ACCUM_ITER', accum, 'TRAIN.AUG_REPEATS', 3]
        ranks = [arrays(datasets.build_train(config(data, *opts), rank, world).epoch(1))
                 for rank in range(world)]
        # in the order of the images
        batches = [batch for batches in zip(*ranks) for batch in batches]
        size = world * accum
        return [[np.concatenate(parts) for parts in zip(*batches[i:i + size])]
                for i in range(0, len(batches), size)]

    whole = steps(8, 1, 1)
    assert equal(steps(4, 2, 1), whole) and equal(steps(2, 2, 2), whole) and equal(steps(4, 1, 2), whole)
    order = np.concatenate([indices for _, _, indices in whole])
    assert sorted(collections.Counter(order % 24).values()) == [3] * 8 and len({*order}) == 24
    for images, labels, indices in whole:
        assert (labels == indices % 24 % 10).all()
        # each copy is another crop
        for i in {*(indices % 24)}:
            copies = images[indices % 24 == i]
            assert len({copy.tobytes() for copy in copies}) == len(copies)
    again = datasets.build_train(config(data, 'DATA.BATCH_SIZE', 8, 'TRAIN.AUG_REPEATS', 3,
                                        'DATA.NUM_WORKERS', 2))
    assert equal(arrays(again.epoch(1, start=1)), whole[1:]) and not equal(arrays(again.epoch(2)), whole)


def test_a_loop_over_a_loader_is_the_next_epoch(data):
    loader, again = datasets.build_train(config(data)), datasets.build_train(config(data))
    for epoch in range(3):
        assert equal(arrays(loader), arrays(again.epoch(epoch)))
    assert not equal(arrays(loader), arrays(again.epoch(0)))


@pytest.mark.parametrize('workers', [0, 2])
def test_evaluation_batches_hold_every_sample_once(data, workers):
    batches = [arrays(datasets.build_eval(config(data, 'DATA.NUM_WORKERS', workers), rank, 2).epoch(0))
               for rank in (0, 1)]
    assert [len(indices) for _, _, indices in batches[0]] == [5, 5, 2]
    for rank in (0, 1):
        for images, _, indices in batches[rank]:
            for pixels, index in zip(images, indices):
                expected = datasets.eval_pixels(Image.open(data / f'{index}.png'), 16, 0.95)
                assert index % 2 == rank and np.array_equal(pixels, expected.transpose(2, 0, 1))


def loader_of_bad(data, make=datasets.build_train, batch_size=4, **options):
    """A loader of bad_list.txt: bad samples are number 10 to 14, on lines 11 to 15."""
    loader = make(config(data, *sum(([f'DATA.{key}', value] for key, value in options.items()), [])))
    loader.dataset.samples = datasets.read_list(str(data / 'bad_list.txt'), str(data), 10)
    if make is datasets.build_eval:
        loader.sampler = datasets.EvalSampler(29, 5)
    else:
        loader.sampler = datasets.TrainSampler(29, batch_size, seed=0)
    return loader


def test_batch_holds_its_samples(data):
    dataset = loader_of_bad(data).dataset
    images, labels, indices, texts = dataset.batch([(3, 5), (3, 12), (3, 2)])
    assert images.shape == (3, 3, 16, 16) and images.dtype == np.uint8 and images.flags['C_CONTIGUOUS']
    assert labels.tolist() == indices.tolist() == [5, 0, 2]
    assert [bool(text) for text in texts] == [False, True, False]
    assert all(np.array_equal(images[k], dataset[3, i][0]) for k, i in ((0, 5), (2, 2)))
    assert not images[1].any()


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_image_raises(data, workers):
    loader = loader_of_bad(data, NUM_WORKERS=workers)
    with pytest.raises(datasets.DataError,
                       match=r'bad_list.txt:1[1-5] .*/(gone|empty|text|cut|folder).png: .*ON_ERROR'):
        list(loader.epoch(0))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize('number, name', list(enumerate(BAD, 10)))
def test_reason_of_unreadable_image_is_given(data, number, name):
    text = loader_of_bad(data).dataset[0, number]
    assert text.startswith(f'{data}/bad_list.txt:{number + 1} {data}/{name}: ') and BAD[name] in text


def test_too_many_pixels_are_unreadable(data):
    text = datasets.build_train(config(data, 'DATA.MAX_PIXELS', 799)).dataset[0, 0]
    assert text.endswith('0.png: 20 x 40 = 800 pixels are more than DATA.MAX_PIXELS 799, which can be raised')
    assert not isinstance(datasets.build_train(config(data, 'DATA.MAX_PIXELS', 800)).dataset[0, 0], str)


class Hanging:
    """A reader that never returns from one file, in a data process."""

    def __init__(self, read, name):
        self.read, self.name, self.trainer = read, name, os.getpid()

    def __call__(self, path, **options):
        if os.path.basename(path) == self.name and os.getpid() != self.trainer:
            signal.pause()
        return self.read(path, **options)


def test_hanging_read_is_killed_and_named(data):
    loader = datasets.build_eval(config(data, 'DATA.NUM_WORKERS', 2, 'DATA.TIMEOUT', 2))
    loader.dataset.read = Hanging(loader.dataset.read, '7.png')
    with pytest.raises(stopping.Failure, match=r'val_list.txt:8 .*/7.png: .* within DATA.TIMEOUT 2 s'):
        list(loader.epoch(0))
    assert not multiprocessing.active_children()


def test_slow_consumers_do_not_end_data_processes(data):
    batches = datasets.build_train(config(data, 'DATA.NUM_WORKERS', 1, 'DATA.TIMEOUT', 1)).epoch(0)
    next(batches)
    time.sleep(2.5)                                           # the data process waits with full hands
    assert len(list(batches)) == 5


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_left_out_of_training(data, workers, caplog):
    caplog.set_level(logging.WARNING, 'halonet')
    loader = loader_of_bad(data, NUM_WORKERS=workers, ON_ERROR='skip', batch_size=29)
    for epoch in (0, 1):
        (images, labels, indices), = arrays(loader.epoch(epoch))
        assert loader.skipped == 5 and images.shape == (24, 3, 16, 16)
        assert sorted(indices) == [*range(10), *range(15, 29)]
        assert all(label == (index - 5 * (index > 9)) % 10 for index, label in zip(indices, labels))
        expected = [loader.dataset[epoch, int(index)][0] for index in indices]
        assert np.array_equal(images, expected)
    assert sorted(message.split(': ')[1].split('/')[-1] for message in caplog.messages) == sorted(BAD)


@pytest.mark.parametrize('workers', [0, 2])
def test_whole_batch_of_unreadable_images(data, workers):
    loader = loader_of_bad(data, datasets.build_eval, NUM_WORKERS=workers, ON_ERROR='skip')
    assert [indices.tolist() for _, _, indices in arrays(loader.epoch(0))] == [
        [*range(5)], [*range(5, 10)], [*range(15, 20)], [*range(20, 25)], [*range(25, 29)]]
    assert loader.skipped == 5
    training = loader_of_bad(data, NUM_WORKERS=workers, ON_ERROR='skip', batch_size=1)
    with pytest.raises(datasets.DataError, match='whole training batch'):
        list(training.epoch(0))


# Paddle's thread prints and ends
@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_error_in_a_transform_is_raised(data):
    for workers, error in ((0, ZeroDivisionError), (2, RuntimeError)):
        loader = datasets.build_train(config(data, 'DATA.NUM_WORKERS', workers, 'DATA.ON_ERROR', 'skip'))
        loader.dataset.transform = lambda image, rng: 1 / 0
        with pytest.raises(error):
            list(loader.epoch(0))


class Deadly:
    """Ends its process, as the system does when memory is short, at one sample."""

    def __init__(self, transform):
        self.transform, self.trainer = transform, os.getpid()

    def __call__(self, image, rng):
        if image.size == (30, 30) and os.getpid() != self.trainer:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.transform(image, rng)


def test_dead_worker_raises(data):
    loader = datasets.build_eval(config(data, 'DATA.NUM_WORKERS', 2))
    loader.dataset.transform = Deadly(loader.dataset.transform)
    received = []
    with pytest.raises(RuntimeError, match='a data worker died.*/dev/shm'):
        for _, _, indices in loader.epoch(0):
            received.append(indices.tolist())
    assert received in ([[*range(5)], [*range(5, 10)]], [[*range(5)]], [])   # sample 10 kills
    assert not multiprocessing.active_children()


def test_workers_have_a_process_group_of_their_own_and_end_with_the_epoch(data, monkeypatch):
    # Paddle sets its handler only once
    monkeypatch.setattr(paddle.io.multiprocess_utils, '_SIGCHLD_handler_set', False)
    before = signal.getsignal(signal.SIGCHLD)
    batches = datasets.build_train(config(data, 'DATA.NUM_WORKERS', 2)).epoch(0)
    next(batches)
    workers = [process.pid for process in multiprocessing.active_children()]
    assert len(workers) == 2 and all(os.getpgid(pid) == pid != os.getpgrp() for pid in workers)
    assert signal.getsignal(signal.SIGCHLD) == before
    batches.close()
    assert not multiprocessing.active_children()


# the config

def test_build_train_reads_the_config(data):
    changed = config(data, 'DATA.ON_ERROR', 'skip', 'TRAIN.HFLIP', 0.25, 'TRAIN.CROP_SCALE', [0.3, 0.9],
                     'DATA.NUM_WORKERS', 3, 'SEED', 5, 'DATA.MEAN', [0.5, 0.25, 1.0])
    loader = datasets.build_train(changed, rank=1, world=2)
    assert loader.on_error == 'skip' and loader.num_workers == 3
    assert loader.dataset.seed == loader.sampler.seed == 5
    assert (loader.sampler.rank, loader.sampler.world, loader.sampler.batch_size) == (1, 2, 4)
    options = loader.dataset.transform.keywords
    assert options == {'backend': PILLOW, 'image_size': 16, 'scale': [0.3, 0.9], 'ratio': [0.75, 4 / 3],
                       'flip': 0.25, 'jitter': 0.0,
                       'policy': augment.parse_auto_augment('rand-m9-mstd0.5-inc1'), 'fill': (128, 64, 255)}
    without = datasets.build_train(config(data, 'TRAIN.AUTO_AUGMENT', ''))
    assert without.dataset.transform.keywords['policy'] is None


def test_build_eval_uses_the_training_batch_by_default(data):
    assert len(datasets.build_eval(config(data, 'DATA.BATCH_SIZE_EVAL', 0))) == 6
    assert len(datasets.build_eval(config(data))) == 5


def test_missing_lists_and_wrong_options_are_refused(data, tmp_path):
    with pytest.raises(FileNotFoundError, match='train_list.txt'):
        datasets.build_train(config(tmp_path))
    with pytest.raises(FileNotFoundError, match='val_list.txt'):
        datasets.build_eval(config(tmp_path))
    with pytest.raises(ValueError, match='MODEL.NUM_CLASSES is 5'):
        datasets.build_eval(config(data, 'MODEL.NUM_CLASSES', 5))
    with pytest.raises(ValueError, match='AUTO_AUGMENT'):
        datasets.build_train(config(data, 'TRAIN.AUTO_AUGMENT', 'augmix'))


# ---- how many data processes, and their shared memory

@pytest.mark.parametrize('asked, device, gpus, cores, count', [
    (5, 'cpu', 0, 2, 5), (0, 'gpu:0', 1, 8, 0), (-1, 'cpu', 0, 64, 2), (-1, 'gpu:0', 1, 8, 7),
    (-1, 'gpu:0', 8, 96, 11), (-1, 'gpu:0', 1, 64, 16), (-1, 'gpu:0', 4, 4, 2)])
def test_data_processes_are_chosen_by_cores_and_gpus(monkeypatch, asked, device, gpus, cores, count):
    monkeypatch.setattr(paddle, 'get_device', lambda: device)
    monkeypatch.setattr(utils, 'gpu_count', lambda: gpus)
    monkeypatch.setattr(datasets.cpu, 'cores', lambda: cores)
    assert datasets.count_workers(asked) == count


def test_launched_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(paddle, 'get_device', lambda: 'gpu:0')
    monkeypatch.setattr(utils, 'gpu_count', lambda: 1)        # each sees its own
    monkeypatch.setattr(datasets.cpu, 'cores', lambda: 32)
    monkeypatch.setenv('PADDLE_LOCAL_SIZE', '4')
    assert datasets.count_workers(-1) == 7


def test_small_shared_memory_is_named(data, tmp_path, caplog):
    loader = datasets.build_train(config(data, 'DATA.NUM_WORKERS', 3))
    needed = datasets.shared_memory_needed(loader, 4)
    assert needed == 3 * 2 * 4 * 3 * 16 * 16
    datasets.warn_of_small_shared_memory(needed, 2, str(tmp_path))
    datasets.warn_of_small_shared_memory(1 << 60, 2, str(tmp_path / 'not there'))
    assert caplog.text == ''
    datasets.warn_of_small_shared_memory(1 << 60, 2, str(tmp_path))
    assert f'the data processes may need {2 << 40} MB: a container gets more by --shm-size' in caplog.text
