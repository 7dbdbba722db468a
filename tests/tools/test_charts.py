"""Check the charts of the pages: gaps, bands, ticks and numbers."""
import math
import re

import numpy as np
import pytest

from reporting import charts


def test_values_that_are_not_finite_are_gaps_with_a_mark():
    nan = math.nan
    points = [(1, 3.0), (2, 2.0), (3, nan), (4, 1.0), (5, nan)]
    text = charts.line_chart('Loss', [charts.Series('val', points)])
    assert len(re.findall('<polyline', text)) == 1 and text.count('class="mark s0"') == 1 + 3
    assert text.count('class="lost') == 2
    assert '<b>not finite</b>' in text
    assert 'nothing recorded yet' in charts.line_chart('Loss', [charts.Series('val', [(1, nan)])])


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


@pytest.mark.parametrize('low, high', [
    (0, 1), (0.12, 2.3), (17, 99.4), (1e-6, 2e-3), (3, 3), (0, 0), (-2, 5), (99.9, 100), (0, 3e4)])
def test_ticks_are_round_and_span_the_values(low, high):
    marks = charts.ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and 3 <= len(marks) <= 9
    steps = np.diff(marks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert f'{steps[0]:.0e}'[0] in '125' and len({*charts.tick_texts(marks)}) == len(marks)
    decimals = {len(text.partition('.')[2]) for text in charts.tick_texts(marks) if 'e' not in text}
    assert len(decimals) <= 1


@pytest.mark.parametrize('value, text', [
    (0.0012, '0.0012'), (98.6111, '98.61'), (1437, '1,437'), (5e-6, '5e−6'), (0, '0'), (-0.5, '−0.5'),
    (math.nan, 'not finite'), (None, '–'), (1.2345e7, '1.23e7')])
def test_numbers(value, text):
    assert charts.number(value) == text
