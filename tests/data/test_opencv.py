"""data/opencv.py against Pillow: the same draws, pixels within stated bounds, the same errors."""
import io
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

import datasets
from config import get_config
from data import augment, image_files, operations

try:
    from data import opencv
except ImportError as error:
    missing = f'OpenCV cannot be imported ({error}); python -m pip install -r requirements-dev.txt brings it'
else:
    missing = ''
    OPENCV = opencv.OpenCVBackend()
PILLOW = operations.PILLOW
needs_cv2 = pytest.mark.skipif(bool(missing), reason=missing)

PHOTO = Path(__file__).parent.parent / 'fixtures' / 'eval_pixels' / 'portrait_333x500.jpg'
FILL = (124, 116, 104)


# reading with OpenCV

def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, 'JPEG', **options)
    return file.getvalue()


def smooth_picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return image.filter(ImageFilter.GaussianBlur(2))


def exif_rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


FILES = {
    'baseline.jpg': lambda: jpeg(smooth_picture(48, 48)),
    'progressive.jpg': lambda: jpeg(smooth_picture(48, 48), progressive=True),
    'subsampled.jpg': lambda: jpeg(smooth_picture(48, 48), subsampling='4:2:0', restart_marker_blocks=2),
    'full_chroma.jpg': lambda: jpeg(smooth_picture(48, 48), subsampling='4:4:4', comment=b'\xff\xd9'),
    'grey.jpg': lambda: jpeg(smooth_picture(48, 48).convert('L')),
    'cmyk.jpg': lambda: jpeg(smooth_picture(48, 48).convert('CMYK')),
    'rgb.jpg': lambda: jpeg(smooth_picture(48, 48), keep_rgb=True),
    'turned.jpg': lambda: jpeg(smooth_picture(48, 48), exif=exif_rotated()),
    'more_behind.jpg': lambda: jpeg(smooth_picture(48, 48)) + b'more',
    'a.png': lambda: png(smooth_picture(48, 48)),
    'palette.png': lambda: png(smooth_picture(48, 48).quantize(16)),
    'alpha.png': lambda: png(smooth_picture(48, 48).convert('RGBA')),
}


def png(image):
    file = io.BytesIO()
    image.save(file, 'PNG')
    return file.getvalue()


@needs_cv2
@pytest.mark.parametrize('name', FILES)
def test_files_decode_to_the_pixels_of_pillow(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name]())
    photo = opencv.read(tmp_path / name)
    assert photo.size == (48, 48)
    assert (photo.reductions == (1,)) == (name in ('cmyk.jpg', 'a.png', 'palette.png', 'alpha.png'))
    pixels = OPENCV.resized_crop(photo, (0, 0, 48, 48), (48, 48))
    assert np.array_equal(pixels, np.asarray(image_files.read(tmp_path / name)))


whole = jpeg(smooth_picture(64, 48), quality=92)
DAMAGED = {
    'cut.jpg': whole[:-200], 'no_end.jpg': whole[:-2], 'half_end.jpg': whole[:-1], 'header.jpg': whole[:300],
    'start.jpg': whole[:2], 'zeros.jpg': whole[:-600] + bytes(600), 'empty.jpg': b'', 'text.jpg': b'no image',
    'cut_progressive.jpg': jpeg(smooth_picture(64, 48), progressive=True)[:-300],
    'thumbnail.jpg': whole[:2] + b'\xff\xe1\x00\x08ab\xff\xd9cd' + whole[2:-300],
    'zero_sized.jpg': re.sub(b'(\xff\xc0...)....', b'\\1\0\0\0\0', whole, flags=re.DOTALL),
    'cut.png': png(smooth_picture(64, 48))[:-600],
}


@needs_cv2
@pytest.mark.parametrize('name', [*DAMAGED, 'gone.jpg', 'folder.jpg'])
def test_files_unreadable_for_pillow_are_unreadable_for_both(tmp_path, name):
    if name in DAMAGED:
        (tmp_path / name).write_bytes(DAMAGED[name])
    (tmp_path / 'folder.jpg').mkdir()
    (tmp_path / 'train_list.txt').write_text(f'{name} 1\n' * 8)
    pillow, cv2 = (datasets.build_train(config(tmp_path, 'DATA.BACKEND', backend)).dataset[0, 3]
                   for backend in ('pillow', 'cv2'))
    assert pillow.startswith(f'{tmp_path}/train_list.txt:4 {tmp_path}/{name}: ')
    assert re.sub('0x[0-9a-f]+', '', cv2) == re.sub('0x[0-9a-f]+', '', pillow)


@needs_cv2
def test_too_many_pixels_are_unreadable_for_both(data):
    opts = ['DATA.MAX_PIXELS', 100, 'DATA.BACKEND']
    texts = {datasets.build_train(config(data, *opts, backend)).dataset[0, 0]
             for backend in ('pillow', 'cv2')}
    assert len(texts) == 1 and 'pixels are more than DATA.MAX_PIXELS 100' in texts.pop()


@needs_cv2
def test_pillow_decodes_where_opencv_cannot(monkeypatch):
    monkeypatch.setattr(opencv.cv2, 'imdecode', lambda data, flags: None)
    photo = opencv.read(PHOTO)
    assert np.array_equal(photo.decode(1)[:, :, ::-1], np.asarray(image_files.read(PHOTO)))
    assert photo.decode(2).shape == (250, 167, 3)
    monkeypatch.setattr(Image.Image, 'load', lambda image: 1 / 0)
    with pytest.raises(OSError, match='ZeroDivisionError'):
        photo.decode(1)


def differences(ours, theirs):
    return np.abs(np.asarray(ours).astype(int) - np.asarray(theirs))


@needs_cv2
@pytest.mark.parametrize('box, size, mean', [
    ((20, 30, 224, 224), (224, 224), 0), ((0, 0, 333, 500), (224, 224), 1.2),
    ((7, 11, 301, 333), (224, 224), 1.2), ((40, 60, 90, 120), (224, 224), 1.2),
    ((0, 0, 333, 500), (160, 160), 2), ((13, 21, 319, 477), (150, 150), 2), ((1, 3, 331, 495), (80, 80), 3),
    ((5, 5, 321, 323), (40, 40), 7), ((0, 0, 333, 500), (250, 100), 2), ((7, 11, 301, 433), (64, 200), 3)])
def test_crops_are_close_to_pillow(box, size, mean):
    """At full, half, quarter and eighth size; a shift by one pixel of the result would be seen."""
    pillow = PILLOW.resized_crop(image_files.read(PHOTO), box, size)
    ours = OPENCV.resized_crop(opencv.read(PHOTO), box, size)
    assert ours.shape == (*size, 3) and ours.dtype == np.uint8
    difference = differences(ours, pillow).mean()
    assert difference <= mean
    assert differences(ours[1:], np.asarray(pillow)[:-1]).mean() > 2 * difference
    assert differences(ours[:, 1:], np.asarray(pillow)[:, :-1]).mean() > 2 * difference


@needs_cv2
def test_jpeg_is_decoded_at_the_reduction_of_its_crop():
    asked = []
    photo = opencv.Photo((800, 600), lambda reduction: asked.append(reduction) or np.zeros(
        (-(-600 // reduction), -(-800 // reduction), 3), np.uint8), opencv.REDUCTIONS)
    for box in ((0, 0, 800, 600), (1, 1, 799, 400), (1, 1, 399, 599), (201, 101, 400, 449), (799, 599, 1, 1)):
        assert OPENCV.resized_crop(photo, box, (100, 100)).shape == (100, 100, 3)
    assert asked == [4, 4, 2, 4, 1]


# operations

EXACT = ('AutoContrast', 'Equalize', 'Invert', 'Posterize', 'Solarize', 'SolarizeAdd', 'Contrast',
         'Brightness')
GEOMETRIC = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')
# name: bound of the mean and of the largest difference, border apart
CLOSE = {
    'Color': (0.01, 1), 'Desaturate': (0.01, 1), 'Sharpness': (0.01, 1), 'GaussianBlur': (1.0, 30),
    **dict.fromkeys(GEOMETRIC, (1.0, 60)),
}


def drawn(name, count=12, seed=0):
    """(value, sampling) as apply_op draws them."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        value = operations.OPS[name].draw_value(i / (count - 1), rng, increasing=i % 2 == 1)
        resample = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[i // 2 % 2]
        yield value, operations.Sampling(resample, FILL)


def pictures():
    photo = Image.open(PHOTO).convert('RGB').crop((40, 100, 264, 324))
    dull = Image.fromarray(np.asarray(photo) // 3 + 40)
    flat = Image.new('RGB', (224, 224), (9, 100, 200))
    values = np.where(np.arange(224) < 200, 7, np.arange(224)).astype(np.uint8)
    uneven = Image.fromarray(values[None, :, None].repeat(3, 2).repeat(224, 0))
    return photo, dull, flat, uneven


@needs_cv2
@pytest.mark.parametrize('name', EXACT)
def test_operations_by_table_equal_pillow(name):
    for image in pictures():
        for value, sampling in drawn(name):
            ours = OPENCV.apply(np.asarray(image), name, value, sampling)
            pillow = PILLOW.apply(image, name, value, sampling)
            assert np.array_equal(ours, np.asarray(pillow)), (value, sampling)


@needs_cv2
@pytest.mark.parametrize('name', CLOSE)
def test_operations_are_close_to_pillow(name):
    mean, largest = CLOSE[name]
    for image in pictures():
        for value, sampling in drawn(name):
            pillow = PILLOW.apply(image, name, value, sampling)
            before = np.asarray(image).copy()
            ours = OPENCV.apply(before, name, value, sampling)
            assert ours.shape == (224, 224, 3) and ours.dtype == np.uint8
            assert np.array_equal(before, np.asarray(image))
            difference = differences(ours, pillow)
            assert difference.mean() <= mean
            # where the picture ends Pillow has a hard edge, OpenCV one pixel of both colours
            inside = Image.new('L', image.size, 255)
            if name in GEOMETRIC:
                inside = PILLOW.apply(inside, name, value, sampling._replace(fillcolor=0))
                inside = inside.filter(ImageFilter.MinFilter(7))
            assert difference[np.asarray(inside) == 255].max(initial=0) <= largest


@needs_cv2
def test_all_operations_are_checked():
    ours = {*opencv.OPS, *opencv.BY_TABLE, *opencv.MATRICES}
    assert {*EXACT, *CLOSE} == ours >= {*operations.RAND_OPS}
    assert ours <= operations.OPS.keys()


@needs_cv2
def test_other_operations_are_applied_by_pillow(monkeypatch):
    blur = operations.Op(lambda image, value, sampling: image.filter(ImageFilter.BoxBlur(value)))
    monkeypatch.setitem(operations.OPS, 'Blur', blur)
    image, *_ = pictures()
    expected = np.asarray(image.filter(ImageFilter.BoxBlur(2)))
    assert np.array_equal(OPENCV.apply(np.asarray(image), 'Blur', 2), expected)


@needs_cv2
@pytest.mark.parametrize('options', [{}, {'jitter': 0.4},
                                     {'policy': augment.parse_auto_augment('rand-m9-mstd0.5-inc1')}])
def test_both_backends_draw_the_same(options):
    """After the transforms the generators stand at the same place, and the pictures differ little."""
    options = {'image_size': 96, 'scale': (0.08, 1.0), 'ratio': (0.75, 4 / 3), 'flip': 0.5, 'policy': None,
               'jitter': 0.0,
               'fill': FILL, **options}
    means = []
    for seed in range(20):
        draws = [np.random.default_rng(seed) for _ in range(2)]
        pillow = datasets.train_pixels(image_files.read(PHOTO), draws[0], backend=PILLOW, **options)
        ours = datasets.train_pixels(opencv.read(PHOTO), draws[1], backend=OPENCV, **options)
        assert draws[0].bit_generator.state == draws[1].bit_generator.state
        means.append(differences(ours, pillow).mean())
    assert np.median(means) < 2 and max(means) < 10


# loaders

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """24 JPEG and PNG images in train_list.txt and val_list.txt; number 7 is cut off."""
    folder = tmp_path_factory.mktemp('data')
    names = [f'{i}.{"png" if i % 5 == 4 else "jpg"}' for i in range(24)]
    for i, name in enumerate(names):
        smooth_picture(40 + 5 * i, 90 - i, i).save(folder / name)
    (folder / '7.jpg').write_bytes((folder / '7.jpg').read_bytes()[:-100])
    for name in ('train_list.txt', 'val_list.txt'):
        (folder / name).write_text(''.join(f'{image} {i % 10}\n' for i, image in enumerate(names)))
    return folder


def config(data, *opts):
    return get_config(None, [
        'DATA.DATA_PATH', str(data), 'DATA.IMAGE_SIZE', 16, 'DATA.BATCH_SIZE', 4, 'DATA.ON_ERROR', 'skip',
        'DATA.NUM_WORKERS', 0, 'MODEL.NUM_CLASSES', 10, 'TRAIN.AUTO_AUGMENT', 'rand-m9-mstd0.5-inc1', *opts])


def batches(loader):
    """{index: (pixels, label)} of an epoch, and the indices in order."""
    order, samples = [], {}
    for images, labels, indices in loader.epoch(1):
        order += indices.tolist()
        samples.update({i: (pixels.tobytes(), label) for pixels, label, i in
                        zip(images.numpy(), labels.tolist(), indices.tolist())})
    return order, samples


@needs_cv2
def test_batches_by_opencv_do_not_depend_on_workers_or_ranks(data, caplog):
    caplog.set_level(logging.WARNING, 'halonet')
    alone = batches(datasets.build_train(config(data, 'DATA.BACKEND', 'cv2')))
    assert len(alone[0]) == len(alone[1]) == 23 and 7 not in alone[1] and 'truncated' in caplog.text
    assert batches(datasets.build_train(config(data, 'DATA.BACKEND', 'cv2', 'DATA.NUM_WORKERS', 2))) == alone
    two = config(data, 'DATA.BACKEND', 'cv2', 'DATA.BATCH_SIZE', 2)
    halves = [batches(datasets.build_train(two, rank, 2)) for rank in (0, 1)]
    assert {**halves[0][1], **halves[1][1]} == alone[1]
    assert batches(datasets.build_train(config(data)))[0] == alone[0]


@needs_cv2
def test_evaluation_reads_by_pillow(data):
    pillow, cv2 = (batches(datasets.build_eval(config(data, 'DATA.BACKEND', backend)))
                   for backend in ('pillow', 'cv2'))
    assert pillow == cv2
    assert datasets.build_eval(config(data, 'DATA.BACKEND', 'cv2')).dataset.read is image_files.read


def test_missing_opencv_is_reported_with_its_installation(data, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cv2', None)
    monkeypatch.delitem(sys.modules, 'data.opencv', raising=False)
    monkeypatch.delattr('data.opencv', raising=False)
    with pytest.raises(ValueError,
                       match="DATA.BACKEND is cv2.*pip install 'opencv-python-headless.*BACKEND pillow"):
        datasets.build_train(config(data, 'DATA.BACKEND', 'cv2'))
    assert len(datasets.build_train(config(data))) == 6
