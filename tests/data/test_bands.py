"""Images of other channels than RGB: reading them, and their pixels in training and evaluation."""
import io
from functools import partial

import numpy as np
import pytest
from PIL import Image

import datasets
from config import get_config
from data import augment, bands, image_files, operations
from data.bands import Bands, BandsBackend

RNG = np.random.default_rng
PHOTO = RNG(0).integers(0, 256, (30, 40, 6), np.uint8)


def grey(image):
    return np.asarray(image.convert('L'))[:, :, None]


def save(image, path):
    """Write pixels or a PIL image to `path` and return it as text."""
    if isinstance(image, np.ndarray):
        np.save(path, image)
    else:
        image.save(path)
    return str(path)


# ---- reading

@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'CMYK', '1'])
def test_one_channel_is_the_brightness(tmp_path, mode):
    image = Image.fromarray(PHOTO[:, :, :3]).convert(mode)
    path = save(image, tmp_path / ('image.tif' if mode == 'CMYK' else 'image.png'))
    assert np.array_equal(np.asarray(bands.read(path, channels=1)), grey(image.convert('RGB')))


def test_one_channel_is_composited_on_the_background(tmp_path):
    path = save(Image.new('RGBA', (5, 4), (9, 9, 9, 0)), tmp_path / 'image.png')
    assert (np.asarray(bands.read(path, channels=1)) == 255).all()
    assert (np.asarray(bands.read(path, 'black', channels=1)) == 0).all()
    assert (np.asarray(bands.read(path, 'drop', channels=1)) == 9).all()


@pytest.mark.parametrize('mode, name', [
    ('LA', 'x.png'), ('RGBA', 'x.png'), ('RGBA', 'x.webp'), ('CMYK', 'x.tif')])
def test_channels_of_a_file_are_kept(tmp_path, mode, name):
    """The colours of transparent pixels as well."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    image = Image.fromarray(PHOTO[:, :, :channels], mode)
    options = {'lossless': True, 'exact': True} if name.endswith('webp') else {}
    image.save(tmp_path / name, **options)
    read = bands.read(str(tmp_path / name), channels=channels)
    assert read.size == (40, 30)
    assert np.array_equal(np.asarray(read), PHOTO[:, :, :channels])


def test_palette_with_transparency_has_four_channels(tmp_path):
    image = Image.fromarray(PHOTO[:, :, 0] % 4, 'P')
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    image.save(tmp_path / 'image.png', transparency=2)
    expected = np.asarray(Image.open(tmp_path / 'image.png').convert('RGBA'))
    assert {0, 255} == {*expected[:, :, 3].ravel()}
    assert np.array_equal(np.asarray(bands.read(str(tmp_path / 'image.png'), channels=4)), expected)


@pytest.mark.parametrize('channels', [1, 2, 3, 4, 6])
def test_arrays_are_read(tmp_path, channels):
    path = save(PHOTO[:, :, :channels], tmp_path / 'image.npy')
    assert bands.is_array(path)
    assert np.array_equal(np.asarray(bands.read(path, channels=channels)), PHOTO[:, :, :channels])
    in_fortran_order = save(np.asfortranarray(PHOTO[:, :, :channels]), tmp_path / 'fortran.npy')
    assert np.array_equal(np.asarray(bands.read(in_fortran_order, channels=channels)), PHOTO[:, :, :channels])


def test_grey_array_needs_no_third_axis(tmp_path):
    path = save(PHOTO[:, :, 0], tmp_path / 'image.npy')
    assert np.array_equal(np.asarray(bands.read(path, channels=1)), PHOTO[:, :, :1])


@pytest.mark.parametrize('image, channels, message', [
    (Image.new('RGB', (4, 4)), 4, r'it has 3 channels \(RGB\), and DATA.CHANNELS is 4'),
    (Image.new('RGBA', (4, 4)), 2, r'it has 4 channels \(RGBA\), and DATA.CHANNELS is 2'),
    (PHOTO, 5, r'it has 6 channels \(a NumPy array\), and DATA.CHANNELS is 5'),
    (PHOTO.astype('float32'), 6, r'a NumPy array float32 \(30, 40, 6\); an image is uint8'),
    (PHOTO[None], 6, r'\(1, 30, 40, 6\); an image is uint8'),
    (PHOTO[:0], 6, r'\(0, 40, 6\); an image is uint8'),
    (PHOTO[:, :, 0].reshape(-1), 1, r'\(1200,\); an image is uint8')])
def test_other_channels_are_refused(tmp_path, image, channels, message):
    path = save(image, tmp_path / ('image.npy' if isinstance(image, np.ndarray) else 'image.png'))
    with pytest.raises(image_files.ImageError, match=message):
        bands.read(path, channels=channels)


def test_damaged_and_large_arrays_are_refused(tmp_path):
    file = io.BytesIO()
    np.save(file, PHOTO)
    for content in (file.getvalue()[:-1], file.getvalue()[:20], image_files.NUMPY):
        (tmp_path / 'cut.npy').write_bytes(content)
        with pytest.raises(Exception) as caught:
            bands.read(str(tmp_path / 'cut.npy'), channels=6)
        assert image_files.reason(caught.value)
    path = save(PHOTO, tmp_path / 'image.npy')
    with pytest.raises(image_files.ImageError, match=r'40 x 30 = 1200 pixels are more than .* 1199'):
        bands.read(path, max_pixels=1199, channels=6)


def test_pickled_objects_are_not_loaded(tmp_path):
    np.save(tmp_path / 'image.npy', np.array([{'a': 1}], dtype=object), allow_pickle=True)
    assert not bands.is_array(str(tmp_path / 'image.npy'))
    with pytest.raises(image_files.ImageError, match='a NumPy array object'):
        bands.read(str(tmp_path / 'image.npy'), channels=1)


def test_array_says_which_option_reads_it(tmp_path):
    path = save(PHOTO[:, :, :3], tmp_path / 'image.npy')
    with pytest.raises(image_files.ImageError, match=r'a NumPy array, which .* DATA.CHANNELS is not 3'):
        image_files.read(path)


# ---- pixels

def of_channels(*pictures):
    return Bands(tuple(map(Image.fromarray, pictures)))


@pytest.mark.parametrize('crop', [0.9, 1.0])
@pytest.mark.parametrize('size', [20, [14, 33]])
def test_evaluation_pixels_of_each_channel_are_those_of_a_grey_picture(size, crop):
    pixels = datasets.eval_pixels(of_channels(*np.moveaxis(PHOTO, 2, 0)), size, crop)
    for i in range(6):
        rgb = datasets.eval_pixels(Image.fromarray(PHOTO[:, :, i]), size, crop)
        assert np.array_equal(rgb[:, :, 0], pixels[:, :, i])
    assert pixels.shape[2] == 6


TRAINING = {
    'rand': {'policy': augment.parse_auto_augment('rand-m9-n4-mstd0.5-inc1-p1'), 'jitter': 0},
    '3a': {'policy': augment.parse_auto_augment('rand-m9-n4-t3a-p1'), 'jitter': 0},
    'jitter': {'policy': None, 'jitter': 0.4},
}


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('options', TRAINING.values(), ids=TRAINING)
def test_training_pixels_are_those_of_grey_pictures(options, seed):
    """An RGB image whose channels are equal goes through every operation as each channel by itself does."""
    one, other = Image.fromarray(PHOTO[:, :, 0]), Image.fromarray(PHOTO[:, :, 1])
    train = partial(datasets.train_pixels, image_size=[24, 18], scale=(0.3, 1.0), ratio=(0.7, 1.4), flip=0.5,
                    **options)
    pixels = train(Bands((one, other)), RNG(seed), backend=BandsBackend(2), fill=(99, 7))
    assert pixels.shape == (24, 18, 2)
    for i, (picture, fill) in enumerate(((one, 99), (other, 7))):
        rgb = train(picture.convert('RGB'), RNG(seed), backend=operations.PILLOW, fill=(fill,) * 3)
        assert np.array_equal(rgb[:, :, 0], pixels[:, :, i])


def test_every_operation_takes_a_channel():
    backend, image = BandsBackend(1), of_channels(PHOTO[:, :, 0])
    sampling = operations.Sampling(Image.Resampling.BICUBIC, (5,))
    for name, op in operations.OPS.items():
        value = op.draw_value(0.7, RNG(0), increasing=False)
        rgb = operations.PILLOW.apply(image.pictures[0].convert('RGB'), name, value,
                                      operations.Sampling(Image.Resampling.BICUBIC, (5, 5, 5)))
        assert np.array_equal(grey(rgb), np.asarray(backend.apply(image, name, value, sampling))), name


# ---- options

@pytest.mark.parametrize('opts, message', [
    (['DATA.CHANNELS', 4], r'DATA.MEAN is .*, DATA.CHANNELS is 4; give one number for each channel, or'),
    (['DATA.CHANNELS', 1, 'DATA.MEAN', [0.4]], r'DATA.STD is .*, DATA.CHANNELS is 1; give one number'),
    (['DATA.MEAN', []], 'DATA.MEAN is'),
    (['DATA.CHANNELS', 1, 'DATA.MEAN', [0.4], 'DATA.STD', [0.2], 'DATA.BACKEND', 'cv2'],
     "DATA.BACKEND is 'cv2', DATA.CHANNELS is 1; OpenCV makes RGB images only here"),
    (['DATA.CHANNELS', 0], 'DATA.CHANNELS is 0; it must be from 1')])
def test_options_that_do_not_fit_are_refused(opts, message):
    with pytest.raises(ValueError, match=message):
        get_config(None, opts)


def test_one_mean_is_for_all_channels():
    images = datasets.paddle.to_tensor(PHOTO[None].transpose(0, 3, 1, 2))
    for mean, std in (([0.4], [0.2]), ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2])):
        expected = (PHOTO / 255 - mean) / std
        normalised = datasets.normalise(images, mean, std).numpy()[0].transpose(1, 2, 0)
        np.testing.assert_allclose(normalised, expected, atol=1e-5)
