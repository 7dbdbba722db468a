"""Images of other channels and other shapes, from the file to the logits of every tool."""
import csv
import json

from tools import export, runtimes

import numpy as np
import paddle
import pytest
from exact_runs import run
from PIL import Image
from runs import TINY, options, program

from config import get_config
from halonet import build_halonet
from model import weights

CASES = {                                           # name: channels, options
    'wide': (3, ['DATA.IMAGE_SIZE', [16, 24]]),
    'grey': (1, ['DATA.IMAGE_SIZE', 16]),
    'grey and alpha': (2, ['DATA.IMAGE_SIZE', [24, 16]]),
    'RGBA': (4, ['DATA.IMAGE_SIZE', 16]),
    'six channels': (6, ['DATA.IMAGE_SIZE', [16, 24]]),
}
AUGMENTED = ['TRAIN.COLOR_JITTER', 0.2, 'TRAIN.RANDOM_ERASE_PROB', 0.25, 'TRAIN.MIXUP_ALPHA', 0.2,
             'TRAIN.NUM_EPOCHS', 60, 'TRAIN.BASE_LR', 0.01, 'TRAIN.CROP_SCALE', [0.8, 1.0], 'TRAIN.HFLIP', 0,
             'VALIDATE_FREQ', 60]


def make_images(folder, channels):
    """Write images of 4 classes: one quarter of the last channel is bright."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (('train', 20), ('val', 12)):
        lines = []
        for i in range(count):
            pixels = rng.integers(100, 120, (20, 24, channels), np.uint8)
            top, left = 10 * (i % 4 // 2), 12 * (i % 2)
            pixels[top:top + 10, left:left + 12, -1] += 100
            name = f'{split}{i}.npy' if channels > 4 else f'{split}{i}.png'
            if channels > 4:
                np.save(folder / name, pixels)
            else:
                Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(folder / name)
            lines.append(f'{name} {i % 4}\n')
        (folder / f'{split}_list.txt').write_text(''.join(lines))
    return str(folder)


SLOW = ('grey', 'grey and alpha', 'RGBA')           # the others have in common with them what may fail
PARAMETERS = [pytest.param(values, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
              for name, values in CASES.items()]


@pytest.fixture(scope='module', params=PARAMETERS)
def trained(request, tmp_path_factory):
    """The channels, the images and the folder of a finished run, with its accuracy."""
    channels, shape = request.param
    folder = tmp_path_factory.mktemp('shapes')
    images = make_images(folder / 'images', channels)
    values = ['DATA.CHANNELS', channels, 'DATA.MEAN', [0.6], 'DATA.STD', [0.25], *shape, *AUGMENTED]
    result = run(images, folder / 'run', *values, 'DATA.NUM_WORKERS', 1)
    return channels, images, folder / 'run', result['val']['acc1']


def test_channels_and_shapes_are_learnt(trained):
    assert trained[3] > 90


def test_evaluation_and_prediction_agree(trained, tmp_path):
    _, images, folder, accuracy = trained
    final = str(folder / 'final.pdparams')
    evaluated = run(images, tmp_path / 'eval', 'EVAL', True, 'MODEL.PRETRAINED', final, *values_of(folder))
    assert evaluated['val']['acc1'] == pytest.approx(accuracy)
    with open(tmp_path / 'eval' / 'results.csv', encoding='utf-8', newline='') as file:
        row = next(csv.DictReader(file))
    sides = get_config(folder / 'config.yaml').DATA.IMAGE_SIZE
    assert row['image_size'] == (str(sides) if isinstance(sides, int) else '{}x{}'.format(*sides))
    program('tools/predict.py', '-pretrained', folder / 'final.pdparams', f'{images}/val_list.txt', '-quiet',
            '-json', tmp_path / 'p.json', '-html', tmp_path / 'p.html')
    pictures = json.loads((tmp_path / 'p.json').read_text())['pictures']
    right = [picture['top'][0]['label'] == picture['label'] for picture in pictures]
    assert 100 * np.mean(right) == pytest.approx(accuracy)
    assert (tmp_path / 'p.html').read_text().count('<img') == len(pictures)


def values_of(folder):
    """Return the options of a run that describe its images and its model."""
    data = get_config(folder / 'config.yaml').DATA
    return ['DATA.CHANNELS', data.CHANNELS, 'DATA.MEAN', data.MEAN, 'DATA.STD', data.STD,
            'DATA.IMAGE_SIZE', data.IMAGE_SIZE]


def test_export_takes_the_shape(trained, tmp_path):
    channels, _, folder, _ = trained
    program('tools/export.py', '-pretrained', folder / 'final.pdparams', '-output', tmp_path / 'exported',
            '-format', 'paddle')
    config = get_config(folder / 'config.yaml', ['MODEL.ATTENTION', 'composed'])
    model = build_halonet(config)
    weights.load_pretrained(model, str(folder / 'final.pdparams'))
    model.eval()
    shape = channels, *export.sizes.sides(config.DATA.IMAGE_SIZE)
    images = np.random.default_rng(0).standard_normal((2, *shape), dtype='float32')
    exported = runtimes.paddle_inference(str(tmp_path / 'exported'))(images)
    with paddle.no_grad():
        logits = model(paddle.to_tensor(images)).numpy()
    np.testing.assert_allclose(exported, logits, atol=1e-4 * np.abs(logits).max())
    meta = json.loads((tmp_path / 'exported' / 'meta.json').read_text())
    assert f'(batch, {channels}, height, width)' in meta['input'] and meta['size'] == config.DATA.IMAGE_SIZE


def test_attention_is_drawn_and_data_are_checked(trained, tmp_path):
    channels, images, folder, _ = trained
    name = 'val0.npy' if channels > 4 else 'val0.png'
    program('tools/visualize.py', '-pretrained', folder / 'final.pdparams', f'{images}/{name}', '-output',
            tmp_path / 'attention.png', '-head', 'mean')
    with Image.open(tmp_path / 'attention.png') as picture:
        assert picture.width > 200
    program('tools/check_data.py', images, '-channels', channels, '-json', tmp_path / 'report.json')
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['bad'] == [] and report['train']['size']['median'] == [24, 20]


def test_file_of_other_channels_stops_the_training(images, tmp_path):
    words = [*TINY, 'DATA.CHANNELS', 4, 'DATA.MEAN', [0.5], 'DATA.STD', [0.5]]
    done = program('main_single_gpu.py', '-data_path', images, '-output', tmp_path / 'run', *options(words),
                   check=False)
    assert done.returncode == 2
    assert 'it has 3 channels (RGB), and DATA.CHANNELS is 4' in done.stdout + done.stderr
