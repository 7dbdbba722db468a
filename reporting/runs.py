"""Read a run folder for its page: all files that exist, however the run ended."""
import glob
import json
import logging
import math
import os
import re
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

from system.options import read_yaml

import numpy as np

import config as options
from data import class_names
from data.list_file import ImageList, read_list

log = logging.getLogger('halonet')

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SPLITS = {'train': 'train', 'val': 'val', 'val_ema': 'EMA'}             # in metrics.jsonl -> on the page
ARRAYS = ('index', 'label', 'top1', 'probability', 'label_probability')      # of a predictions_*.npz
NO_RESULT = {'DATA.DATA_PATH', *options.OF_ONE_START} - {'MODEL.PRETRAINED'}   # options that change no result
ANY_LABEL = 1 << 40                                 # classes, where the config does not give their number
STARTED_FROM = 'starting from the weights of '
TIME = '%Y-%m-%d %H:%M:%S'                          # at the start of a line of log.txt

Record = dict[str, Any]                             # a line of metrics.jsonl
Predictions = dict[str, np.ndarray]                 # name in ARRAYS -> array (n,), in the order of the list


@dataclass
class Run:
    """The contents of a run folder."""
    folder: str
    records: list[Record]                           # of metrics.jsonl, without evaluations on their own
    torn: int                                       # lines of metrics.jsonl that are no records
    config: dict[str, Any]                          # 'GROUP.KEY' -> value
    base: dict[str, Any]                            # the nearest file in configs/, or {}
    base_name: str
    machine: dict[str, Any]
    log: dict[str, Any]                             # of log.txt, as `_log` returns them
    predictions: dict[str, Predictions]             # split -> predictions
    finished: bool
    classes: list[str] = field(default_factory=list)         # names by label
    samples: Optional[ImageList] = None             # of the evaluation, if its list file is unchanged

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.folder))

    @property
    def model(self) -> str:
        return self.config.get('MODEL.NAME') or self.name

    @property
    def data(self) -> str:
        """Name of the data folder, or ''."""
        if 'DATA.DATA_PATH' not in self.config:
            return ''
        return os.path.basename(os.path.abspath(str(self.config['DATA.DATA_PATH'])))

    @property
    def title(self) -> str:
        if not self.data:
            return self.model
        return f'{self.model} on {self.data}'

    @property
    def steps_per_epoch(self) -> Optional[float]:
        """Steps per epoch by the evaluations, which end epochs, else by the log, else None."""
        for record in reversed(self.records):
            if record['split'] != 'train' and record['epoch']:
                return record['step'] / record['epoch']
        return self.log.get('steps_per_epoch')

    @property
    def median_speed(self) -> Optional[float]:
        """Images per second of the training, or None."""
        speeds = self.values('train', 'images_per_s')
        return float(np.median(speeds)) if speeds else None

    def curve(self, split: str, key: str, factor: float = 1) -> list[tuple[float, float]]:
        """Return [(epoch, value * factor)] of a split; steps if epochs are not known.

        Values may be not finite.
        """
        per_epoch = self.steps_per_epoch or 1
        points = []
        for record in self.records:
            if record['split'] == split and record.get(key) is not None:
                points.append((record['step'] / per_epoch, float(record[key]) * factor))
        return points

    def values(self, split: str, key: str) -> list[float]:
        """Return the values of a curve."""
        return [value for _, value in self.curve(split, key)]

    def best(self, split: str) -> Optional[tuple[float, int]]:
        """Return (top-1, epoch) of the best evaluation of a split, the first of equal ones, or None."""
        best = None
        for epoch, value in self.curve(split, 'acc1'):
            if math.isfinite(value) and (best is None or value > best[0]):
                best = value, round(epoch)
        return best

    def last(self, split: str, key: str) -> Optional[float]:
        """Return the last value of `key`, or None."""
        values = self.values(split, key)
        return values[-1] if values else None

    def at(self, split: str, key: str, epoch: int) -> Optional[float]:
        """Return the value of `key` in the evaluation of a split after `epoch`, or None."""
        for x, value in self.curve(split, key):
            if round(x) == epoch:
                return value
        return None

    @property
    def judged(self) -> tuple[str, Optional[Predictions]]:
        """(split, predictions) that confusions and errors are of: the better weights at the end."""
        found = {split: arrays for split, arrays in self.predictions.items() if len(arrays['index'])}
        if len(found) > 1:
            found.pop('eval', None)                 # an evaluation in the folder of a training
        if not found:
            return '', None
        return max(found.items(), key=lambda item: np.mean(item[1]['label'] == item[1]['top1']))


def read_run(folder: str, classes: Optional[str] = None) -> Run:
    """Read the run in a folder; `classes` is a file of class names.

    Raises ValueError if the folder holds no run.
    """
    config = _config(folder)
    if not config and not os.path.exists(os.path.join(folder, 'metrics.jsonl')):
        raise ValueError(f'{folder}: no run folder (neither config.yaml nor metrics.jsonl in it)')
    records, torn = _records(os.path.join(folder, 'metrics.jsonl'))
    facts = _log(os.path.join(folder, 'log.txt'))
    if config:
        config['MODEL.PRETRAINED'] = facts.get('pretrained') or config.get('MODEL.PRETRAINED', '')
    base_name, base = nearest_config(config)
    run = Run(
        folder=folder,
        records=records,
        torn=torn,
        config=config,
        base=base,
        base_name=base_name,
        machine=_json(folder, 'machine.json') or _json(folder, 'machine_eval.json'),
        log=facts,
        predictions=_predictions(folder),
        finished=os.path.exists(os.path.join(folder, 'final.pdparams')),
    )
    _, judged = run.judged
    if judged is not None:
        run.samples = _samples(run, judged)
        run.classes = names_of_classes(run, judged, classes)
    return run


def nearest_config(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return (name, flat options) of the file in configs/ with the same model and the fewest differences.

    The result is ('', {}) if no file has this model.
    """
    model = config.get('MODEL.NAME')
    found = []
    for path in sorted(glob.glob(os.path.join(ROOT, 'configs', '[!_]*.yaml'))):
        with open(path, encoding='utf-8') as file:
            if str(model) not in file.read():       # quick: reading all of them as configs takes a while
                continue
        flat = options.flatten(options.get_config(path))
        if flat['MODEL.NAME'] == model:
            found.append((len(differences(config, flat)), os.path.relpath(path, ROOT), flat))
    if not found:
        return '', {}
    _, name, flat = min(found, key=lambda item: item[:2])
    return name, flat


def differences(config: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the sorted keys whose values differ, without those of NO_RESULT."""
    keys = (config.keys() | other.keys()) - NO_RESULT - {'BASE'}
    return sorted(key for key in keys if config.get(key) != other.get(key))


def names_of_classes(run: Run, judged: Predictions, file: Optional[str] = None) -> list[str]:
    """Return the class names of a run in the order of the labels; numbers, where names are not known.

    Raises as class_names.find, for `file`.
    """
    largest = int(max(judged['label'].max(), judged['top1'].max()))
    count = max(run.config.get('MODEL.NUM_CLASSES', 0), largest + 1)
    names = class_names.find(
        count, file=file, run_folder=run.folder, data_path=_data_path(run), warn=log.warning)
    return names or [str(label) for label in range(count)]


# ---- files

def _config(folder: str) -> dict[str, Any]:
    """Read the config of a run as flat options, or {}. They may be those of another version."""
    for name in ('config.yaml', 'config_eval.yaml'):
        try:
            config = read_yaml(os.path.join(folder, name))
        except (OSError, ValueError):
            continue
        if config:
            return config
    return {}


def _json(folder: str, name: str) -> dict[str, Any]:
    """Read a JSON object; {} if there is none."""
    try:
        with open(os.path.join(folder, name), encoding='utf-8') as file:
            content = json.load(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _lines(path: str) -> Iterator[str]:
    """Yield the lines of a text file that may be missing or damaged."""
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            yield from file


def _records(path: str) -> tuple[list[Record], int]:
    """Read metrics.jsonl: its records in the order of their steps, and the number of lines that are none.

    Step 0 is that of an evaluation on its own, which is left out.
    """
    records = []
    torn = 0
    for line in _lines(path):
        record = _record(line)
        if record is None:
            torn += line.strip() != ''
        elif record['step']:
            records.append(record)
    return sorted(records, key=lambda record: record['step']), torn


def _record(line: str) -> Optional[Record]:
    """Parse a line of metrics.jsonl, or return None if it is no record."""
    try:
        record = json.loads(line)
        whole = isinstance(record['step'], int) and isinstance(record['epoch'], int)
        return record if whole and record['split'] in SPLITS else None
    except (ValueError, KeyError, TypeError):
        return None


def _log(path: str) -> dict[str, Any]:
    """Read log.txt: times, number of resumptions, first weights, steps per epoch, as far as it has them."""
    facts: dict[str, Any] = {'resumed': 0}
    times = []
    for line in _lines(path):
        seconds = _seconds(line[:19])
        if seconds is not None:
            times.append((seconds, line[:19]))
        if ' resumed from ' in line:
            facts['resumed'] += 1
        if 'starting from' in line:
            facts['pretrained'] = line.partition(STARTED_FROM)[2].rstrip('\n')
        found = re.search(r'training: (\d+) steps per epoch', line)
        if found:
            facts['steps_per_epoch'] = int(found[1])
    if times:
        (start, first), (end, last) = times[0], times[-1]
        facts.update(first=first, last=last, seconds=end - start)
    return facts


def _seconds(text: str) -> Optional[float]:
    """Parse a time of log.txt, or return None."""
    try:
        return time.mktime(time.strptime(text, TIME))
    except (ValueError, OverflowError):
        return None


def _predictions(folder: str) -> dict[str, Predictions]:
    """Read every predictions_SPLIT.npz that is not damaged."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), 'predictions_*.npz'))):
        try:
            with np.load(path) as file:
                arrays = {key: file[key] for key in ARRAYS}
                if 'temperature' in file:           # which files of earlier versions lack
                    arrays['temperature'] = file['temperature']
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
        found[os.path.basename(path)[len('predictions_'):-len('.npz')]] = arrays
    return found


def _data_path(run: Run) -> str:
    """Return the data folder; relative to where the run was started, or to the repository."""
    path = str(run.config.get('DATA.DATA_PATH', ''))
    for start in (run.machine.get('folder', ''), '', ROOT):
        if os.path.exists(os.path.join(start, path)):
            return os.path.join(start, path)
    return path


def _samples(run: Run, judged: Predictions) -> Optional[ImageList]:
    """Read the list file of the evaluation; None if it is missing or has changed."""
    folder = _data_path(run)
    path = os.path.join(folder, str(run.config.get('DATA.EVAL_LIST', 'val_list.txt')))
    try:
        samples = read_list(path, folder, run.config.get('MODEL.NUM_CLASSES', ANY_LABEL))
    except (ValueError, OSError):
        return None
    index = judged['index']
    other_labels = run.config.get('DATA.EVAL_CLASSES') or run.config.get('DATA.EVAL_LABELS')
    if index.max() >= len(samples) or not other_labels and (samples.labels[index] != judged['label']).any():
        return None
    return samples
