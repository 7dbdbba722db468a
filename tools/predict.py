"""What a model sees in pictures: the likeliest classes of each, on the console, as JSON or CSV, or as a page to look at.

PICTURE is an image file, a folder (with its subfolders) or a list file (.txt, lines 'relative/path' or 'relative/path label',
relative to the folder of the list). The pixels are those of an evaluation: the centre crop of the resized picture.

  python tools/predict.py -cfg configs/halonet_26t_256.yaml -pretrained halonet_26t_256.pdparams dog.jpg holidays/
  python tools/predict.py -pretrained demo/run/final.pdparams demo/digits/val_list.txt -csv demo/digits.csv -html demo/digits.html
  python tools/predict.py -pretrained demo/run/final.pdparams demo/digits/val/7 -json - -quiet | python -m json.tool

Exit status: 0, or 1 if a picture could not be read (it is named; the others are done), or 2 for a mistake in the command.
After Ctrl-C it is 130, and the files say what is known so far.
"""
import csv
import io
import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system.console import visible
from tools import (
    cli,
    finding,
)

from data import list_file

LINES = "lines 'relative/path' or 'relative/path label'"


@dataclass
class Picture:
    """A picture and what became of it: the `top` classes as (label, probability), likeliest first, or an `error`."""
    path: str
    label: Optional[int] = None                     # what the list file says it shows
    error: str = ''
    top: list = field(default_factory=list)
    pixels: Any = None                              # uint8 (S, S, 3): what the network saw; kept for the page only


def find_pictures(words):
    """The Pictures that files, folders and list files name, in their order.

    Raises ValueError for a folder without pictures and for a list that names none. A missing file is a Picture with an error.
    """
    pictures = []
    for word in words:
        if os.path.isdir(word):
            found = finding.find_images(word)
            if not found.images:
                raise ValueError(f'{word}: no pictures in this folder{found.explain(", left out: ")}')
            pictures += [Picture(os.path.join(word, name)) for name in found.images]
        elif word.lower().endswith('.txt'):
            pictures += read_list(word)
        else:
            pictures.append(Picture(word))
    return pictures


def read_list(path):
    """The Pictures in a list file; a last word that is a whole number is a label, unless the line as a whole names a file."""
    pictures, folder = [], os.path.dirname(path)
    for line in list_file.read_lines(path, LINES):
        name, *label = line.rsplit(None, 1)
        whole = os.path.join(folder, list_file.file_name(line, folder))
        if label and label[0].isdecimal() and not os.path.exists(whole):
            pictures.append(Picture(os.path.join(folder, list_file.file_name(name, folder)), int(label[0])))
        else:
            pictures.append(Picture(whole))
    if not pictures:
        raise ValueError(f"{path}: the list is empty; expected {LINES}")
    return pictures


def read(picture, data):
    """Fill in the pixels of a Picture by the options `data`, config.DATA, or its error. Any number of threads may do so."""
    import datasets
    from data import image_files
    try:
        image = image_files.read(picture.path, data.BACKGROUND, data.MAX_PIXELS)
        picture.pixels = datasets.eval_pixels(image, data.IMAGE_SIZE, data.CROP_PCT)
    except Exception as error:                      # Pillow may raise nearly anything for a damaged file
        picture.error = image_files.reason(error)
    return picture


def predict(model, config, pictures, *, batch_size, topk, keep=0):
    """Yield the Pictures in their order, each with its `topk` classes or its error; the first `keep` keep their pixels."""
    import numpy as np
    import paddle

    import datasets
    prepare = partial(read, data=config.DATA)
    pictures, kept = iter(pictures), 0
    with ThreadPoolExecutor() as pool, paddle.no_grad():
        coming = [pool.submit(prepare, picture) for picture in itertools.islice(pictures, batch_size)]
        while coming:
            batch = [future.result() for future in coming]
            coming = [pool.submit(prepare, picture) for picture in itertools.islice(pictures, batch_size)]  # read meanwhile
            good = [picture for picture in batch if not picture.error]
            if good:
                images = paddle.to_tensor(np.stack([picture.pixels.transpose(2, 0, 1) for picture in good]))
                logits = model(datasets.normalise(images, config.DATA.MEAN, config.DATA.STD))
                values, labels = paddle.nn.functional.softmax(logits.astype('float32'), axis=-1).topk(topk, axis=-1)
                for picture, *top in zip(good, labels.tolist(), values.tolist()):
                    picture.top = list(zip(*top))
            for picture in batch:
                kept += 1
                picture.pixels = picture.pixels if kept <= keep else None
                yield picture


# ---- what is written

def as_dict(picture, names):
    """A Picture as it stands in the JSON."""
    result = {'picture': picture.path}
    if picture.label is not None:
        result['label'] = picture.label
    if picture.error:
        return {**result, 'error': picture.error}
    return {**result, 'top': [{'label': label, 'name': names[label], 'probability': round(p, 6)} for label, p in picture.top]}


def as_json(pictures, names, facts):
    content = {**facts, 'pictures': [as_dict(picture, names) for picture in pictures]}
    return json.dumps(content, indent=1, ensure_ascii=False) + '\n'


def as_csv(pictures, names):
    """Write a line per picture and rank; a picture that could not be read has one line, with its error.

    An apostrophe precedes what a spreadsheet would take for a formula.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['picture', 'true_label', 'rank', 'label', 'name', 'probability', 'error'])
    for picture in pictures:
        true = '' if picture.label is None else picture.label
        if picture.error:
            writer.writerow([plain_cell(picture.path), true, '', '', '', '', plain_cell(picture.error)])
        for rank, (label, p) in enumerate(picture.top, 1):
            writer.writerow([plain_cell(picture.path), true, rank, label, plain_cell(names[label]), f'{p:.6f}', ''])
    return text.getvalue()


def plain_cell(text: str) -> str:
    """Return a cell of a table, after an apostrophe if it begins as a formula does."""
    return f"'{text}" if text.startswith(('=', '+', '-', '@', '\t', '\r')) else text


def as_text(picture, names):
    """Format a Picture as lines for the console."""
    path = visible(picture.path.replace('\n', '\\n'))
    if picture.error:
        return f'{path}: cannot be read: {visible(picture.error)}\n'
    names = [visible(name) for name in names]
    head = path + ('' if picture.label is None else f'  (a {names[picture.label]})')
    return '\n'.join([head, *(f'  {100 * p:6.2f} %  {names[label]}' for label, p in picture.top)]) + '\n'


def summary(pictures, seconds, device):
    """The last line: how many, how fast, and how many of those with a label are right."""
    good = [picture for picture in pictures if not picture.error]
    line = f'{len(good)} pictures in {seconds:.2f} s, {len(good) / seconds:.1f} images/s on {device}'
    if len(good) < len(pictures):
        line += f'; {len(pictures) - len(good)} cannot be read'
    labelled = [picture for picture in good if picture.label is not None]
    if labelled:
        right = sum(picture.label == picture.top[0][0] for picture in labelled)
        line += f'; {right} of {len(labelled)} labels are right ({100 * right / len(labelled):.2f} %)'
    return line


def parser():
    parser = cli.Parser(__doc__)
    parser.add_argument('pictures', metavar='PICTURE|FOLDER|LIST', nargs='+', help='what to look at')
    parser.add_model()
    parser.add('topk', 'classes to name for each picture', type=int, default=5, metavar='N')
    parser.add('batch_size', 'pictures per forward pass', type=int, default=32, metavar='N')
    parser.add('json', 'write everything as JSON; - is the console', metavar='FILE')
    parser.add('csv', 'write a table, one line per picture and class; - is the console', metavar='FILE')
    parser.add('html', 'write a page with the pictures and their bars, in one file', metavar='FILE')
    parser.add('html_most', 'pictures on that page at most', type=int, default=500, metavar='N')
    parser.add('quiet', 'no text on the console but JSON, CSV and errors', action='store_true')
    return parser


def check_labels(pictures, names):
    for picture in pictures:
        if picture.label is not None and picture.label >= len(names):
            raise ValueError(f'{picture.path}: label {picture.label} is not in 0..{len(names) - 1}, the classes of the model')


def main(args):
    if min(args.topk, args.batch_size, args.html_most) < 1:
        raise ValueError(f'-topk {args.topk} -batch_size {args.batch_size} -html_most {args.html_most}: each must be at least 1')
    cli.check_outputs(args.json, args.csv, args.html)
    config = cli.config_of(args)
    pictures = find_pictures(args.pictures)
    names = cli.class_names_or_numbers(config, args.classes)
    check_labels(pictures, names)
    model, device = cli.load_model(config)
    start, done = time.perf_counter(), []
    results = predict(model, config, pictures, batch_size=args.batch_size, topk=min(args.topk, len(names)),
                      keep=args.html_most if args.html else 0)
    status = 0
    try:
        for picture in cli.progress(results, len(pictures), 'predicting') if args.quiet else results:
            done.append(picture)
            if picture.error or not args.quiet:
                print(as_text(picture, names), end='', file=sys.stderr if picture.error else sys.stdout)
    except KeyboardInterrupt:
        if not done:
            raise
        status = cli.INTERRUPTED
        print(f'\ninterrupted: what is written is about {len(done)} of {len(pictures)} pictures', file=sys.stderr)
    line = summary(done, time.perf_counter() - start, device)
    facts = {'model': config.MODEL.NAME, 'weights': config.MODEL.PRETRAINED, 'image_size': config.DATA.IMAGE_SIZE,
             'crop_pct': config.DATA.CROP_PCT}
    if not args.quiet:
        print(line)
    if args.json:
        cli.write_text(args.json, as_json(done, names, facts))
    if args.csv:
        cli.write_text(args.csv, as_csv(done, names))
    if args.html:
        from reporting import predictions
        cli.write_text(args.html, predictions.page(done[:args.html_most], names, facts, line, len(done)))
    return status or int(any(picture.error for picture in done))


if __name__ == '__main__':
    parser().run(main)
