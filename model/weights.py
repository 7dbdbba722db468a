"""Load weights into a HaloNet: translate the names of other projects, load strictly, adapt for fine-tuning.

model/hub.py finds the file and model/weight_files.py reads it.
"""
import re
from collections.abc import Iterable, Mapping
from typing import Any

from utils import log

import numpy as np
import paddle
from paddle import nn

from model import hub
from model.weight_files import PADDLE_NAME_TABLE, read, read_pickle  # noqa: F401  (for checkpoints)

Table = tuple[tuple[re.Pattern, str], ...]


def _table(pairs: Iterable[tuple[str, str]]) -> Table:
    """Compile pairs (old, new) of whole parts of keys for `rename`."""
    return tuple((re.compile(rf'(?<![^.]){re.escape(old)}(?![^.])'), new) for old, new in pairs)


PADDLEVIT_NAMES = (                                 # PaddleViT's, and ours, which are timm's
    ('stage1.blocks', 'stages.0'),
    ('stage2.blocks', 'stages.1'),
    ('stage3.blocks', 'stages.2'),
    ('stage4.blocks', 'stages.3'),
    ('creat_shortcut', 'shortcut'),
    ('pos_embed.rel_height', 'pos_embed.height_rel'),
    ('pos_embed.rel_width', 'pos_embed.width_rel'),
    ('post_attn.bn', 'post_attn'),
    ('classifier.1', 'head.fc'),
)
TIMM_NAMES = (('running_mean', '_mean'), ('running_var', '_variance'))     # statistics of a norm
PADDLEVIT, TIMM = _table(PADDLEVIT_NAMES), _table(TIMM_NAMES)
TO_PADDLEVIT = _table((ours, theirs) for theirs, ours in PADDLEVIT_NAMES)
TO_TIMM = _table((ours, theirs) for theirs, ours in TIMM_NAMES)
PADDLEVIT_KEY = re.compile(                         # every key of PaddleViT's two models
    r'stem\.conv[123]\.(conv\.weight|bn\.\w+)|'
    r'stage[1-4]\.blocks\.\d+\.(conv1_1x1|conv2_kxk|conv3_1x1|creat_shortcut)\.(conv\.weight|bn\.\w+)|'
    r'stage[1-4]\.blocks\.\d+\.self_attn\.((q|kv)\.weight|pos_embed\.rel_(height|width))|'
    r'stage[1-4]\.blocks\.\d+\.post_attn\.bn\.\w+|'
    r'classifier\.1\.(weight|bias)')
COUNTER = '.num_batches_tracked'                    # of PyTorch's batch norms, not used here
HEAD = ('head.fc.weight', 'head.fc.bias')
STEMS = ('stem.conv1.conv.weight', 'stem.conv.weight')                # the first convolution of a network
HEADS = 1 << 28                                     # bytes for a classifier of more classes than the model
SHOWN_KEYS = 3                                      # of each kind in a message


# ---- names

def rename(key: str, table: Table = PADDLEVIT + TIMM) -> str:
    """Translate a key of PaddleViT's or timm's models into ours; our own keys stay as they are."""
    for pattern, replacement in table:
        key = pattern.sub(replacement, key)
    return key


def to_ours(state: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a state dict of ours, PaddleViT's or timm's into ours: {key: array or tensor}.

    PyTorch's linear weights are (out, in), Paddle's are (in, out). They are the only matrices whose key
    ends with .weight: position tables end with _rel. Raises ValueError where two keys name the same
    parameter.
    """
    from_torch = any(TIMM[0][0].search(key) for key in state)
    ours: dict[str, Any] = {}
    twice = []
    for key, value in state.items():
        if key == PADDLE_NAME_TABLE or key.endswith(COUNTER):
            continue
        name = rename(key)
        if name in ours:
            twice.append(name)
        array = value if hasattr(value, 'astype') else np.asarray(value)
        ours[name] = _transposed(name, array) if from_torch else array
    if twice:
        raise ValueError('several entries stand for ' + ', '.join(dict.fromkeys(twice)))
    return ours


def to_timm(state: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a state dict of ours into timm's names and layout, without the counters of batches."""
    return {rename(key, TO_TIMM): _transposed(key, value) for key, value in state.items()}


def to_paddlevit(state: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a state dict of ours into PaddleViT's names. Raises ValueError for keys that it lacks."""
    renamed = {rename(key, TO_PADDLEVIT): value for key, value in state.items()}
    foreign = [key for key, name in zip(state, renamed) if not PADDLEVIT_KEY.fullmatch(name)]
    if foreign:
        raise ValueError(f'PaddleViT has no names for {len(foreign)} entries of this model '
                         f'({_first(foreign)}): its models are halonet_26t and halonet_50ts')
    return renamed


def _transposed(key: str, value: Any) -> Any:
    """Return a linear layer's weight transposed, and any other value as it is."""
    return value.T if key.endswith('.weight') and value.ndim == 2 else value


def _first(items: list[str]) -> str:
    """Join the first items of a list for a message."""
    dots = ', ...' if len(items) > SHOWN_KEYS else ''
    return ', '.join(items[:SHOWN_KEYS]) + dots


# ---- loading

def load_strictly(model: nn.Layer, state: Mapping[str, Any],
                  partial: bool = False) -> tuple[list[str], list[str]]:
    """Load a state dict with our names (see to_ours) into `model`: all of it, or nothing.

    state: {key: array or tensor}, cast to the dtypes of the model. Raises ValueError, with the keys, for
    missing and unexpected entries, other shapes and numbers that the model cannot hold. With `partial`,
    loads what fits. Returns (missing keys, unexpected keys), which are empty unless `partial`.
    """
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    misshapen = [key for key in wanted if key in state and list(state[key].shape) != list(wanted[key].shape)]
    if (missing or unexpected or misshapen) and not partial:
        shapes = [f'{key}: {list(state[key].shape)} in the file, {list(wanted[key].shape)} in the model'
                  for key in misshapen]
        raise ValueError('the weights do not fit the model, and nothing was loaded'
                         + _listed('missing', missing) + _listed('unexpected', unexpected)
                         + _listed('other shape', shapes))
    unset = {*missing, *misshapen}
    fitting = {key: _cast(key, state[key], wanted[key].dtype) for key in wanted if key not in unset}
    nn.Layer.set_state_dict(model, {**wanted, **fitting})       # Paddle warns of a key that is not there
    return [key for key in wanted if key in unset], unexpected


def _listed(title: str, items: list[str]) -> str:
    """Format one kind of misfit as a line of a message, or '' where there is none."""
    return f'\n  {title} ({len(items)}): {_first(items)}' if items else ''


def _cast(key: str, value: Any, dtype: paddle.dtype) -> Any:
    """Cast an array or tensor to a dtype. Raises ValueError for numbers that are not finite or not real."""
    if 'complex' in str(value.dtype):
        raise ValueError(f'{key} holds complex numbers; nothing was loaded')
    name = str(dtype).removeprefix('paddle.')
    with np.errstate(over='ignore'):
        if name == 'bfloat16':                      # numpy has none
            value = paddle.to_tensor(value.astype('float32')).astype(dtype)
            numbers = value.astype('float32')
        else:
            value = value.astype(name)
            numbers = value
    if not np.isfinite(np.asarray(numbers)).all():
        raise ValueError(f'{key} holds numbers that are not finite, or too large for {name}; '
                         'nothing was loaded')
    return value


def load_pretrained(model: nn.Layer, path: str, *, ema: bool = False, fine_tune: bool = False) -> None:
    """Load a weight file, a checkpoint or a model of the Hugging Face hub into `model`, strictly.

    path: a file of any format that `read` knows (its .pdparams ending may be left out), or a hub name
    such as timm/halonet26t.a1h_in1k. ema: load a checkpoint's averaged weights instead of the raw ones.
    fine_tune: `adapt` the weights first. A model without a classifier (num_classes 0) leaves the file's
    out. Raises FileNotFoundError, and ValueError, naming the file, where it is damaged or does not fit.
    """
    try:
        found = hub.find(path)
    except (ValueError, OSError) as error:
        raise type(error)(f'-pretrained {error}') from error
    wanted = model.state_dict()
    limit = 8 * sum(value.size for value in wanted.values()) + HEADS        # float64 is the largest dtype
    try:
        state = to_ours(read(found, ema, limit))
        state = {key: value for key, value in state.items() if key not in HEAD or key in wanted}
        if fine_tune:
            state = adapt(state, model)
        load_strictly(model, state)
    except ValueError as error:
        message = str(error)
        if not message.startswith(found):
            message = f'{found}: {message}'
        raise ValueError(message) from None


# ---- fine-tuning

def adapt(state: Mapping[str, Any], model: nn.Layer) -> dict[str, Any]:
    """Adapt a state dict with our names to the classes, image channels and attention windows of `model`.

    Another number of classes, or a file without a classifier: the model keeps its own, fresh head.
    Other channels than RGB: the first convolution is adapted. Another window: position tables are
    interpolated to its size. Each change is logged; nothing else is adapted.
    """
    wanted = model.state_dict()
    return {**state, **_fresh_head(state, wanted), **_adapted_stem(state, wanted),
            **_resized_tables(state, wanted)}


def _fresh_head(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the model's classifier where `state` has none or one for another number of classes."""
    if HEAD[0] not in wanted:                       # num_classes 0
        return {}
    features, classes = wanted[HEAD[0]].shape
    shape = tuple(state[HEAD[0]].shape) if HEAD[0] in state else ()
    is_absent = not any(key in state for key in HEAD)
    has_other_classes = len(shape) == 2 and shape[0] == features and shape[1] != classes
    if not is_absent and not has_other_classes:
        return {}
    old = 'none' if is_absent else f'one for {shape[1]}'
    log.info('fresh head for %d classes: the weights have %s', classes, old)
    return {key: wanted[key].numpy() for key in HEAD}


def _adapted_stem(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Adapt the first convolution of `state` where it is for RGB and the model's images are not."""
    key = next((key for key in STEMS if key in wanted and key in state), None)
    if key is None or len(state[key].shape) != 4:
        return {}
    found, channels = state[key].shape[1], wanted[key].shape[1]
    if found != 3 or channels == 3:
        return {}
    log.info('%s: adapted from RGB to %d channels', key, channels)
    return {key: adapt_stem(np.asarray(state[key]), channels)}


def adapt_stem(weight: np.ndarray, channels: int) -> np.ndarray:
    """Adapt the first convolution's weight (O, 3, h, w) to images of other channels: (O, channels, h, w).

    As timm's adapt_input_conv. One channel gets the sum over RGB, so a grey image gives the same as before.
    More channels repeat those of RGB, scaled by 3 / channels.
    """
    if channels == 1:
        return weight.sum(axis=1, keepdims=True)
    copies = -(-channels // 3)
    return np.tile(weight, (1, copies, 1, 1))[:, :channels] * weight.dtype.type(3 / channels)


def _resized_tables(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Interpolate the position tables of `state` whose window has another size in the model."""
    resized = {}
    for key, value in wanted.items():
        if not key.endswith('_rel') or key not in state:
            continue
        table = state[key]
        if table.ndim == 2 and len(table) != len(value) and table.shape[1] == value.shape[1]:
            resized[key] = stretch_table(table, len(value))
            log.info('%s: interpolated from a window of %d pixels to one of %d', key, len(table) // 2 + 1,
                     len(value) // 2 + 1)
    return resized


def stretch_table(table: np.ndarray, rows: int) -> np.ndarray:
    """Interpolate a table of relative positions (2w-1, d) linearly to another window: (rows, d).

    Offset 0 and the ends keep their values, so an offset stays the same fraction of the window, as in
    ViTDet and MViTv2. Windows grow with the image, and there the same part of the scene spans more
    pixels. Offsets kept in pixels would leave the new outer offsets, those across the halo, without a
    learnt value.
    """
    at = np.linspace(0, len(table) - 1, rows)
    columns = [np.interp(at, np.arange(len(table)), column) for column in table.T]
    return np.stack(columns, axis=1).astype(table.dtype)
