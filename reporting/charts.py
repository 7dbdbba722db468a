"""Line charts as inline SVG: pure functions from points to text. Colours and dark mode are the page's (style.css).

A chart is 400 x 240 units, the width of a phone, and as wide on a desktop, where three stand side by side: the text keeps its
size. Series differ by colour and by dash and marker.
"""
import json
import math
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 38           # margins
BUCKETS = 120                                       # of many points: means of so many stretches, with a band around them
MARKED = 40                                         # most points of a series that get markers
DASHES = ('', '6 3', '2 3', '9 3 2 3')
MARKERS = (
    'M{x} {y}m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0', 'M{x} {y}m-2.7 -2.7h5.4v5.4h-5.4z', 'M{x} {y}m0 -3.6l3.4 6h-6.8z',
    'M{x} {y}m0 -3.7l3.7 3.7l-3.7 3.7l-3.7 -3.7z')


@dataclass
class Series:
    """A curve: its label, its points [(x, y)], y perhaps not finite, and its colour, dash and marker by number."""
    label: str
    points: list
    colour: int = 0
    dash: int = 0
    marker: int = 0                                 # -1: none, but for a point on its own
    band: list = field(default_factory=list)        # [(x, lowest, highest)] where the points are means
    last: float = math.nan                          # value of the last point before means were taken


def number(value, digits=4):
    """A value as a person writes it: 0.0012, 98.61, 1,437, 5e-06."""
    if value is None:
        return '–'
    if not math.isfinite(value):
        return 'not finite'
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        text = f'{value:,.{digits}g}' if abs(value) < 1000 else f'{value:,.0f}'
        return text.replace('-', '−')
    mantissa, exponent = f'{value:.2e}'.split('e')
    return f'{float(mantissa):g}e{int(exponent)}'.replace('-', '−')


def tick_texts(marks):
    """The marks of an axis with as many decimals each."""
    texts = [number(mark) for mark in marks]
    if any('e' in text for text in texts):
        return texts
    decimals = max(len(text.partition('.')[2]) for text in texts)
    return [f'{mark:,.{decimals}f}'.replace('-', '−') for mark in marks]


def ticks(low, high, count=6):
    """Round numbers, 1, 2 or 5 times a power of ten apart, from at most `low` to at least `high`; about `count` of them."""
    if high <= low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    raw = (high - low) / (count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low, high):
    """Powers of ten, evenly apart and about five of them, from at most `low` to at least `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / 5))
    return [10.0 ** i for i in range(first, last + step, step)]


def thin(points, buckets=BUCKETS):
    """Many points as the means of about `buckets` stretches, and [(x, lowest, highest)] of each; few as they are, and [].

    A stretch with values that are not finite ends in a point that is not.
    """
    if len(points) <= 2 * buckets:
        return points, []
    size = math.ceil(len(points) / buckets)
    means, band = [], []
    for i in range(0, len(points), size):
        part = [(x, y) for x, y in points[i:i + size] if math.isfinite(y)]
        if part:
            x, values = sum(x for x, _ in part) / len(part), [y for _, y in part]
            means.append((x, sum(values) / len(values)))
            band.append((x, min(values), max(values)))
        means += [point for point in points[i:i + size] if not math.isfinite(point[1])][-1:]
    return means, band


def prepared(s):
    points, band = thin(s.points)
    return Series(s.label, points, s.colour, s.dash, s.marker, band, s.points[-1][1])


class Scale:
    """Data -> place: linear, or logarithmic."""

    def __init__(self, marks, start, end, log=False):
        self.marks, self.log, self.start, self.end = marks, log, start, end
        self.low, self.high = self.of(marks[0]), self.of(marks[-1])

    def of(self, value):
        return math.log10(value) if self.log else value

    def __call__(self, value):
        return round(self.start + (self.of(value) - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def line_chart(title, series, *, x_label='epoch', unit='', top=None, digits=4, linear=False):
    """A <figure> with title, legend (with the last values) and chart. Values that are not finite are gaps, marked below.

    `top`: a value that the axis need not exceed, such as 100 for percent. The axis is logarithmic, unless `linear`, where the
    largest value is more than 100 times the smallest.
    """
    last_x = max((x for s in series for x, _ in s.points), default=0)
    series = [prepared(s) for s in series if s.points]
    values = [y for s in series for _, y in s.points if math.isfinite(y)]
    values += [y for s in series for _, *spread in s.band for y in spread]
    head = f'<figcaption><h3>{escape(title)}</h3>{legend(series, unit, digits)}</figcaption>'
    if not values:
        return f'<figure class="chart">{head}<p class="none">nothing recorded yet</p></figure>'
    log = min(values) > 0 and max(values) > 100 * min(values) and not linear
    marks = log_ticks(min(values), max(values)) if log else ticks(min(values), max(values))
    marks = [mark for mark in marks if top is None or mark <= top] or marks
    if min(values) >= 0 and not log:
        marks = [mark for mark in marks if mark >= 0]
    if len(marks) < 2:
        marks = [marks[0] - 1, marks[0]]
    x_marks = ticks(0, last_x)
    x = Scale([0, max(last_x, 1e-9)], LEFT, WIDTH - RIGHT)
    y = Scale(marks, HEIGHT - BOTTOM, TOP, log)
    body = [axes(x, y, [mark for mark in x_marks if mark <= last_x * 1.0001], x_label, unit)]
    body += [curve(s, x, y) for s in series]
    return (f'<figure class="chart">{head}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
            f'aria-label="{escape(title)}: {escape(describe(series, unit, digits, x_label))}" '
            f"data-chart='{escape(hover_data(series, x_label, unit, last_x), quote=True)}'>"
            f'{"".join(body)}</svg></figure>')


def legend(series, unit, digits):
    items = []
    for s in series:
        sample = f'<path class="line s{s.colour}" d="M0 7H24"{dash(s)}/>' + (mark(s, 12, 7) if s.marker >= 0 else '')
        items.append(f'<li><svg class="key" viewBox="0 0 24 14" aria-hidden="true">{sample}</svg>{escape(s.label)} '
                     f'<b>{number(s.last, digits)}{unit if math.isfinite(s.last) else ""}</b></li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def axes(x, y, x_marks, x_label, unit):
    parts = []
    for value, text in zip(y.marks, [number(mark) for mark in y.marks] if y.log else tick_texts(y.marks)):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value)}H{WIDTH - RIGHT}"/>'
                     f'<text class="tick" x="{LEFT - 7}" y="{y(value) + 4}" text-anchor="end">{text}{unit}</text>')
    for value in x_marks:
        parts.append(f'<path class="grid short" d="M{x(value)} {HEIGHT - BOTTOM}v4"/>'
                     f'<text class="tick" x="{x(value)}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
                 f'<text class="tick name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
                 f'{escape(x_label)}</text>')
    return ''.join(parts)


def curve(s, x, y):
    """The pieces of a series between values that are not finite, its markers, and a cross below each such value."""
    pieces, lost = [[]], []
    for px, py in s.points:
        if math.isfinite(py):
            pieces[-1].append((x(px), y(py)))
        else:
            lost.append(x(px))
            pieces.append([])
    outline = [(x(a), y(high)) for a, _, high in s.band] + [(x(a), y(low)) for a, low, _ in reversed(s.band)]
    parts = [f'<polygon class="band s{s.colour}" points="{" ".join(f"{a},{b}" for a, b in outline)}"/>'] if outline else []
    parts += [f'<polyline class="line s{s.colour}" points="{" ".join(f"{a},{b}" for a, b in piece)}"{dash(s)}/>'
             for piece in pieces if len(piece) > 1]
    marked = s.marker >= 0 and len(s.points) <= MARKED
    parts += [mark(s, a, b) for piece in pieces for a, b in piece if marked or len(piece) == 1]
    parts += [f'<path class="lost s{s.colour}" d="M{a - 4} {HEIGHT - BOTTOM - 8}l8 8m0 -8l-8 8"/>' for a in lost]
    return ''.join(parts)


def dash(s):
    pattern = DASHES[s.dash % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ''


def mark(s, a, b):
    return f'<path class="mark s{s.colour}" d="{MARKERS[s.marker % len(MARKERS)].format(x=a, y=b)}"/>'


def describe(series, unit, digits, x_label):
    """The chart in words."""
    words = []
    for s in series:
        values = [y for _, y in s.points if math.isfinite(y)]
        spread = f'from {number(min(values), digits)} to {number(max(values), digits)}{unit}' if values else 'none finite'
        words.append(f'{s.label}, {len(s.points)} points, {spread}, last {number(s.last, digits)} '
                     f'at {x_label} {number(s.points[-1][0])}')
    return '; '.join(words)


def hover_data(series, x_label, unit, last_x):
    points = [[[round(a, 4), float(f'{b:.6g}') if math.isfinite(b) else None] for a, b in s.points] for s in series]
    return json.dumps({'x': x_label, 'unit': unit, 'last': last_x, 'plot': [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
                       'series': [[s.label, s.colour, p] for s, p in zip(series, points)]}, separators=(',', ':'))
