"""What lets an exported folder stand alone: preprocess.json, the card, and infer.py without Paddle."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from tools import export, export_files, infer, runtimes

import numpy as np
import paddle
import pytest
from PIL import Image, UnidentifiedImageError
from runs import TINY, make_images, options, program

import datasets
from config import get_config
from data import image_files
from halonet import build_halonet
from model import weights

FIXTURES = Path(__file__).parent.parent / 'fixtures' / 'eval_pixels'
PICTURES = sorted(path.name for path in FIXTURES.iterdir() if path.suffix in ('.jpg', '.png'))
ARGS = SimpleNamespace(dynamic=False, input='float32', result='logits', topk=5)          # of export.py
HAS_ONNX = all(importlib.util.find_spec(name) for name in export.NEEDED)


def inputs_of(path, *opts):
    """The inputs that infer.py and this project make of a picture file, both (C, H, W)."""
    config = get_config(None, list(opts))
    data = config.DATA
    image = datasets.choose_read(data.CHANNELS)(str(path), data.BACKGROUND, data.MAX_PIXELS)
    pixels = datasets.eval_pixels(image, data.IMAGE_SIZE, data.CROP_PCT).transpose(2, 0, 1)
    expected = datasets.normalise(paddle.to_tensor(pixels[None]), data.MEAN, data.STD).numpy()[0]
    return infer.prepare(Path(path), export_files.preprocess(config, ARGS)), expected


# ---- the input of the model

@pytest.mark.parametrize('size, crop', [
    (256, 0.95), (224, 0.94), (96, 1.0), ('128x200', 0.9), ('64x32', 1.0)])
@pytest.mark.parametrize('name', PICTURES)
def test_input_equals_that_of_an_evaluation(name, size, crop):
    found, expected = inputs_of(FIXTURES / name, 'DATA.IMAGE_SIZE', size, 'DATA.CROP_PCT', crop)
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16', 'CMYK'])
@pytest.mark.parametrize('channels, background', [(3, 'white'), (3, '#102030'), (3, 'drop'), (1, 'white')])
def test_modes_are_read_alike(tmp_path, mode, channels, background):
    path = tmp_path / ('image.tif' if mode == 'CMYK' else 'image.png')
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    if mode == 'I;16':
        image = Image.fromarray(values[:, :, 0].astype(np.uint16) * 200)
    else:
        image = Image.fromarray(values, 'RGBA').convert(mode)
    image.save(path)
    means = ['DATA.MEAN', [0.4], 'DATA.STD', [0.3]]
    found, expected = inputs_of(path, 'DATA.IMAGE_SIZE', 16, 'DATA.CHANNELS', channels, 'DATA.BACKGROUND',
                                background, *means)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize('channels', [2, 4, 6])
def test_channels_are_read_alike(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 256, (20, 30, channels), np.uint8)
    opts = ['DATA.IMAGE_SIZE', [16, 24], 'DATA.CHANNELS', channels, 'DATA.MEAN', [0.4], 'DATA.STD', [0.3]]
    np.save(tmp_path / 'image.npy', values)
    paths = [tmp_path / 'image.npy']
    if channels < 5:
        paths.append(tmp_path / 'image.png')
        Image.fromarray(values, {2: 'LA', 4: 'RGBA'}[channels]).save(paths[1])
    for path in paths:
        found, expected = inputs_of(path, *opts)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match=rf'{channels}'):
        infer.read(paths[-1], channels + 3, 'white')


def test_grey_array_needs_no_third_axis(tmp_path):
    np.save(tmp_path / 'image.npy', np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8))
    found, expected = inputs_of(tmp_path / 'image.npy', 'DATA.IMAGE_SIZE', 16, 'DATA.CHANNELS', 1,
                                'DATA.MEAN', [0.4], 'DATA.STD', [0.3])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize('kind', image_files.FORMATS)
def test_formats_are_read_alike(tmp_path, kind):
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / 'image', kind)
    found, expected = inputs_of(tmp_path / 'image', 'DATA.IMAGE_SIZE', 16)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize('name, channels', [
    ('drawing.eps', 3), ('drawing.jpg', 3),         # EPS by its content: Pillow would start Ghostscript
    ('palette.png', 4)])                            # a palette without transparency has three channels
def test_files_that_are_refused_elsewhere_are_refused(tmp_path, name, channels):
    image = Image.fromarray(np.full((20, 30, 3), 7, np.uint8))
    path = tmp_path / name
    if name.startswith('drawing'):
        image.save(path, 'EPS')
    else:
        image.convert('P').save(path)
    with pytest.raises(ValueError):
        datasets.choose_read(channels)(str(path), 'white', 1e9)
    with pytest.raises((ValueError, UnidentifiedImageError)):
        infer.read(path, channels, 'white')


@pytest.mark.parametrize('opts, words', [
    ([], ['shorter side has 269 pixels', '256 pixels high and 256 wide', 'on white', 'rounded down']),
    (['DATA.IMAGE_SIZE', '64x32', 'DATA.BACKGROUND', 'drop', 'DATA.CROP_PCT', 0.5],
     ['height by 128 and the width by 64', '64 pixels high and 32 wide', 'Ignore transparency']),
    (['DATA.CHANNELS', 1, 'DATA.MEAN', [0.5], 'DATA.STD', [0.5]], ['convert it to grey']),
    (['DATA.CHANNELS', 4, 'DATA.MEAN', [0.5], 'DATA.STD', [0.5]], ['the 4 channels of the file'])])
def test_steps_are_in_words(opts, words):
    facts = export_files.preprocess(get_config(None, opts), ARGS)
    text = ' '.join(facts['steps'])
    assert all(word in text for word in words), text
    assert facts['input']['shape'][1] == facts['channels']
    assert facts['cover'][0] >= facts['crop'][0] == facts['input']['shape'][2]


# ---- the folder

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """The images, the run and the exported folder of a short training."""
    folder = tmp_path_factory.mktemp('standalone')
    images = make_images(folder / 'data', val=10)
    (folder / 'data' / 'class_names.txt').write_text('red\ngreen\nblue\nnone\n')
    program('main_single_gpu.py', '-data_path', images, '-output', folder / 'run', *options(TINY))
    formats = ['paddle', 'onnx'] if HAS_ONNX else ['paddle']
    program('tools/export.py', '-pretrained', folder / 'run' / 'final.pdparams', '-output', folder / 'out',
            '-format', *formats)
    return images, folder / 'run', folder / 'out'


def test_card_tells_of_the_run(exported):
    _, run, out = exported
    card = (out / 'README.md').read_text()
    with open(run / 'metrics.jsonl', encoding='utf-8') as file:
        last = [json.loads(line) for line in file][-1]
    for text in ('# tiny\n', '| classes | 4 |', '| trained on | data |', '| images | 16 pixels, 3 channels |',
                 f'| accuracy | top-1 {last["acc1"]:.2f} %, top-5 {last["acc5"]:.2f} % of val_list.txt',
                 'after epoch 2', '-eval -pretrained RUN/final.pdparams', '`preprocess.json`', '| licence |'):
        assert text in card, text
    assert str(run) not in card
    listed = {line.split('`')[1] for line in card.splitlines() if line.startswith('| `')}
    assert {*os.listdir(out)} == listed | {'README.md'}


def test_card_of_weights_alone(exported, tmp_path):
    _, run, _ = exported
    for name in ('final.pdparams', 'config.yaml'):
        shutil.copy(run / name, tmp_path / name)
    program('tools/export.py', '-pretrained', tmp_path / 'final.pdparams', '-output', tmp_path / 'out',
            '-format', 'paddle')
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert '| classes | 4 |' in card and 'accuracy' not in card and 'infer.py' not in card


# ---- pixels in, probabilities out

@pytest.mark.parametrize('kind, result, dynamic', [
    ('uint8', 'logits', False), ('float32', 'probabilities', True), ('uint8', 'topk', True),
    ('float32', 'topk', False)])
def test_program_takes_pixels_and_gives_probabilities(exported, tmp_path, kind, result, dynamic):
    """The oracle is the network itself, with normalise and softmax of numpy."""
    _, run, _ = exported
    words = ['-input', kind, '-result', result, '-topk', 3, *(['-dynamic'] if dynamic else [])]
    program('tools/export.py', '-pretrained', run / 'final.pdparams', '-output', tmp_path / 'out', '-format',
            'paddle', *words)
    config = get_config(run / 'config.yaml')
    model = build_halonet(config)
    weights.load_pretrained(model, str(run / 'final.pdparams'))
    model.eval()
    side = 20 if dynamic else 16
    pixels = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), np.uint8)
    images = ((pixels / 255 - config.DATA.MEAN) / config.DATA.STD).astype('float32').transpose(0, 3, 1, 2)
    images = np.ascontiguousarray(images)
    with paddle.no_grad():
        logits = model(paddle.to_tensor(images)).numpy()
    found = runtimes.paddle_inference(str(tmp_path / 'out'))(pixels if kind == 'uint8' else images)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if result == 'logits':
        np.testing.assert_allclose(found, logits, atol=1e-5 * np.abs(logits).max())
    elif result == 'probabilities':
        np.testing.assert_allclose(found, probabilities, atol=1e-6)
    else:
        values, labels = found
        np.testing.assert_allclose(values, np.sort(probabilities)[:, :0:-1], atol=1e-6)
        np.testing.assert_array_equal(labels, np.argsort(-probabilities)[:, :3])
    facts = json.loads((tmp_path / 'out' / 'preprocess.json').read_text())
    assert facts['result'] == result and facts['input']['type'] == kind
    assert facts['input']['shape'][-1] == 3 or kind == 'float32'


def test_wrong_labels_are_noticed():
    logits = np.array([[0.1, 0.6, 0.3]])
    assert np.abs(export.error_of((np.array([[0.6, 0.3]]), np.array([[1, 2]])), logits)).max() == 0
    assert np.abs(export.error_of((np.array([[0.6, 0.3]]), np.array([[2, 1]])), logits)).max() > 0.2
    assert np.abs(export.error_of((np.array([[0.6, 0.1]]), np.array([[1, 0]])), logits)).max() > 0.1


@pytest.mark.parametrize('words, message', [
    (['-result', 'topk', '-topk', 5], '-topk 5: it must be from 1 to 4, the classes'),
    (['-result', 'topk', '-topk', 0], '-topk 0: it must be'),
    (['-result', 'probabilities', '-opts', 'MODEL.NUM_CLASSES', 0], 'without a classifier has no prob')])
def test_impossible_results_are_refused(exported, tmp_path, words, message):
    _, run, _ = exported
    words = ['-pretrained', run / 'final.pdparams', '-output', tmp_path / 'out', *words]
    done = program('tools/export.py', *words, check=False)
    assert done.returncode == 2 and message in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not HAS_ONNX, reason='the packages of requirements-export.txt are not installed')
@pytest.mark.parametrize('kind, result', [('uint8', 'topk'), ('float32', 'probabilities')])
def test_infer_takes_all_kinds_of_programs(exported, tmp_path, kind, result):
    images, run, out = exported
    program('tools/export.py', '-pretrained', run / 'final.pdparams', '-output', tmp_path / 'out',
            '-input', kind, '-result', result, '-topk', 4)
    found = []
    for folder in (out, tmp_path / 'out'):
        done = without_paddle(folder, f'{images}/val', '-json')
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)['pictures'])
    for one, other in zip(*found):
        assert [entry['name'] for entry in one['top']] == [entry['name'] for entry in other['top']]
        for a, b in zip(one['top'], other['top']):
            assert a['probability'] == pytest.approx(b['probability'], abs=2e-6)


# ---- infer.py

def without_paddle(folder, *words):
    """Run the infer.py of a folder where neither Paddle nor this project can be imported."""
    blocked = folder.parent / 'blocked'
    blocked.mkdir(exist_ok=True)
    for name in ('paddle', 'datasets', 'tools', 'config', 'yacs'):
        (blocked / f'{name}.py').write_text('raise ImportError("not here")\n')
    environment = {**os.environ, 'PYTHONPATH': str(blocked)}
    return subprocess.run([sys.executable, str(folder / 'infer.py'), *map(str, words)], env=environment,
                          capture_output=True, text=True, cwd=folder.parent, timeout=120)


@pytest.mark.skipif(not HAS_ONNX, reason='the packages of requirements-export.txt are not installed')
def test_infer_gives_the_probabilities_of_predict(exported, tmp_path):
    images, run, out = exported
    program('tools/predict.py', '-pretrained', run / 'final.pdparams', f'{images}/val', '-quiet', '-json',
            tmp_path / 'p.json')
    expected = json.loads((tmp_path / 'p.json').read_text())['pictures']
    done = without_paddle(out, f'{images}/val', '-json')
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)['pictures']
    assert [entry['picture'] for entry in found] == [entry['picture'] for entry in expected]
    for ours, theirs in zip(found, expected):
        assert [entry['name'] for entry in ours['top']] == [entry['name'] for entry in theirs['top']]
        for one, other in zip(ours['top'], theirs['top']):
            assert one['probability'] == pytest.approx(other['probability'], abs=1e-4)


@pytest.mark.skipif(not HAS_ONNX, reason='the packages of requirements-export.txt are not installed')
def test_infer_names_what_it_cannot_read(exported, tmp_path):
    images, _, out = exported
    (tmp_path / 'broken.jpg').write_bytes(b'no picture')
    done = without_paddle(out, tmp_path / 'broken.jpg', f'{images}/val/0.png', '-top', 1)
    assert done.returncode == 1 and 'broken.jpg: cannot be read' in done.stderr
    assert done.stdout.splitlines()[0] == f'{images}/val/0.png' and len(done.stdout.splitlines()) == 2
    done = without_paddle(out, tmp_path / 'none.jpg')
    assert done.returncode == 2 and 'none.jpg: no such file or folder' in done.stderr
