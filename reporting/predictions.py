"""The page of tools/predict.py: one HTML file that needs nothing else, for light and dark, for telephones and desks."""
import base64
import io
import os
from collections import Counter
from html import escape
from typing import Any

from PIL import Image

SMALL = 64                                          # pixels a side, up to which each one is to be seen
STYLE = '''
:root { color-scheme: light dark; --back: #f4f5f7; --card: #fff; --text: #1a1d21; --soft: #626a75; --line: #e1e4e8;
        --track: #e4e7eb; --bar: #2f6fdb; --right: #1a7f4b; --wrong: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --back: #101317; --card: #1a1e24; --text: #e8eaed; --soft: #9aa3ae; --line: #2b313a; --track: #272d35;
          --bar: #6ea2f7; --right: #4cc38a; --wrong: #f0883e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 1.5rem 1rem 3rem; background: var(--back); color: var(--text);
       font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; } p { margin: .15rem 0; color: var(--soft); overflow-wrap: anywhere; }
main { display: grid; gap: 1rem; margin-top: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; background: var(--track); }
img.small { image-rendering: pixelated; }
figcaption { padding: .7rem .85rem .85rem; }
.name { font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; margin-bottom: .45rem; }
.true { font-weight: 600; } .right { color: var(--right); } .wrong { color: var(--wrong); }
.row { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: .6rem; margin-top: .3rem; }
.row span { flex: 1; overflow-wrap: anywhere; }
.row b { font-variant-numeric: tabular-nums; font-weight: inherit; } .name + .row { font-weight: 650; }
.row i { flex: 0 0 100%; height: 5px; border-radius: 3px; overflow: hidden; background: var(--track); }
.row i::after { content: ""; display: block; height: 100%; width: var(--p); border-radius: 3px; background: var(--bar); }
@media (max-width: 640px) {
  figure { display: grid; grid-template-columns: 38% minmax(0, 1fr); align-items: start; }
  figcaption { padding: .5rem .7rem .7rem; }
  .broken { grid-column: 1 / -1; } }
.broken { padding: 1.2rem .85rem; } .broken b { color: var(--wrong); }
form { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; margin-top: 1rem; } form[hidden] { display: none; }
select { font: inherit; color: inherit; padding: .25rem .4rem; border: 1px solid var(--line); border-radius: 6px;
         background: var(--card); }
'''
KINDS = {'wrong': 'wrong', 'right': 'right', 'unlabelled': 'without a label', 'broken': 'cannot be read'}
SCRIPT = '''
const main = document.querySelector('main'), form = document.querySelector('form'), cards = [...main.children];
const signs = {listed: 0, surest: -1, unsurest: 1};
function arrange() {
  const sign = signs[form.order.value], kind = form.kind ? form.kind.value : 'all';
  const ordered = [...cards].sort((a, b) => sign * (a.dataset.p - b.dataset.p));
  main.replaceChildren(...ordered.filter(card => kind === 'all' || kind === card.dataset.kind));
}
form.hidden = false;
form.addEventListener('input', arrange);
arrange();
'''


def data_uri(pixels):
    """uint8 (S, S, 3) as the src of an <img>: PNG where it is small, else JPEG."""
    small = len(pixels) <= SMALL
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG' if small else 'JPEG', quality=88)
    return f'data:image/{"png" if small else "jpeg"};base64,{base64.b64encode(file.getvalue()).decode()}'


def kind_of(picture: Any) -> str:
    """Return the key in KINDS of a Picture of tools/predict.py."""
    if picture.error:
        return 'broken'
    if picture.label is None:
        return 'unlabelled'
    return 'right' if picture.label == picture.top[0][0] else 'wrong'


def shown_paths(pictures: list) -> tuple[str, list[str]]:
    """Return the name of the folder that all Pictures lie in, and their paths inside of it."""
    paths = [os.path.abspath(picture.path) for picture in pictures]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    return os.path.basename(folder), [os.path.relpath(path, folder) for path in paths]


def controls(pictures: list) -> str:
    """Return the form that filters and sorts the pictures; it shows itself where scripts run."""
    kinds = Counter(map(kind_of, pictures))
    options = [f'<option value="all">all {len(pictures)}</option>']
    options += [f'<option value="{kind}">{text}: {kinds[kind]}</option>' for kind, text in KINDS.items() if kinds[kind]]
    show = f'<label>Show <select name="kind">{"".join(options)}</select></label> ' if len(kinds) > 1 else ''
    orders = {'listed': 'as listed', 'surest': 'most confident first', 'unsurest': 'least confident first'}
    options = [f'<option value="{order}">{text}</option>' for order, text in orders.items()]
    return f'<form hidden>{show}<label>Order <select name="order">{"".join(options)}</select></label></form>'


def card(picture: Any, path: str, names: list[str]) -> str:
    """Return a Picture of tools/predict.py, shown as `path`, as a <figure>."""
    data = f'data-kind="{kind_of(picture)}"'
    if picture.error:
        return (f'<figure {data} data-p="0"><div class="broken"><b>cannot be read</b><p>{escape(path)}</p>'
                f'<p>{escape(picture.error)}</p></div></figure>')
    true, best = '', picture.top[0][0]
    if picture.label is not None:
        right = picture.label == best
        verdict = '✓ right' if right else f'✗ wrong: it is {escape(names[picture.label])}'
        true = f'<br><span class="true {"right" if right else "wrong"}">{verdict}</span>'
    rows = ''.join(f'<div class="row"><span title="{escape(names[label])}">{escape(names[label])}</span><b>{100 * p:.1f} %</b>'
                   f'<i style="--p:{100 * p:.2f}%"></i></div>' for label, p in picture.top)
    small = ' class="small"' if len(picture.pixels) <= SMALL else ''
    image = f'<img{small} alt="{escape(names[best])}" src="{data_uri(picture.pixels)}">'
    return (f'<figure {data} data-p="{picture.top[0][1]:.6f}">{image}<figcaption>'
            f'<div class="name">{escape(path)}{true}</div>{rows}</figcaption></figure>')


def page(pictures: list, names: list[str], facts: dict[str, Any], summary: str, count: int) -> str:
    """Return the page for the first pictures of `count`; `facts` are those of the JSON, `summary` is the last line.

    Paths are shown without the folders that all have in common: the page may be sent to somebody.
    """
    folder, paths = shown_paths(pictures)
    title = f'{facts["model"]}: what it sees in {folder}'
    more = f' The first {len(pictures)} of {count} are shown.' if count > len(pictures) else ''
    weights = '/'.join(facts['weights'].split('/')[-2:])
    cards = '\n'.join(card(picture, path, names) for picture, path in zip(pictures, paths))
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n'
            f'<p>{escape(summary)}.{more}</p>\n<p>weights {escape(weights)}; pictures as the network saw them, '
            f'{facts["image_size"]} pixels a side</p>\n{controls(pictures)}\n<main>\n{cards}\n</main>\n'
            f'<script>{SCRIPT}</script></body></html>\n')
