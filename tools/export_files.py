"""The files that let an exported folder stand alone: preprocess.json, README.md and infer.py."""
from __future__ import annotations

import argparse
import math
import os
import shutil
from typing import Any

from system import sizes
from tools import cli

from data import class_names

INFER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'infer.py')
RESULTS = {                                         # of -result, and what the file says about it
    'logits': 'logits (batch, classes): their softmax gives the probabilities, in the order of meta.json',
    'probabilities': 'probabilities (batch, classes), in the order of the classes in meta.json',
    'topk': 'the largest probabilities (batch, N), and their labels (batch, N) as in meta.json',
}
KINDS = {1: 'grey', 3: 'RGB'}                       # number of channels -> what they are
CONTENTS = {                                        # file -> what the card says about it
    'model.onnx': 'for onnxruntime and OpenVINO',
    'model.json': 'for Paddle Inference, with model.pdiparams',
    'model.pdiparams': 'the weights of model.json',
    'preprocess.json': 'how an image file becomes the input, in words and numbers',
    'meta.json': 'class names, and how the files were compared with the model',
    'infer.py': 'classifies pictures; needs numpy, Pillow and onnxruntime only',
}


def write(folder: str, prepared: dict[str, Any], config: Any, facts: dict[str, Any]) -> None:
    """Write preprocess.json, README.md, and infer.py where there is a model.onnx, to `folder`.

    prepared: that of `preprocess`. facts: those of `card_facts`.
    """
    cli.write_json(os.path.join(folder, 'preprocess.json'), prepared)
    if os.path.exists(os.path.join(folder, 'model.onnx')):
        shutil.copyfile(INFER, os.path.join(folder, 'infer.py'))
    cli.write_text(os.path.join(folder, 'README.md'), card(config, facts, folder))


# ---- preprocess.json

def preprocess(config: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return how an image file becomes the input of the model, in words and numbers, and what it gives.

    args: those of tools/export.py: dynamic, input, result and topk. `cover` and `crop` are [height, width].
    """
    data = config.DATA
    crop = list(sizes.sides(data.IMAGE_SIZE))
    cover = [math.floor(side / data.CROP_PCT) for side in crop]
    sides = ['height', 'width'] if args.dynamic else crop
    pixels = args.input == 'uint8'
    shape = [*sides, data.CHANNELS] if pixels else [data.CHANNELS, *sides]
    return {
        'input': {'name': 'images', 'type': args.input, 'shape': ['batch', *shape],
                  'channels': KINDS.get(data.CHANNELS, 'those of the file')},
        'result': args.result,
        'output': RESULTS[args.result] if config.MODEL.NUM_CLASSES else 'features (batch, features)',
        'steps': [read_step(data), resize_step(cover), crop_step(crop), PIXELS if pixels else NORMALISE],
        'channels': data.CHANNELS,
        'background': data.BACKGROUND,
        'cover': cover,
        'crop': crop,
        'interpolation': 'bicubic',
        'mean': list(data.MEAN),
        'std': list(data.STD),
    }


PIXELS = 'Order the values as rows, columns, channels. The model normalises them itself.'
NORMALISE = ('Subtract 255 * mean and divide by 255 * std, each channel by its own numbers. '
             'Order the values as channels, rows, columns.')
BICUBIC = "The filter is Pillow's bicubic, with antialiasing: first along the rows, then along the columns."


def read_step(data: Any) -> str:
    """Describe how a file is read, by the options `data` (config.DATA)."""
    if data.CHANNELS not in KINDS:
        return (f'Read the {data.CHANNELS} channels of the file, with 8 bits per value. '
                'Each is a grey image in what follows.')
    text = 'Read the image as RGB with 8 bits per value; of 16 bits take the upper 8. Do not turn it by EXIF.'
    if data.BACKGROUND == 'drop':
        text += ' Ignore transparency.'
    else:
        text += f' Composite transparent pixels on {data.BACKGROUND}.'
    if data.CHANNELS == 1:
        text += ' Then convert it to grey: 0.299 R + 0.587 G + 0.114 B.'
    return text


def resize_step(cover: list[int]) -> str:
    """Describe the resize to an image that just covers `cover`."""
    rows, columns = cover
    if rows == columns:
        return (f'Resize so that the shorter side has {rows} pixels, and the longer one '
                f'{rows} * longer / shorter, rounded down. {BICUBIC}')
    return (f'Divide the height by {rows} and the width by {columns}. Divide both sides by the smaller of '
            f'these two, rounded to the nearest pixel, halves to even. {BICUBIC}')


def crop_step(crop: list[int]) -> str:
    """Describe the centre crop."""
    height, width = crop
    return (f'Cut out the centre, {height} pixels high and {width} wide. It starts at (side - crop) / 2, '
            'rounded to the nearest pixel, halves to even. Outside the image is black.')


# ---- the card

def card(config: Any, facts: dict[str, Any], folder: str) -> str:
    """Return the text of README.md."""
    lines = card_head(config, facts)
    present = {*os.listdir(folder), 'meta.json'}
    if 'infer.py' in present:
        lines += ['```bash', 'python -m pip install numpy pillow onnxruntime', 'python infer.py dog.jpg',
                  '```', '']
    lines += ['| file | content |', '|---|---|']
    lines += [f'| `{name}` | {text} |' for name, text in CONTENTS.items() if name in present]
    return '\n'.join(lines) + '\n'


def card_head(config: Any, facts: dict[str, Any]) -> list[str]:
    """Return the first lines of a card: the title, and `facts` as a table."""
    return [f'# {config.MODEL.NAME}', '',
            'A HaloNet (Vaswani et al. 2021, arXiv 2103.12731) for image classification.', '',
            '| | |', '|---|---|', *(f'| {name} | {value} |' for name, value in facts.items()), '']


def card_facts(config: Any, model: Any) -> dict[str, Any]:
    """Return {heading: text} of the table of a card, as far as the run beside the weights is known.

    `model` is the network of the config.
    """
    import paddle

    from halonet import count_parameters
    from training.macs import total_multiply_adds
    multiply_adds = total_multiply_adds(model, *sizes.sides(config.DATA.IMAGE_SIZE))
    return {
        'parameters': f'{count_parameters(model) / 1e6:.2f} M',
        'multiply-adds of an image': f'{multiply_adds / 1e9:.2f} G',
        'images': f'{sizes.as_text(config.DATA.IMAGE_SIZE)} pixels, {config.DATA.CHANNELS} channels',
        'classes': config.MODEL.NUM_CLASSES,
        'weights': os.path.basename(config.MODEL.PRETRAINED),
        **run_facts(config.MODEL.PRETRAINED),
        'written with': f'PaddlePaddle {paddle.__version__}',
        'licence': 'of the program that made it: Apache 2.0; of the weights and the data: not stated',
    }


def precision_fact(lowered: dict[str, Any]) -> str:
    """Return what a card says of a lower precision; `lowered` is that of precision.lower."""
    text, beside = lowered['precision'], lowered['beside_float32']
    if 'top1' in beside:
        text += (f', top-1 {beside["top1"]:.2f} % of {beside["list"]}; the same file in float32 had '
                 f'{beside["top1_float32"]:.2f} %')
    return text


def run_facts(weights: str) -> dict[str, Any]:
    """Return the facts of the training that lies beside a weight file; {} if there is none."""
    from reporting import runs
    folder = class_names.run_folder_of(weights)
    if not os.path.isfile(os.path.join(folder, 'metrics.jsonl')):
        return {}
    run = runs.read_run(folder)
    facts = {'trained on': run.data, 'recipe': recipe_of(run), **accuracy_of(run, os.path.basename(weights))}
    return {name: text for name, text in facts.items() if text}


def recipe_of(run: Any) -> str:
    """Return the nearest file in configs/, and the options that differ."""
    from reporting import runs
    if not run.base_name:
        return 'a config of its own'
    keys = [key for key in runs.differences(run.config, run.base) if key in run.config]
    return ', '.join([f'`{run.base_name}`', *(f'{key} {run.config[key]}' for key in keys)])


def accuracy_of(run: Any, weights: str) -> dict[str, str]:
    """Return the accuracy that a run has measured of its file `weights`, and the command that repeats it."""
    split = 'val_ema' if '_ema' in weights else 'val'
    best = run.best(split)
    if weights.startswith('best') and best:
        epoch = best[1]
    elif weights.startswith('final') and run.finished and best:
        epoch = round(run.curve(split, 'acc1')[-1][0])
    else:
        return {}
    top1, top5 = run.at(split, 'acc1', epoch), run.at(split, 'acc5', epoch)
    images = run.config.get('DATA.EVAL_LIST', 'val_list.txt')
    command = f'python main_single_gpu.py -cfg RUN/config.yaml -eval -pretrained RUN/{weights}'
    return {'accuracy': f'top-1 {top1:.2f} %, top-5 {top5:.2f} % of {images}, after epoch {epoch}',
            'measured by': f'`{command}`'}
