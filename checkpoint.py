"""The checkpoints of a run folder: complete, written whole or not at all, checked when read, the newest few kept."""
import hashlib
import os
import pickle
import re

import numpy as np
import paddle

import utils
import weights

FOLDER = 'checkpoints'
NAME = re.compile(r'^step_(\d{8,})\.pdckpt$')
FOOTER = b'sha256:'                                 # follows the pickle, with 64 hex digits; unpicklers stop before it


def to_numpy(value):
    """Tensors in nested dicts and lists as numpy arrays."""
    if isinstance(value, dict):
        return {key: to_numpy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_numpy(item) for item in value]
    return value.numpy() if isinstance(value, paddle.Tensor) else value


def save_weights(path, state_dict):
    """A flat state dict for `model.set_state_dict(paddle.load(path))`; the same weights give the same bytes."""
    content = {key: np.ascontiguousarray(value) for key, value in to_numpy(state_dict).items()}
    utils.atomic_write(path, lambda file: pickle.dump(content, file, protocol=4))


class _Hashing:
    """A file to write to that hashes what passes."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)


def save(folder, step, state, keep):
    """Write `state` (nested dicts of tensors, arrays, numbers, text) as the checkpoint of `step`; keep the newest `keep`."""
    os.makedirs(os.path.join(folder, FOLDER), exist_ok=True)

    def write(file):
        hashing = _Hashing(file)
        pickle.dump(to_numpy(state), hashing, protocol=4)
        file.write(FOOTER + hashing.sha256.hexdigest().encode())

    utils.atomic_write(os.path.join(folder, FOLDER, f'step_{step:08d}.pdckpt'), write)
    for path in steps(folder)[keep:]:
        os.remove(path)


def steps(folder):
    """Paths of the checkpoints in a run folder, the newest first."""
    folder = os.path.join(folder, FOLDER)
    names = [name for name in os.listdir(folder) if NAME.match(name)] if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: int(NAME.match(name)[1]), reverse=True)]


def load(path):
    """The state in a checkpoint, tensors as numpy arrays. Raises ValueError for a damaged file, FileNotFoundError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such checkpoint')
    digest = hashlib.sha256()
    left = os.path.getsize(path) - len(FOOTER) - 64
    with open(path, 'rb') as file:
        while left > 0 and (data := file.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
        footer = file.read()
    if footer != FOOTER + digest.hexdigest().encode():
        raise ValueError(f'{path}: this is no checkpoint of this project, or it is damaged (its checksum does not match)')
    return weights.read_pickle(path)


def newest(folder):
    """(path, state) of the newest good checkpoint in a run folder, or (None, None); damaged ones are named in the log."""
    for path in steps(folder):
        try:
            return path, load(path)
        except (ValueError, OSError) as error:
            utils.log.warning('%s; trying the one before it', error)
    return None, None
