"""Make the HTML of a run's page, one self-contained file: the values of templates/run.html, from a Run."""
import os
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
from markupsafe import Markup

from config import defaults
from reporting import prediction_sections
from reporting.charts import BUCKETS, Series, has_points, line_chart, number
from reporting.runs import SPLITS, Run, differences
from reporting.tables import DASH, Table, duration, fixed, percent, value_text
from reporting.templates import render

PERCENT = {'unit': '\u202f%', 'top': 100, 'linear': True}
CURVES: tuple[tuple[str, str, tuple[str, ...], int, dict[str, Any]], ...] = (
    # title, key of metrics.jsonl, splits, factor, options of line_chart
    ('Top-1 accuracy', 'acc1', tuple(SPLITS), 1, PERCENT),
    ('Loss', 'loss', tuple(SPLITS), 1, {}),
    ('Top-5 accuracy', 'acc5', tuple(SPLITS), 1, PERCENT),
    ('Learning rate', 'lr', ('train',), 1, {'digits': 3, 'linear': True}),
    ('Training speed, images/s', 'images_per_s', ('train',), 1, {'linear': True}),
    ('Time spent waiting for data', 'data_wait', ('train',), 100, {**PERCENT, 'digits': 2}),
)
ALWAYS_DRAWN = ('loss', 'acc1', 'lr')               # even before there is a record
STYLE = {'train': (2, 1, -1), 'val': (0, 0, 0), 'val_ema': (1, 0, 1)}        # split -> colour, dash, marker
STYLE_ALONE = (0, 0, -1)
LONG = 60                                           # letters of a value that gets the whole width


def run_page(run: Run) -> str:
    """Return the page of a run."""
    split, judged = run.judged
    values: dict[str, Any] = {'confusion': None}
    if judged is not None:
        values = prediction_sections.sections(run, judged, split)
    return render(
        'run.html',
        title=f'{run.title} · {run.name}',
        script='hover.js',
        run=run,
        state=status(run),
        facts=facts(run),
        tiles=tiles(run),
        curves=curves(run),
        evaluations=evaluations(run),
        configuration=configuration(run),
        machine=machine(run),
        **values,
    )


@dataclass
class State:
    """How far a run came: `kind` is 'done', 'part' or 'none'."""
    kind: str
    text: str


def status(run: Run) -> State:
    """Describe how far a run came."""
    planned = run.config.get('TRAIN.NUM_EPOCHS')
    if not run.records and run.predictions:
        return State('done', 'evaluation only')
    if not run.records:
        return State('none', 'nothing recorded yet')
    last = run.records[-1]
    if last['epoch'] != planned:
        reached = f'epoch {last["epoch"]} of {planned or "?"}, step {last["step"]:,}'
        return State('part', f'not complete: {reached}')
    if not run.finished:
        return State('part', f'all {planned} epochs recorded, but no final weights')
    return State('done', f'complete: {planned} epochs')


def facts(run: Run) -> list[str]:
    """List when a run was made, how long it took and how often it was resumed, as far as known."""
    texts = []
    if 'first' in run.log:
        first, last = run.log['first'][:16], run.log['last'][:16]
        if last[:10] == first[:10]:
            last = last[11:]                        # the same day: the time alone
        texts.append(f'{first} to {last}')
        texts.append(duration(run.log['seconds']))
    times = run.log['resumed']
    if times == 1:
        texts.append('resumed once')
    elif times:
        texts.append(f'resumed {times} times')
    return texts


@dataclass
class Tile:
    """A large number at the top of the page."""
    name: str
    value: str
    note: str


def tiles(run: Run) -> list[Tile]:
    """List the numbers one looks for first.

    Accuracies are those of the best epochs, whose weights are kept, with the last epoch's beside them.
    """
    found = []
    for split in ('val', 'val_ema'):
        best = run.best(split)
        if best:
            note = f'best, epoch {best[1]}; last {percent(run.last(split, "acc1"))}'
            found.append(Tile(f'Top-1, {SPLITS[split]}', percent(best[0]), note))
    best = run.best('val')
    top5 = run.at('val', 'acc5', best[1]) if best else None
    if best and top5 is not None:
        note = f'epoch {best[1]}; last {percent(run.last("val", "acc5"))}'
        found.append(Tile('Top-5, val', percent(top5), note))
    _, judged = run.judged
    if judged is not None and not run.records:
        top1 = percent(100 * float(np.mean(judged['label'] == judged['top1'])))
        found.append(Tile('Top-1', top1, f'{len(judged["index"]):,} images'))
    speed = run.median_speed
    if speed is not None:
        found.append(Tile('Training loss', number(run.last('train', 'loss')), 'of augmented images'))
        waits = run.values('train', 'data_wait')
        note = 'median, training'
        if waits:
            note = f'{100 * np.mean(waits):.0f}\u202f% waiting for data'
        found.append(Tile('Images/s', f'{speed:,.0f}', note))
    return found


def curves(run: Run) -> dict[str, Any]:
    """Draw the charts of a run, with a note."""
    x_label = 'epoch' if run.steps_per_epoch else 'step'
    charts = []
    for title, key, splits, factor, options in CURVES:
        series = []
        for split in splits:
            style = STYLE[split] if len(splits) > 1 else STYLE_ALONE
            series.append(Series(SPLITS[split], run.curve(split, key, factor), *style))
        if key in ALWAYS_DRAWN or has_points(series):
            charts.append(line_chart(title, series, x_label=x_label, **options))
    note = ('Training loss and accuracy are those of augmented images with smoothed or mixed labels, '
            'averaged over the steps since the previous record.')
    if len(run.curve('train', 'loss')) > 2 * BUCKETS:
        note += ' A long curve shows means of adjacent records; its band is their range.'
    return {'charts': charts, 'note': note}


def evaluations(run: Run) -> Table:
    """List the numbers of every evaluation."""
    splits = [split for split in ('val', 'val_ema') if run.curve(split, 'loss')]
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for record in run.records:
        if record['split'] in splits:
            found.setdefault((record['epoch'], record['step']), {})[record['split']] = record
    head = ['epoch', 'step']
    for split in splits:
        name = SPLITS[split]
        head += [f'top-1 ({name})', f'top-5 ({name})', f'loss ({name})']
    rows = []
    for (epoch, step), records in sorted(found.items()):
        row = [str(epoch), f'{step:,}']
        for split in splits:
            record = records.get(split, {})
            row += [fixed(record.get('acc1'), 2), fixed(record.get('acc5'), 2), fixed(record.get('loss'), 4)]
        rows.append(row)
    return Table(head, rows, 'numbers')


# ---- how it was made

@dataclass
class Configuration:
    """The options of a run: a note, those that differ from the nearest config file, and all of them."""
    note: Union[str, Markup]
    differing: Table
    all: Table


def configuration(run: Run) -> Configuration:
    """Compare the options of a run with those of its nearest config file, or else with the defaults."""
    standard = defaults()
    head = ['option', 'this run', 'default']
    named = Markup('the defaults of <code>config.py</code>')
    if run.base:
        head = ['option', 'this run', os.path.basename(run.base_name), 'default']
        named = Markup('<code>{}</code>').format(run.base_name)
    rows = []
    for key in differences(run.config, run.base or standard):
        row = [key, value_text(run.config.get(key))]
        if run.base:
            row.append(value_text(run.base.get(key)))
        rows.append([*row, value_text(standard.get(key))])
    everything = []
    for key, value in sorted(run.config.items()):
        if key != 'BASE':
            default = standard.get(key)
            other = '' if value == default else value_text(default)
            everything.append([key, value_text(value), other])
    note = Markup('No option differs from {}.').format(named)
    if rows:
        note = Markup('Options that differ from {}:').format(named)
    return Configuration(
        note=note,
        differing=Table(head, rows, 'options own'),
        all=Table(['option', 'this run', 'default, where it differs'], everything, 'options own'),
    )


def machine(run: Run) -> list[tuple[str, str, bool]]:
    """List the facts of machine.json as (name, value, whether it is long), the long ones last."""
    facts = [(str(key), str(value) or DASH, len(str(value)) > LONG) for key, value in run.machine.items()]
    return sorted(facts, key=lambda fact: fact[2])
