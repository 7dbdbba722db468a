"""Check the pages of runs in a browser: layout, contrast, and the values at the pointer."""
import re
import shutil

import pytest
from many_classes import make_run
from PIL import Image
from runs import records

from reporting.report import write

LABELS = {'train': 'train', 'val': 'val', 'val_ema': 'EMA'}


@pytest.fixture(scope='module')
def all_pages(trained, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('pages')
    names = [f'a rather long name of class {label}' if label % 2 else f'n{label:08d}' for label in range(40)]
    for kind, classes in (('many', 40), ('some', 24)):
        (folder / kind).mkdir()
        make_run(folder / kind, classes, 400, names)
    write([str(trained), str(folder / 'many'), str(folder / 'some')], folder / 'compare.html')
    return {'run': trained / 'report.html', 'compare': folder / 'compare.html',
            'many': folder / 'many' / 'report.html', 'some': folder / 'some' / 'report.html'}


OVERLAPS = '''[...document.querySelectorAll('svg[role=img]')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
        p.left < q.right && q.left < p.right && p.top + 2 < q.bottom && q.top + 2 < p.bottom
    ).map(([b]) => a + ' / ' + b));
})'''
PARTS = 'figure text, figure polyline, .tiles *, .legend *, .cards *'
OUTSIDE = f'[...document.querySelectorAll("{PARTS}")]' + '''.filter(e => {
    const box = e.getBoundingClientRect();
    const around = e.closest('figure, .tiles, .cards li').getBoundingClientRect();
    return box.left < around.left - 1 || box.right > around.right + 1 || box.bottom > around.bottom + 1;
}).map(e => e.outerHTML.slice(0, 80))'''
FAINT = '''(() => {
    const parse = c => c.match(/[\\d.]+/g).map(Number);
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const light = c => c.slice(0, 3).map(v => linear(v / 255))
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const over = (top, under) => {
        const a = top[3] ?? 1;
        return top.slice(0, 3).map((v, i) => v * a + under[i] * (1 - a));
    };
    const ground = e => {
        if (!e) return [255, 255, 255];
        const c = parse(getComputedStyle(e).backgroundColor);
        return (c[3] ?? 1) === 1 ? c : over(c, ground(e.parentElement));
    };
    const isText = n => n.nodeType === 3 && n.textContent.trim();
    const speaks = e => e.tagName !== 'SCRIPT' && [...e.childNodes].some(isText);
    return [...document.querySelectorAll('body *')].filter(speaks).map(e => {
        const style = getComputedStyle(e), ink = parse(e.tagName === 'text' ? style.fill : style.color);
        const [a, b] = [light(over(ink, ground(e))), light(ground(e))].sort((p, q) => q - p);
        return [(a + .05) / (b + .05), e.className + ' ' + e.textContent.slice(0, 30)];
    }).filter(([ratio]) => ratio < 4.5);
})()'''
DRAWN = '''[...document.querySelectorAll('svg[role=img]')].map(svg => {
    const width = svg.getBoundingClientRect().width;
    const text = parseFloat(getComputedStyle(svg.querySelector('text')).fontSize) * width / 400;
    const lines = [...svg.querySelectorAll('polyline')].map(line => line.getBoundingClientRect().width);
    return [width, text, Math.max(...lines)];
})'''


@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
@pytest.mark.parametrize('width', [375, 1280])
@pytest.mark.parametrize('name', ['run', 'compare', 'many', 'some'])
def test_pages_in_a_browser(chromium, all_pages, name, width, dark):
    chromium.open(all_pages[name], width=width, dark=dark)
    assert chromium.problems() == []
    assert chromium.evaluate('document.documentElement.scrollWidth') == width       # no sideways scrolling
    drawn = chromium.evaluate(DRAWN)
    assert len(drawn) == (6 if name == 'compare' else 7)
    for chart, text, line in drawn:
        assert chart > 0.8 * width / (1 if width < 600 else 3.6) and text > 10 and line > 0.25 * chart
    assert chromium.evaluate(OVERLAPS) == [] and chromium.evaluate(OUTSIDE) == []
    assert chromium.evaluate(FAINT) == []                                                  # WCAG's 4.5 : 1
    background = chromium.evaluate('getComputedStyle(document.body).backgroundColor')
    assert (sum(map(int, re.findall(r'\d+', background))) < 384) == dark


@pytest.mark.parametrize('width', [375, 800, 1280])
@pytest.mark.parametrize('name', ['run', 'some'])
def test_tiles_fill_each_row(chromium, all_pages, name, width):
    chromium.open(all_pages[name], width=width)
    right, ends = chromium.evaluate('''(() => {
        const all = document.querySelector('.tiles'), rows = {};
        for (const tile of all.children) {
            const box = tile.getBoundingClientRect();
            rows[box.top] = box.right;
        }
        return [all.getBoundingClientRect().right, Object.values(rows)];
    })()''')
    assert all(abs(end - right) < 2 for end in ends), (right, ends)


LINES = '''[...document.querySelectorAll(ROWS)].map(e => [e.textContent.trim(), e.scrollWidth - e.clientWidth,
    e.scrollHeight - e.clientHeight, e.getBoundingClientRect().width])'''


@pytest.mark.parametrize('width', [375, 1280])
@pytest.mark.parametrize('rows', ['.confusion tbody th span', '.bars .name'])
def test_class_names_can_be_read(chromium, trained, all_pages, tmp_path, width, rows):
    """Long names break into lines. Before, the rows of the confusions on a telephone read '0 S...'."""
    shutil.copytree(trained, tmp_path / 'run')
    names = ['Sphynx cat', 'Staffordshire bullterrier', 'F\u00f6hre',
             'a very long name of a class that goes on and on and on']
    text = ''.join(f'{name}\n' for name in names)
    (tmp_path / 'run' / 'class_names.txt').write_text(text, encoding='utf-8')
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
def test_wide_table_is_shaded_where_it_can_be_scrolled(chromium, all_pages, tmp_path, dark):
    """A shade at its side shows that the table goes on there."""
    chromium.open(all_pages['compare'], width=375, dark=dark)
    for scrolled, shaded in ((0, [False, True]), (100, [True, True]), (9999, [True, False])):
        left, right, y = chromium.evaluate(f'''(e => {{
            e.scrollLeft = {scrolled};
            const box = e.getBoundingClientRect();
            return [box.left, box.right, box.top + 4];
        }})(document.querySelector('.sheet'))''')
        chromium.screenshot(tmp_path / 'page.png')
        with Image.open(tmp_path / 'page.png') as image:
            ends = [sum(image.convert('RGB').getpixel((int(x), int(y)))) for x in (left + 1, right - 2)]
        card = sum((23, 27, 32)) if dark else 3 * 255
        assert [abs(end - card) > 60 for end in ends] == shaded


def test_pointer_and_arrow_keys_show_values(chromium, trained):
    chromium.open(trained / 'report.html')
    chart = 'document.querySelectorAll("svg[role=img]")[1]'
    chromium.evaluate(f'{chart}.scrollIntoView()')
    box = f'(b => [b.left, b.top, b.width, b.height])({chart}.getBoundingClientRect())'
    left, top, width, height = chromium.evaluate(box)
    chromium.send('Input.dispatchMouseEvent', type='mouseMoved', x=left + 0.97 * width, y=top + height / 2)
    shown = 'document.querySelectorAll(".tip")[1].innerText'
    last = {split: records(trained, split)[-1]['loss'] for split in LABELS}
    text = chromium.evaluate(shown)
    assert text.splitlines()[0] == 'epoch 3'
    for line, split in zip(text.splitlines()[1:], LABELS):
        label, value = line.split(' ')
        assert label == LABELS[split] and float(value) == pytest.approx(last[split], rel=1e-3)
    assert chromium.evaluate('document.documentElement.scrollWidth') == 1280
    chromium.evaluate(f'{chart}.focus()')
    for key, epoch in (('ArrowLeft', 'epoch 2.5'), ('ArrowLeft', 'epoch 2'), ('ArrowRight', 'epoch 2.5')):
        chromium.send('Input.dispatchKeyEvent', type='keyDown', key=key)
        assert chromium.evaluate(shown).splitlines()[0] == epoch
    chromium.send('Input.dispatchKeyEvent', type='keyDown', key='Escape')
    assert chromium.evaluate('document.querySelectorAll(".tip")[1].hidden')
