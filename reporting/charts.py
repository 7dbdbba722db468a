"""Draw line charts as inline SVG. The page's style.css gives them their colours, also in dark mode.

A chart is 400 x 240 units, the width of a phone. On a desktop three of them fit side by side, so the text
keeps its size. Series differ by colour, dash and marker.
"""
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any, Optional

from markupsafe import Markup

from reporting.templates import render

Points = list[tuple[float, float]]                  # [(x, y)]
Band = list[tuple[float, float, float]]             # [(x, lowest, highest)]

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 38           # margins
BUCKETS = 120                                       # of many points, which become the means of the buckets
MARKED = 40                                         # most points of a series that get markers
DASHES = ('', '6 3', '2 3', '9 3 2 3')
MARKERS = (                                         # paths from the centre: circle, square, triangle, diamond
    'm-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0', 'm-2.7 -2.7h5.4v5.4h-5.4z', 'm0 -3.6l3.4 6h-6.8z',
    'm0 -3.7l3.7 3.7l-3.7 3.7l-3.7 -3.7z')


@dataclass
class Series:
    """One curve. Its colour, dash and marker are numbers; its values may be not finite."""
    label: str
    points: Points
    colour: int = 0
    dash: int = 0
    marker: int = 0                                 # -1: none, except for a point between two gaps
    band: Band = field(default_factory=list)        # the range of each bucket
    last: float = math.nan                          # value of the last point, before thinning

    @property
    def finite(self) -> list[float]:
        """The values that are finite."""
        return [y for _, y in self.points if math.isfinite(y)]


# ---- numbers and axes

def number(value: Optional[float], digits: int = 4) -> str:
    """Format a value for people: 0.0012, 98.61, 1,437, 5e−06."""
    if value is None:
        return '–'
    if not math.isfinite(value):
        return 'not finite'
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        text = f'{value:,.{digits}g}' if abs(value) < 1000 else f'{value:,.0f}'
        return text.replace('-', '−')
    mantissa, exponent = f'{value:.2e}'.split('e')
    return f'{float(mantissa):g}e{int(exponent)}'.replace('-', '−')


def numbers(values: list[float]) -> list[str]:
    return [number(value) for value in values]


def tick_texts(marks: list[float]) -> list[str]:
    """Format the marks of an axis, each with the same number of decimals."""
    texts = numbers(marks)
    if 'e' in ''.join(texts):
        return texts
    decimals = max(len(text.partition('.')[2]) for text in texts)
    return [f'{mark:,.{decimals}f}'.replace('-', '−') for mark in marks]


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return about `count` round numbers, from at most `low` to at least `high`.

    They are 1, 2 or 5 times a power of ten apart.
    """
    if high <= low == 0:
        low, high = 0.0, 1.0
    elif high <= low:
        low, high = low - abs(low) / 2, high + abs(high) / 2
    raw = (high - low) / (count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return about five powers of ten, evenly apart, from at most `low` to at least `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / 5))
    return [10.0 ** i for i in range(first, last + step, step)]


def thin(points: Points, buckets: int = BUCKETS) -> tuple[Points, Band]:
    """Average many points in about `buckets` buckets; return the means and the band.

    Few points are returned as they are, with []. Of values that are not finite, each bucket keeps the last.
    """
    if len(points) <= 2 * buckets:
        return points, []
    size = math.ceil(len(points) / buckets)
    means: Points = []
    band: Band = []
    for i in range(0, len(points), size):
        xs, ys = [], []
        last_gap: Points = []
        for x, y in points[i:i + size]:
            if math.isfinite(y):
                xs.append(x)
                ys.append(y)
            else:
                last_gap = [(x, y)]
        if ys:
            mean_x = sum(xs) / len(xs)
            means.append((mean_x, sum(ys) / len(ys)))
            band.append((mean_x, min(ys), max(ys)))
        means += last_gap
    return means, band


def has_points(series: list[Series]) -> bool:
    """True if at least one of the series has a point."""
    return any(s.points for s in series)


def prepared(series: Series) -> Series:
    """Thin the points of a series, and keep its last value."""
    points, band = thin(series.points)
    return replace(series, points=points, band=band, last=series.points[-1][1])


class Scale:
    """Map values to coordinates of the chart, linearly or by their logarithm."""

    def __init__(self, marks: list[float], start: float, end: float, log: bool = False) -> None:
        self.marks = marks
        self.log = log
        self.start = start
        self.end = end
        self.low = self.level(marks[0])
        self.high = self.level(marks[-1])

    def level(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        fraction = (self.level(value) - self.low) / (self.high - self.low)
        return round(self.start + fraction * (self.end - self.start), 1)


# ---- the chart

def line_chart(title: str, series: list[Series], *, x_label: str = 'epoch', unit: str = '',
               top: float = math.inf, digits: int = 4, linear: bool = False) -> Markup:
    """Draw a <figure> with title, legend (with the last values) and chart.

    Values that are not finite are gaps, with a cross below. The axis ends at `top`, such as 100 for percent.
    It is logarithmic where the largest value exceeds 100 times the smallest, unless `linear`.
    """
    last_x = max((x for s in series for x, _ in s.points), default=0)
    series = [prepared(s) for s in series if s.points]
    legend = [legend_entry(s, unit, digits) for s in series]
    values = drawn_values(series)
    if not values:
        return render('chart.html', title=title, legend=legend, drawn=None)
    x_marks = [mark for mark in ticks(0, last_x) if mark <= last_x * 1.0001]
    x = Scale([0, max(last_x, 1e-9)], LEFT, WIDTH - RIGHT)
    y = value_axis(values, top, linear)
    y_texts = numbers(y.marks) if y.log else tick_texts(y.marks)
    drawn = {
        'size': (WIDTH, HEIGHT),
        'left': LEFT, 'right': WIDTH - RIGHT, 'bottom': HEIGHT - BOTTOM,
        'x_label': x_label,
        'unit': unit,
        'x_ticks': axis_ticks(x, x_marks, numbers(x_marks)),
        'y_ticks': axis_ticks(y, y.marks, y_texts),
        'curves': [curve(s, x, y) for s in series],
        'words': describe(series, unit, digits, x_label),
        'hover': hover_data(series, x_label, unit, last_x),
    }
    return render('chart.html', title=title, legend=legend, drawn=drawn)


def axis_ticks(scale: Scale, marks: list[float], texts: list[str]) -> list[tuple[float, str]]:
    """Return the coordinate and the text of each mark."""
    return [(scale(mark), text) for mark, text in zip(marks, texts)]


def drawn_values(series: list[Series]) -> list[float]:
    """Return all finite values of the curves and their bands."""
    values = []
    for s in series:
        values += s.finite
        for _, lowest, highest in s.band:
            values += [lowest, highest]
    return values


def value_axis(values: list[float], top: float, linear: bool) -> Scale:
    """Choose the vertical axis for some values, as described at `line_chart`."""
    low, high = min(values), max(values)
    log = low > 0 and high > 100 * low and not linear
    marks = log_ticks(low, high) if log else ticks(low, high)
    bottom = 0 if low >= 0 else -math.inf
    marks = [mark for mark in marks if bottom <= mark <= top] or marks
    if len(marks) < 2:
        marks = [marks[0] - 1, marks[0]]
    return Scale(marks, HEIGHT - BOTTOM, TOP, log)


def legend_entry(series: Series, unit: str, digits: int) -> dict[str, Any]:
    """Return the label, the sample of the line and the last value of a series."""
    last = number(series.last, digits)
    if math.isfinite(series.last):
        last += unit
    sample = marker(series, 12, 7) if series.marker >= 0 else ''
    return {'colour': series.colour, 'dash': dash(series), 'mark': sample,
            'label': series.label, 'last': last}


def curve(series: Series, x: Scale, y: Scale) -> dict[str, Any]:
    """Place a series in the chart: its band, its lines between gaps, its markers, and the gaps themselves."""
    pieces: list[list[tuple[float, float]]] = [[]]
    gaps = []
    for x_value, y_value in series.points:
        if math.isfinite(y_value):
            pieces[-1].append((x(x_value), y(y_value)))
        else:
            gaps.append(x(x_value))
            pieces.append([])
    all_marked = series.marker >= 0 and len(series.points) <= MARKED
    lines, marks = [], []
    for piece in pieces:
        if len(piece) > 1:
            lines.append(polygon(piece))
        if all_marked or len(piece) == 1:           # a point between two gaps has no line
            for point in piece:
                marks.append(marker(series, *point))
    return {'colour': series.colour, 'dash': dash(series), 'band': outline(series.band, x, y), 'lines': lines,
            'marks': marks, 'gaps': gaps}


def outline(band: Band, x: Scale, y: Scale) -> str:
    """Return the polygon around a band: its highest values, then the lowest ones backwards."""
    above, below = [], []
    for at, lowest, highest in band:
        above.append((x(at), y(highest)))
        below.append((x(at), y(lowest)))
    return polygon(above + below[::-1])


def polygon(points: list[tuple[float, float]]) -> str:
    """Write points as SVG does: 'x,y x,y'."""
    return ' '.join(f'{x},{y}' for x, y in points)


def dash(series: Series) -> str:
    return DASHES[series.dash % len(DASHES)]


def marker(series: Series, x: float, y: float) -> str:
    """Return the path of a series' marker around (x, y)."""
    return f'M{x} {y}{MARKERS[series.marker % len(MARKERS)]}'


def describe(series: list[Series], unit: str, digits: int, x_label: str) -> str:
    """Describe the chart in words."""
    words = []
    for s in series:
        spread = 'none finite'
        if s.finite:
            spread = f'from {number(min(s.finite), digits)} to {number(max(s.finite), digits)}{unit}'
        words.append(f'{s.label}, {len(s.points)} points, {spread}, last {number(s.last, digits)} '
                     f'at {x_label} {number(s.points[-1][0])}')
    return '; '.join(words)


def hover_data(series: list[Series], x_label: str, unit: str, last_x: float) -> str:
    """Return the JSON that hover.js reads: the plot's edges and the points, null for what is not finite."""
    drawn = []
    for s in series:
        points = []
        for x, y in s.points:
            value = float(f'{y:.6g}') if math.isfinite(y) else None
            points.append((round(x, 4), value))
        drawn.append((s.label, s.colour, points))
    plot = [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM]
    content = {'x': x_label, 'unit': unit, 'last': last_x, 'plot': plot, 'series': drawn}
    return json.dumps(content, separators=(',', ':'))
