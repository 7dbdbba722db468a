"""The page of a run: every chart and figure against the files of the run, runs that ended early, and a browser's view."""
import base64
import io
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser

from tools import report

import browser
import numpy as np
import pytest
from PIL import Image
from runs import TINY, make_images, records

from config import flatten, get_config
from reporting import charts, page
from reporting.report import write
from reporting.runs import Run, read_run
from training import engine
from training import records as run_records

CHARTS = {                                          # title -> key, splits
    'Top-1 accuracy': ('acc1', ('train', 'val', 'val_ema')), 'Top-5 accuracy': ('acc5', ('train', 'val', 'val_ema')),
    'Loss': ('loss', ('train', 'val', 'val_ema')), 'Learning rate': ('lr', ('train',)),
    'Training speed, images/s': ('images_per_s', ('train',)), 'Time spent waiting for data': ('data_wait', ('train',)),
}
LABELS = {'train': 'train', 'val': 'val', 'val_ema': 'EMA'}
VOID = {'meta', 'link', 'img', 'br', 'path', 'input'}


class Page(HTMLParser):
    """The elements of an HTML text [(tag, attributes, text)]; fails where tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], text
        self.feed(text)
        assert self.open == [], 'not closed'

    def handle_starttag(self, tag, attrs):
        element = [tag, dict(attrs), '']
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ''])

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, f'</{tag}> in line {self.getpos()[0]}'

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def find(self, tag, name=None, **attributes):
        return [element for element in self.elements if element[0] == tag
                and (name is None or name in element[1].get('class', '').split())
                and all(element[1].get(key) == value for key, value in attributes.items())]

    def charts(self):
        """{title: its data for the pointer}"""
        drawn = self.find('svg', role='img')
        return {svg[1]['aria-label'].split(': ')[0]: json.loads(svg[1]['data-chart']) for svg in drawn}


def open_page(path):
    text = path.read_text(encoding='utf-8')
    found = Page(text)
    for _, attributes, _ in found.elements:
        for key in ('src', 'href', 'srcset', 'data'):
            assert attributes.get(key, 'data:').startswith('data:'), attributes
    assert not re.search(r'https?://(?!www\.w3\.org/2000/svg)|@import|url\(', text)
    return found


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images') / 'data', val=40)


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained') / 'run'
    engine.run(get_config(None, [*TINY, 'DATA.DATA_PATH', images, 'OUTPUT', str(folder), 'TRAIN.EMA_DECAY', 0.9,
                                 'TRAIN.NUM_EPOCHS', 3, 'TRAIN.BASE_LR', 0.01]))
    return folder


# ---- a whole run

def test_a_training_ends_with_its_page(trained):
    found = open_page(trained / 'report.html')
    assert found.find('h1')[0][2] == 'tiny on data' and found.find('title')[0][2] == 'tiny on data · run'
    assert 'complete: 3 epochs' in found.find('span', 'state')[0][2]
    titles = [element[2] for element in found.find('h2')]
    assert titles == ['Curves', 'Confusion', 'Accuracy by class', 'Surest mistakes', 'Configuration', 'Machine and versions']
    assert [element[2] for element in found.find('h3')] == list(charts_in_order())


def charts_in_order():
    return [title for title, *_ in page.CURVES]


def test_charts_have_the_points_of_the_records(trained):
    found = open_page(trained / 'report.html').charts()
    assert found.keys() == CHARTS.keys()
    for title, (key, splits) in CHARTS.items():
        factor = 100 if key == 'data_wait' else 1
        expected = {LABELS[split]: [[r['step'] / 2, r[key] * factor] for r in records(trained, split)] for split in splits}
        drawn = {label: points for label, _, points in found[title]['series']}
        assert drawn.keys() == expected.keys()
        for label, points in expected.items():
            np.testing.assert_allclose(drawn[label], points, rtol=1e-4, atol=1e-4)


def test_tiles_show_the_best_epoch_and_the_last_beside_it(trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'run')
    values = {1: (40.0, 90.0), 2: (72.5, 97.5), 3: (65.0, 95.0)}
    lines = [json.dumps({'epoch': epoch, 'step': 2 * epoch, 'split': 'val', 'loss': 1.0, 'acc1': top1, 'acc5': top5}) + '\n'
             for epoch, (top1, top5) in values.items()]
    edit_records(tmp_path / 'run', lambda old: [line for line in old if '"train"' in line] + lines)
    names, numbers, notes = (tile_parts(pages(tmp_path), tag) for tag in ('dt', 'b', 'span'))
    tiles = {name[2]: (number[2], note[2]) for name, number, note in zip(names, numbers, notes)}
    assert tiles['Top-1, val'] == ('72.50\u202f%', 'best, epoch 2; last 65.00\u202f%')
    assert tiles['Top-5, val'] == ('97.50\u202f%', 'epoch 2; last 95.00\u202f%')


def tile_parts(found, tag):
    start = next(i for i, element in enumerate(found.elements) if 'tiles' in element[1].get('class', ''))
    stop = next(i for i, element in enumerate(found.elements) if element[0] == 'section')
    return [element for element in found.elements[start:stop] if element[0] == tag]


def test_curves_are_drawn_at_their_places(trained):
    """The drawn coordinates, turned back by the axis' labels, are the values; every series is drawn."""
    text = (trained / 'report.html').read_text()
    svg = re.search(r'<svg [^>]*aria-label="Loss:.*?</svg>', text, re.S)[0]
    marks = re.findall(r'<text class="tick" x="43" y="([\d.]+)" text-anchor="end">([\d.]+)</text>', svg)
    (y0, v0), (y1, v1) = [(float(y) - 4, float(value)) for y, value in (marks[0], marks[-1])]
    lines = re.findall(r'<polyline class="line s(\d)" points="([^"]+)"', svg)
    assert [colour for colour, _ in lines] == ['2', '0', '1']
    for (_, points), split in zip(lines, LABELS):
        values = [v0 + (float(point.split(',')[1]) - y0) / (y1 - y0) * (v1 - v0) for point in points.split()]
        np.testing.assert_allclose(values, [r['loss'] for r in records(trained, split)], atol=0.01)
    assert len(re.findall('class="mark s0"', svg)) == len(re.findall('class="mark s1"', svg)) == 3


def best_predictions(folder):
    both = [np.load(folder / f'predictions_{split}.npz') for split in ('val', 'val_ema')]
    return max(both, key=lambda p: (p['label'] == p['top1']).mean())


def test_confusions_and_classes_are_those_of_the_predictions(trained):
    found, kept = open_page(trained / 'report.html'), best_predictions(trained)
    (table,) = re.findall(r'<table class="confusion few">(.*?)</table>', found.text, re.S)
    rows = [re.findall(r'<td[^>]*>(\d*)</td>', row) for row in table.split('<tr>')[2:]]
    shown = np.array([[int(cell or 0) for cell in row] for row in rows])
    expected = [[((kept['label'] == i) & (kept['top1'] == j)).sum() for j in range(4)] for i in range(4)]
    np.testing.assert_array_equal(shown, expected)
    bars = {name[2]: of[2] for name, of in zip(found.find('span', 'name'), found.find('span', 'of'))}
    assert bars == {str(i): f'{expected[i][i]} of {sum(expected[i])}' for i in range(4)}
    shares = [float(re.search(r'width:([\d.]+)%', bar[1]['style'])[1]) for bar in found.find('i') if 'style' in bar[1]]
    assert shares == pytest.approx(sorted(100 * expected[i][i] / sum(expected[i]) for i in range(4)), abs=0.01)


def test_the_surest_mistakes_are_shown_with_picture_and_line(trained, images):
    found, kept = open_page(trained / 'report.html'), best_predictions(trained)
    wrong = [i for i in np.argsort(-kept['probability'], kind='stable') if kept['label'][i] != kept['top1'][i]]
    assert len(wrong) > 1, 'the run must make mistakes for this test'
    lines = open(os.path.join(images, 'val_list.txt'), encoding='utf-8').read().splitlines()
    assert [element[2] for element in found.find('p', 'where')] == [f'val_list.txt:{i + 1}{lines[i]}' for i in wrong]
    for picture, i in zip(found.find('img'), wrong):
        data = base64.b64decode(picture[1]['src'].removeprefix('data:image/png;base64,'))
        with Image.open(io.BytesIO(data)) as shown, Image.open(os.path.join(images, lines[i].split()[0])) as image:
            np.testing.assert_array_equal(np.asarray(shown), np.asarray(image))
        assert picture[1]['alt'] == f'taken for {kept["top1"][i]}, labelled {kept["label"][i]}'
    said = [element[2] for element in found.find('p') if element[2].startswith('model says')]
    assert said == [f'model says{100 * kept["probability"][i]:.1f}\u202f%{kept["top1"][i]}' for i in wrong]


def test_the_configuration_is_compared_with_the_nearest_file(tmp_path):
    changed = get_config('configs/halonet_digits.yaml', ['TRAIN.BASE_LR', 0.5, 'SEED', 3, 'OUTPUT', 'x', 'DATA.DATA_PATH', 'y'])
    (tmp_path / 'config.yaml').write_text(changed.dump())
    write([str(tmp_path)], tmp_path / 'report.html')
    text = open_page(tmp_path / 'report.html').text
    own = re.search(r'What differs from <code>configs/halonet_digits.yaml</code>.*?</table>', text, re.S)[0]
    rows = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row) for row in own.split('<tr>')[2:]]
    assert rows == [['SEED', '3', '0', '0'], ['TRAIN.BASE_LR', '0.5', '0.002', '0.001']]
    everything = re.search(r'<summary>All (\d+) options</summary>(.*?)</table>', text, re.S)
    assert int(everything[1]) == len(flatten(changed)) - 1 == everything[2].count('<tr>') - 1          # BASE is none


# ---- whatever a run has got to

def strip(folder, *names):
    for name in names:
        os.remove(folder / name)


def edit_records(folder, change):
    lines = (folder / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (folder / 'metrics.jsonl').write_text(''.join(change(lines)))


def add_nan(folder):
    bad = {'epoch': 2, 'step': 6, 'split': 'val', 'loss': math.nan, 'acc1': 0.0, 'acc5': math.inf, 'lr': None}
    edit_records(folder, lambda lines: [*lines, json.dumps(bad) + '\n'])


PARTS = {
    'killed in epoch 1': (lambda f: (edit_records(f, lambda lines: lines[:1]), strip(
        f, 'final.pdparams', 'predictions_val.npz', 'predictions_val_ema.npz')), 'not complete: epoch 1 of 3'),
    'nothing but the config': (lambda f: [strip(f, p.name) for p in f.iterdir() if p.is_file() and p.name != 'config.yaml'],
                               'nothing recorded yet'),
    'no config': (lambda f: strip(f, 'config.yaml'), 'No config.yaml'),
    'config that is no YAML': (lambda f: (f / 'config.yaml').write_bytes(b'\xff: [}'), 'No config.yaml'),
    'options of another version': (lambda f: (f / 'config.yaml').write_text('MODEL: {NAME: old, GONE: 3}\nX: 1'), 'MODEL.GONE'),
    'torn records': (lambda f: edit_records(f, lambda lines: [*lines, '{"step": 3', '\n[]\n\n{"step": 1}\n']), '3 unreadable'),
    'not finite': (add_nan, 'not finite'),
    'no records': (lambda f: strip(f, 'metrics.jsonl'), 'evaluation only'),
    'no log': (lambda f: strip(f, 'log.txt'), 'complete: 3 epochs'),
    'a log of something else': (lambda f: (f / 'log.txt').write_bytes(b'\xff\n2026-99-99'), 'complete: 3 epochs'),
    'no machine': (lambda f: strip(f, 'machine.json'), 'Not recorded'),
    'damaged machine': (lambda f: (f / 'machine.json').write_text('{"a'), 'Not recorded'),
    'damaged predictions': (lambda f: [(f / f'predictions_{s}.npz').write_bytes(b'PK\3\4') for s in ('val', 'val_ema')],
                            'No predictions yet'),
    'records of another version': (lambda f: edit_records(f, lambda lines: [line.replace('"acc5"', '"x"') for line in lines]),
                                   'All 3 evaluations'),
}


@pytest.mark.parametrize('name', PARTS)
def test_a_run_that_is_not_whole_has_a_page(trained, tmp_path, name):
    shutil.copytree(trained, tmp_path / 'run', ignore=shutil.ignore_patterns('checkpoints', 'tensorboard', 'report.html'))
    spoil, expected = PARTS[name]
    spoil(tmp_path / 'run')
    write([str(tmp_path / 'run')], tmp_path / 'one.html')
    assert expected in open_page(tmp_path / 'one.html').text
    write([str(tmp_path / 'run'), str(trained)], tmp_path / 'two.html')
    assert len(open_page(tmp_path / 'two.html').charts()) == 6


def test_values_that_are_not_finite_are_gaps_with_a_mark():
    nan = math.nan
    text = charts.line_chart('Loss', [charts.Series('val', [(1, 3.0), (2, 2.0), (3, nan), (4, 1.0), (5, nan)])])
    assert len(re.findall('<polyline', text)) == 1 and text.count('class="mark s0"') == 1 + 3 and text.count('class="lost') == 2
    assert '<b>not finite</b>' in text
    assert 'nothing recorded yet' in charts.line_chart('Loss', [charts.Series('val', [(1, nan)])])


def test_pictures_and_list_may_be_gone_or_changed(trained, images, tmp_path):
    shutil.copytree(trained, tmp_path / 'run')
    shutil.copytree(images, tmp_path / 'data')
    text = (tmp_path / 'run' / 'config.yaml').read_text().replace(images, str(tmp_path / 'data'))
    (tmp_path / 'run' / 'config.yaml').write_text(text)
    kept = best_predictions(trained)
    first = max(np.flatnonzero(kept['label'] != kept['top1']), key=lambda i: kept['probability'][i])
    (tmp_path / 'data' / 'val' / f'{first}.png').write_bytes(b'no picture any more')
    found = pages(tmp_path)
    assert len(found.find('span', 'no-image')) == 1 and found.find('p', 'where')[0][2].startswith(f'val_list.txt:{first + 1}')
    with open(tmp_path / 'data' / 'val_list.txt', 'r+', encoding='utf-8') as file:
        lines = file.readlines()
        file.seek(0)
        file.writelines(lines[1:] + lines[:1])
    found = pages(tmp_path)
    assert not found.find('img') and 'has changed' in found.text and found.find('p', 'where')[0][2] == f'image {first}'
    shutil.rmtree(tmp_path / 'data')
    assert not pages(tmp_path).find('img')


def pages(tmp_path):
    write([str(tmp_path / 'run')], tmp_path / 'page.html')
    return open_page(tmp_path / 'page.html')


def test_names_are_text_and_not_markup(trained, images, tmp_path):
    shutil.copytree(trained, tmp_path / '<b>run')
    config = (tmp_path / '<b>run' / 'config.yaml').read_text().replace('NAME: tiny', 'NAME: "<script>alert(\'1\')</script>"')
    (tmp_path / '<b>run' / 'config.yaml').write_text(config)
    names = tmp_path / 'names.txt'
    names.write_text('<i>cat\n"dog\' onerror="x\n&amp;\nplain\n')
    write([str(tmp_path / '<b>run')], tmp_path / 'page.html', classes=names)
    found = open_page(tmp_path / 'page.html')
    assert found.find('h1')[0][2] == "<script>alert('1')</script> on data" and len(found.find('script')) == 1
    assert {element[2] for element in found.find('span', 'name')} == {'<i>cat', '"dog\' onerror="x', '&amp;', 'plain'}
    names.write_text('one\n')
    with pytest.raises(ValueError, match='1 names for 4 classes'):
        read_run(str(trained), names)
    names.write_bytes(b'\x89PNG')
    with pytest.raises(ValueError, match=f'{names}: not a UTF-8 text file'):
        read_run(str(trained), names)


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match='no run folder'):
        write([str(tmp_path)], tmp_path / 'page.html')
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        report.parser().run(report.main, [str(tmp_path)])
    assert stop.value.code == 2 and re.search(r'error: .*no run folder.*\n$', capsys.readouterr().err)


# ---- many classes, many points

def many(folder, classes, count, names):
    """A run folder with `classes` classes and `count` predictions, and an image for each below data/val/NAME."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    top1 = np.where(rng.random(count) < 0.7, labels, (labels + rng.integers(1, 4, count)) % classes)
    lines = []
    for i, label in enumerate(labels):
        path = folder / 'data' / 'val' / names[label] / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        if top1[i] != label:
            Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype='uint8')).save(path)
        lines.append(f'{path.relative_to(folder / "data")} {label}\n')
    (folder / 'data' / 'val_list.txt').write_text(''.join(lines))
    options = ['DATA.DATA_PATH', str(folder / 'data'), 'MODEL.NUM_CLASSES', classes]
    (folder / 'config.yaml').write_text(get_config('configs/halonet_50ts_256.yaml', options).dump())
    rows = np.stack([np.arange(count), labels, top1, rng.random(count), rng.random(count)], 1)
    run_records.write_predictions(folder / 'predictions_val.npz', rows)
    with open(folder / 'metrics.jsonl', 'w', encoding='utf-8') as file:
        for step in range(1, 1501):
            record = {'epoch': (step - 1) // 5 + 1, 'step': step, 'split': 'train', 'loss': 7 / step ** 0.5 + rng.random(),
                      'acc1': 1.0, 'acc5': 5.0, 'lr': 1e-3 * (1 - step / 1501), 'images_per_s': 3000.0, 'data_wait': rng.random()}
            file.write(json.dumps(record) + '\n')
            if step % 5 == 0:
                del record['data_wait']
                file.write(json.dumps({**record, 'split': 'val', 'lr': None}) + '\n')
    write([str(folder)], folder / 'report.html')
    return labels, top1


def test_of_many_classes_the_most_confused_are_shown(tmp_path):
    names = [f'n{label:08d}' for label in range(40)]
    labels, top1 = many(tmp_path, 40, 800, names)
    found = open_page(tmp_path / 'report.html')
    assert 'class="confusion' not in found.text and len(found.find('span', 'name')) == page.WORST
    section = re.search(r'<section id=confusion>.*?</section>', found.text, re.S)[0]
    rows = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row) for row in section.split('<tr>')[2:]]
    counts = {(a, b): int(((labels == a) & (top1 == b)).sum()) for a in range(40) for b in range(40) if a != b}
    assert [int(row[2]) for row in rows] == sorted(counts.values(), reverse=True)[:page.PAIRS]
    for a, b, count, share, back in rows:
        pair = names.index(a), names.index(b)
        assert (int(count), int(back)) == (counts[pair], counts[pair[::-1]]) and share == f'{5 * counts[pair]:.0f}\u202f%'
    assert len(found.find('img')) == page.MISTAKES and all('jpeg' in image[1]['src'] for image in found.find('img'))


def test_many_points_become_means_with_a_band():
    rng = np.random.default_rng(0)
    points = [(i, float(value)) for i, value in enumerate(rng.random(3000))]
    means, band = charts.thin(points)
    assert len(means) == len(band) == 120
    values = np.array(points)[:, 1].reshape(120, 25)
    np.testing.assert_allclose([y for _, y in means], values.mean(1))
    np.testing.assert_allclose([spread for _, *spread in band], np.stack([values.min(1), values.max(1)], 1))
    assert charts.thin(points[:240]) == (points[:240], [])
    points[30] = (30, math.nan)
    means, _ = charts.thin(points)
    assert len(means) == 121 and means[2][0] == 30 and math.isnan(means[2][1])


# ---- figures

@pytest.mark.parametrize('low, high', [(0, 1), (0.12, 2.3), (17, 99.4), (1e-6, 2e-3), (3, 3), (0, 0), (-2, 5), (99.9, 100),
                                       (0, 3e4)])
def test_ticks_are_round_and_span_the_values(low, high):
    marks = charts.ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and 3 <= len(marks) <= 9
    steps = np.diff(marks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert f'{steps[0]:.0e}'[0] in '125' and len({*charts.tick_texts(marks)}) == len(marks)
    decimals = {len(text.partition('.')[2]) for text in charts.tick_texts(marks) if 'e' not in text}
    assert len(decimals) <= 1


@pytest.mark.parametrize('value, text', [(0.0012, '0.0012'), (98.6111, '98.61'), (1437, '1,437'), (5e-6, '5e−6'), (0, '0'),
                                         (-0.5, '−0.5'), (math.nan, 'not finite'), (None, '–'), (1.2345e7, '1.23e7')])
def test_numbers(value, text):
    assert charts.number(value) == text


@pytest.mark.parametrize('right, images, low, high', [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)])
def test_wilson_intervals(right, images, low, high):
    """The textbook's values for ten trials."""
    assert page.wilson(right, images) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_runs_are_compared(trained, images, tmp_path):
    other = tmp_path / 'other'
    engine.run(get_config(None, [*TINY, 'DATA.DATA_PATH', images, 'OUTPUT', str(other), 'TRAIN.BASE_LR', 0.02]))
    report.main(report.parser().parse_args([str(trained), str(other), '-output', str(tmp_path / 'compare.html')]))
    found = open_page(tmp_path / 'compare.html')
    drawn = {title: {label: len(points) for label, _, points in data['series']} for title, data in found.charts().items()}
    assert drawn['Loss, train'] == {'run': 6, 'other': 4} and drawn['Top-1, val'] == {'run': 3, 'other': 2}
    assert drawn['Top-1, EMA'] == {'run': 3} and drawn['Learning rate'] == {'run': 6, 'other': 4}
    table = re.search(r'<h2>Configuration</h2>.*?</table>', found.text, re.S)[0]
    rows = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row) for row in table.split('<tr>')[2:]]
    assert [row for row in rows if row[0] != 'OUTPUT'] == [
        ['TRAIN.BASE_LR', '0.01', '0.02'], ['TRAIN.EMA_DECAY', '0.9', '0.0'], ['TRAIN.NUM_EPOCHS', '3', '2']]


def test_an_old_page_stays_when_the_new_one_cannot_be_written(trained, tmp_path, monkeypatch):
    (tmp_path / 'report.html').write_text('old')
    monkeypatch.setattr(os, 'fsync', lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write([str(trained)], tmp_path / 'report.html')
    assert [path.name for path in tmp_path.iterdir()] == ['report.html'] and (tmp_path / 'report.html').read_text() == 'old'


@pytest.mark.parametrize('folders, labels', [
    (['runs/a', 'runs/b'], ['a', 'b']), (['runs/a/run', 'runs/b/run'], ['a', 'b']), (['x/a/run', 'y/b/run'], ['x/a', 'y/b']),
    (['runs/run', 'runs/run/eval/run'], ['.', 'eval/run']), (['run', 'run/'], ['1: .', '2: .'])])
def test_runs_of_the_same_name_are_told_apart_by_their_folders(folders, labels):
    runs = [page_run(folder) for folder in folders]
    assert page.labels_of(runs) == labels


def page_run(folder):
    return Run(folder, [], 0, {}, {}, '', {}, {}, {}, False)


# ---- in a browser

@pytest.fixture(scope='module')
def chromium():
    if not browser.find():
        pytest.skip(f'none of {", ".join(browser.NAMES)} is on PATH; the pages were checked as text only')
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope='module')
def all_pages(trained, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('pages')
    names = [f'a rather long name of class {label}' if label % 2 else f'n{label:08d}' for label in range(40)]
    for kind, classes in (('many', 40), ('some', 24)):
        (folder / kind).mkdir()
        many(folder / kind, classes, 400, names)
    write([str(trained), str(folder / 'many'), str(folder / 'some')], folder / 'compare.html')
    return {'run': trained / 'report.html', 'compare': folder / 'compare.html',
            'many': folder / 'many' / 'report.html', 'some': folder / 'some' / 'report.html'}


OVERLAPS = '''[...document.querySelectorAll('svg[role=img]')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) => p.left < q.right && q.left < p.right
        && p.top + 2 < q.bottom && q.top + 2 < p.bottom).map(([b]) => a + ' / ' + b));
})'''
OUTSIDE = '''[...document.querySelectorAll('figure text, figure polyline, .tiles *, .legend *, .cards *')].filter(e => {
    const box = e.getBoundingClientRect(), around = e.closest('figure, .tiles, .cards li').getBoundingClientRect();
    return box.left < around.left - 1 || box.right > around.right + 1 || box.bottom > around.bottom + 1;
}).map(e => e.outerHTML.slice(0, 80))'''
FAINT = '''(() => {
    const parse = c => c.match(/[\\d.]+/g).map(Number);
    const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const over = (top, under) => { const a = top[3] ?? 1; return top.slice(0, 3).map((v, i) => v * a + under[i] * (1 - a)); };
    const ground = e => { if (!e) return [255, 255, 255]; const c = parse(getComputedStyle(e).backgroundColor);
                          return (c[3] ?? 1) === 1 ? c : over(c, ground(e.parentElement)); };
    const speaks = e => e.tagName !== 'SCRIPT' && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    return [...document.querySelectorAll('body *')].filter(speaks).map(e => {
        const style = getComputedStyle(e), ink = parse(e.tagName === 'text' ? style.fill : style.color);
        const [a, b] = [light(over(ink, ground(e))), light(ground(e))].sort((p, q) => q - p);
        return [(a + .05) / (b + .05), e.className + ' ' + e.textContent.slice(0, 30)];
    }).filter(([ratio]) => ratio < 4.5);
})()'''
DRAWN = '''[...document.querySelectorAll('svg[role=img]')].map(svg => [svg.getBoundingClientRect().width,
    parseFloat(getComputedStyle(svg.querySelector('text')).fontSize) * svg.getBoundingClientRect().width / 400,
    Math.max(...[...svg.querySelectorAll('polyline')].map(line => line.getBoundingClientRect().width))])'''


@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
@pytest.mark.parametrize('width', [375, 1280])
@pytest.mark.parametrize('name', ['run', 'compare', 'many', 'some'])
def test_pages_in_a_browser(chromium, all_pages, name, width, dark):
    chromium.open(all_pages[name], width=width, dark=dark)
    assert chromium.problems() == []
    assert chromium.evaluate('document.documentElement.scrollWidth') == width             # nothing to scroll sideways
    drawn = chromium.evaluate(DRAWN)
    assert len(drawn) == 6
    for chart, text, line in drawn:
        assert chart > 0.8 * width / (1 if width < 600 else 3.6) and text > 10 and line > 0.25 * chart
    assert chromium.evaluate(OVERLAPS) == [] and chromium.evaluate(OUTSIDE) == []
    assert chromium.evaluate(FAINT) == []                                                  # WCAG's 4.5 : 1
    background = chromium.evaluate('getComputedStyle(document.body).backgroundColor')
    assert (sum(map(int, re.findall(r'\d+', background))) < 384) == dark


@pytest.mark.parametrize('width', [375, 800, 1280])
@pytest.mark.parametrize('name', ['run', 'some'])
def test_tiles_leave_no_hole(chromium, all_pages, name, width):
    chromium.open(all_pages[name], width=width)
    right, ends = chromium.evaluate('''(() => { const all = document.querySelector('.tiles'), rows = {};
        for (const tile of all.children) { const box = tile.getBoundingClientRect(); rows[box.top] = box.right; }
        return [all.getBoundingClientRect().right, Object.values(rows)]; })()''')
    assert all(abs(end - right) < 2 for end in ends), (right, ends)


LINES = '''[...document.querySelectorAll(ROWS)].map(e => [e.textContent.trim(), e.scrollWidth - e.clientWidth,
    e.scrollHeight - e.clientHeight, e.getBoundingClientRect().width])'''


@pytest.mark.parametrize('width', [375, 1280])
@pytest.mark.parametrize('rows', ['.confusion tbody th span', '.bars .name'])
def test_class_names_can_be_read(chromium, trained, all_pages, tmp_path, width, rows):
    """On a telephone the rows of the confusions read '0 S...': names break into lines, and most are there as a whole."""
    shutil.copytree(trained, tmp_path / 'run')
    names = ['Sphynx cat', 'Staffordshire bullterrier', 'F\u00f6hre', 'a very long name of a class that goes on and on and on']
    (tmp_path / 'run' / 'class_names.txt').write_text(''.join(f'{name}\n' for name in names), encoding='utf-8')
    write([str(tmp_path / 'run')], tmp_path / 'page.html')
    chromium.open(tmp_path / 'page.html', width=width)
    shown = chromium.evaluate(LINES.replace('ROWS', repr(rows)))
    assert len(shown) == 4
    for text, wider, higher, box in shown:
        assert box >= 85 and (max(wider, higher) <= 2 or 'very long' in text), text
    assert chromium.evaluate('document.documentElement.scrollWidth') == width
    chromium.open(all_pages['some'], width=width)       # more classes, in smaller cells
    shown = chromium.evaluate(LINES.replace('ROWS', repr(rows)))
    assert len(shown) == 24 and all(max(wider, higher) <= 2 and box >= 85 for _, wider, higher, box in shown)


def test_options_stand_below_each_other_on_a_telephone(chromium, all_pages):
    """Paths in three columns of a telephone were slivers of a few letters."""
    chromium.open(all_pages['compare'], width=375)
    cells = chromium.evaluate('''[...document.querySelectorAll('.options td')].map(e => [e.dataset.head,
        getComputedStyle(e, '::before').content, e.getBoundingClientRect().width])''')
    assert len(cells) > 20 and all(f'"{head}"' == shown and width > 280 for head, shown, width in cells)


@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_a_table_that_goes_on_beside_the_page_shows_it(chromium, all_pages, tmp_path, dark):
    """By a shade on that side: on a telephone the columns of the results ended with the page, as if there were no more."""
    chromium.open(all_pages['compare'], width=375, dark=dark)
    for scrolled, shaded in ((0, [False, True]), (100, [True, True]), (9999, [True, False])):
        left, right, y = chromium.evaluate(f'''(e => {{ e.scrollLeft = {scrolled}; const box = e.getBoundingClientRect();
            return [box.left, box.right, box.top + 4]; }})(document.querySelector('.sheet'))''')
        chromium.screenshot(tmp_path / 'page.png')
        with Image.open(tmp_path / 'page.png') as image:
            ends = [sum(image.convert('RGB').getpixel((int(x), int(y)))) for x in (left + 1, right - 2)]
        card = sum((23, 27, 32)) if dark else 3 * 255
        assert [abs(end - card) > 60 for end in ends] == shaded


def test_the_pointer_and_the_keys_show_values(chromium, trained):
    chromium.open(trained / 'report.html')
    chromium.evaluate('document.querySelectorAll("svg[role=img]")[1].scrollIntoView()')
    left, top, width, height = chromium.evaluate(
        '(b => [b.left, b.top, b.width, b.height])(document.querySelectorAll("svg[role=img]")[1].getBoundingClientRect())')
    chromium.send('Input.dispatchMouseEvent', type='mouseMoved', x=left + 0.97 * width, y=top + height / 2)
    shown = 'document.querySelectorAll(".tip")[1].innerText'
    last = {split: records(trained, split)[-1]['loss'] for split in LABELS}
    text = chromium.evaluate(shown)
    assert text.splitlines()[0] == 'epoch 3'
    for line, split in zip(text.splitlines()[1:], LABELS):
        label, value = line.split(' ')
        assert label == LABELS[split] and float(value) == pytest.approx(last[split], rel=1e-3)
    assert chromium.evaluate('document.documentElement.scrollWidth') == 1280
    chromium.evaluate('document.querySelectorAll("svg[role=img]")[1].focus()')
    for key, epoch in (('ArrowLeft', 'epoch 2.5'), ('ArrowLeft', 'epoch 2'), ('ArrowRight', 'epoch 2.5')):
        chromium.send('Input.dispatchKeyEvent', type='keyDown', key=key)
        assert chromium.evaluate(shown).splitlines()[0] == epoch
    chromium.send('Input.dispatchKeyEvent', type='keyDown', key='Escape')
    assert chromium.evaluate('document.querySelectorAll(".tip")[1].hidden')
