"""Broken lists, images, options, checkpoints and folders: the cases in the table of docs/reliability.md."""
import ctypes
import hashlib
import os
import pickle
import re
import shutil
import signal
import struct
import zlib
from pathlib import Path

from system import stopping

import numpy as np
import pytest
from hostile_files import HOSTILE
from PIL import Image
from runs import ROOT, TINY, make_images

import datasets
from config import parse_args
from training import checkpoint, engine

DOCS = Path(ROOT) / 'docs' / 'reliability.md'
CASES = {}                                  # (what, how it is broken): (what happens, how to break it)
RUNS, SKIP = 'is read', 'left out with `DATA.ON_ERROR skip`; else stops: '


def case(what, how, outcome):
    """Register a function that breaks a folder of images, and may return options, with its outcome."""
    return lambda function: CASES.setdefault((what, how), (outcome, function))


# ---- list files

def rewrite(change, name='train_list.txt'):
    """A case that changes the bytes of a list."""
    def apply(data):
        (data / name).write_bytes(change((data / name).read_bytes()))
    return apply


LISTS = {
    'binary data': ('stops: not a UTF-8 text file', lambda text: os.urandom(10) + b'\xff\xfe' + text),
    'a line of 10 MB': ('stops: no label in', lambda text: b'x' * 10_000_000 + b'\n' + text),
    'lines that end as in Windows': (RUNS, lambda text: text.replace(b'\n', b'\r\n')),
    'a byte-order mark': (RUNS, lambda text: b'\xef\xbb\xbf' + text),
    'a label that is too large': (
        'stops: label 4 is not in 0..3', lambda text: text.replace(b' 3\n', b' 4\n')),
    'a label that is no number': (
        "stops: label 'cat' is not a whole number", lambda text: text.replace(b' 3\n', b' cat\n')),
    'a line twice': (RUNS + ', and counts twice', lambda text: text + text.splitlines(keepends=True)[0]),
    'no line': ('stops: the list is empty', lambda text: b'\n# nothing\n'),
    'too few images for a batch': ('stops: do not fill one batch', lambda text: text[:text.index(b'\n') + 1]),
    'a path that leaves the folder': (
        'stops: the path leaves DATA.DATA_PATH', lambda text: b'../x.png 1\n' + text),
}
for how, (outcome, change) in LISTS.items():
    case('list file', how, outcome)(rewrite(change))


@case('list file', 'missing', 'stops: no such list file')
def _(data):
    (data / 'val_list.txt').unlink()


@case('list file', 'a folder of that name', 'stops: no such list file')
def _(data):
    (data / 'train_list.txt').unlink()
    (data / 'train_list.txt').mkdir()


# ---- class names

NAMES = {
    'binary data': ('stops: not a UTF-8 text file', b'\x89PNG\xff'),
    'more names than classes': ('stops: has 5 names and the model 4 outputs', b'cat\ndog\nemu\nfox\ngnu\n'),
    'fewer names than classes': ('is read; the others are called class N, and a line says so', b'cat\ndog\n'),
}


def names_file(content):
    def apply(data):
        (data / 'class_names.txt').write_bytes(content)
    return apply


for how, (outcome, content) in NAMES.items():
    case('class names', how, outcome)(names_file(content))


# ---- an evaluation's protocol

def protocol_file(option, content):
    def apply(data):
        (data / 'file').write_bytes(content)
        return ['-opts', option, data / 'file']
    return apply


PROTOCOLS = {
    ('subset of classes', 'a class that the model lacks'): (
        'is no class of the model', 'DATA.EVAL_CLASSES', b'0\n1\n2\n4\n'),
    ('subset of classes', 'fewer lines than labels'): (
        'label 3, but', 'DATA.EVAL_CLASSES', b'0\n1\n2\n'),
    ('several right labels', 'truncated'): ('not JSON', 'DATA.EVAL_LABELS', b'{"val/0.png": [1'),
    ('several right labels', 'no entry for an image'): (
        'has no entry for val/1.png', 'DATA.EVAL_LABELS', b'{"val/0.png": [1]}'),
}
for (what, how), (message, option, content) in PROTOCOLS.items():
    case(what, how, f'stops: {message}')(protocol_file(option, content))


# ---- images

def image(how, outcome):
    """Register a function that writes the image 7.png of the training list, on line 8."""
    def register(write):
        def apply(data):
            path = data / 'train' / '7.png'
            path.unlink()
            write(path)
        return case('image', how, outcome)(apply)
    return register


def png(mode, size=(20, 24)):
    return lambda path: Image.new(mode, size).save(path, 'PNG')


def header(width, height):
    """A PNG file that claims a size."""
    def chunk(kind, content):
        checksum = struct.pack('>I', zlib.crc32(kind + content))
        return struct.pack('>I', len(content)) + kind + content + checksum
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(bytes(100))) + chunk(b'IEND', b''))


def gif(path):
    frames = [Image.new('P', (20, 24), i) for i in range(3)]
    frames[0].save(path, 'GIF', save_all=True, append_images=frames[1:])


def rotated(path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new('RGB', (20, 24)).save(path, 'JPEG', exif=exif)


image('missing', SKIP + 'No such file')(lambda path: None)
image('no bytes', SKIP + 'the file is empty')(lambda path: path.touch())
image('text', SKIP + 'not an image in a format that is read here')(
    lambda path: path.write_text('404 not found'))
image('a folder of that name', SKIP + 'Is a directory')(lambda path: path.mkdir())
image('truncated', SKIP + 'truncated')(lambda path: (png('RGB', (200, 200))(path), os.truncate(path, 100)))
image('EPS, named .png', SKIP + 'EPS or PostScript: not an image in a format that is read here')(
    lambda path: path.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'))
image('a FIFO', SKIP + 'a FIFO, not a regular file')(os.mkfifo)
image('30,000 x 30,000 pixels', SKIP + '900000000 pixels are more than DATA.MAX_PIXELS')(
    lambda path: path.write_bytes(header(30000, 30000)))
image('1 x 1 pixel', RUNS)(png('RGB', (1, 1)))
image('animated GIF', RUNS + ', its first frame')(gif)
image('1 x 20,000 pixels', RUNS)(png('L', (1, 20000)))
image('16-bit grey', RUNS + ', scaled to 8 bits')(png('I;16'))
image('32-bit values', SKIP + '32-bit values (mode F) have no range that is known')(
    lambda path: Image.new('F', (20, 24)).save(path, 'TIFF'))
image('palette', RUNS)(png('P'))
image('transparency', RUNS + ', on `DATA.BACKGROUND`')(png('LA'))
image('rotated by EXIF', RUNS + ' as it is stored, as timm does')(rotated)


# ---- options and config files

def config_file(content):
    def apply(data):
        (data / 'c.yaml').write_bytes(content)
        return ['-cfg', data / 'c.yaml']
    return apply


case('config', 'missing', 'stops: no such config file')(lambda data: ['-cfg', data / 'none.yaml'])
case('config', 'a folder of that name', 'stops: no such config file')(lambda data: ['-cfg', data])
case('config', 'binary data', 'stops: not valid YAML')(config_file(b'\x89PNG\r\n\x1a\n'))
case('config', 'truncated', 'stops: not valid YAML')(config_file(b'DATA: {IMAGE_SIZE: 3'))
case('config', 'an unknown option', 'stops: unknown option TRIAN.BASE_LR; did you mean TRAIN.BASE_LR')(
    config_file(b'TRIAN: {BASE_LR: 1}'))
case('config', 'another type', 'stops: SEED must be a whole number')(config_file(b'SEED: many'))
case('config', 'a value out of range', 'stops: it must be at least 1')(lambda data: ['-opts', 'SAVE_KEEP', 0])
case('config', 'an infinite number', 'stops: it must be a finite number')(
    config_file(b'TRAIN: {BASE_LR: .inf}'))
case('config', 'mean of pixels from 0 to 255', 'stops: Divide by 255')(
    lambda data: ['-opts', 'DATA.MEAN', '[123.675, 116.28, 103.53]'])
case('config', 'a name that is nearly right', 'stops: did you mean configs/halonet_26t_256.yaml?')(
    lambda data: ['-cfg', 'halonet_26'])
case('config', 'two sources of weights', 'stops: name different weights')(
    lambda data: ['-pretrained', 'a.pdparams', '-resume', 'a.pdckpt'])


# ---- checkpoints and weight files

class Bomb:
    def __reduce__(self):
        return os.system, ('touch bomb_went_off',)


def damaged(option, change):
    """A case in which the file that `option` names, from a good run, has other bytes."""
    def apply(data):
        names = {'MODEL.PRETRAINED': 'final.pdparams', 'MODEL.RESUME': 'checkpoints/step_00000004.pdckpt'}
        path = data / 'good' / names[option]
        path.write_bytes(change(path.read_bytes()))
        return ['-opts', option, path]
    return apply


def flip(data):
    return data[:2000] + bytes([data[2000] ^ 4]) + data[2001:]


def with_checksum(data):
    return data + checkpoint.FOOTER + hashlib.sha256(data).hexdigest().encode()


NOT_A_CHECKPOINT = 'this is no checkpoint of this project, or it is damaged'
for what, option, message in (('checkpoint', 'MODEL.RESUME', NOT_A_CHECKPOINT),
                              ('weights', 'MODEL.PRETRAINED', 'not a readable weight file')):
    case(what, 'truncated', f'stops: {message}')(damaged(option, lambda data: data[:1000]))
    case(what, 'no bytes', f'stops: {message}')(damaged(option, lambda data: b''))
    case(what, 'a web page', f'stops: {message}')(damaged(option, lambda data: b'<!DOCTYPE html>'))
    case(what, 'a pickle that runs code', f'stops: {message}')(
        damaged(option, lambda data: pickle.dumps({'a': Bomb()})))
    case(what, 'missing', 'stops: no such')(lambda data, option=option: ['-opts', option, data / 'none'])
case('checkpoint', 'a flipped bit', 'stops: this is no checkpoint of this project, or it is damaged')(
    damaged('MODEL.RESUME', flip))
case('weights', 'of another model', 'stops: the weights do not fit the model, and nothing was loaded')(
    damaged('MODEL.PRETRAINED', lambda data: pickle.dumps({'fc.weight': np.zeros((2, 2), 'float32')})))


case('weights', 'a pickle of objects by their addresses', 'stops: its numbers are O8')(
    damaged('MODEL.PRETRAINED', lambda data: HOSTILE['scalar of objects']))
case('weights', 'a key of tuples that contain each other', 'stops: a key that is no name')(
    damaged('MODEL.PRETRAINED', lambda data: HOSTILE['doubled tuples as key']))
case('weights', 'a zip entry shorter than its directory says', 'stops: not a readable weight file')(
    damaged('MODEL.PRETRAINED', lambda data: HOSTILE['short zip entry']))
case('weights', 'in another dictionary, keys below `model.module.`', 'is read, and logged')(
    damaged('MODEL.PRETRAINED', lambda data: pickle.dumps(
        {'model': {f'model.module.{key}': value for key, value in pickle.loads(data).items()}, 'epoch': 3})))
case('checkpoint', 'another content, with its checksum', 'stops: of another version of this project')(
    damaged('MODEL.RESUME', lambda data: with_checksum(pickle.dumps({'model': {}}))))


@case('checkpoint', 'the newest damaged, `-resume auto`', 'the one before it is used, and logged')
def _(data):
    os.truncate(data / 'good' / 'checkpoints' / 'step_00000004.pdckpt', 1000)
    return ['-output', data / 'good', '-resume', 'auto']


@case('records', 'metrics.jsonl damaged', 'stops: not a record of a run')
def _(data):
    (data / 'good' / 'metrics.jsonl').write_bytes(os.urandom(30).replace(b'\n', b'') + b'\n')
    return ['-output', data / 'good', '-resume', 'auto']


# ---- folders and processes

@case('run folder', 'a file of that name', 'stops: cannot make the run folder')
def _(data):
    return ['-output', data / 'train_list.txt']


@case('run folder', 'below a file', 'stops: cannot make the run folder')
def _(data):
    return ['-output', data / 'train_list.txt' / 'run']


@case('run folder', 'of another run, without `-resume`', 'stops: holds a run already')
def _(data):
    return ['-output', data / 'good']


@case('run folder', 'without permission', 'stops: Permission denied')
def _(data):
    (data / 'run').mkdir(mode=0o500)


case('data folder', 'missing', 'stops: no such list file, for there is no folder')(
    lambda data: ['-data_path', data / 'none'])



@case('data folder', 'without permission', 'stops: Permission denied')
def _(data):
    (data / 'val_list.txt').chmod(0)


@case('data worker', 'killed', 'stops: a data worker died')
def _(data):
    trainer = os.getpid()

    def deadly(*args, **kwargs):
        assert os.getpid() != trainer
        os.kill(os.getpid(), signal.SIGKILL)
    datasets.train_pixels = deadly                   # the fixture puts it back
    return ['-opts', 'DATA.NUM_WORKERS', 1]


@case('data worker', 'reads one file without end', 'stops: could not be read within DATA.TIMEOUT 1 s')
def _(data):
    datasets.train_pixels = lambda *args, **kwargs: signal.pause()           # the fixture puts it back
    return ['-opts', 'DATA.NUM_WORKERS', 1, 'DATA.TIMEOUT', 1]


# ---- the test

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    """A folder of images, and in it a run of four steps."""
    folder = tmp_path_factory.mktemp('good') / 'data'
    make_images(folder)
    train(folder, '-output', folder / 'good')
    return folder


def train(data, *words):
    words = ['-data_path', data, '-output', data / 'run', '-opts', *TINY, 'SAVE_KEEP', 9, *words]
    engine.run(parse_args([str(word) for word in words]))


@pytest.fixture
def no_override():
    """Run without the rights by which root ignores permissions."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    rights = (ctypes.c_uint32 * 6)()                 # effective, permitted, inheritable; upper halves
    assert libc.capget(header, rights) == 0
    effective = rights[0]
    rights[0] &= ~0b110                              # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, rights) == 0
    yield
    rights[0] = effective
    assert libc.capset(header, rights) == 0


@pytest.mark.parametrize('what, how', CASES)
def test_broken_input(what, how, good, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, 'train_pixels', datasets.train_pixels)
    data = tmp_path / 'data'
    shutil.copytree(good, data)
    outcome, break_it = CASES[what, how]
    words = break_it(data) or []
    if 'permission' in how:
        request.getfixturevalue('no_override')
    before = {path: path.read_bytes() for path in data.glob('good/**/*.pd*')}
    named = what in ('data worker', 'config') or how == 'too few images for a batch'     # or by its path
    if ' stops: ' in f' {outcome}':
        with pytest.raises((*stopping.MISTAKES, stopping.Failure, SystemExit)) as stop:
            train(data, *words)
        message = capsys.readouterr().err if stop.type is SystemExit else str(stop.value)
        assert outcome.split('stops: ')[1] in message and len(message) < 2000
        assert named or str(tmp_path) in message
        if what not in ('image', 'data worker') and (what, how) != ('run folder', 'without permission'):
            assert not (data / 'run').exists()       # training has not begun
        assert not [*data.glob('run/**/*.pd*')] and not [*data.glob('**/*.tmp*')]
        assert {path: path.read_bytes() for path in data.glob('good/**/*.pd*')} == before
        if outcome.startswith(SKIP):
            assert f'{data}/train_list.txt:8' in message and '7.png' in message
            train(data, '-opts', 'DATA.ON_ERROR', 'skip')
            assert 'left out: ' in capsys.readouterr().out
    else:
        train(data, *words)
        assert 'weights: ' in capsys.readouterr().out
        if what == 'class names':
            names = (data / 'run' / 'class_names.txt').read_text()
            assert names == 'cat\ndog\nclass 2\nclass 3\n'
    assert not os.path.exists('bomb_went_off')


def test_table_in_the_docs_lists_every_case():
    """After a change, replace the table in the docs by the rows that this test shows."""
    inputs = [what for what, _ in CASES]
    rows = []
    for what, how in sorted(CASES, key=lambda case: inputs.index(case[0])):   # the cases of an input together
        rows.append(f'| {what} | {how} | {CASES[what, how][0]} |')
    text = DOCS.read_text(encoding='utf-8')
    (table,) = re.findall(r'\n\| input \| defect \| result \|\n\|---\|---\|---\|\n((?:\|.*\n)+)', text)
    assert table.splitlines() == rows, '\n'.join(rows)
