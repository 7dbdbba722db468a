"""The HTML of a run's page and of the page that compares runs: pure functions from Run to text, one self-contained file."""
import math
import os
from html import escape

import numpy as np

from reporting import pictures
from reporting.charts import BUCKETS, Series, line_chart, number
from reporting.runs import SPLITS, defaults, differences

HERE = os.path.dirname(os.path.abspath(__file__))
FEW_CLASSES = 30                                    # up to so many: the whole confusion matrix and every class
NUMBERED = 16                                       # up to so many classes: counts written in the matrix's cells
PAIRS, WORST, MISTAKES = 20, 20, 24                 # what is shown of many: confused pairs, classes, surest mistakes
PERCENT = {'unit': '\u202f%', 'top': 100, 'linear': True}
CURVES: tuple[tuple, ...] = (                       # title, key of metrics.jsonl, splits, factor, how it is drawn
    ('Top-1 accuracy', 'acc1', tuple(SPLITS), 1, PERCENT),
    ('Loss', 'loss', tuple(SPLITS), 1, {}),
    ('Top-5 accuracy', 'acc5', tuple(SPLITS), 1, PERCENT),
    ('Learning rate', 'lr', ('train',), 1, {'digits': 3, 'linear': True}),
    ('Training speed, images/s', 'images_per_s', ('train',), 1, {'linear': True}),
    ('Time spent waiting for data', 'data_wait', ('train',), 100, {**PERCENT, 'digits': 2}),
)
STYLE = {'train': (2, 1, -1), 'val': (0, 0, 0), 'val_ema': (1, 0, 1)}        # split -> colour, dash, marker


def document(title, body):
    texts = {}
    for name in ('style.css', 'hover.js'):
        with open(os.path.join(HERE, name), encoding='utf-8') as file:
            texts[name] = file.read()
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
            f'<style>\n{texts["style.css"]}</style>\n</head>\n<body>\n{body}\n'
            f'<script>\n{texts["hover.js"]}</script>\n</body>\n</html>\n')


def section(title, content, note='', name=''):
    note = f'<p class="note">{note}</p>' if note else ''
    return f'<section{f" id={name}" if name else ""}><h2>{escape(title)}</h2>{note}{content}</section>\n'


def table(head, rows, classes='', caption=''):
    """Rows of HTML cells; the first of each row is its heading. `head` is text.

    Cells know the head of their column: options stand one below the other on a telephone (style.css).
    """
    body = []
    for row in rows:
        cells = [f'<td data-head="{escape(text)}">{cell}</td>' for text, cell in zip(head[1:], row[1:])]
        body.append(f'<tr><th scope="row">{row[0]}</th>{"".join(cells)}</tr>')
    head = ''.join(f'<th scope="col">{escape(text)}</th>' for text in head)
    caption = f'<caption>{escape(caption)}</caption>' if caption else ''
    return (f'<div class="wide sheet" tabindex="0" role="region" aria-label="{escape(caption or "table")}">'
            f'<table class="{classes}">{caption}<thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>')


def details(summary, content):
    return f'<details><summary>{escape(summary)}</summary>{content}</details>'


def fixed(value, digits):
    return '–' if value is None else f'{value:.{digits}f}' if math.isfinite(value) else 'not finite'


def percent(value):
    return fixed(value, 2) + ('\u202f%' if value is not None and math.isfinite(value) else '')


# ---- one run

def run_page(run):
    split, judged = run.judged
    parts = [header(run), '<main>', tiles(run), curves(run)]
    if judged:
        parts += [f'<div class="pair">{confusion(run, judged)}{per_class(run, judged)}</div>', mistakes(run, judged, split)]
    else:
        parts.append(section('Predictions', '<p class="none">No predictions yet: the last evaluation of a run writes them '
                             '(predictions_val.npz), and the confusions and the surest mistakes are shown here.</p>'))
    parts += [configuration(run), machine(run), '</main>', footer([run])]
    return document(f'{run.title} · {run.name}', '\n'.join(parts))


def header(run):
    when = run.log.get('first', '')
    span = f'{when[:16]} to {run.log["last"][11 if run.log["last"][:10] == when[:10] else 0:16]}' if when else ''
    facts = [span, duration(run.log.get('seconds')), f'resumed {run.log["resumed"]} times' if run.log['resumed'] > 1 else
             'resumed once' if run.log['resumed'] else '']
    state, text = status(run)
    return (f'<header><p class="eyebrow">{escape(run.folder)}</p><h1>{escape(run.title)}</h1>'
            f'<p class="facts"><span class="state {state}">{escape(text)}</span>'
            f'{"".join(f"<span>{escape(fact)}</span>" for fact in facts if fact)}</p></header>')


def status(run):
    """('done', 'part' or 'none', words) about how far a run came."""
    planned = run.config.get('TRAIN.NUM_EPOCHS')
    if not run.records:
        return ('done', 'evaluation only') if run.predictions else ('none', 'nothing recorded yet')
    reached = run.records[-1]['epoch']
    if run.finished and reached == planned:
        return 'done', f'complete: {planned} epochs'
    last = run.records[-1]
    if reached == planned:
        return 'part', f'all {planned} epochs recorded, but no final weights'
    return 'part', f'not complete: epoch {reached} of {planned or "?"}, step {last["step"]:,}'


def duration(seconds):
    if seconds is None:
        return ''
    days, hours, minutes = int(seconds // 86400), int(seconds // 3600 % 24), int(seconds // 60 % 60)
    if seconds < 3600:
        return f'{minutes} min {int(seconds % 60)} s'
    return f'{days} d {hours} h' if days else f'{hours} h {minutes} min'


def tiles(run):
    """The numbers one looks for first: those of the best epochs, whose weights are kept, with the last beside them."""
    items = []
    for split, label in list(SPLITS.items())[1:]:
        best = run.best(split)
        if best:
            last = percent(run.last(split, 'acc1'))
            items.append((f'Top-1, {label}', percent(best[0]), f'best, epoch {best[1]}; last {last}'))
    best = run.best('val')
    top5 = best and run.at('val', 'acc5', best[1])
    if top5 is not None:
        items.append(('Top-5, val', percent(top5), f'epoch {best[1]}; last {percent(run.last("val", "acc5"))}'))
    _, judged = run.judged
    if judged and not run.records:
        items.append(('Top-1', percent(100 * np.mean(judged['label'] == judged['top1'])), f'{len(judged["index"]):,} images'))
    speeds = [value for _, value in run.curve('train', 'images_per_s')]
    if speeds:
        items.append(('Training loss', number(run.last('train', 'loss')), 'of augmented images'))
        waits = [value for _, value in run.curve('train', 'data_wait')]
        items.append(('Images/s', f'{np.median(speeds):,.0f}', f'{100 * np.mean(waits):.0f}\u202f% waiting for data' if waits else
                      'median, training'))
    cells = ''.join(f'<div><dt>{escape(a)}</dt><dd><b>{b}</b><span>{c}</span></dd></div>' for a, b, c in items)
    return f'<dl class="tiles">{cells}</dl>' if items else ''


def curves(run):
    x_label = 'epoch' if run.steps_per_epoch else 'step'
    charts = []
    for title, key, splits, factor, drawn in CURVES:
        styles = STYLE if len(splits) > 1 else {'train': (0, 0, -1)}
        series = [Series(SPLITS[split], scaled(run.curve(split, key), factor), *styles[split]) for split in splits]
        if any(s.points for s in series) or key in ('loss', 'acc1', 'lr'):
            charts.append(line_chart(title, series, x_label=x_label, **drawn))
    note = ('Training loss and accuracy are of augmented images with smoothed or mixed labels, averaged over the steps since '
            'the last record.')
    if any(len(run.curve('train', key)) > 2 * BUCKETS for key in ('loss', 'lr')):
        note += ' Of many points the line is the mean of a stretch, and the band spans its lowest and highest.'
    return section('Curves', f'<div class="charts">{"".join(charts)}</div>{evaluations(run)}', note, 'curves')


def scaled(points, factor):
    return [(x, y * factor) for x, y in points]


def evaluations(run):
    """The figures of every evaluation, for reading and copying."""
    splits = [split for split in ('val', 'val_ema') if run.curve(split, 'loss')]
    found = {}
    for record in run.records:
        if record['split'] in splits:
            found.setdefault((record['epoch'], record['step']), {})[record['split']] = record
    rows = [[str(epoch), f'{step:,}', *(fixed(records.get(split, {}).get(key), digits) for split in splits
                                        for key, digits in (('acc1', 2), ('acc5', 2), ('loss', 4)))]
            for (epoch, step), records in sorted(found.items())]
    head = ['epoch', 'step', *(f'{name} ({SPLITS[split]})' for split in splits for name in ('top-1', 'top-5', 'loss'))]
    return details(f'All {len(rows)} evaluations in figures', table(head, rows, 'figures')) if rows else ''


# ---- what it gets wrong

def confusion(run, judged):
    count = len(run.classes)
    matrix = np.zeros((count, count), int)
    np.add.at(matrix, (judged['label'], judged['top1']), 1)
    wrong = int(matrix.sum() - np.trace(matrix))
    note = f'{wrong:,} of {matrix.sum():,} images are taken for another class.'
    if count > FEW_CLASSES:
        return section('Most confused classes', confused_pairs(matrix, run.classes), note, 'confusion')
    note += ' Rows are the classes in the list, columns what the model says; strength of colour is the share of the row.'
    return section('Confusion', confusion_table(matrix, run.classes), note, 'confusion')


def confusion_table(matrix, names):
    short = max(map(len, names)) <= 3
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    worst = max((share - np.diag(np.diag(share))).max(), 1e-9)
    head = ''.join(f'<th scope="col" title="{escape(name)}">{escape(name) if short else i}</th>' for i, name in enumerate(names))
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j, n in enumerate(matrix[i]):
            kind, strength = ('right', share[i, j]) if i == j else ('wrong', share[i, j] / worst)
            text = f'{escape(name)} taken for {escape(names[j])}: {n}' if i != j else f'{escape(name)} right: {n}'
            strong = ' strong' if strength > 0.6 else ''
            cells.append(f'<td class="{kind}{strong}" style="--v:{strength:.3f}" title="{text}">{n}</td>' if n else
                         f'<td title="{text}"></td>')
        label = escape(name) if short else f'<i>{i}</i> {escape(name)}'
        rows.append(f'<tr><th scope="row" title="{escape(name)}"><span>{label}</span></th>{"".join(cells)}</tr>')
    kind = 'confusion' + (' few' if len(names) <= NUMBERED else '') + ('' if short else ' named')
    return (f'<div class="wide" tabindex="0" role="region" aria-label="confusion matrix"><table class="{kind}">'
            f'<thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>')


def confused_pairs(matrix, names):
    off = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-off, axis=None, kind='stable')[:PAIRS]
    rows = []
    for i, j in zip(*np.unravel_index(order, off.shape)):
        if off[i, j]:
            share = 100 * off[i, j] / matrix[i].sum()
            rows.append([escape(names[i]), escape(names[j]), str(off[i, j]), f'{share:.0f}\u202f%', str(off[j, i])])
    return table(['class', 'taken for', 'images', 'of the class', 'the other way'], rows, 'figures second-text')


def per_class(run, judged):
    """Accuracy of each class, the worst first; of many classes the worst, and all in figures."""
    rows = []
    for label, name in enumerate(run.classes):
        of = judged['label'] == label
        if of.any():
            rows.append((name, int((judged['top1'][of] == label).sum()), int(of.sum())))
    rows.sort(key=lambda row: row[1] / row[2])
    shown = rows if len(rows) <= FEW_CLASSES else rows[:WORST]
    bars = ''.join(class_bar(*row) for row in shown)
    width = min(max(len(name) for name, *_ in shown) + 1, 18)
    of = max(len(f'{right:,} of {images:,}') for _, right, images in shown)
    note = f'{"The worst first" if shown is rows else f"The {WORST} worst of {len(rows):,}"}. ' \
           'The line is the 95 % interval of what as many other images would give (Wilson).'
    figures = [[escape(name), str(right), str(images), percent(100 * right / images)] for name, right, images in rows]
    rest = '' if shown is rows else details('All classes in figures', table(
        ['class', 'right', 'images', 'accuracy'], figures, 'figures'))
    bars = f'<ol class="bars" style="--name:{width}ch;--of:{of}ch">{bars}</ol>'
    return section('Accuracy by class', bars + rest, note, 'classes')


def class_bar(name, right, images):
    low, high = (100 * value for value in wilson(right, images))
    return (f'<li><span class="name" title="{escape(name)}">{escape(name)}</span>'
            f'<span class="bar" aria-hidden="true"><i style="width:{100 * right / images:.2f}%"></i>'
            f'<u style="left:{low:.2f}%;width:{high - low:.2f}%"></u></span>'
            f'<b>{100 * right / images:.1f}\u202f%</b><span class="of">{right:,} of {images:,}</span></li>')


def wilson(right, images, z=1.96):
    """The 95 % interval of a share by Wilson's score."""
    p, square = right / images, z * z / images
    half = z * math.sqrt(p * (1 - p) / images + square / (4 * images))
    return max((p + square / 2 - half) / (1 + square), 0.0), min((p + square / 2 + half) / (1 + square), 1.0)


def mistakes(run, judged, split):
    """Pictures that the model is surest to know and gets wrong: hard ones, or wrong labels."""
    wrong = np.flatnonzero(judged['label'] != judged['top1'])
    order = wrong[np.argsort(-judged['probability'][wrong], kind='stable')][:MISTAKES]
    cards = ''.join(card(run, {key: array[k] for key, array in judged.items()}) for k in order)
    note = f'Wrong answers with the highest probability ({SPLITS.get(split, split)}): hard pictures, or wrong labels in the list.'
    if run.samples is None:
        note += ' The pictures are not shown: the list that was evaluated is not there any more, or has changed.'
    return section('Surest mistakes', f'<ul class="cards">{cards}</ul>' if cards else '<p class="none">No mistake.</p>',
                   note, 'mistakes')


def card(run, of):
    index, said, label = int(of['index']), run.classes[int(of['top1'])], run.classes[int(of['label'])]
    where = os.path.basename(run.samples.where(index)) if run.samples else f'image {index}'
    line = f'{run.samples.name(index)} {int(of["label"])}' if run.samples else ''
    uri, pixelated = pictures.thumbnail(run.samples.path(index)) if run.samples else ('', False)
    image = (f'<img src="{uri}" alt="{escape(f"taken for {said}, labelled {label}")}"{" class=pixels" if pixelated else ""}>'
             if uri else '<span class="no-image">no picture</span>')
    return (f'<li>{image}<p><em>model says</em><span>{100 * of["probability"]:.1f}\u202f%</span><b>{escape(said)}</b></p>'
            f'<p><em>list says</em><span>{100 * of["label_probability"]:.1f}\u202f%</span><b>{escape(label)}</b></p>'
            f'<p class="where">{escape(where)}<br>{escape(line)}</p></li>')


# ---- how it was made

def value_text(value):
    return '–' if value is None else escape(str(value)) if value != '' else '<i>empty</i>'


def configuration(run):
    if not run.config:
        return section('Configuration', '<p class="none">No config.yaml in the folder.</p>')
    standard = defaults()
    against = run.base or standard
    rows = [[escape(key), value_text(run.config.get(key)), value_text(against.get(key)), *(
        [value_text(standard.get(key))] if run.base else [])] for key in differences(run.config, against)]
    named = f'<code>{escape(run.base_name)}</code>' if run.base else 'the defaults of <code>config.py</code>'
    head = ['option', 'this run', os.path.basename(run.base_name), 'default'] if run.base else ['option', 'this run', 'default']
    text = table(head, rows, 'options own') if rows else ''
    note = f'What differs from {named}:' if rows else f'Nothing differs from {named}.'
    everything = [[escape(key), value_text(value), '' if value == standard.get(key) else value_text(standard.get(key))]
                  for key, value in sorted(run.config.items()) if key != 'BASE']
    return section('Configuration', text + details(f'All {len(everything)} options', table(
        ['option', 'this run', 'default, where it differs'], everything, 'options own')), note, 'config')


def machine(run):
    if not run.machine:
        return section('Machine and versions', '<p class="none">Not recorded (machine.json).</p>', name='machine')
    facts = sorted(((str(key), str(value)) for key, value in run.machine.items()), key=lambda fact: len(fact[1]) > 60)
    rows = ''.join(f'<div{" class=long" if len(value) > 60 else ""}><dt>{escape(key)}</dt><dd>{escape(value) or "–"}</dd></div>'
                   for key, value in facts)
    return section('Machine and versions', f'<dl class="facts-list">{rows}</dl>', name='machine')


def footer(runs):
    count, torn = sum(len(run.records) for run in runs), sum(run.torn for run in runs)
    note = f'; {torn} unreadable line(s) left out' if torn else ''
    return f'<footer>Made by tools/report.py from {count:,} records of metrics.jsonl{note}.</footer>'


# ---- several runs

COMPARED: tuple[tuple, ...] = (                     # title, split, key, how it is drawn
    ('Top-1, val', 'val', 'acc1', PERCENT), ('Top-1, EMA', 'val_ema', 'acc1', PERCENT), ('Loss, val', 'val', 'loss', {}),
    ('Loss, train', 'train', 'loss', {}), ('Learning rate', 'train', 'lr', {'digits': 3, 'linear': True}),
    ('Training speed, images/s', 'train', 'images_per_s', {'linear': True}),
)


COLOURS = (0, 1, 4, 3, 5, 2)                        # in the order of the runs


def labels_of(runs):
    """A short name for each run, different for each: its folder, from where the folders differ."""
    names = [run.name for run in runs]
    if len({*names}) == len(names):
        return names
    folders = [os.path.abspath(run.folder) for run in runs]
    common = os.path.commonpath(folders)
    labels = [os.path.relpath(folder, common) for folder in folders]
    while all('/' in label for label in labels) and len({label.split('/')[-1] for label in labels}) == 1:
        labels = [label.rpartition('/')[0] for label in labels]              # .../a/run and .../b/run: a and b
    return labels if len({*labels}) == len(labels) else [f'{i}: {label}' for i, label in enumerate(labels, 1)]


def comparison(runs):
    labels = labels_of(runs)
    x_label = 'epoch' if all(run.steps_per_epoch for run in runs) else 'epoch or step'
    charts = []
    for title, split, key, drawn in COMPARED:
        series = [Series(label, run.curve(split, key), COLOURS[i % 6], i % 4, i % 4 if split != 'train' else -1)
                  for i, (label, run) in enumerate(zip(labels, runs))]
        if any(s.points for s in series):
            charts.append(line_chart(title, series, x_label=x_label, **drawn))
    head = (f'<header><p class="eyebrow">{escape(os.path.commonpath([os.path.abspath(run.folder) for run in runs]))}</p>'
            f'<h1>{len(runs)} runs compared</h1></header>')
    differing = 'What differs between them.'
    body = [head, '<main>', section('Results', summary(runs, labels)),
            section('Curves', f'<div class="charts">{"".join(charts)}</div>' if charts else '<p class="none">No records.</p>'),
            section('Configuration', compared_values([run.config for run in runs], labels, 'options'), differing),
            section('Machine and versions', compared_values([run.machine for run in runs], labels, 'facts'), differing),
            '</main>', footer(runs)]
    return document(f'{len(runs)} runs: ' + ', '.join(labels), '\n'.join(body))


def summary(runs, labels):
    rows = []
    for label, run in zip(labels, runs):
        best, ema = run.best('val'), run.best('val_ema')
        speeds = [value for _, value in run.curve('train', 'images_per_s')]
        rows.append([escape(label), status(run)[1].split(',')[0], percent(run.last('val', 'acc1')), percent(best and best[0]),
                     str(best[1]) if best else '–', percent(run.last('val_ema', 'acc1')), percent(ema and ema[0]),
                     number(run.last('val', 'loss')), f'{np.median(speeds):,.0f}' if speeds else '–',
                     duration(run.log.get('seconds')) or '–'])
    head = ['run', 'state', 'top-1', 'best', 'epoch', 'EMA top-1', 'best EMA', 'val loss', 'images/s', 'time']
    return table(head, rows, 'figures second-text')


def compared_values(sides, labels, what):
    keys = sorted({key for side in sides for key in side if key != 'BASE'})
    rows = [[escape(key), *(value_text(side.get(key)) for side in sides)] for key in keys
            if any(side.get(key) != sides[0].get(key) for side in sides)]
    return table(['', *labels], rows, 'options') if rows else f'<p class="none">Nothing among {len(keys)} {what}.</p>'
