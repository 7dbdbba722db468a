"""Train the same HaloNet by timm's train.py and by main_single_gpu.py, and compare the accuracies.

    python dev/compare_timm/compare.py FOLDER             all in FOLDER: tables, and a chart of each task
    python dev/compare_timm/compare.py FOLDER -timm DIR   the same, with timm's repository as DIR

Two tasks, three recipes, five seeds and two trainers are 60 trainings of a minute or two. Each takes one
core, and two run at a time. A complete training is kept, so the next call finishes an interrupted one.
FOLDER/env gets PyTorch and torchvision, and FOLDER/timm gets timm's repository at the version below.
"""
from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scipy import stats

from dev import drawings
from dev.compare_timm import data
from reporting import charts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIG = HERE / 'halonet_small.yaml'
TIMM = ('https://github.com/huggingface/pytorch-image-models', 'v1.0.28')
TORCH = ('torch==2.13.0', 'numpy', 'pillow<12', 'pyyaml', 'safetensors', 'huggingface_hub')
TORCHVISION = 'torchvision==0.28.0'
SEEDS = range(5)
EPOCHS, WARMUP = 12, 2                              # the warm-up is part of the epochs
AT_ONCE = 2                                         # trainings
TRAINERS = ('timm', 'ours')


class Task(NamedTuple):
    size: int                                       # pixels
    classes: int
    stride: int                                     # of the second stage


TASKS = {'emoji': Task(64, 9, 2), 'clothes': Task(32, 10, 1)}
RECIPES: dict[str, dict[str, object]] = {           # options of this project
    'adamw': {
        'TRAIN.OPTIMIZER': 'adamw', 'TRAIN.BASE_LR': 2e-3, 'TRAIN.WEIGHT_DECAY': 0.05, 'TRAIN.GRAD_CLIP': 1.0,
        'TRAIN.AUTO_AUGMENT': 'rand-m9-n2-mstd0.5-inc1', 'TRAIN.RANDOM_ERASE_PROB': 0.25,
        'TRAIN.MIXUP_ALPHA': 0.2, 'TRAIN.CUTMIX_ALPHA': 1.0, 'TRAIN.MIXUP_PROB': 0.5,
        'TRAIN.EMA_DECAY': 0.98},
    'lamb': {
        'TRAIN.OPTIMIZER': 'lamb', 'TRAIN.BASE_LR': 1e-2, 'TRAIN.WEIGHT_DECAY': 0.02, 'TRAIN.GRAD_CLIP': 1.0,
        'TRAIN.EPS': 1e-6, 'TRAIN.LOSS': 'bce', 'TRAIN.AUTO_AUGMENT': 'rand-m7-mstd0.5-inc1',
        'TRAIN.MIXUP_ALPHA': 0.1, 'TRAIN.CUTMIX_ALPHA': 1.0, 'TRAIN.MIXUP_PROB': 0.5, 'MODEL.DROPPATH': 0.05},
    'sgd': {
        'TRAIN.OPTIMIZER': 'sgd', 'TRAIN.BASE_LR': 0.2, 'TRAIN.WEIGHT_DECAY': 1e-4, 'TRAIN.GRAD_CLIP': 0.02,
        'TRAIN.CLIP_MODE': 'agc', 'TRAIN.MOMENTUM': 0.9, 'TRAIN.AUTO_AUGMENT': 'rand-m7-mstd0.5-inc1',
        'TRAIN.RANDOM_ERASE_PROB': 0.4},
}
EXCHANGED = 'sgd'                                   # its weights are tried in the other project: no averages
FLAGS = {                                           # option: its flag of timm's train.py
    'TRAIN.OPTIMIZER': 'opt', 'TRAIN.BASE_LR': 'lr', 'TRAIN.WEIGHT_DECAY': 'weight-decay',
    'TRAIN.GRAD_CLIP': 'clip-grad', 'TRAIN.CLIP_MODE': 'clip-mode', 'TRAIN.MOMENTUM': 'momentum',
    'TRAIN.EPS': 'opt-eps', 'TRAIN.AUTO_AUGMENT': 'aa', 'TRAIN.RANDOM_ERASE_PROB': 'reprob',
    'TRAIN.MIXUP_ALPHA': 'mixup', 'TRAIN.CUTMIX_ALPHA': 'cutmix', 'TRAIN.MIXUP_PROB': 'mixup-prob',
    'TRAIN.EMA_DECAY': 'model-ema-decay', 'MODEL.DROPPATH': 'drop-path',
}


class Sides(NamedTuple):
    """Where the data and the runs are, and what runs timm."""

    folder: Path
    python: Path                                    # of an environment with PyTorch
    timm: Path                                      # timm's repository

    def run_folder(self, task: str, recipe: str, trainer: str, seed: int) -> Path:
        """Return the folder of a training."""
        return self.folder / 'runs' / f'{task}_{recipe}_{trainer}_{seed}'

    def run_ours(self, program: str, *words: object, log: Path) -> None:
        """Run a program of this repository."""
        run([sys.executable, ROOT / program, *words], log)

    def run_timm(self, program: str, task: str, flags: Mapping[str, object], log: Path) -> None:
        """Run a program of timm on the data and the network of a task. A flag of the value True has none."""
        size, classes, stride = TASKS[task]
        common = {'data-dir': self.folder / task, 'num-classes': classes, 'input-size': [3, size, size],
                  'model': 'halonet_small', 'model-kwargs': f'stride={stride}', 'crop-pct': 1.0,
                  'mean': [0.5, 0.5, 0.5], 'std': [0.5, 0.5, 0.5], 'device': 'cpu', 'workers': 1}
        words: list[object] = []
        for flag, value in {**common, **flags}.items():
            words.append(f'--{flag}')
            if isinstance(value, list):
                words += value
            elif value is not True:
                words.append(value)
        run([self.python, HERE / 'timm_side.py', self.timm / program, *words], log, PYTHONPATH=str(self.timm))


def run(command: list[object], log: Path, **environment: str) -> None:
    """Run a command on one core, and write what it prints into `log`. Raises CalledProcessError."""
    with open(log, 'w') as file:
        subprocess.run([str(word) for word in command], stdout=file, stderr=file, check=True,
                       env={**os.environ, 'OMP_NUM_THREADS': '1', **environment})


def prepare(folder: Path, timm: Path | None) -> Sides:
    """Make what is missing in `folder`: images, lists, the environment, timm's repository."""
    data.make(folder)
    for name in TASKS:
        run([sys.executable, ROOT / 'tools/make_lists.py', folder / name], folder / f'{name}.log')
    python = folder / 'env/bin/python'
    if not python.exists():
        subprocess.run([sys.executable, '-m', 'venv', folder / 'env'], check=True)
        subprocess.run([python, '-m', 'pip', 'install', '-q', *TORCH], check=True)
        subprocess.run([python, '-m', 'pip', 'install', '-q', '--no-deps', TORCHVISION], check=True)
    if timm is None:
        timm = folder / 'timm'
        if not timm.exists():
            address, version = TIMM
            clone: list[object] = ['git', 'clone', '-q', '--depth', 1, '--branch', version, address, timm]
            run(clone, folder / 'clone.log')
    return Sides(folder, python, timm)


# ---- trainings

def train_ours(sides: Sides, task: str, recipe: Mapping[str, object], seed: int, output: Path) -> None:
    """Train by main_single_gpu.py."""
    options = {'DATA.IMAGE_SIZE': TASKS[task].size, 'MODEL.STRIDES': [1, TASKS[task].stride], 'SEED': seed,
               'TRAIN.NUM_EPOCHS': EPOCHS, 'TRAIN.WARMUP_EPOCHS': WARMUP, 'TRAIN.WARMUP_LR': 1e-6,
               'TRAIN.END_LR': 1e-6, 'TRAIN.LR_BATCH': 0, 'TRAIN.SMOOTHING': 0.1, 'SAVE_FREQ': EPOCHS,
               **recipe}
    words = [word for pair in options.items() for word in pair]
    sides.run_ours('main_single_gpu.py', '-cfg', CONFIG, '-device', 'cpu', '-data_path', sides.folder / task,
                   '-output', output, '-opts', *words, log=output.with_suffix('.log'))


def train_timm(sides: Sides, task: str, recipe: Mapping[str, object], seed: int, output: Path) -> None:
    """Train by timm's train.py. Its warm-up comes before the epochs of --epochs."""
    flags = {'train-split': 'train', 'val-split': 'val', 'batch-size': 64, 'sched-on-updates': True,
             'epochs': EPOCHS - WARMUP, 'warmup-epochs': WARMUP, 'warmup-prefix': True, 'warmup-lr': 1e-6,
             'min-lr': 1e-6, 'smoothing': 0.1, 'seed': seed, 'checkpoint-hist': 1, 'output': output.parent,
             'experiment': output.name}
    flags.update({FLAGS[key]: value for key, value in recipe.items() if key in FLAGS})
    if recipe.get('TRAIN.LOSS') == 'bce':
        flags['bce-loss'] = True
    if averaged(recipe):
        flags['model-ema'] = True
    sides.run_timm('train.py', task, flags, output.with_suffix('.log'))


def train_all(sides: Sides) -> None:
    """Run each training that is not complete, two at a time, and the first seed of all of them first."""
    def train(seed: int, task: str, name: str, trainer: str) -> None:
        output = sides.run_folder(task, name, trainer, seed)
        if output.exists():
            return
        part = output.with_name(f'{output.name}.part')
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(exist_ok=True)
        start = {'timm': train_timm, 'ours': train_ours}[trainer]
        start(sides, task, RECIPES[name], seed, part)
        part.rename(output)
        print(f'{output.name}: {curve(output, trainer, RECIPES[name])[-1]:.2f} %', flush=True)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        trainings = [pool.submit(train, seed, task, name, trainer)
                     for seed in SEEDS for task in TASKS for name in RECIPES for trainer in TRAINERS]
        for training in trainings:
            training.result()


def averaged(recipe: Mapping[str, object]) -> bool:
    """True for a recipe whose averaged weights are compared."""
    return 'TRAIN.EMA_DECAY' in recipe


def curve(output: Path, trainer: str, recipe: Mapping[str, object], value: str = 'acc1') -> list[float]:
    """Return the accuracy after each epoch in percent, or the `loss`, of averages where there are any."""
    if trainer == 'timm':
        column = {'acc1': 'eval_top1', 'loss': 'eval_loss'}[value]
        with open(output / 'summary.csv', newline='') as file:
            return [float(row[column]) for row in csv.DictReader(file)]
    split = 'val_ema' if averaged(recipe) else 'val'
    records = map(json.loads, (output / 'metrics.jsonl').read_text().splitlines())
    return [record[value] for record in records if record['split'] == split]


# ---- results

def report(sides: Sides) -> None:
    """Print the tables, and write a chart for each task."""
    for value, title, digits in (('acc1', 'accuracy, %', 1), ('loss', 'loss', 3)):
        print(f'\n| task | recipe | {title}: timm | here | difference, 95 % interval | p |')
        print('|---' * 6 + '|')
        for task in TASKS:
            for name in RECIPES:
                theirs, ours = (last_values(sides, task, name, trainer, value) for trainer in TRAINERS)
                print(f'| {task} | {name} | {" | ".join(compare(theirs, ours, digits))} |')
    print('\n| task | recipe | trainer | accuracy in each seed, % |\n|---|---|---|---|')
    for task in TASKS:
        curves = []
        for colour, (name, recipe) in enumerate(RECIPES.items()):
            for dash, trainer in enumerate(TRAINERS):
                last = last_values(sides, task, name, trainer, 'acc1')
                print(f'| {task} | {name} | {trainer} | {", ".join(f"{value:.1f}" for value in last)} |')
                runs = [curve(sides.run_folder(task, name, trainer, seed), trainer, recipe) for seed in SEEDS]
                curves.append(charts.Series(f'{name}, {trainer}', drawings.mean_curve(runs), colour=colour,
                                            dash=dash, marker=-1))
        (sides.folder / f'{task}.svg').write_text(drawings.svg(curves))


def last_values(sides: Sides, task: str, recipe: str, trainer: str, value: str) -> list[float]:
    """Return the accuracy or the loss of each seed after the last epoch."""
    return [curve(sides.run_folder(task, recipe, trainer, seed), trainer, RECIPES[recipe], value)[-1]
            for seed in SEEDS]


def compare(theirs: list[float], ours: list[float], digits: int = 1) -> list[str]:
    """Return both means with standard deviations, their difference, and p of Welch's test of equal means."""
    test = stats.ttest_ind(ours, theirs, equal_var=False)
    low, high = test.confidence_interval(0.95)
    means = [f'{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}'
             for values in (theirs, ours)]
    difference = statistics.mean(ours) - statistics.mean(theirs)
    interval = f'{difference:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})'
    return [*means, interval, f'{test.pvalue:.2f}']


def exchange(sides: Sides) -> None:
    """Print the accuracy of trained weights in both projects, for each task and trainer."""
    print('\n| task | weights by | accuracy in timm, % | here, % |\n|---|---|---|---|')
    for task in TASKS:
        scratch = sides.folder / 'exchange' / task
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        theirs, ours = (sides.run_folder(task, EXCHANGED, trainer, 0) for trainer in TRAINERS)
        sides.run_ours('main_single_gpu.py', '-cfg', CONFIG, '-eval', '-device', 'cpu',
                       '-data_path', sides.folder / task, '-output', scratch / 'eval',
                       '-pretrained', theirs / 'last.pth.tar', '-opts', 'DATA.IMAGE_SIZE', TASKS[task].size,
                       'MODEL.STRIDES', [1, TASKS[task].stride], log=scratch / 'eval.log')
        with open(scratch / 'eval/results.csv', newline='') as file:
            here = float(next(csv.DictReader(file))['top1'])
        print(f'| {task} | timm | {curve(theirs, "timm", {})[-1]:.2f} | {here:.2f} |')

        weights = scratch / 'ours.safetensors'
        sides.run_ours('tools/port_weights.py', ours / 'final.pdparams', weights, log=scratch / 'port.log')
        results = scratch / 'timm.json'
        sides.run_timm('validate.py', task, {'split': 'val', 'checkpoint': weights, 'results-file': results,
                                             'results-format': 'json'}, scratch / 'timm.log')
        there = json.loads(results.read_text())['top1']
        print(f'| {task} | ours | {there:.2f} | {curve(ours, "ours", {})[-1]:.2f} |')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', metavar='FOLDER', type=Path, help='for packages, images and runs')
    parser.add_argument('-timm', '--timm', metavar='DIR', type=Path, help=f"timm's repository at {TIMM[1]}")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sides = prepare(folder, args.timm and args.timm.resolve())
    train_all(sides)
    report(sides)
    exchange(sides)


if __name__ == '__main__':
    main()
