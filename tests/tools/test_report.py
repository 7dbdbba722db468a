"""Check the pages of runs: every chart and number against the files of the run, and runs that ended early."""
import base64
import io
import json
import math
import os
import re
import shutil

from tools import report

import numpy as np
import pytest
from html_page import open_page, rows_of
from many_classes import make_run
from PIL import Image
from runs import TINY, options, program, records

from config import flatten, get_config
from reporting import comparison, page, templates
from reporting import prediction_sections as sections
from reporting.report import write
from reporting.runs import Run, read_run
from training import engine

CHARTS = {                                          # title -> key, splits
    'Top-1 accuracy': ('acc1', ('train', 'val', 'val_ema')),
    'Top-5 accuracy': ('acc5', ('train', 'val', 'val_ema')),
    'Loss': ('loss', ('train', 'val', 'val_ema')), 'Learning rate': ('lr', ('train',)),
    'Training speed, images/s': ('images_per_s', ('train',)),
    'Time spent waiting for data': ('data_wait', ('train',)),
}
RELIABILITY = 'Accuracy by probability'
LABELS = {'train': 'train', 'val': 'val', 'val_ema': 'EMA'}


# ---- a whole run

def test_training_ends_with_its_page(trained):
    found = open_page(trained / 'report.html')
    assert found.find('h1')[0][2] == 'tiny on data' and found.find('title')[0][2] == 'tiny on data · run'
    assert 'complete: 3 epochs' in found.find('span', 'state')[0][2]
    titles = [element[2] for element in found.find('h2')]
    assert titles == ['Curves', 'Confusion', 'Accuracy by class', 'Calibration', 'Most confident errors',
                      'Configuration', 'Machine and versions']
    assert [element[2] for element in found.find('h3')] == [*charts_in_order(), RELIABILITY]


def charts_in_order():
    return [title for title, *_ in page.CURVES]


def test_charts_have_the_points_of_the_records(trained):
    found = open_page(trained / 'report.html').charts()
    assert found.keys() == {*CHARTS, RELIABILITY}
    for title, (key, splits) in CHARTS.items():
        factor = 100 if key == 'data_wait' else 1
        expected = {}
        for split in splits:
            expected[LABELS[split]] = [[r['step'] / 2, r[key] * factor] for r in records(trained, split)]
        drawn = {label: points for label, _, points in found[title]['series']}
        assert drawn.keys() == expected.keys()
        for label, points in expected.items():
            np.testing.assert_allclose(drawn[label], points, rtol=1e-4, atol=1e-4)


def test_reliability_diagram_has_the_accuracy_of_each_range(trained):
    run = read_run(str(trained))
    _, judged = run.judged
    accuracy, diagonal = open_page(trained / 'report.html').charts()[RELIABILITY]['series']
    ranges = np.ceil(judged['probability'] * 15)
    expected = [[100 * judged['probability'][ranges == i].mean(),
                 100 * (judged['label'] == judged['top1'])[ranges == i].mean()] for i in np.unique(ranges)]
    np.testing.assert_allclose(accuracy[2], expected, rtol=1e-4, atol=1e-4)
    assert diagonal[2] == [[0, 0], [100, 100]]


def test_tiles_show_the_best_epoch_and_the_last_beside_it(trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'run')
    values = {1: (40.0, 90.0), 2: (72.5, 97.5), 3: (65.0, 95.0)}
    lines = []
    for epoch, (top1, top5) in values.items():
        record = {'epoch': epoch, 'step': 2 * epoch, 'split': 'val', 'loss': 1.0, 'acc1': top1, 'acc5': top5}
        lines.append(json.dumps(record) + '\n')
    edit_records(tmp_path / 'run', lambda old: [line for line in old if '"train"' in line] + lines)
    names, numbers, notes = (tile_parts(pages(tmp_path), tag) for tag in ('dt', 'b', 'span'))
    tiles = {name[2]: (number[2], note[2]) for name, number, note in zip(names, numbers, notes)}
    assert tiles['Top-1, val'] == ('72.50\u202f%', 'best, epoch 2; last 65.00\u202f%')
    assert tiles['Top-5, val'] == ('97.50\u202f%', 'epoch 2; last 95.00\u202f%')


def tile_parts(found, tag):
    start = next(i for i, element in enumerate(found.elements) if 'tiles' in element[1].get('class', ''))
    stop = next(i for i, element in enumerate(found.elements) if element[0] == 'section')
    return [element for element in found.elements[start:stop] if element[0] == tag]


def test_curves_have_the_right_coordinates(trained):
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


def test_all_pages_have_one_stylesheet(trained):
    """The pages are rendered: braces of CSS and JavaScript must not be taken for those of the templates."""
    found = open_page(trained / 'report.html')
    for tag, name in (('style', 'style.css'), ('script', 'hover.js')):
        with open(os.path.join(templates.FOLDER, name), encoding='utf-8') as file:
            assert [element[2].strip() for element in found.find(tag)] == [file.read().strip()]


def test_training_without_jinja2_keeps_its_weights(images, tmp_path):
    code = ("import runpy, sys; sys.modules['jinja2'] = None; sys.argv[0] = 'main_single_gpu.py'; "
            "runpy.run_path('main_single_gpu.py', run_name='__main__')")
    program('-c', code, '-data_path', images, '-output', tmp_path, *options(TINY))
    assert (tmp_path / 'final.pdparams').exists() and not (tmp_path / 'report.html').exists()
    assert re.search('report.html could not be written: .*jinja2', (tmp_path / 'log.txt').read_text())


def best_predictions(folder):
    both = [np.load(folder / f'predictions_{split}.npz') for split in ('val', 'val_ema')]
    return max(both, key=lambda p: (p['label'] == p['top1']).mean())


def test_confusion_matrix_and_class_accuracies_equal_the_predictions(trained):
    found, kept = open_page(trained / 'report.html'), best_predictions(trained)
    (table,) = re.findall(r'<table class="confusion few">(.*?)</table>', found.text, re.S)
    rows = [re.findall(r'<td[^>]*>(\d*)</td>', row) for row in table.split('<tr>')[2:]]
    shown = np.array([[int(cell or 0) for cell in row] for row in rows])
    expected = [[((kept['label'] == i) & (kept['top1'] == j)).sum() for j in range(4)] for i in range(4)]
    np.testing.assert_array_equal(shown, expected)
    bars = {name[2]: of[2] for name, of in zip(found.find('span', 'name'), found.find('span', 'of'))}
    assert bars == {str(i): f'{expected[i][i]} of {sum(expected[i])}' for i in range(4)}
    styles = [bar[1]['style'] for bar in found.find('i') if 'style' in bar[1]]
    widths = [float(re.search(r'width:([\d.]+)%', style)[1]) for style in styles]
    accuracies = [100 * expected[i][i] / sum(expected[i]) for i in range(4)]
    assert widths == pytest.approx(sorted(accuracies), abs=0.01)


def test_most_confident_errors_are_shown_with_picture_and_line(trained, images):
    found, kept = open_page(trained / 'report.html'), best_predictions(trained)
    order = np.argsort(-kept['probability'], kind='stable')
    wrong = [i for i in order if kept['label'][i] != kept['top1'][i]]
    assert len(wrong) > 1, 'the run must make errors for this test'
    lines = open(os.path.join(images, 'val_list.txt'), encoding='utf-8').read().splitlines()
    shown = [element[2] for element in found.find('p', 'where')]
    assert shown == [f'val_list.txt:{i + 1}{lines[i]}' for i in wrong]
    for picture, i in zip(found.find('img'), wrong):
        data = base64.b64decode(picture[1]['src'].removeprefix('data:image/png;base64,'))
        path = os.path.join(images, lines[i].split()[0])
        with Image.open(io.BytesIO(data)) as embedded, Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(embedded), np.asarray(image))
        assert picture[1]['alt'] == f'predicted {kept["top1"][i]}, labelled {kept["label"][i]}'
    shown = [element[2] for element in found.find('p') if element[2].startswith('predicted')]
    assert shown == [f'predicted{100 * kept["probability"][i]:.1f}\u202f%{kept["top1"][i]}' for i in wrong]


def test_the_configuration_is_compared_with_the_nearest_file(tmp_path):
    opts = ['TRAIN.BASE_LR', 0.5, 'SEED', 3, 'OUTPUT', 'x', 'DATA.DATA_PATH', 'y']
    changed = get_config('configs/halonet_digits.yaml', opts)
    (tmp_path / 'config.yaml').write_text(changed.dump())
    write([str(tmp_path)], tmp_path / 'report.html')
    text = open_page(tmp_path / 'report.html').text
    note = 'Options that differ from <code>configs/halonet_digits.yaml</code>'
    own = re.search(f'{note}.*?</table>', text, re.S)[0]
    assert rows_of(own) == [['SEED', '3', '0', '0'], ['TRAIN.BASE_LR', '0.5', '0.002', '0.001']]
    everything = re.search(r'<summary>All (\d+) options</summary>(.*?)</table>', text, re.S)
    count = len(flatten(changed)) - 1               # BASE is none
    assert int(everything[1]) == count == everything[2].count('<tr>') - 1


# ---- incomplete runs

def strip(folder, *names):
    for name in names:
        os.remove(folder / name)


def edit_records(folder, change):
    lines = (folder / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (folder / 'metrics.jsonl').write_text(''.join(change(lines)))


def add_nan(folder):
    bad = {'epoch': 2, 'step': 6, 'split': 'val', 'loss': math.nan, 'acc1': 0.0, 'acc5': math.inf, 'lr': None}
    edit_records(folder, lambda lines: [*lines, json.dumps(bad) + '\n'])


def keep_only_config(folder):
    strip(folder, *(path.name for path in folder.iterdir() if path.is_file() and path.name != 'config.yaml'))


def stop_in_epoch_1(folder):
    edit_records(folder, lambda lines: lines[:1])
    strip(folder, 'final.pdparams', 'predictions_val.npz', 'predictions_val_ema.npz')


def tear_records(folder):
    edit_records(folder, lambda lines: [*lines, '{"step": 3', '\n[]\n\n{"step": 1}\n'])


def rename_acc5(folder):
    edit_records(folder, lambda lines: [line.replace('"acc5"', '"x"') for line in lines])


def damage_predictions(folder):
    for split in ('val', 'val_ema'):
        (folder / f'predictions_{split}.npz').write_bytes(b'PK\3\4')


def removing(name):
    return lambda folder: strip(folder, name)


def writing(name, content):
    return lambda folder: (folder / name).write_bytes(content)


INCOMPLETE = {                                      # name -> (change of the folder, text of the page)
    'killed in epoch 1': (stop_in_epoch_1, 'not complete: epoch 1 of 3'),
    'nothing but the config': (keep_only_config, 'nothing recorded yet'),
    'no config': (removing('config.yaml'), 'No config.yaml'),
    'config that is no YAML': (writing('config.yaml', b'\xff: [}'), 'No config.yaml'),
    'config that is a list': (writing('config.yaml', b'[1, 2]'), 'No config.yaml'),
    'options of another version': (writing('config.yaml', b'MODEL: {NAME: a, GONE: 3}\nX: 1'), 'MODEL.GONE'),
    'torn records': (tear_records, '3 unreadable'),
    'not finite': (add_nan, 'not finite'),
    'no records': (removing('metrics.jsonl'), 'evaluation only'),
    'no log': (removing('log.txt'), 'complete: 3 epochs'),
    'log of another program': (writing('log.txt', b'\xff\n2026-99-99'), 'complete: 3 epochs'),
    'log with an impossible time': (writing('log.txt', b'2026-13-32 25:61:00 x\n'), 'complete: 3 epochs'),
    'no machine': (removing('machine.json'), 'Not recorded'),
    'damaged machine': (writing('machine.json', b'{"a'), 'Not recorded'),
    'damaged predictions': (damage_predictions, 'No predictions yet'),
    'records of another version': (rename_acc5, 'All 3 evaluations'),
}


@pytest.mark.parametrize('name', INCOMPLETE)
def test_incomplete_run_has_a_page(trained, tmp_path, name):
    ignored = shutil.ignore_patterns('checkpoints', 'tensorboard', 'report.html')
    shutil.copytree(trained, tmp_path / 'run', ignore=ignored)
    spoil, expected = INCOMPLETE[name]
    spoil(tmp_path / 'run')
    write([str(tmp_path / 'run')], tmp_path / 'one.html')
    assert expected in open_page(tmp_path / 'one.html').text
    write([str(tmp_path / 'run'), str(trained)], tmp_path / 'two.html')
    assert len(open_page(tmp_path / 'two.html').charts()) == 6


def test_missing_pictures_and_changed_lists_are_left_out(trained, images, tmp_path):
    shutil.copytree(trained, tmp_path / 'run')
    shutil.copytree(images, tmp_path / 'data')
    text = (tmp_path / 'run' / 'config.yaml').read_text().replace(images, str(tmp_path / 'data'))
    (tmp_path / 'run' / 'config.yaml').write_text(text)
    kept = best_predictions(trained)
    first = max(np.flatnonzero(kept['label'] != kept['top1']), key=lambda i: kept['probability'][i])
    (tmp_path / 'data' / 'val' / f'{first}.png').write_bytes(b'no picture any more')
    found = pages(tmp_path)
    assert len(found.find('span', 'no-image')) == 1
    assert found.find('p', 'where')[0][2].startswith(f'val_list.txt:{first + 1}')
    with open(tmp_path / 'data' / 'val_list.txt', 'r+', encoding='utf-8') as file:
        lines = file.readlines()
        file.seek(0)
        file.writelines(lines[1:] + lines[:1])
    found = pages(tmp_path)
    assert not found.find('img') and 'has changed' in found.text
    assert found.find('p', 'where')[0][2] == f'image {first}'
    shutil.rmtree(tmp_path / 'data')
    assert not pages(tmp_path).find('img')


def pages(tmp_path):
    write([str(tmp_path / 'run')], tmp_path / 'page.html')
    return open_page(tmp_path / 'page.html')


def test_names_are_escaped(trained, images, tmp_path):
    shutil.copytree(trained, tmp_path / '<b>[r]un')
    config = tmp_path / '<b>[r]un' / 'config.yaml'
    config.write_text(config.read_text().replace('NAME: tiny', 'NAME: "<script>alert(\'1\')</script>"'))
    names = tmp_path / 'names.txt'
    names.write_text('<i>cat\n"dog\' onerror="x\n&amp;\nplain\n')
    write([str(tmp_path / '<b>[r]un')], tmp_path / 'page.html', classes=names)
    found = open_page(tmp_path / 'page.html')
    assert found.find('h1')[0][2] == "<script>alert('1')</script> on data" and len(found.find('script')) == 1
    shown = {element[2] for element in found.find('span', 'name')}
    assert shown == {'<i>cat', '"dog\' onerror="x', '&amp;', 'plain'}
    names.write_text('one\n')
    with pytest.raises(ValueError, match='1 names for 4 classes'):
        read_run(str(trained), names)
    names.write_bytes(b'\x89PNG')
    with pytest.raises(ValueError, match=f'{names}: not a UTF-8 text file'):
        read_run(str(trained), names)


def test_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match='no run folder'):
        write([str(tmp_path)], tmp_path / 'page.html')
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        report.parser().run(report.main, [str(tmp_path)])
    assert stop.value.code == 2 and re.search(r'error: .*no run folder.*\n$', capsys.readouterr().err)


# ---- many classes, many points

def test_most_confused_of_many_classes_are_shown(tmp_path):
    names = [f'n{label:08d}' for label in range(40)]
    labels, top1 = make_run(tmp_path, 40, 800, names)
    found = open_page(tmp_path / 'report.html')
    assert 'class="confusion' not in found.text and len(found.find('span', 'name')) == sections.WORST
    section = re.search(r'<section id="confusion">.*?</section>', found.text, re.S)[0]
    rows = rows_of(section)
    pairs = [(a, b) for a in range(40) for b in range(40) if a != b]
    counts = {(a, b): int(((labels == a) & (top1 == b)).sum()) for a, b in pairs}
    assert [int(row[2]) for row in rows] == sorted(counts.values(), reverse=True)[:sections.PAIRS]
    for a, b, count, fraction, back in rows:
        pair = names.index(a), names.index(b)
        assert (int(count), int(back)) == (counts[pair], counts[pair[::-1]])
        assert fraction == f'{5 * counts[pair]:.0f}\u202f%'
    assert len(found.find('img')) == sections.ERRORS
    assert all('jpeg' in image[1]['src'] for image in found.find('img'))


@pytest.mark.parametrize('right, images, low, high', [
    (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)])
def test_wilson_intervals(right, images, low, high):
    """The textbook's values for ten trials."""
    assert sections.wilson(right, images) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_runs_are_compared(trained, images, tmp_path):
    other = tmp_path / 'other'
    opts = ['DATA.DATA_PATH', images, 'OUTPUT', str(other), 'TRAIN.BASE_LR', 0.02]
    engine.run(get_config(None, [*TINY, *opts]))
    words = [str(trained), str(other), '-output', str(tmp_path / 'compare.html')]
    report.main(report.parser().parse_args(words))
    found = open_page(tmp_path / 'compare.html')
    drawn = {}
    for title, data in found.charts().items():
        drawn[title] = {label: len(points) for label, _, points in data['series']}
    assert drawn['Loss, train'] == {'run': 6, 'other': 4} and drawn['Top-1, val'] == {'run': 3, 'other': 2}
    assert drawn['Top-1, EMA'] == {'run': 3} and drawn['Learning rate'] == {'run': 6, 'other': 4}
    table = re.search(r'<h2>Configuration</h2>.*?</table>', found.text, re.S)[0]
    assert [row for row in rows_of(table) if row[0] != 'OUTPUT'] == [
        ['TRAIN.BASE_LR', '0.01', '0.02'], ['TRAIN.EMA_DECAY', '0.9', '0.0'], ['TRAIN.NUM_EPOCHS', '3', '2']]


def test_failed_write_keeps_the_old_page(trained, tmp_path, monkeypatch):
    (tmp_path / 'report.html').write_text('old')
    monkeypatch.setattr(os, 'fsync', lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write([str(trained)], tmp_path / 'report.html')
    assert [path.name for path in tmp_path.iterdir()] == ['report.html']
    assert (tmp_path / 'report.html').read_text() == 'old'


@pytest.mark.parametrize('folders, labels', [
    (['runs/a', 'runs/b'], ['a', 'b']),
    (['runs/a/run', 'runs/b/run'], ['a', 'b']),
    (['x/a/run', 'y/b/run'], ['x/a', 'y/b']),
    (['runs/run', 'runs/run/eval/run'], ['.', 'eval/run']),
    (['run', 'run/'], ['1: .', '2: .'])])
def test_runs_of_the_same_name_are_labelled_by_their_folders(folders, labels):
    runs = [page_run(folder) for folder in folders]
    assert comparison.labels_of(runs) == labels


def page_run(folder):
    return Run(folder, [], 0, {}, {}, '', {}, {}, {}, False)
