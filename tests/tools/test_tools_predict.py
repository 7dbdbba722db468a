"""Check that predict shows and writes what the model computes on the pixels of an evaluation."""
import base64
import csv
import io
import json
import os
import re
import subprocess
import sys

from tools import cli, predict

import browser
import numpy as np
import paddle
import pytest
from html_page import open_page
from PIL import Image
from runs import program
from tool_runs import NAMES, call

import datasets
from data.list_file import read_optional_labels


def expected(untrained, path):
    """Class probabilities of a picture, in float64, from a plain forward pass."""
    _, model, config = untrained
    with Image.open(path) as file:
        pixels = datasets.eval_pixels(file, 16, 0.8)
    x = (pixels / 255 - config.DATA.MEAN) / config.DATA.STD
    images = paddle.to_tensor(x.transpose(2, 0, 1)[None].astype('float32'))
    logits = model(images).numpy()[0].astype('float64')
    return np.exp(logits) / np.exp(logits).sum()


def test_predictions_equal_a_plain_forward_pass(untrained, tmp_path, capsys):
    folder = untrained.folder
    paths = [f'{folder}/data/val/{i}.png' for i in range(9)]
    words = ['-pretrained', untrained.weights, folder / 'data' / 'val', '-topk', 3, '-batch_size', 4]
    assert call(predict, *words, '-json', tmp_path / 'a.json', '-csv', tmp_path / 'a.csv') == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / 'a.json').read_text())
    assert content['model'] == 'tiny' and [item['picture'] for item in content['pictures']] == paths
    rows = list(csv.DictReader(io.StringIO((tmp_path / 'a.csv').read_text())))
    assert len(rows) == 27
    for i, (path, item) in enumerate(zip(paths, content['pictures'])):
        p = expected(untrained, path)
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


def test_lists_and_their_labels(untrained, tmp_path, capsys):
    folder = untrained.folder
    (folder / 'data' / 'one 1').write_bytes((folder / 'data' / 'val' / '0.png').read_bytes())
    lines = '# pictures\nval/3.png 3\n\none 1\none 1 2\nval/1.png\nval/2.png\t0\nval/4.png +3\n'
    (folder / 'data' / 'some.txt').write_text(lines)
    found = read_optional_labels(str(folder / 'data' / 'some.txt'))
    expected = [('3.png', 3), ('one 1', None), ('one 1', 2), ('1.png', None), ('2.png', 0), ('4.png', 3)]
    assert [(os.path.basename(path), label) for path, label in found] == expected
    words = [folder / 'data' / 'val_list.txt', '--quiet', '--json=-']
    assert call(predict, '--pretrained', untrained.weights, *words) == 0
    content = json.loads(capsys.readouterr().out)
    right = [item['label'] == item['top'][0]['label'] for item in content['pictures']]
    assert call(predict, '-pretrained', untrained.weights, folder / 'data' / 'val_list.txt') == 0
    out = capsys.readouterr().out
    assert f'{sum(right)} of 9 are correct ({100 * np.mean(right):.2f} %)' in out
    assert '2.png  (label: blue "&")' in out


def test_unreadable_pictures_are_reported_and_the_others_done(untrained, tmp_path, capsys):
    good = untrained.data / 'val' / '4.png'
    (tmp_path / 'text.jpg').write_text('hello')
    (tmp_path / 'half.png').write_bytes(good.read_bytes()[:300])
    words = [tmp_path / 'text.jpg', tmp_path / 'half.png', tmp_path / 'none.png', good]
    outputs = ['-json', tmp_path / 'a.json', '-csv', tmp_path / 'a.csv', '-html', tmp_path / 'a.html']
    assert call(predict, '-pretrained', untrained.weights, *words, *outputs) == 1
    out, err = capsys.readouterr()
    assert [line.split(':')[0] for line in err.splitlines()] == [str(path) for path in words[:3]]
    assert 'not an image' in err and 'No such file' in err
    assert '1 pictures in' in out and '; 3 cannot be read' in out
    items = json.loads((tmp_path / 'a.json').read_text())['pictures']
    assert ['error' in item for item in items] == [True, True, True, False]
    rows = list(csv.DictReader((tmp_path / 'a.csv').open()))
    assert [row['error'] != '' for row in rows] == [True] * 3 + [False] * 4
    assert (tmp_path / 'a.html').read_text().count('<b>cannot be read</b>') == 3


def test_the_page_shows_the_pictures_with_their_bars(untrained, tmp_path):
    data = untrained.data
    words = [data / 'val_list.txt', '-html', tmp_path / 'a.html', '-html_most', 6]
    assert call(predict, '-pretrained', untrained.weights, *words) == 0
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
        p = np.sort(expected(untrained, data / 'val' / f'{i}.png'))[::-1]
        np.testing.assert_allclose(widths[4 * i:4 * i + 4], 100 * p, atol=0.006)


def test_the_page_shows_no_absolute_path(untrained, tmp_path):
    words = [untrained.data / 'val_list.txt', tmp_path / 'none.png', '-html', tmp_path / 'a.html']
    assert call(predict, '-pretrained', untrained.weights, *words) == 1
    text = (tmp_path / 'a.html').read_text()
    below = os.path.relpath(untrained.folder, os.path.commonpath([untrained.folder, tmp_path]))
    assert f'>{below}/data/val/3.png<' in text and 'weights run/final.pdparams;' in text
    visible = text.split('<style>')[0] + text.split('</style>')[1].split('<script>')[0]
    assert not re.search(r'[> "]/\w', visible)


@pytest.mark.skipif(not browser.find(), reason=f'none of {", ".join(browser.NAMES)} is on PATH')
@pytest.mark.parametrize('width', [375, 1280])
def test_the_page_filters_and_sorts(untrained, tmp_path, width):
    words = [untrained.data / 'val_list.txt', tmp_path / 'none.png']
    words += ['-html', tmp_path / 'a.html', '-json', tmp_path / 'a.json']
    assert call(predict, '-pretrained', untrained.weights, *words) == 1
    items = json.loads((tmp_path / 'a.json').read_text())['pictures']
    names = [os.path.basename(item['picture']) for item in items]
    wrong = [i for i, item in enumerate(items) if 'top' in item and item['label'] != item['top'][0]['label']]
    assert 0 < len(wrong) < 9
    by_confidence = sorted(wrong, key=lambda i: -items[i]['top'][0]['probability'])
    with browser.Browser() as opened:
        opened.open(tmp_path / 'a.html', width=width)
        assert opened.problems() == [] and opened.evaluate('document.documentElement.scrollWidth') == width
        cut_off = opened.evaluate('''[...document.querySelectorAll('figure *')].filter(e =>
            e.getBoundingClientRect().right > e.closest('figure').getBoundingClientRect().right).length''')
        assert cut_off == 0

        def shown(kind, order):
            opened.evaluate(f'''(() => {{
                const form = document.querySelector('form');
                form.kind.value = {kind!r};
                form.order.value = {order!r};
                form.dispatchEvent(new Event('input'));
            }})()''')
            texts = opened.evaluate("[...document.querySelectorAll('figure')].map(e => e.innerText)")
            return [re.search(r'\w+\.png', text)[0] for text in texts]
        assert shown('all', 'listed') == names
        assert shown('wrong', 'listed') == [names[i] for i in wrong]
        assert shown('wrong', 'most') == [names[i] for i in by_confidence]
        assert shown('wrong', 'least') == [names[i] for i in by_confidence[::-1]]
        assert shown('broken', 'most') == ['none.png'] and shown('all', 'listed') == names
        assert not opened.evaluate("document.querySelector('form').hidden")


@pytest.mark.parametrize('words, message', [
    (['-pretrained', 'x', 'RUN/data/val'], 'there is no config.yaml that describes the model of x'),
    (['-pretrained', 'x', '-cfg', 'RUN/run/config.yaml', 'RUN/data/val'], '-pretrained x: no such file'),
    (['-pretrained', 'RUN/run/final', 'RUN/run'], 'no pictures in this folder'),
    (['-pretrained', 'RUN/run/final', 'RUN/none.txt'], 'No such file'),
    (['-pretrained', 'RUN/run/final', '-crop_pct', '1', '-opts', 'DATA.CROP_PCT', '0.5', '--',
      'RUN/data/val'],
     '-crop_pct says 1.0 and -opts DATA.CROP_PCT says 0.5'),
    (['-pretrained', 'RUN/run/final', '-topk', '0', 'RUN/data/val'], 'at least 1'),
    (['-pretrained', 'RUN/run/final', '-html_most', '-3', 'RUN/data/val'], 'at least 1'),
    (['-pretrained', 'RUN/run/final', 'RUN/binary.txt'],
     "not a UTF-8 text file; expected lines of 'relative/path'"),
    (['-pretrained', 'RUN/run/final', '-opts', 'MODEL.NUM_CLASSES', '3', 'DATA.SEED', '1'],
     'required: PICTURE'),
    (['-pretrained', 'RUN/run/final', 'RUN/data/val', '-classes', 'RUN/data/val_list.txt'],
     '9 names for 4 classes'),
    (['-pretrained', 'RUN/run/final', 'RUN/data/val', '-image_size', 'big'],
     'DATA.IMAGE_SIZE must be a whole number'),
    (['RUN/data/val'], 'required: -pretrained')])
def test_mistake_is_one_line(untrained, capsys, words, message):
    assert call(predict, *(word.replace('RUN', str(untrained.folder)) for word in words)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert ': error: ' in line and message in line


@pytest.mark.parametrize('option', ['-json', '-csv', '-html'])
@pytest.mark.parametrize('name, message', [('none/a', 'No such file or directory'), ('', 'Is a directory')])
def test_unwritable_outputs_are_refused_before_the_work(untrained, tmp_path, capsys, option, name, message):
    words = ['-pretrained', untrained.weights, untrained.data / 'val', option, tmp_path / name]
    assert call(predict, *words) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.endswith(f'{tmp_path / name}: cannot be written: {message}\n')
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    (tmp_path / 'a.csv').write_text('old')
    def replace(source, target):
        raise OSError(28, 'No space left on device', source)
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(OSError) as error:
        cli.write_text(str(tmp_path / 'a.csv'), 'new')
    reason = 'cannot write: No space left on device; what was there before is intact'
    assert cli.describe_error(error.value) == f'{tmp_path}/a.csv: {reason}'
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('a.csv', 'old')]


@pytest.mark.parametrize('encoding', ['utf-8:strict', 'ascii'])
def test_names_that_the_terminal_cannot_show_are_escaped(untrained, tmp_path, encoding):
    picture = (untrained.data / 'val' / '4.png').read_bytes()
    for name in (b'\xff.png', '\u00fc.png'.encode()):
        with open(os.fsencode(tmp_path) + b'/' + name, 'wb') as file:
            file.write(picture)
    words = ['-json', tmp_path / 'a.json', '-csv', tmp_path / 'a.csv', '-html', tmp_path / 'a.html']
    words += ['-pretrained', untrained.weights, tmp_path]
    done = program('tools/predict.py', *words, PYTHONIOENCODING=encoding)
    assert '\\udcff.png\n' in done.stdout and '2 pictures in' in done.stdout
    items = json.loads((tmp_path / 'a.json').read_text())['pictures']
    assert [os.path.basename(item['picture']) for item in items] == ['\u00fc.png', '\udcff.png']
    assert all('\\udcff.png' in (tmp_path / name).read_text(encoding='utf-8') for name in ('a.csv', 'a.html'))


def test_closed_output_is_no_error(untrained):
    read, write = os.pipe()
    os.close(read)
    words = ['tools/predict.py', '-pretrained', untrained.weights, untrained.data / 'val']
    command = [sys.executable, *(str(word) for word in words)]
    done = subprocess.run(command, cwd=cli.ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0 and 'rror' not in done.stderr


def test_interrupt_keeps_the_results_so_far(untrained, tmp_path, capsys, monkeypatch):
    original = predict.read

    def read(picture, *args, **kwargs):
        if picture.path.endswith('7.png'):
            raise KeyboardInterrupt
        return original(picture, *args, **kwargs)
    monkeypatch.setattr(predict, 'read', read)
    table = tmp_path / 'table.csv'
    words = ['-pretrained', untrained.weights, '-batch_size', 2, '-topk', 1, '-quiet', '-csv', table]
    assert call(predict, untrained.data / 'val', *words) == 130
    rows = list(csv.DictReader(table.open()))
    assert 'interrupted' in (text := capsys.readouterr().err) and f' {len(rows)} of 9 pictures' in text
    assert 1 <= len(rows) < 8
    assert [os.path.basename(row['picture']) for row in rows] == [f'{i}.png' for i in range(len(rows))]


@pytest.mark.parametrize('label', [4, -1])
def test_labels_outside_the_classes_are_refused(untrained, tmp_path, capsys, label):
    (tmp_path / 'list.txt').write_text(f'a.png {label}\n')
    assert call(predict, '-pretrained', untrained.weights, tmp_path / 'list.txt') == 2
    assert f'label {label} is not in 0..3' in capsys.readouterr().err


def test_cells_are_no_formulas_and_names_no_escape_sequences(untrained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = (untrained.data / 'val' / '4.png').read_bytes()
    names = ['=1+1.png', '+1.png', '@x.png', '\tx.png', 'a\x1b[31m.png', 'plain.png']
    for name in names:
        (tmp_path / name).write_bytes(picture)
    (tmp_path / 'list.txt').write_text('-gone.png\n')
    names_file = tmp_path / 'names'
    names_file.write_text('=cmd()\n@b\nc\x1b]0;x\x07\nd\n')
    words = ['-pretrained', untrained.weights, *names, 'list.txt', '-csv', 'a.csv', '-classes', names_file]
    assert call(predict, *words) == 1
    out, err = capsys.readouterr()
    assert '\x1b' not in out + err and r'a\x1b[31m.png' in out and r'c\x1b]0;x\x07' in out
    rows = list(csv.DictReader(open('a.csv', newline='')))
    cells = {row['picture'] for row in rows} | {row['name'] for row in rows}
    assert {"'=1+1.png", "'+1.png", "'@x.png", "'\tx.png", 'plain.png', "'=cmd()", "'@b", 'd'} <= cells
    assert not any(cell.startswith(('=', '+', '-', '@', '\t', '\r')) for cell in cells)
