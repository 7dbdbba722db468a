"""Check visualize: the picture shows the attention weights of the model."""
import re

from tools import fonts, visualize
from tools.attention_maps import attention_maps

import numpy as np
import paddle
import pytest
from PIL import Image
from tool_runs import call

import datasets


def test_the_picture_shows_the_weights(untrained, tmp_path):
    folder, model, config = untrained
    path = folder / 'data' / 'val' / '4.png'
    words = ['-query', 13, 3, '-side', 240, '-npz', tmp_path / 'a.npz', '-output', tmp_path / 'a.png']
    assert call(visualize, path, '-pretrained', untrained.weights, *words) == 0
    with Image.open(path) as file:
        pixels = datasets.eval_pixels(file, 16, 0.8)
    images = paddle.to_tensor(pixels.transpose(2, 0, 1)[None])
    images = datasets.normalise(images, config.DATA.MEAN, config.DATA.STD)
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
    at = ((np.arange(6) + 0.6) * cell).astype(int)
    left_at = ((np.arange(6) + 4.6) * cell).astype(int)
    bright = panel[at][:, left_at].sum(-1)          # (6, 6)
    outer = np.zeros((6, 6), bool)                  # the margin, where colours have no picture below them
    outer[0] = outer[:, 5] = True
    order = np.argsort(weights[outer])
    assert (np.diff(bright[outer][order]) >= -3).all() and bright[outer].std() > 0
    left, top, *_ = attention.window_box(*query)
    assert visualize.outside(attention, weights, query) == pytest.approx(weights[outer].sum(), abs=1e-6)
    with Image.open(tmp_path / 'a.png') as image:
        assert image.width == 14 + 3 * (240 + 14)   # the geometry and two heads


def test_layers_and_heads_are_chosen(untrained, tmp_path, capsys):
    picture = untrained.data / 'val' / '4.png'
    words = ['-pretrained', untrained.weights, '-output', tmp_path / 'a.png']
    assert call(visualize, picture, picture, *words, '-layer', 'stages.1.0', '-head', 1, 'mean') == 0
    assert '2 rows' in capsys.readouterr().out
    for extra, message in [(['-layer', '7'], 'the layers with halo attention are stages.1.0'),
                           (['-head', '2'], 'mean, or 0 to 1'),
                           (['-output', 'a.xyz'], '-output a.xyz: its ending selects the kind'),
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


@pytest.mark.parametrize('text', [
    'dog', 'F\u00f6hre', '\u98df\u3079\u7269', '\u0416 \u03b1 \u00e9 \u98df \U0001f600 \u0928', 'a\x1b[31mb'])
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


def test_texts_fit_the_picture(untrained, tmp_path):
    """The legend was cut off beside a single head, and so would be a long name of a class."""
    words = [untrained.data / 'val' / '4.png', '-pretrained', untrained.weights, '-head', 'mean', '-output']
    long = 'a name of a class that is longer than the panels are wide, by far and beyond all doubt\n'
    (tmp_path / 'long.txt').write_text(4 * long)
    assert call(visualize, *words, tmp_path / 'a.png') == 0
    assert call(visualize, *words, tmp_path / 'b.png', '-classes', tmp_path / 'long.txt') == 0
    for name in 'ab':
        with Image.open(tmp_path / f'{name}.png') as image:
            pixels = np.asarray(image.convert('L'))
            assert pixels[:, -8:].min() > 240       # only paper at the right border
            assert image.width > 14 + 2 * (220 + 14)
