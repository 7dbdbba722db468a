"""predict and visualize: what they show is what the model computes on the pixels of an evaluation."""
import base64
import csv
import io
import json
import os
import re
import subprocess
import sys

from tools import cli, fonts, predict, visualize
from tools.attention_maps import attention_maps

import browser
import numpy as np
import paddle
import pytest
from html_page import open_page
from PIL import Image
from runs import TINY, make_images, program

import datasets
from config import get_config
from halonet import build_halonet

NAMES = ['red <b>', 'green', 'blue "&"', 'grey']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run folder with config.yaml and weights, and beside it data/ with images and class_names.txt."""
    folder = tmp_path_factory.mktemp('predict')
    data = make_images(folder / 'data', val=9)
    (folder / 'data' / 'class_names.txt').write_text(''.join(f'{name}\n' for name in NAMES))
    (folder / 'binary.txt').write_bytes(b'\x89PNG')
    os.makedirs(folder / 'run')
    config = get_config(None, [*TINY, 'DATA.DATA_PATH', data, 'DATA.CROP_PCT', 0.8])
    (folder / 'run' / 'config.yaml').write_text(config.dump())
    paddle.seed(3)
    model = build_halonet(config)
    for key, value in model.state_dict().items():
        if key.endswith('bn.weight') and not value.numpy().any():
            value.set_value(paddle.ones_like(value))                          # a fresh block would be its shortcut
    model.head.fc.weight.set_value(model.head.fc.weight * 30)
    model.eval()
    paddle.save(model.state_dict(), str(folder / 'run' / 'final.pdparams'))
    return folder, model, config


def call(tool, *words):
    with pytest.raises(SystemExit) as stop:
        tool.parser().run(tool.main, [str(word) for word in words])
    return stop.value.code


def expected(run, path):
    """Class probabilities of a picture, in float64, from a plain forward pass."""
    _, model, config = run
    with Image.open(path) as file:
        pixels = datasets.eval_pixels(file, 16, 0.8)
    x = (pixels / 255 - config.DATA.MEAN) / config.DATA.STD
    logits = model(paddle.to_tensor(x.transpose(2, 0, 1)[None].astype('float32'))).numpy()[0].astype('float64')
    return np.exp(logits) / np.exp(logits).sum()


def weights_of(run):
    return run[0] / 'run' / 'final.pdparams'


# ---- predict

def test_predictions_equal_a_plain_forward_pass(run, tmp_path, capsys):
    folder = run[0]
    paths = [f'{folder}/data/val/{i}.png' for i in range(9)]
    words = ['-pretrained', weights_of(run), folder / 'data' / 'val', '-topk', 3, '-batch_size', 4]
    assert call(predict, *words, '-json', tmp_path / 'a.json', '-csv', tmp_path / 'a.csv') == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / 'a.json').read_text())
    assert content['model'] == 'tiny' and [item['picture'] for item in content['pictures']] == paths
    rows = list(csv.DictReader(io.StringIO((tmp_path / 'a.csv').read_text())))
    assert len(rows) == 27
    for i, (path, item) in enumerate(zip(paths, content['pictures'])):
        p = expected(run, path)
        order = np.argsort(-p)[:3]
        assert [top['label'] for top in item['top']] == order.tolist()
        assert [top['name'] for top in item['top']] == [NAMES[label] for label in order]
        np.testing.assert_allclose([top['probability'] for top in item['top']], p[order], atol=2e-6)
        mine = rows[3 * i:3 * i + 3]
        assert [(row['picture'], row['rank'], int(row['label'])) for row in mine] == [
            (path, str(rank), label) for rank, label in enumerate(order.tolist(), 1)]
        np.testing.assert_allclose([float(row['probability']) for row in mine], p[order], atol=2e-6)
        assert f'{path}\n  {100 * p[order[0]]:6.2f} %  {NAMES[order[0]]}' in out
    assert re.search(r'\n9 pictures in [\d.]+ s, [\d.]+ images/s on cpu\n$', out)


def test_lists_and_their_labels(run, tmp_path, capsys):
    folder = run[0]
    (folder / 'data' / 'one 1').write_bytes((folder / 'data' / 'val' / '0.png').read_bytes())
    (folder / 'data' / 'some.txt').write_text('# pictures\nval/3.png 3\n\none 1\none 1 2\nval/1.png\nval/2.png\t0\n')
    found = predict.read_list(str(folder / 'data' / 'some.txt'))
    expected = [('3.png', 3), ('one 1', None), ('one 1', 2), ('1.png', None), ('2.png', 0)]
    assert [(os.path.basename(item.path), item.label) for item in found] == expected
    assert call(predict, '--pretrained', weights_of(run), folder / 'data' / 'val_list.txt', '--quiet', '--json=-') == 0
    content = json.loads(capsys.readouterr().out)
    right = [item['label'] == item['top'][0]['label'] for item in content['pictures']]
    assert call(predict, '-pretrained', weights_of(run), folder / 'data' / 'val_list.txt') == 0
    out = capsys.readouterr().out
    assert f'{sum(right)} of 9 labels are right ({100 * np.mean(right):.2f} %)' in out
    assert '2.png  (a blue "&")' in out


def test_unreadable_pictures_are_told_and_the_others_done(run, tmp_path, capsys):
    good = run[0] / 'data' / 'val' / '4.png'
    (tmp_path / 'text.jpg').write_text('hello')
    (tmp_path / 'half.png').write_bytes(good.read_bytes()[:300])
    words = [tmp_path / 'text.jpg', tmp_path / 'half.png', tmp_path / 'none.png', good]
    outputs = ['-json', tmp_path / 'a.json', '-csv', tmp_path / 'a.csv', '-html', tmp_path / 'a.html']
    assert call(predict, '-pretrained', weights_of(run), *words, *outputs) == 1
    out, err = capsys.readouterr()
    assert [line.split(':')[0] for line in err.splitlines()] == [str(path) for path in words[:3]]
    assert 'not an image' in err and 'No such file' in err and '1 pictures in' in out and '; 3 cannot be read' in out
    items = json.loads((tmp_path / 'a.json').read_text())['pictures']
    assert ['error' in item for item in items] == [True, True, True, False]
    assert [row['error'] != '' for row in csv.DictReader(open(tmp_path / 'a.csv'))] == [True] * 3 + [False] * 4
    assert (tmp_path / 'a.html').read_text().count('<b>cannot be read</b>') == 3


def test_the_page_shows_the_pictures_with_their_bars(run, tmp_path):
    data = run[0] / 'data'
    words = [data / 'val_list.txt', '-html', tmp_path / 'a.html', '-html_most', 6]
    assert call(predict, '-pretrained', weights_of(run), *words) == 0
    page = open_page(tmp_path / 'a.html')
    images = [image[1]['src'] for image in page.find('img')]
    assert len(images) == 6 and 'The first 6 of 9 are shown.' in page.text
    assert '<b>' not in ''.join(page.texts).replace('red <b>', '') and 'red <b>' in page.texts
    for i, src in enumerate(images):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(src.split(',')[1]))))
        with Image.open(data / 'val' / f'{i}.png') as file:
            np.testing.assert_array_equal(shown, datasets.eval_pixels(file, 16, 0.8))
    widths = [float(bar[1]['style'][4:-1]) for bar in page.find('i')]
    for i in range(6):
        p = np.sort(expected(run, data / 'val' / f'{i}.png'))[::-1]
        np.testing.assert_allclose(widths[4 * i:4 * i + 4], 100 * p, atol=0.006)


def test_the_page_shows_no_absolute_path(run, tmp_path):
    words = [run[0] / 'data' / 'val_list.txt', tmp_path / 'none.png', '-html', tmp_path / 'a.html']
    assert call(predict, '-pretrained', weights_of(run), *words) == 1
    text = (tmp_path / 'a.html').read_text()
    below = os.path.relpath(run[0], os.path.commonpath([run[0], tmp_path]))
    assert f'>{below}/data/val/3.png<' in text and 'weights run/final.pdparams;' in text
    assert not re.search(r'[> "]/\w', text.split('<style>')[0] + text.split('</style>')[1].split('<script>')[0])


@pytest.mark.skipif(not browser.find(), reason=f'none of {", ".join(browser.NAMES)} is on PATH')
@pytest.mark.parametrize('width', [375, 1280])
def test_the_page_filters_and_sorts(run, tmp_path, width):
    words = [run[0] / 'data' / 'val_list.txt', tmp_path / 'none.png']
    assert call(predict, '-pretrained', weights_of(run), *words, '-html', tmp_path / 'a.html', '-json', tmp_path / 'a.json') == 1
    items = json.loads((tmp_path / 'a.json').read_text())['pictures']
    names = [os.path.basename(item['picture']) for item in items]
    wrong = [i for i, item in enumerate(items) if 'top' in item and item['label'] != item['top'][0]['label']]
    assert 0 < len(wrong) < 9
    by_confidence = sorted(wrong, key=lambda i: -items[i]['top'][0]['probability'])
    with browser.Browser() as opened:
        opened.open(tmp_path / 'a.html', width=width)
        assert opened.problems() == [] and opened.evaluate('document.documentElement.scrollWidth') == width
        assert opened.evaluate('''[...document.querySelectorAll('figure *')].filter(e => e.getBoundingClientRect().right
            > e.closest('figure').getBoundingClientRect().right).length''') == 0      # nothing is cut off

        def shown(kind, order):
            opened.evaluate(f'''(() => {{ const form = document.querySelector('form'); form.kind.value = {kind!r};
                form.order.value = {order!r}; form.dispatchEvent(new Event('input')); }})()''')
            texts = opened.evaluate("[...document.querySelectorAll('figure')].map(e => e.innerText)")
            return [re.search(r'\w+\.png', text)[0] for text in texts]
        assert shown('all', 'listed') == names
        assert shown('wrong', 'listed') == [names[i] for i in wrong]
        assert shown('wrong', 'most') == [names[i] for i in by_confidence]
        assert shown('wrong', 'least') == [names[i] for i in by_confidence[::-1]]
        assert shown('broken', 'most') == ['none.png'] and shown('all', 'listed') == names
        assert not opened.evaluate("document.querySelector('form').hidden")


@pytest.mark.parametrize('words, message', [
    (['-pretrained', 'x', 'RUN/data/val'], 'there is no config.yaml that says what model x belongs to'),
    (['-pretrained', 'x', '-cfg', 'RUN/run/config.yaml', 'RUN/data/val'], '-pretrained x: no such file'),
    (['-pretrained', 'RUN/run/final', 'RUN/run'], 'no pictures in this folder'),
    (['-pretrained', 'RUN/run/final', 'RUN/none.txt'], 'No such file'),
    (['-pretrained', 'RUN/run/final', '-crop_pct', '1', '-opts', 'DATA.CROP_PCT', '0.5', '--', 'RUN/data/val'],
     '-crop_pct says 1.0 and -opts DATA.CROP_PCT says 0.5'),
    (['-pretrained', 'RUN/run/final', '-topk', '0', 'RUN/data/val'], 'at least 1'),
    (['-pretrained', 'RUN/run/final', '-html_most', '-3', 'RUN/data/val'], 'at least 1'),
    (['-pretrained', 'RUN/run/final', 'RUN/binary.txt'], "not a UTF-8 text file; expected lines 'relative/path'"),
    (['-pretrained', 'RUN/run/final', '-opts', 'MODEL.NUM_CLASSES', '3', 'DATA.SEED', '1'], 'required: PICTURE'),
    (['-pretrained', 'RUN/run/final', 'RUN/data/val', '-classes', 'RUN/data/val_list.txt'], '9 names for 4 classes'),
    (['-pretrained', 'RUN/run/final', 'RUN/data/val', '-image_size', 'big'], 'DATA.IMAGE_SIZE must be a whole number'),
    (['RUN/data/val'], 'required: -pretrained')])
def test_mistakes_are_one_line(run, capsys, words, message):
    assert call(predict, *(word.replace('RUN', str(run[0])) for word in words)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert ': error: ' in line and message in line


@pytest.mark.parametrize('option', ['-json', '-csv', '-html'])
@pytest.mark.parametrize('place, message', [('none/a', 'No such file or directory'), ('', 'Is a directory')])
def test_what_cannot_be_written_is_told_before_the_work(run, tmp_path, capsys, option, place, message):
    assert call(predict, '-pretrained', weights_of(run), run[0] / 'data' / 'val', option, tmp_path / place) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.endswith(f'{tmp_path / place}: cannot be written: {message}\n') and not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / 'a.csv').write_text('old')
    monkeypatch.setattr(os, 'replace', lambda *names: (_ for _ in ()).throw(OSError(28, 'No space left on device', names[0])))
    with pytest.raises(OSError) as error:
        cli.write_text(str(tmp_path / 'a.csv'), 'new')
    assert cli.told(error.value) == f'{tmp_path}/a.csv: cannot write: No space left on device; what was there before is intact'
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('a.csv', 'old')]


@pytest.mark.parametrize('encoding', ['utf-8:strict', 'ascii'])
def test_names_that_are_no_text_or_beyond_the_terminal(run, tmp_path, encoding):
    picture = (run[0] / 'data' / 'val' / '4.png').read_bytes()
    for name in (b'\xff.png', '\u00fc.png'.encode()):
        with open(os.fsencode(tmp_path) + b'/' + name, 'wb') as file:
            file.write(picture)
    words = ['-json', tmp_path / 'a.json', '-csv', tmp_path / 'a.csv', '-html', tmp_path / 'a.html']
    done = program('tools/predict.py', '-pretrained', weights_of(run), tmp_path, *words, PYTHONIOENCODING=encoding)
    assert '\\udcff.png\n' in done.stdout and '2 pictures in' in done.stdout
    items = json.loads((tmp_path / 'a.json').read_text())['pictures']
    assert [os.path.basename(item['picture']) for item in items] == ['\u00fc.png', '\udcff.png']
    assert all('\\udcff.png' in (tmp_path / name).read_text(encoding='utf-8') for name in ('a.csv', 'a.html'))


def test_a_reader_that_has_had_enough_is_no_mistake(run):
    read, write = os.pipe()
    os.close(read)
    words = ['tools/predict.py', '-pretrained', weights_of(run), run[0] / 'data' / 'val']
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cli.ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0 and 'rror' not in done.stderr


def test_an_interrupt_leaves_what_is_known(run, tmp_path, capsys, monkeypatch):
    original = predict.read

    def read(picture, *args, **kwargs):
        if picture.path.endswith('7.png'):
            raise KeyboardInterrupt
        return original(picture, *args, **kwargs)
    monkeypatch.setattr(predict, 'read', read)
    table = tmp_path / 'table.csv'
    assert call(predict, run[0] / 'data' / 'val', '-pretrained', run[0] / 'run' / 'final.pdparams', '-batch_size', 2, '-topk', 1,
                '-quiet', '-csv', table) == 130
    rows = list(csv.DictReader(table.open()))
    assert 'interrupted' in (text := capsys.readouterr().err) and f' {len(rows)} of 9 pictures' in text
    assert [os.path.basename(row['picture']) for row in rows] == [f'{i}.png' for i in range(len(rows))] and 1 <= len(rows) < 8


def test_labels_beyond_the_classes_are_refused(run, tmp_path, capsys):
    (tmp_path / 'list.txt').write_text('a.png 4\n')
    assert call(predict, '-pretrained', weights_of(run), tmp_path / 'list.txt') == 2
    assert 'label 4 is not in 0..3' in capsys.readouterr().err


# ---- visualize

def test_the_picture_shows_the_weights(run, tmp_path):
    folder, model, config = run
    path = folder / 'data' / 'val' / '4.png'
    words = [path, '-pretrained', weights_of(run), '-query', 13, 3, '-side', 240, '-npz', tmp_path / 'a.npz']
    assert call(visualize, *words, '-output', tmp_path / 'a.png') == 0
    with Image.open(path) as file:
        pixels = datasets.eval_pixels(file, 16, 0.8)
    images = datasets.normalise(paddle.to_tensor(pixels.transpose(2, 0, 1)[None]), config.DATA.MEAN, config.DATA.STD)
    (attention,), _ = attention_maps(model, images)
    with np.load(tmp_path / 'a.npz') as file:
        assert list(file) == ['0/stages.1.0']
        np.testing.assert_allclose(file['0/stages.1.0'], attention.probabilities.numpy(), atol=1e-6)
    query = attention.query_at(13 / 16, 3 / 16)
    assert query == (0, 3) and attention.window_box(*query) == (3, -1, 9, 5)
    weights = attention.probabilities[1, 0, 3].numpy()
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    panel = np.asarray(visualize.overlay(pixels, attention, weights, query, 240)).astype(int)
    cell = 480 / (8 + 2 + 0.2)
    bright = np.array([[panel[int((r + 0.6) * cell), int((4 + c + 0.6) * cell)].sum() for c in range(6)] for r in range(6)])
    outer = np.array([[r == 0 or c == 5 for c in range(6)] for r in range(6)])           # in the margin colours stand alone
    order = np.argsort(weights[outer])
    assert (np.diff(bright[outer][order]) >= -3).all() and bright[outer].std() > 0
    left, top, *_ = attention.window_box(*query)
    assert visualize.outside(attention, weights, query) == pytest.approx(weights[outer].sum(), abs=1e-6)
    with Image.open(tmp_path / 'a.png') as image:
        assert image.width == 14 + 3 * (240 + 14)   # the geometry and two heads


def test_visualize_chooses_layers_and_heads(run, tmp_path, capsys):
    picture, words = run[0] / 'data' / 'val' / '4.png', ['-pretrained', weights_of(run), '-output', tmp_path / 'a.png']
    assert call(visualize, picture, picture, *words, '-layer', 'stages.1.0', '-head', 1, 'mean') == 0
    assert '2 rows' in capsys.readouterr().out
    for extra, message in [(['-layer', '7'], 'the layers with halo attention are stages.1.0'),
                           (['-head', '2'], 'mean, or 0 to 1'),
                           (['-output', 'a.xyz'], '-output a.xyz: its ending says what kind'),
                           (['-npz', 'a'], '-npz a: its name must end with .npz'),
                           (['-npz', tmp_path / 'none' / 'a.npz'], 'none/a.npz: cannot be written: No such'),
                           (['-query', '16', '0'], 'pixels 0 to 15'), (['-side', '10'], '200 to 2000'),
                           (['-opts', 'MODEL.STAGES', "['conv', 'conv']"], 'the weights do not fit')]:
        assert call(visualize, picture, *words, *extra) == 2
        assert message in capsys.readouterr().err
    (tmp_path / 'bad.png').write_text('x')
    assert call(visualize, tmp_path / 'bad.png', *words) == 2
    assert 'bad.png: not an image' in capsys.readouterr().err


def drawn(font, letter):
    return bytes(font.getmask(letter))


@pytest.mark.parametrize('text', ['dog', 'F\u00f6hre', '\u98df\u3079\u7269', '\u0416 \u03b1 \u00e9 \u98df \U0001f600 \u0928',
                                  'a\x1b[31mb'])
def test_no_letter_is_drawn_as_a_box(text):
    writer = fonts.Writer([text])
    shown, font = writer.shown(text), writer.font(30)
    box = drawn(font, '\U0010fffe')                 # a noncharacter, of which no font has a picture
    assert [letter for letter in shown if drawn(font, letter) == box] == [] and shown.isprintable()
    for letter, replaced in writer.escapes.items():
        assert re.fullmatch(r'\\(x\w\w|u\w{4}|U\w{8})', replaced) and chr(letter) not in shown


def test_without_any_other_font_letters_become_escapes(monkeypatch):
    monkeypatch.setenv('PATH', '')                  # no fontconfig
    monkeypatch.setattr(fonts, 'USUAL', ('no such font.ttf',))
    assert fonts.Writer(['\u98df dog']).shown('\u98df dog') == '\\u98df dog'


def test_texts_are_within_the_picture(run, tmp_path):
    """The legend was cut off beside a single head, and so would be a long name of a class."""
    words = [run[0] / 'data' / 'val' / '4.png', '-pretrained', weights_of(run), '-head', 'mean', '-output']
    long = 'a name of a class that is longer than the panels are wide, by far and beyond all doubt\n'
    (tmp_path / 'long.txt').write_text(4 * long)
    assert call(visualize, *words, tmp_path / 'a.png') == 0
    assert call(visualize, *words, tmp_path / 'b.png', '-classes', tmp_path / 'long.txt') == 0
    for name in 'ab':
        with Image.open(tmp_path / f'{name}.png') as image:
            pixels = np.asarray(image.convert('L'))
            assert pixels[:, -8:].min() > 240 and image.width > 14 + 2 * (220 + 14)    # only paper at the right border


# ---- all

@pytest.mark.parametrize('name', ['predict', 'visualize', 'make_lists', 'check_data', 'eval_all'])
def test_help_answers_with_examples(name, tmp_path, monkeypatch):
    done = program(f'{cli.ROOT}/tools/{name}.py', '-h')
    assert done.stdout.count(f'python tools/{name}.py') >= 2 and done.stderr == ''
    options = re.findall(r'^  (-\w+)[^,]*, (-\S+)', done.stdout, re.M)
    assert len(options) > 2 and all(long == f'-{short}' or short == '-h' for short, long in options)


def test_cells_are_no_formulas_and_names_no_commands(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = (run[0] / 'data' / 'val' / '4.png').read_bytes()
    names = ['=1+1.png', '+1.png', '@x.png', '\tx.png', 'a\x1b[31m.png', 'plain.png']
    for name in names:
        (tmp_path / name).write_bytes(picture)
    (tmp_path / 'list.txt').write_text('-gone.png\n')
    names_file = tmp_path / 'names'
    names_file.write_text('=cmd()\n@b\nc\x1b]0;x\x07\nd\n')
    words = ['-pretrained', weights_of(run), *names, 'list.txt', '-csv', 'a.csv', '-classes', names_file]
    assert call(predict, *words) == 1
    out, err = capsys.readouterr()
    assert '\x1b' not in out + err and r'a\x1b[31m.png' in out and r'c\x1b]0;x\x07' in out
    rows = list(csv.DictReader(open('a.csv', newline='')))
    cells = {row['picture'] for row in rows} | {row['name'] for row in rows}
    assert {"'=1+1.png", "'+1.png", "'@x.png", "'\tx.png", 'plain.png', "'=cmd()", "'@b", 'd'} <= cells
    assert not any(cell.startswith(('=', '+', '-', '@', '\t', '\r')) for cell in cells)
