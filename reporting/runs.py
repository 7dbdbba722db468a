"""Reading a run folder for its page: whatever is there, however the run ended."""
import glob
import json
import math
import os
import re
import time
import zipfile
from dataclasses import dataclass, field

from utils import log

import numpy as np
import yaml

import config as options
import datasets
from data import class_names

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SPLITS = {'train': 'train', 'val': 'val', 'val_ema': 'EMA'}             # as in metrics.jsonl -> as in the page
WHERE = ('DATA.DATA_PATH', *(key for key in options.OF_ONE_START if key != 'MODEL.PRETRAINED'))  # these change no result


@dataclass
class Run:
    """What is known of a run."""
    folder: str
    records: list                                   # of metrics.jsonl, evaluations on their own left out
    torn: int                                       # lines of metrics.jsonl that are no records
    config: dict                                    # 'GROUP.KEY' -> value
    base: dict                                      # of the file in configs/ that is nearest to it, or {}
    base_name: str
    machine: dict
    log: dict                                       # what log.txt tells: first, last, seconds, resumed, steps_per_epoch
    predictions: dict                               # split -> {'index': ..., 'label': ..., ...}
    finished: bool
    classes: list = field(default_factory=list)     # names by label
    samples: object = None                          # the ImageList of the evaluation, or None

    @property
    def name(self):
        return os.path.basename(os.path.abspath(self.folder))

    @property
    def model(self):
        return self.config.get('MODEL.NAME') or self.name

    @property
    def data(self):
        """The name of the data folder, or ''."""
        return os.path.basename(os.path.abspath(str(self.config['DATA.DATA_PATH']))) if 'DATA.DATA_PATH' in self.config else ''

    @property
    def title(self):
        return f'{self.model} on {self.data}' if self.data else self.model

    @property
    def steps_per_epoch(self):
        """By the evaluations, which are at the ends of epochs; else by the log; None if neither tells."""
        ends = [r['step'] / r['epoch'] for r in self.records if r['split'] != 'train' and r.get('epoch')]
        return ends[-1] if ends else self.log.get('steps_per_epoch')

    def curve(self, split, key):
        """[(epoch, or step where epochs are not known, value)] of a split; a value may be not finite."""
        per = self.steps_per_epoch or 1
        return [(r['step'] / per, float(r[key])) for r in self.records if r['split'] == split and r.get(key) is not None]

    def best(self, split):
        """(top-1, epoch) of the best evaluation of a split, or None."""
        values = [(value, -epoch) for epoch, value in self.curve(split, 'acc1') if math.isfinite(value)]
        return (max(values)[0], round(-max(values)[1])) if values else None

    def last(self, split, key):
        values = self.curve(split, key)
        return values[-1][1] if values else None

    def at(self, split, key, epoch):
        """The value of `key` in the evaluation of a split after `epoch`, or None."""
        return next((value for x, value in self.curve(split, key) if round(x) == epoch), None)

    @property
    def judged(self):
        """(split, predictions) that the page's confusions and mistakes are of: the best weights at the end of the run."""
        kept = {split: p for split, p in self.predictions.items() if len(p['index'])}
        trained = {split: p for split, p in kept.items() if split != 'eval'} or kept
        return max(trained.items(), key=lambda item: np.mean(item[1]['label'] == item[1]['top1']), default=(None, None))


def read_run(folder, classes=None):
    """The Run in a folder. Raises ValueError where the folder holds none."""
    config = _yaml(folder, 'config.yaml') or _yaml(folder, 'config_eval.yaml')
    if not config and not os.path.exists(os.path.join(folder, 'metrics.jsonl')):
        raise ValueError(f'{folder}: no run folder (neither config.yaml nor metrics.jsonl in it)')
    records, torn = _records(os.path.join(folder, 'metrics.jsonl'))
    log = _log(os.path.join(folder, 'log.txt'))
    if config:
        config['MODEL.PRETRAINED'] = log.get('pretrained') or config.get('MODEL.PRETRAINED', '')
    base_name, base = nearest_config(config)
    run = Run(folder=folder, records=[r for r in records if r['step']], torn=torn, config=config, base=base,
              base_name=base_name, machine=_json(folder, 'machine.json') or _json(folder, 'machine_eval.json'),
              log=log, predictions=_predictions(folder),
              finished=os.path.exists(os.path.join(folder, 'final.pdparams')))
    _, judged = run.judged
    if judged:
        run.samples = _samples(run, judged)
        run.classes = names_of_classes(run, judged, classes)
    return run


def defaults():
    return options.flatten(options._C)


def nearest_config(config):
    """(name, flat options) of the file in configs/ for the same model with the fewest differences; ('', {}) without one."""
    found = []
    for path in sorted(glob.glob(os.path.join(ROOT, 'configs', '[!_]*.yaml'))):
        with open(path, encoding='utf-8') as file:
            likely = str(config.get('MODEL.NAME')) in file.read()            # reading all of them takes a while
        flat = options.flatten(options.get_config(path)) if likely else {}
        if likely and flat['MODEL.NAME'] == config.get('MODEL.NAME'):
            found.append((len(differences(config, flat)), os.path.relpath(path, ROOT), flat))
    return min(found, key=lambda item: item[:2])[1:] if found else ('', {})


def differences(config, other):
    """The keys whose values differ, those of WHERE left out, sorted."""
    return sorted(key for key in config.keys() | other.keys()
                  if key not in WHERE and key != 'BASE' and config.get(key) != other.get(key))


def names_of_classes(run, judged, file=None):
    """Return the class names of a run in the order of the labels; labels as numbers, where names are not known.

    Raises as class_names.find, for `file`.
    """
    count = max(run.config.get('MODEL.NUM_CLASSES', 0), int(max(judged['label'].max(), judged['top1'].max())) + 1)
    names = class_names.find(count, file=file, run_folder=run.folder, data_path=_data_path(run), warn=log.warning)
    return names or [str(label) for label in range(count)]


# ---- files

def _yaml(folder, name):
    """A config file of a run as flat options, read as it stands: the options may be those of another version."""
    def flatten(node, prefix=''):
        for key, value in node.items():
            yield from flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else [(f'{prefix}{key}', value)]
    try:
        with open(os.path.join(folder, name), encoding='utf-8') as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return dict(flatten(content)) if isinstance(content, dict) else {}


def _json(folder, name):
    try:
        with open(os.path.join(folder, name), encoding='utf-8') as file:
            content = json.load(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _records(path):
    """The records of metrics.jsonl in the order of their steps, and how many lines are none."""
    records, torn = [], 0
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            for line in file:
                try:
                    record = json.loads(line)
                    good = isinstance(record['step'], int) and isinstance(record['epoch'], int) and record['split'] in SPLITS
                except (ValueError, KeyError, TypeError):
                    good = False
                records, torn = records + [record] if good else records, torn + (not good and bool(line.strip()))
    return sorted(records, key=lambda record: record['step']), torn


def _log(path):
    facts, start = {'resumed': 0}, 'starting from the weights of '
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            for line in file:
                if re.match(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d', line):
                    facts.setdefault('first', line[:19])
                    facts['last'] = line[:19]
                facts['resumed'] += ' resumed from ' in line
                if 'starting from' in line:
                    facts['pretrained'] = line.partition(start)[2].rstrip('\n')
                found = re.search(r'training: (\d+) steps per epoch', line)
                facts.update({'steps_per_epoch': int(found[1])} if found else {})
    if 'first' in facts:
        first, last = (time.mktime(time.strptime(facts[key], '%Y-%m-%d %H:%M:%S')) for key in ('first', 'last'))
        facts['seconds'] = last - first
    return facts


def _predictions(folder):
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, 'predictions_*.npz'))):
        try:
            with np.load(path) as file:
                arrays = {key: file[key] for key in ('index', 'label', 'top1', 'probability', 'label_probability')}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
        found[os.path.basename(path)[len('predictions_'):-len('.npz')]] = arrays
    return found


def _data_path(run):
    """The data folder of a run; a relative one is relative to where the run was started, or to the repository."""
    path = str(run.config.get('DATA.DATA_PATH', ''))
    places = [os.path.join(place, path) for place in (run.machine.get('folder', ''), '', ROOT)]
    return next((place for place in places if os.path.isdir(place)), path)


def _samples(run, judged):
    """The list that was evaluated, or None where it is not there or not the same any more."""
    folder = _data_path(run)
    try:
        samples = datasets.read_list(os.path.join(folder, 'val_list.txt'), folder, run.config.get('MODEL.NUM_CLASSES', 1 << 40))
    except (ValueError, OSError):
        return None
    index = judged['index']
    same = index.max() < len(samples) and np.array_equal(samples.labels[index], judged['label'])
    return samples if same else None
