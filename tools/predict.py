"""Predict the classes of pictures: on the console, as JSON or CSV, or as an HTML page with the pictures.

PICTURE is an image file, a folder (with its subfolders) or a list file (.txt) with lines 'relative/path' or
'relative/path label', relative to its folder. The pixels are those of an evaluation: the centre crop of the
resized picture.

  python tools/predict.py -cfg configs/halonet_26t_256.yaml -pretrained halonet_26t_256.pdparams dog.jpg cats/
  python tools/predict.py -pretrained demo/run/final.pdparams demo/digits/val_list.txt -html demo/digits.html
  python tools/predict.py -pretrained demo/run/final.pdparams demo/digits/val/7 -quiet -csv demo/digits.csv

Exit status: 0, or 1 if a picture could not be read (it is named; the others are done), or 2 for a mistake in
the command. After Ctrl-C it is 130, and the files hold the results so far.
"""
import argparse
import csv
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system.console import visible
from tools import cli, finding

from data import image_files
from data.list_file import read_optional_labels

COLUMNS = ('picture', 'true_label', 'rank', 'label', 'name', 'probability', 'error')     # of the CSV
FORMULA = ('=', '+', '-', '@', '\t', '\r')          # first letters that a spreadsheet takes for a formula


@dataclass
class Picture:
    """A picture with its prediction or its error."""
    path: str
    label: Optional[int] = None                     # by the list file
    error: str = ''
    top: list[tuple[int, float]] = field(default_factory=list)      # (label, probability), best first
    pixels: Any = None                              # uint8 (H, W, C), the network's input; kept for the page


def find_pictures(words: list[str]) -> list[Picture]:
    """Return the pictures that files, folders and list files name, in their order, missing files too.

    Raises ValueError for a folder without pictures and for an empty list.
    """
    pictures = []
    for word in words:
        if os.path.isdir(word):
            found = finding.find_images(word)
            if not found.images:
                raise ValueError(f'{word}: no pictures in this folder{found.explain(", left out: ")}')
            pictures += [Picture(os.path.join(word, name)) for name in found.images]
        elif word.lower().endswith('.txt'):
            pictures += [Picture(path, label) for path, label in read_optional_labels(word)]
        else:
            pictures.append(Picture(word))
    return pictures


def check_labels(pictures: list[Picture], count: int) -> None:
    """Raise ValueError for a label that is none of `count` classes."""
    for picture in pictures:
        if picture.label is not None and not 0 <= picture.label < count:
            raise ValueError(f'{picture.path}: label {picture.label} is not in 0..{count - 1}, '
                             'the classes of the model')


def read(picture: Picture, data: Any) -> Picture:
    """Set the pixels of a picture, or its error, by the options `data` (config.DATA). Thread-safe."""
    import datasets
    try:
        image = datasets.choose_read(data.CHANNELS)(picture.path, data.BACKGROUND, data.MAX_PIXELS)
        picture.pixels = datasets.eval_pixels(image, data.IMAGE_SIZE, data.CROP_PCT)
    except Exception as error:                      # Pillow may raise nearly anything for a damaged file
        picture.error = image_files.reason(error)
    return picture


def predict(model: Any, config: Any, pictures: Iterable[Picture], *, batch_size: int, topk: int,
            keep: int = 0) -> Iterator[Picture]:
    """Yield the pictures in their order, with their `topk` classes or their error.

    The first `keep` keep their pixels. While the network runs on a batch, threads read the next one.
    """
    import paddle
    prepare = partial(read, data=config.DATA)
    pictures = iter(pictures)
    kept = 0
    with ThreadPoolExecutor() as pool, paddle.no_grad():
        def start_batch() -> list[Future]:
            return [pool.submit(prepare, picture) for picture in itertools.islice(pictures, batch_size)]
        coming = start_batch()
        while coming:
            batch = [future.result() for future in coming]
            coming = start_batch()
            classify(model, config, [picture for picture in batch if not picture.error], topk)
            for picture in batch:
                kept += 1
                if kept > keep:
                    picture.pixels = None
                yield picture


def classify(model: Any, config: Any, pictures: list[Picture], topk: int) -> None:
    """Set the `topk` most probable classes of pictures that have pixels."""
    import numpy as np
    import paddle

    import datasets
    if not pictures:
        return
    pixels = np.stack([picture.pixels.transpose(2, 0, 1) for picture in pictures])       # (B, C, H, W)
    images = datasets.normalise(paddle.to_tensor(pixels), config.DATA.MEAN, config.DATA.STD)
    probabilities = paddle.nn.functional.softmax(model(images).astype('float32'), axis=-1)
    values, labels = probabilities.topk(topk, axis=-1)
    for picture, top_labels, top_values in zip(pictures, labels.tolist(), values.tolist()):
        picture.top = list(zip(top_labels, top_values))


# ---- output

def as_dict(picture: Picture, names: list[str]) -> dict[str, Any]:
    """Return a picture as it is in the JSON."""
    result: dict[str, Any] = {'picture': picture.path}
    if picture.label is not None:
        result['label'] = picture.label
    if picture.error:
        result['error'] = picture.error
    else:
        result['top'] = [{'label': label, 'name': names[label], 'probability': round(probability, 6)}
                         for label, probability in picture.top]
    return result


def as_json(pictures: list[Picture], names: list[str], facts: dict[str, Any]) -> str:
    content = {**facts, 'pictures': [as_dict(picture, names) for picture in pictures]}
    return json.dumps(content, indent=1, ensure_ascii=False) + '\n'


def as_csv(pictures: list[Picture], names: list[str]) -> str:
    """Format a line per picture and class; a picture that could not be read has one line, with its error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(COLUMNS)
    for picture in pictures:
        path = plain_cell(picture.path)
        true = '' if picture.label is None else picture.label
        if picture.error:
            writer.writerow([path, true, '', '', '', '', plain_cell(picture.error)])
        for rank, (label, probability) in enumerate(picture.top, 1):
            writer.writerow([path, true, rank, label, plain_cell(names[label]), f'{probability:.6f}', ''])
    return text.getvalue()


def plain_cell(text: str) -> str:
    """Return a cell of a table, after an apostrophe if a spreadsheet would take it for a formula."""
    return f"'{text}" if text.startswith(FORMULA) else text


def as_text(picture: Picture, names: list[str]) -> str:
    """Format a picture as lines for the console."""
    head = visible(picture.path.replace('\n', '\\n'))
    if picture.error:
        return f'{head}: cannot be read: {visible(picture.error)}\n'
    if picture.label is not None:
        head += f'  (label: {visible(names[picture.label])})'
    lines = [f'  {100 * probability:6.2f} %  {visible(names[label])}' for label, probability in picture.top]
    return '\n'.join([head, *lines]) + '\n'


def summary(pictures: list[Picture], seconds: float, device: str) -> str:
    """Return the last line: number of pictures, speed, and the accuracy for those with a label."""
    good = labelled = right = 0
    for picture in pictures:
        if not picture.error:
            good += 1
            if picture.label is not None:
                labelled += 1
                right += picture.label == picture.top[0][0]
    line = f'{good} pictures in {seconds:.2f} s, {good / seconds:.1f} images/s on {device}'
    if good < len(pictures):
        line += f'; {len(pictures) - good} cannot be read'
    if labelled:
        line += f'; {right} of {labelled} are correct ({100 * right / labelled:.2f} %)'
    return line


# ---- the command

def parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument('pictures', metavar='PICTURE|FOLDER|LIST', nargs='+', help='the pictures to classify')
    parser.add_model()
    parser.add('topk', 'classes to name for each picture', type=int, default=5, metavar='N')
    parser.add('batch_size', 'pictures per forward pass', type=int, default=32, metavar='N')
    parser.add('json', 'write everything as JSON; - is the console', metavar='FILE')
    parser.add('csv', 'write a table, one line per picture and class; - is the console', metavar='FILE')
    parser.add('html', 'write a page with the pictures and their bars, in one file', metavar='FILE')
    parser.add('html_most', 'pictures on that page at most', type=int, default=500, metavar='N')
    parser.add('quiet', 'no text on the console but JSON, CSV and errors', action='store_true')
    return parser


def main(args: argparse.Namespace) -> int:
    for option in ('topk', 'batch_size', 'html_most'):
        if getattr(args, option) < 1:
            raise ValueError(f'-{option} {getattr(args, option)}: it must be at least 1')
    cli.check_outputs(args.json, args.csv, args.html)
    if args.html:
        from reporting import predictions  # before the work, in case Jinja2 is missing
    config = cli.config_of(args)
    pictures = find_pictures(args.pictures)
    names = cli.class_names_or_numbers(config, args.classes)
    check_labels(pictures, len(names))
    model, device = cli.load_model(config)
    start = time.perf_counter()
    results = predict(model, config, pictures, batch_size=args.batch_size, topk=min(args.topk, len(names)),
                      keep=args.html_most if args.html else 0)
    done, status = collect(results, len(pictures), names, args.quiet)
    line = summary(done, time.perf_counter() - start, device)
    facts = {'model': config.MODEL.NAME, 'weights': config.MODEL.PRETRAINED,
             'image_size': config.DATA.IMAGE_SIZE, 'crop_pct': config.DATA.CROP_PCT}
    if not args.quiet:
        print(line)
    if args.json:
        cli.write_text(args.json, as_json(done, names, facts))
    if args.csv:
        cli.write_text(args.csv, as_csv(done, names))
    if args.html:
        cli.write_text(args.html, predictions.page(done[:args.html_most], names, facts, line, len(done)))
    return status


def collect(results: Iterable[Picture], count: int, names: list[str],
            quiet: bool) -> tuple[list[Picture], int]:
    """Print `count` results and return them with the exit status; after Ctrl-C the results so far."""
    done: list[Picture] = []
    status = 0
    try:
        for picture in cli.progress(results, count, 'predicting') if quiet else results:
            done.append(picture)
            if picture.error:
                status = 1
                print(as_text(picture, names), end='', file=sys.stderr)
            elif not quiet:
                print(as_text(picture, names), end='')
    except KeyboardInterrupt:
        if not done:
            raise
        status = cli.INTERRUPTED
        print(f'\ninterrupted: the files will hold {len(done)} of {count} pictures', file=sys.stderr)
    return done, status


if __name__ == '__main__':
    parser().run(main)
