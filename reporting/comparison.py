"""Make the HTML of the page that compares several runs: the values of templates/compare.html."""
import os
from typing import Any

from markupsafe import Markup

from reporting.charts import Series, has_points, line_chart, number
from reporting.page import PERCENT, status
from reporting.runs import Run
from reporting.tables import DASH, Table, duration, percent, value_text
from reporting.templates import render

COMPARED: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    # title, split, key of metrics.jsonl, options of line_chart
    ('Top-1, val', 'val', 'acc1', PERCENT),
    ('Top-1, EMA', 'val_ema', 'acc1', PERCENT),
    ('Loss, val', 'val', 'loss', {}),
    ('Loss, train', 'train', 'loss', {}),
    ('Learning rate', 'train', 'lr', {'digits': 3, 'linear': True}),
    ('Training speed, images/s', 'train', 'images_per_s', {'linear': True}),
)
COLOURS = (0, 1, 4, 3, 5, 2)                        # in the order of the runs
STYLES = 4                                          # dashes and markers


def compare_page(runs: list[Run]) -> str:
    """Return the page that compares runs."""
    labels = labels_of(runs)
    differences = [
        ('Configuration', differing([run.config for run in runs], labels), 'options'),
        ('Machine and versions', differing([run.machine for run in runs], labels), 'facts'),
    ]
    return render(
        'compare.html',
        title=f'{len(runs)} runs: ' + ', '.join(labels),
        script='hover.js',
        folder=common_folder(runs),
        results=results(runs, labels),
        curves=curves(runs, labels),
        differences=differences,
        runs=runs,
    )


def common_folder(runs: list[Run]) -> str:
    return os.path.commonpath([os.path.abspath(run.folder) for run in runs])


def labels_of(runs: list[Run]) -> list[str]:
    """Return a short and distinct label for each run: its folder, from where the folders differ."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    common = common_folder(runs)
    labels = [os.path.relpath(os.path.abspath(run.folder), common) for run in runs]
    while all('/' in label for label in labels) and len({os.path.basename(label) for label in labels}) == 1:
        labels = [os.path.dirname(label) for label in labels]           # a/run and b/run: a and b
    if len(set(labels)) < len(labels):              # the same folder twice
        labels = [f'{i}: {label}' for i, label in enumerate(labels, 1)]
    return labels


def curves(runs: list[Run], labels: list[str]) -> list[Markup]:
    """Draw a chart per quantity, with a curve per run."""
    x_label = 'epoch' if all(run.steps_per_epoch for run in runs) else 'epoch or step'
    charts = []
    for title, split, key, options in COMPARED:
        series = []
        for i, (label, run) in enumerate(zip(labels, runs)):
            marker = -1 if split == 'train' else i % STYLES
            series.append(Series(label, run.curve(split, key), COLOURS[i % len(COLOURS)], i % STYLES, marker))
        if has_points(series):
            charts.append(line_chart(title, series, x_label=x_label, **options))
    return charts


def results(runs: list[Run], labels: list[str]) -> Table:
    """List the results of each run."""
    head = ['run', 'state', 'top-1', 'best', 'epoch', 'EMA top-1', 'best EMA', 'val loss', 'images/s', 'time']
    rows = []
    for label, run in zip(labels, runs):
        best, best_epoch = run.best('val') or (None, DASH)
        best_ema, _ = run.best('val_ema') or (None, DASH)
        speed = run.median_speed
        rows.append([
            label,
            status(run).text.split(',')[0],
            percent(run.last('val', 'acc1')),
            percent(best),
            str(best_epoch),
            percent(run.last('val_ema', 'acc1')),
            percent(best_ema),
            number(run.last('val', 'loss')),
            DASH if speed is None else f'{speed:,.0f}',
            duration(run.log.get('seconds')) or DASH,
        ])
    return Table(head, rows, 'numbers second-text')


def differing(sides: list[dict[str, Any]], labels: list[str]) -> Table:
    """List the keys whose values are not equal in all `sides`, one of them per run."""
    keys: set[str] = set().union(*sides)
    rows = []
    for key in sorted(keys - {'BASE'}):
        values = [side.get(key) for side in sides]
        if values.count(values[0]) < len(values):
            rows.append([key, *(value_text(value) for value in values)])
    return Table(['', *labels], rows, 'options')
