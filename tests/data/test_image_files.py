"""data/image_files.py: formats by content, limits, transparency, bit depth; resizing with every Pillow."""
import io
import os
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin, features
from runs import program

import datasets
from config import flatten, get_config
from data import augment, image_files
from training import checkpoint

try:
    from data import opencv
except ImportError:
    opencv = None


def read_cv2(path, *options):
    """Pixels (H, W, 3) of the whole file by OpenCV's reader."""
    return opencv.read(path, *options).decode(1)[:, :, ::-1]


needs_opencv = pytest.mark.skipif(not opencv, reason='needs OpenCV')
READERS = [image_files.read, pytest.param(read_cv2, marks=needs_opencv)]


def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def png(depth, kind, row, *, width=4, key=b'', palette=b''):
    """A PNG file of one row in its own layout; `key` is what its tRNS chunk says."""
    parts = [chunk(b'IHDR', struct.pack('>IIBBBBB', width, 1, depth, kind, 0, 0, 0))]
    parts += [chunk(b'PLTE', palette)] if palette else []
    parts += [chunk(b'tRNS', key)] if key else []
    parts += [chunk(b'IDAT', zlib.compress(b'\0' + row)), chunk(b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RED, GREEN = (255, 0, 0), (0, 128, 0)
GREY_16 = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
PALETTE = bytes([9, 9, 9, 200, 1, 1, 5, 6, 7])
MIXED = tuple(round(value * 128 / 255 + back * 127 / 255) for value, back in zip((200, 1, 1), RED))


def tiff(values, min_is_white=False, **options):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0 if min_is_white else 1
    return saved(Image.fromarray(values), 'TIFF', tiffinfo=tags, **options)


def grey(*values):
    return [(value,) * 3 for value in values]


MODES = {                                           # name: (file, its pixels on red)
    '1 bit with a key': (png(1, 0, b'\x50', key=b'\0\1'), [(0, 0, 0), RED, (0, 0, 0), RED]),
    '2 bits with a key': (png(2, 0, b'\x1b', key=b'\0\2'), [*grey(0, 85), RED, *grey(255)]),
    '4 bits with a key': (png(4, 0, b'\x0f\x30', key=b'\0\x03'), [*grey(0, 255), RED, *grey(0)]),
    '8 bits with a key': (png(8, 0, b'\0\1\2\3', key=b'\0\2'), [*grey(0, 1), RED, *grey(3)]),
    '16 bits with a key': (png(16, 0, struct.pack('>4H', 0, 65535, 256, 257), key=b'\1\0'),
                           [*grey(0, 255), RED, *grey(1)]),
    'RGB with a key': (png(8, 2, bytes(range(12)), key=bytes([0, 3, 0, 4, 0, 5])),
                       [(0, 1, 2), RED, (6, 7, 8), (9, 10, 11)]),
    'RGB of 16 bits with a key': (png(16, 2, struct.pack('>6H', 256, 512, 1024, 0, 0, 0), width=2,
                                      key=struct.pack('>3H', 256, 512, 1024)), [RED, (0, 0, 0)]),
    'grey and alpha of 16 bits': (png(16, 4, struct.pack('>4H', 257, 65535, 257, 0), width=2),
                                  [*grey(1), RED]),
    'palette with alpha': (png(8, 3, b'\0\1\2\0', key=b'\0\x80', palette=PALETTE),
                           [RED, MIXED, (5, 6, 7), RED]),
    'palette with an index': (saved(Image.fromarray(np.array([[0, 1]], np.uint8)), 'GIF', transparency=1),
                              [(0, 0, 0), RED]),
    'RGBA': (saved(Image.fromarray(np.array([[[1, 2, 3, 0], [1, 2, 3, 255], [200, 1, 1, 128]]], np.uint8)),
                   'PNG'),
             [RED, (1, 2, 3), MIXED]),
    'RGBA in WebP': (saved(Image.fromarray(np.array([[[1, 2, 3, 0]] * 4], np.uint8)), 'WEBP',
                           lossless=True), [RED] * 4),
    'grey of 16 bits': (saved(Image.fromarray(GREY_16), 'PNG'), grey(0, 0, 1, 128, 255)),
    'grey of 16 bits, TIFF': (tiff(GREY_16), grey(0, 0, 1, 128, 255)),
    'grey of 16 bits, LZW': (tiff(GREY_16, compression='tiff_lzw'), grey(0, 0, 1, 128, 255)),
    'grey of 16 bits, 0 is white': (tiff(GREY_16, min_is_white=True), grey(255, 255, 254, 127, 0)),
    'PGM of 16 bits': (b'P5 5 1 65535\n' + GREY_16.astype('>u2').tobytes(), grey(0, 0, 1, 128, 255)),
    'PGM of 12 bits': (b'P5 2 1 4095\n' + np.array([0, 4095], '>u2').tobytes(), grey(0, 255)),
}


@pytest.mark.parametrize('read', READERS)
@pytest.mark.parametrize('name', MODES)
def test_transparency_and_bit_depth(tmp_path, name, read):
    content, expected = MODES[name]
    (tmp_path / 'a.jpg').write_bytes(content)                 # the ending says nothing
    pixels = np.asarray(read(tmp_path / 'a.jpg', 'red'))
    assert pixels.shape == (1, len(expected), 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[0].astype(int) - expected).max() <= 1
    if RED in expected:
        assert not np.array_equal(pixels, np.asarray(read(tmp_path / 'a.jpg', '#008000')))
        assert not np.array_equal(pixels, np.asarray(read(tmp_path / 'a.jpg', 'drop')))


@pytest.mark.parametrize('mode', ['LA', 'PA', 'RGBA', 'P'])
def test_opaque_images_keep_their_pixels(mode):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    if mode == 'LA':
        image = rgb.convert('L').convert('LA')
    elif mode in ('P', 'PA'):
        image = rgb.quantize(9)
    else:
        image = rgb.convert(mode)
    image = image.convert('PA') if mode == 'PA' else image
    if mode == 'P':
        image.info['transparency'] = bytes([255] * 9)
    assert np.array_equal(np.asarray(image_files.to_rgb(image, 'red')), np.asarray(image.convert('RGB')))


def test_alpha_is_ignored_without_a_background_as_in_timm():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 4), np.uint8))
    expected = datasets.eval_pixels(image.convert('RGB'), 16, 0.9)
    assert np.array_equal(datasets.eval_pixels(image, 16, 0.9, 'drop'), expected)
    assert not np.array_equal(datasets.eval_pixels(image, 16, 0.9), expected)


@pytest.mark.parametrize('image', [Image.new('F', (3, 3)), Image.new('I', (3, 3))])
def test_32_bit_images_are_refused(tmp_path, image):
    image.save(tmp_path / 'a.tif')
    with pytest.raises(image_files.ImageError, match='32-bit values .* no range'):
        image_files.read(tmp_path / 'a.tif')


# formats and kinds of files

@pytest.mark.parametrize('kind', image_files.FORMATS)
def test_content_decides_the_format(tmp_path, kind):
    path = tmp_path / 'picture.tga'
    image = Image.fromarray(np.full((16, 16, 3), 77, np.uint8))
    path.write_bytes(saved(image, kind))
    assert np.abs(np.asarray(image_files.read(path)).astype(int) - 77).max() <= 2


def test_avif_is_read_where_pillow_has_it():
    assert ('AVIF' in image_files.FORMATS) == ('avif' in features.modules and bool(features.check('avif')))


FOREIGN = {
    'EPS or PostScript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) show\n',
    'PDF': b'%PDF-1.4\n', 'HEIC': b'\0\0\0\x18ftypheic\0\0\0\0', 'a web page': b'<!DOCTYPE html>',
    'ICO': saved(Image.new('RGB', (16, 16)), 'ICO'),
    'JPEG 2000': b'\0\0\0\x0cjP  \r\n\x87\n', 'Photoshop (PSD)': b'8BPS\0\1',
}


@pytest.mark.parametrize('kind', FOREIGN)
def test_other_formats_are_named_and_refused(tmp_path, kind):
    (tmp_path / 'a.jpg').write_bytes(FOREIGN[kind])
    with pytest.raises(image_files.ImageError, match='not an image in a format that is read here') as error:
        image_files.read(tmp_path / 'a.jpg')
    assert str(error.value).startswith(f'{kind}: ')


def test_formats_do_not_depend_on_images_opened_before(tmp_path):
    """Pillow tries all formats it has loaded; TGA, loaded late, takes icons for its own."""
    (tmp_path / 'a.png').write_bytes(FOREIGN['ICO'])
    for before in (lambda: None, Image.init):
        before()
        with pytest.raises(image_files.ImageError, match='^ICO: '):
            image_files.read(tmp_path / 'a.png')


@pytest.mark.parametrize('read', READERS)
def test_only_regular_files_are_opened(tmp_path, read):
    os.mkfifo(tmp_path / 'fifo')
    os.symlink(tmp_path / 'fifo', tmp_path / 'link')
    os.symlink(tmp_path / 'nowhere', tmp_path / 'broken')
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / 'socket'))
    for path, message in ((tmp_path / 'fifo', 'a FIFO, not'), (tmp_path / 'link', 'a FIFO, not'),
                          ('/dev/zero', 'a device, not'),
                          (tmp_path / 'socket', 'a socket, not'), (tmp_path / 'broken', 'No such file'),
                          (tmp_path, 'directory')):
        with pytest.raises((image_files.ImageError, OSError)) as error:
            read(path)
        assert message in image_files.reason(error.value)


@pytest.mark.parametrize('options', [{'pnginfo': 'text'}, {'icc_profile': os.urandom(3_000_000)}])
def test_large_metadata_is_accepted(tmp_path, options):
    if 'pnginfo' in options:
        options = {'pnginfo': PngImagePlugin.PngInfo()}
        options['pnginfo'].add_itxt('XML:com.adobe.xmp', 'x' * 3_000_000, zip=True)
    Image.new('RGB', (8, 8), (9, 99, 199)).save(tmp_path / 'a.png', **options)
    assert np.array_equal(np.asarray(image_files.read(tmp_path / 'a.png')), np.full((8, 8, 3), (9, 99, 199)))


def test_pixel_limit_is_checked_before_decoding(tmp_path):
    (tmp_path / 'a.png').write_bytes(png(8, 0, b'', width=2 ** 31 - 1))
    with pytest.raises(image_files.ImageError,
                       match='2147483647 x 1 = 2147483647 pixels are more than DATA.MAX_PIXELS'):
        image_files.read(tmp_path / 'a.png')


def test_short_memory_makes_an_image_unreadable(tmp_path, monkeypatch):
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    (tmp_path / 'val_list.txt').write_text('a.png 0\n')
    dataset = datasets.build_eval(get_config(None, ['DATA.DATA_PATH', str(tmp_path)])).dataset

    def fail(*args, **kwargs):
        raise MemoryError
    monkeypatch.setattr(image_files, 'resize_and_crop', fail)
    assert dataset[0, 0].endswith('a.png: not enough memory for its pixels')


# sizes

@pytest.mark.parametrize('width, height', [
    (120, 50), (50, 120), (30, 300), (300, 30), (64, 64), (9, 7), (1, 40)])
def test_resize_starts_with_rows_for_every_pillow(width, height):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    size = (max(width // 2, 1), height // 3 + 1)
    rows = [image.crop((0, y, width, y + 1)).resize((size[0], 1), 3) for y in range(height)]
    by_rows = Image.fromarray(np.stack([np.asarray(row)[0] for row in rows]))
    columns = [by_rows.crop((x, 0, x + 1, height)).resize((1, size[1]), 3) for x in range(size[0])]
    expected = np.stack([np.asarray(column)[:, 0] for column in columns], axis=1)
    assert np.array_equal(np.asarray(image_files.resize(image, size)), expected)


@pytest.mark.parametrize('width, height, size, box', [
    (40, 30, (21, 16), (3, 1, 18, 16)), (40, 30, (80, 60), (20, 10, 52, 42)),
    (7, 90, (14, 180), (-2, 74, 14, 106)),
    (200, 9, (400, 18), (180, -3, 216, 21)), (90, 90, (30, 30), (0, 0, 30, 30))])
def test_part_of_a_resized_image_equals_that_of_the_whole(monkeypatch, width, height, size, box):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([x * 5 % 256, y * 3 % 256, (x + y) % 256], axis=-1).astype(np.uint8))
    whole = np.asarray(image_files.resize_and_crop(image, size, box)).astype(int)
    assert np.array_equal(whole, np.asarray(image_files.resize(image, size).crop(box)))
    part = np.asarray(image_files._resized_part(image, size,
                                                (max(box[0], 0), max(box[1], 0), min(box[2], size[0]),
                                                             min(box[3], size[1]))))
    shown = whole[max(-box[1], 0):, max(-box[0], 0):][:part.shape[0], :part.shape[1]]
    assert np.abs(part - shown).max() <= 1
    monkeypatch.setattr(image_files, 'LARGE', 0)
    assert np.abs(np.asarray(image_files.resize_and_crop(image, size, box)).astype(int) - whole).max() <= 1


def test_thin_images_take_little_memory(tmp_path):
    """A process that may take 400 MB more than it has reads, crops and augments them."""
    sizes = [(1, 20000), (20000, 1), (1, 3_000_000), (3_000_000, 2)]
    for i, size in enumerate(sizes):
        Image.new('L', size, 7).save(tmp_path / f'{i}.png')
    code = f"""
import sys, resource
sys.path.insert(0, {os.getcwd()!r})
import numpy as np, datasets
start = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (start + 400_000_000,) * 2)
for i in range({len(sizes)}):
    image = datasets.image_files.read({str(tmp_path)!r} + f'/{{i}}.png')
    assert (datasets.eval_pixels(image, 256, 0.95) == 7).all()
    pixels = datasets.train_pixels(image, np.random.default_rng(0), backend=datasets.PILLOW, image_size=256,
                                   scale=(0.08, 1), ratio=(0.1, 0.2), flip=0.5, policy=None, jitter=0,
                                   fill=(0, 0, 0))
    assert (pixels == 7).all()
"""
    (tmp_path / 'thin.py').write_text(code)
    program(tmp_path / 'thin.py')


def test_crop_boxes_of_thin_images_are_inside():
    for width, height in ((1, 999), (999, 1), (1, 1), (2, 77)):
        for seed in range(20):
            left, top, w, h = augment._crop_box(width, height, np.random.default_rng(seed), (0.08, 1.0),
                                                (0.1, 0.3))
            assert 0 <= left and 0 <= top and w >= 1 and h >= 1 and left + w <= width and top + h <= height


# the options

@pytest.mark.parametrize('color', ['white', '#808080', 'rgb(1, 2, 3)', 'drop'])
def test_background_colours_are_accepted(color):
    assert get_config(None, ['DATA.BACKGROUND', color]).DATA.BACKGROUND == color


@pytest.mark.parametrize('color', ['whit', '', '#12345', '#11223344', 7])
def test_invalid_background_colours_are_refused(color):
    with pytest.raises(ValueError, match='DATA.BACKGROUND is .* it can be a colour such as white'):
        get_config(None, ['DATA.BACKGROUND', color])


def test_checkpoint_older_than_an_option_resumes_with_its_default():
    config = get_config(None, [])
    facts = checkpoint.facts(flatten(config), images=8)
    before = {key: value for key, value in facts.items() if key != 'DATA.BACKGROUND'}
    assert checkpoint.differences(before, facts) == []
    black = checkpoint.facts(flatten(get_config(None, ['DATA.BACKGROUND', 'black'])), images=8)
    assert checkpoint.differences(before, black) == ['DATA.BACKGROUND was white, is black']
