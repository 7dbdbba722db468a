"""The table of results: each evaluation appends one CSV line."""
import csv
import io
import os
from collections.abc import Iterable, Mapping
from typing import Any, Optional

from system import files, sizes
import utils

from paddle import nn

from halonet import count_parameters
from training.macs import total_multiply_adds

COLUMNS = ('model', 'weights', 'data', 'image_size', 'crop_pct', 'top1', 'top5', 'loss', 'images',
           'images_per_s', 'parameters_m', 'multiply_adds_g', 'device', 'amp')


def row(known: Mapping[str, Any], model: nn.Layer, weights: str,
        result: Mapping[str, Any]) -> dict[str, Any]:
    """Return {column: value} of an evaluation of the file `weights`.

    known: the columns model, data, image_size, crop_pct, device and amp; image_size is that of the config.
    result: as engine.evaluate returns it. Parameters are in millions, multiply-adds of one image in thousand
    millions.
    """
    return {
        **known,
        'image_size': sizes.as_text(known['image_size']),
        'weights': weights,
        'top1': round(result['acc1'], 3),
        'top5': round(result['acc5'], 3),
        'loss': round(result['loss'], 5),
        'images': result['images'],
        'images_per_s': round(result['images_per_s'], 1),
        'parameters_m': round(count_parameters(model) / 1e6, 3),
        'multiply_adds_g': multiply_adds(model, known['image_size']),
    }


def multiply_adds(model: nn.Layer, image_size: sizes.Size) -> float:
    """Return the multiply-adds for one image, in thousand millions."""
    return round(total_multiply_adds(model, *sizes.sides(image_size)) / 1e9, 3)


def check_table(path: str) -> None:
    """Raise ValueError for a file with other columns. A missing or empty file passes."""
    if not os.path.exists(path):
        return
    if not os.path.isfile(path) and not os.path.isdir(path):         # reading a pipe would wait for ever
        raise ValueError(f'{path}: not a file that lines can be appended to; '
                         'name another file by -results')
    with open(path, encoding='utf-8', newline='') as file:
        _check_heading(path, next(csv.reader(file), None))


def _check_heading(path: str, heading: Optional[list[str]]) -> None:
    if heading is not None and tuple(heading) != COLUMNS:
        raise ValueError(f'{path}: its columns are {", ".join(heading)}, and not those of this version; '
                         'name another file by -results')


def save_result(path: str, values: Mapping[str, Any]) -> None:
    """Append the `row` of an evaluation to the CSV file `path`, which several may do at once; rank 0 writes.

    Raises ValueError for a file with other columns, and OSError; then the file is as it was.
    """
    if utils.rank() != 0:
        return
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    line = _line(values[column] for column in COLUMNS)
    with files.appending(path, is_whole=_is_row) as file:
        file.seek(0)
        heading = file.readline()
        if heading:
            _check_heading(path, next(csv.reader([heading.decode()]), None))
        else:
            line = _line(COLUMNS) + line
        files.write_all(file, line)


def _line(values: Iterable) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerow(values)
    return text.getvalue().encode('utf-8', 'backslashreplace')               # a path may be no text


def _is_row(line: bytes) -> bool:
    """True if a line of the table is complete."""
    fields = next(csv.reader([line.decode(errors='replace')]), ())
    return len(fields) == len(COLUMNS)
