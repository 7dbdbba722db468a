"""The files that describe a start in its run folder: config.yaml, machine.json and class_names.txt."""
import json
import os
from dataclasses import dataclass
from typing import Any, Optional

from system import files
import utils
from utils import log

import numpy as np

from data import class_names
from training.records import harmless, write_machine


@dataclass(frozen=True)
class RunFolder:
    """The run folder at `path`, and the description of a start that is written there."""
    path: str
    device: str                                     # cpu or gpu
    precision: str                                  # float32, or the dtype of mixed precision
    config: str                                     # the text of config.yaml
    data_path: str
    num_classes: int

    def record_training(self, *, resumed: bool, attention: str) -> None:
        """Write config.yaml, machine.json and class_names.txt, on rank 0. attention: what the model uses."""
        self._write_config('config.yaml')
        self._write_machine('machine.json', attention)
        keep_class_names(self.path, self.data_path, self.num_classes, resumed)

    def record_evaluation(self, weights: str, *, attention: str,
                          classes: Optional[np.ndarray] = None) -> None:
        """Write config_eval.yaml, machine_eval.json and class_names.txt for the file `weights`, on rank 0.

        classes: the model's classes that the data have, (k,), by their labels; None: all.
        """
        self._write_config('config_eval.yaml')
        self._write_machine('machine_eval.json', attention)
        keep_names_of_weights(self.path, weights, self.data_path, self.num_classes, classes)

    def _write_machine(self, name: str, attention: str) -> None:
        path = os.path.join(self.path, name)
        write_machine(path, self.device, precision=self.precision, attention=attention)

    def _write_config(self, name: str) -> None:
        path, content = os.path.join(self.path, name), self.config.encode()
        utils.on_rank_0(files.atomic_write, path, lambda file: file.write(content))


def read_machine(resume: str, output: str) -> dict[str, Any]:
    """Return the machine.json of the run that MODEL.RESUME goes on with; {} if there is none to read.

    output: the run folder, for `resume` auto.
    """
    folder = output if resume == 'auto' else class_names.run_folder_of(resume)
    try:
        with open(os.path.join(folder, 'machine.json'), encoding='utf-8') as file:
            facts = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def keep_class_names(folder: str, data_path: str, count: int, resumed: bool = False) -> None:
    """Write the class names of the data, `count` of them, to the folder of a training; rank 0 writes.

    A resumed run keeps its own: they are those of the labels that it has learned. A difference is
    logged.
    """
    if utils.rank() != 0:
        return
    with harmless(class_names.FILE):
        names = class_names.for_a_run(data_path, count)
        path = os.path.join(folder, class_names.FILE)
        if resumed and os.path.exists(path):
            _warn_of_other_names(path, names, data_path)
        else:
            _write_class_names(path, names)


def keep_names_of_weights(folder: str, weights: str, data_path: str, count: int,
                          classes: Optional[np.ndarray] = None) -> None:
    """Write the class names of a weight file, else those of the data, to the folder of an evaluation.

    Rank 0 writes. A difference between the two is logged, unless the data have other labels: `classes`, (k,),
    are the model's for these.
    """
    if utils.rank() != 0:
        return
    with harmless(class_names.FILE):
        names = class_names.for_a_run(data_path, count)
        if classes is not None:
            names = class_names.of_a_subset(data_path, count, classes.tolist())
        of_weights = os.path.join(class_names.run_folder_of(weights), class_names.FILE)
        if classes is None and os.path.exists(of_weights):
            _warn_of_other_names(of_weights, names, data_path)
        if os.path.exists(os.path.join(folder, 'config.yaml')):      # the folder belongs to a training
            return
        if os.path.exists(of_weights):
            names = class_names.read_names(of_weights)
        _write_class_names(os.path.join(folder, class_names.FILE), names)


def _warn_of_other_names(path: str, names: Optional[list[str]], data_path: str) -> None:
    """Log how the class names in `path` differ from `names`, those of the data."""
    difference = names and class_names.first_difference(class_names.read_names(path), names)
    if difference:
        log.warning('class names differ between %s and %s: %s; the labels may not mean the same', path,
                    os.path.join(data_path, class_names.FILE), difference)


def _write_class_names(path: str, names: Optional[list[str]]) -> None:
    """Write class names, one per line, unless there are none or the file has them already."""
    if not names or (os.path.exists(path) and class_names.read_names(path) == names):
        return
    text = ''.join(f'{name}\n' for name in names)
    files.atomic_write(path, lambda file: file.write(text.encode()))
