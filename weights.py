"""Weight files, ours and foreign, to a state dict of a HaloNet: reading, renaming, strict loading.

Reading never runs what a file contains: pickles may hold arrays and containers, nothing else.
"""
import os
import pickle
import re

import numpy as np

PADDLEVIT = (                                       # its names, in its order from the outside in -> ours (timm's)
    (re.compile(r'^stage(\d+)\.blocks\.'), lambda m: f'stages.{int(m[1]) - 1}.'),
    (re.compile(r'\.creat_shortcut\.'), '.shortcut.'),
    (re.compile(r'\.pos_embed\.rel_(height|width)$'), r'.pos_embed.\1_rel'),
    (re.compile(r'\.post_attn\.bn\.'), '.post_attn.'),
    (re.compile(r'^classifier\.1\.'), 'head.fc.'),
)
PADDLE_NAME_TABLE = 'StructuredToParameterName@@'   # paddle.save adds it; it is no parameter


def rename(key):
    """A key of PaddleViT's HaloNet -> our key; our own keys stay as they are."""
    for pattern, replacement in PADDLEVIT:
        key = pattern.sub(replacement, key)
    return key


def load_state_dict(model, state_dict, load, partial=False):
    """Translate, check and cast `state_dict`, then hand it to `load`, Paddle's own set_state_dict of `model`.

    Returns (missing keys, unexpected keys), both empty unless `partial`. Raises ValueError as HaloNet.set_state_dict.
    """
    state = {rename(key): value for key, value in state_dict.items() if key != PADDLE_NAME_TABLE}
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    misshapen = [f'{key}: {list(state[key].shape)} in the file, {list(wanted[key].shape)} in the model'
                 for key in wanted if key in state and list(state[key].shape) != list(wanted[key].shape)]
    if (missing or unexpected or misshapen) and not partial:
        raise ValueError('the weights do not fit the model, and nothing was loaded' + ''.join(
            f'\n  {title} ({len(keys)}): ' + ', '.join(keys[:20]) + (', ...' if len(keys) > 20 else '')
            for title, keys in (('missing', missing), ('unexpected', unexpected), ('other shape', misshapen)) if keys))
    fitting = {key: state[key] for key in wanted if key in state and list(state[key].shape) == list(wanted[key].shape)}
    load({key: value.astype(str(wanted[key].numpy().dtype)) for key, value in fitting.items()})
    return [key for key in wanted if key not in fitting], unexpected


class _ArraysOnly(pickle.Unpickler):
    """An unpickler for what paddle.save writes. Any other global is refused by name, before it is called."""

    ALLOWED = {('numpy', 'ndarray'), ('numpy', 'dtype'), ('collections', 'OrderedDict'), ('_codecs', 'encode'),
               ('builtins', 'tuple'), ('builtins', 'slice'), ('builtins', 'set')} | {
        (f'numpy.{core}.multiarray', name) for core in ('core', '_core') for name in ('_reconstruct', 'scalar')}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f'it contains {module}.{name}, and a weight file may hold arrays only')
        return super().find_class(module, name)


def read_pickle(path):
    """What paddle.save wrote to `path`, tensors as numpy arrays. Raises ValueError, naming the file, for anything else."""
    with open(path, 'rb') as file:
        try:
            return _ArraysOnly(file).load()
        except Exception as error:                  # a damaged pickle may raise nearly anything
            raise ValueError(f'{path}: not a readable weight file: {error or type(error).__name__}') from None


def read(path):
    """The state dict {key: numpy array} in a .pdparams file.

    Raises FileNotFoundError, and ValueError for a file that is damaged or holds something else.
    """
    content = read_pickle(path)
    state = {key: value for key, value in content.items() if key != PADDLE_NAME_TABLE} if isinstance(content, dict) else {}
    if not state or not all(isinstance(value, np.ndarray) for value in state.values()):
        raise ValueError(f'{path}: expected a state dict of arrays, as model.state_dict() gives')
    return {key: _from_bfloat16(value) if value.dtype == np.uint16 else value for key, value in state.items()}


def _from_bfloat16(bits):
    """paddle.save writes bfloat16 as the uint16 of the same bits: the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def load_pretrained(model, path):
    """Load the weight file `path` (its .pdparams ending may be left out) into `model`, strictly.

    Raises FileNotFoundError, and ValueError, naming the file, where it is damaged or does not fit.
    """
    found = next((name for name in (path, f'{path}.pdparams') if os.path.isfile(name)), None)
    if not found:
        raise FileNotFoundError(f'-pretrained {path}: no such file')
    state = read(found)
    try:
        model.set_state_dict(state)
    except ValueError as error:
        raise ValueError(f'{found}: {error}') from None
