"""Write a model.onnx in float16 or int8 in place of the float32 one, and prove what it costs and gains."""
from __future__ import annotations

import argparse
import os
import shutil
import statistics
from typing import Any, Callable

from system.console import quiet
from tools import cli, runtimes

import numpy as np

PRECISIONS = ('float32', 'float16', 'int8')
FLOAT16_LIMIT = 0.02                                # of the largest result, for its difference
CALIBRATION, FEWEST = 128, 32                       # images for the ranges of activations
DROP = 0.3                                          # default of -drop
RANKED_ON = 8                                       # images on which layers are compared
BATCH = 16
ROUNDS = 7                                          # of timing
Prepare = Callable[[np.ndarray], np.ndarray]        # pixels uint8 (B, C, H, W) -> the input of the file


def check(args: argparse.Namespace, config: Any) -> None:
    """Raise ValueError for options of tools/export.py that do not go together."""
    if args.precision != 'int8':
        for name in ('calibrate', 'drop'):
            if getattr(args, name) is not None:
                raise ValueError(f'-{name} is for -precision int8')
        return
    if not args.calibrate:
        raise ValueError('-precision int8 needs -calibrate DATA, a data folder with its lists')
    if args.drop is not None and not args.drop >= 0:
        raise ValueError(f'-drop {args.drop}: it must be 0 or more')
    if not config.MODEL.NUM_CLASSES:
        raise ValueError('-precision int8: a model without a classifier has no accuracy to compare')


def lower(path: str, folder: str, config: Any, args: argparse.Namespace,
          images: np.ndarray) -> dict[str, Any]:
    """Replace the ONNX file `path` by one of args.precision; return the facts for meta.json and the card.

    folder: for temporary files. images: inputs on which float16 and the speed are compared.
    Raises ValueError where the lower precision costs too much, and for calibration data that do not do.
    """
    before = os.path.join(folder, 'float32.onnx')
    shutil.move(path, before)
    if args.precision == 'int8':
        facts = _to_int8(before, path, folder, config, args)
    else:
        facts = _to_float16(before, path, images)
    facts.update(_speeds({'float32': before, args.precision: path}, images))
    return {'precision': args.precision, 'beside_float32': facts}


# ---- float16

def _to_float16(before: str, path: str, images: np.ndarray) -> dict[str, Any]:
    import onnx
    with quiet():
        from onnxruntime.transformers.float16 import convert_float_to_float16
        onnx.save(convert_float_to_float16(onnx.load(before), keep_io_types=True), path)
        results = [runtimes.onnxruntime(file)(images) for file in (before, path)]
    expected, found = (result[0] if isinstance(result, tuple) else result for result in results)
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    print(f'float16: differs from float32 by {difference:.1e} of the largest result')
    if not difference <= FLOAT16_LIMIT:             # NaN fails too
        raise ValueError(f'float16: the limit is {FLOAT16_LIMIT}; nothing written')
    return {'difference_from_float32': difference}


# ---- int8

def _to_int8(before: str, path: str, folder: str, config: Any, args: argparse.Namespace) -> dict[str, Any]:
    with quiet():
        from tools.quantization import Quantizer
    import datasets
    calibration, listed = _calibration_images(config)
    loader = datasets.build_eval(config)

    def prepare(pixels: np.ndarray) -> np.ndarray:
        return _prepare(pixels, args.input, config.DATA)

    print(f'calibrating on {len(calibration)} images of {listed}', flush=True)
    quantizer = Quantizer(before, folder)
    drawn = cli.progress(calibration, len(calibration), 'calibration')
    quantizer.calibrate(prepare(image[None]) for image in drawn)
    expected = _accuracy(before, loader, prepare, 'float32')
    limit = DROP if args.drop is None else args.drop
    in_float: list[str] = []
    ranked: list[str] = []
    while True:
        layers = [layer for layer in quantizer.layers if layer not in in_float]
        quantizer.write(path, layers)
        found = _accuracy(path, loader, prepare, 'int8')
        print(f'top-1 of {config.DATA.EVAL_LIST}, {len(loader.dataset)} images: float32 {expected:.2f} %, '
              f'int8 {found:.2f} %, {len(in_float)} of {len(quantizer.layers)} layers in float32', flush=True)
        if found >= expected - limit:
            break
        ranked = ranked or _rank(quantizer, path, before, prepare(calibration[:RANKED_ON]))
        if len(in_float) == len(ranked):
            raise ValueError(f'int8 loses more than -drop {limit} points; nothing written')
        in_float = ranked[:2 * len(in_float) or 1]
        print(f'int8 loses more than {limit} points; in float32 next: {", ".join(in_float)}', flush=True)
    return {
        'top1_float32': round(expected, 4),
        'top1': round(found, 4),
        'list': config.DATA.EVAL_LIST,
        'images': len(loader.dataset),
        'calibration_images': len(calibration),
        'layers': len(quantizer.layers),
        'float32_layers': in_float,
    }


def _calibration_images(config: Any) -> tuple[np.ndarray, str]:
    """Return pixels uint8 (N, C, H, W) of random images of the training list, and its name.

    The list that is evaluated takes its place where there is none.

    Raises ValueError where there are fewer than FEWEST or one cannot be read.
    """
    import datasets
    name = datasets.LISTS[0]
    if not os.path.isfile(os.path.join(config.DATA.DATA_PATH, name)):
        name = config.DATA.EVAL_LIST
    chosen = config.clone()
    chosen.defrost()
    chosen.DATA.EVAL_LIST = name
    dataset = datasets.build_eval(chosen).dataset
    if len(dataset) < FEWEST:
        raise ValueError(f'{os.path.join(config.DATA.DATA_PATH, name)}: {len(dataset)} images; calibration '
                         f'needs {FEWEST} or more')
    count = min(CALIBRATION, len(dataset))
    order = np.random.default_rng(0).permutation(len(dataset))[:count]
    images, _, _, texts = dataset.batch([(0, int(i)) for i in order])
    for text in filter(None, texts):
        raise ValueError(text)
    return images, name


def _prepare(pixels: np.ndarray, kind: str, data: Any) -> np.ndarray:
    """Return pixels uint8 (B, C, H, W) as the input of a file of `-input kind`."""
    import paddle

    import datasets
    if kind == 'uint8':
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    return datasets.normalise(paddle.to_tensor(pixels), data.MEAN, data.STD).numpy()


def _accuracy(path: str, loader: Any, prepare: Prepare, name: str) -> float:
    """Return the top-1 accuracy of an ONNX file, in percent."""
    run = runtimes.onnxruntime(path)
    right = count = 0
    for images, labels, _ in cli.progress(loader.epoch(0), len(loader), name):
        results = run(prepare(images.numpy()))
        best = results[1][:, 0] if isinstance(results, tuple) else results.argmax(axis=1)
        right += int((best == labels.numpy()).sum())
        count += len(best)
    return 100 * right / count


def _rank(quantizer: Any, path: str, before: str, images: np.ndarray) -> list[str]:
    """Return the layers, first those that change the results most when they alone are in int8."""
    expected = _first(runtimes.onnxruntime(before)(images))
    errors = {}
    for name in cli.progress(quantizer.layers, len(quantizer.layers), 'layers'):
        quantizer.write(path, [name], alone=True)
        errors[name] = float(np.square(_first(runtimes.onnxruntime(path)(images)) - expected).sum())
    return sorted(errors, key=errors.__getitem__, reverse=True)


def _first(results: Any) -> np.ndarray:
    """Return the logits or probabilities of a file."""
    return results[0] if isinstance(results, tuple) else results


# ---- speed

def _speeds(files: dict[str, str], images: np.ndarray) -> dict[str, Any]:
    """Time two ONNX files in ONNX Runtime; print the milliseconds of an image, and return their ratio."""
    runs = {name: runtimes.onnxruntime(path) for name, path in files.items()}
    times = runtimes.time_by_turns(runs, images, ROUNDS)
    medians = {name: statistics.median(values) for name, values in times.items()}
    before, after = medians.values()
    print('onnxruntime here, milliseconds an image: '
          + ', '.join(f'{name} {value:.1f}' for name, value in medians.items())
          + f'; {before / after:.2f} times as fast')
    return {'times_as_fast_in_onnxruntime': round(before / after, 2)}
