"""Weights, ours and foreign, into a HaloNet: finding or fetching the file, renaming, strict loading, adapting for fine-tuning."""
import http.client
import logging
import os
import re
import urllib.error
import urllib.request

import numpy as np
import paddle

from model.weight_files import PADDLE_NAME_TABLE, read, read_pickle  # noqa: F401  (checkpoints are read by the latter too)
from utils import log


def _table(pairs):
    """Pairs of whole parts of keys, old and new -> what rename takes."""
    return tuple((re.compile(rf'(?<![^.]){re.escape(old)}(?![^.])'), new) for old, new in pairs)


PADDLEVIT_NAMES = (                                 # its names and ours, which are timm's
    *((f'stage{n + 1}.blocks', f'stages.{n}') for n in range(4)),
    ('creat_shortcut', 'shortcut'),
    ('pos_embed.rel_height', 'pos_embed.height_rel'),
    ('pos_embed.rel_width', 'pos_embed.width_rel'),
    ('post_attn.bn', 'post_attn'),
    ('classifier.1', 'head.fc'),
)
TIMM_NAMES = (('running_mean', '_mean'), ('running_var', '_variance'))     # PyTorch's and Paddle's of batch-norm statistics
PADDLEVIT, TIMM = _table(PADDLEVIT_NAMES), _table(TIMM_NAMES)
TO_PADDLEVIT, TO_TIMM = (_table((ours, theirs) for theirs, ours in names) for names in (PADDLEVIT_NAMES, TIMM_NAMES))
PADDLEVIT_KEY = re.compile(                         # what its models, halonet_26t and halonet_50ts, consist of
    r'(stem\.conv[123]|stage[1-4]\.blocks\.\d+\.(conv1_1x1|conv2_kxk|conv3_1x1|creat_shortcut))\.(conv\.weight|bn\.\w+)|'
    r'stage[1-4]\.blocks\.\d+\.(self_attn\.((q|kv)\.weight|pos_embed\.rel_(height|width))|post_attn\.bn\.\w+)|'
    r'classifier\.1\.(weight|bias)')
COUNTER = '.num_batches_tracked'                    # of PyTorch's batch norms, of no use here
HEAD = ('head.fc.weight', 'head.fc.bias')
HEADS = 1 << 28                                     # bytes for a classifier of more classes than the model's
HUB_PREFIX = re.compile(r'^hf[-_]hub:')
HUB_NAME = re.compile(r'[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?')
HUB_FILES = ('model.safetensors', 'pytorch_model.bin')     # what timm's repositories hold, the safe one first
HUB_ERRORS = (                                      # of huggingface_hub, the special before the general
    ('GatedRepoError', 'wants the terms of this model accepted on its page, and your HF_TOKEN'),
    ('RepositoryNotFoundError', 'has no such public model; mind the spelling, or set HF_TOKEN for a private one'),
    ('RevisionNotFoundError', 'has no such revision of it'),
    ('LocalEntryNotFoundError', 'stopped answering; try again'),
    ('EntryNotFoundError', f'has neither {" nor ".join(HUB_FILES)} of it'),
    ('HFValidationError', 'has no models with such names; write OWNER/MODEL'),
)
ENDINGS = ('.pdparams', '.pdckpt', '.safetensors', '.pth', '.pt', '.tar', '.bin')


# ---- names

def rename(key, table=PADDLEVIT + TIMM):
    """A key of PaddleViT's or timm's models -> our key; our own keys stay as they are."""
    for pattern, replacement in table:
        key = pattern.sub(replacement, key)
    return key


def to_ours(state):
    """A state dict of ours, PaddleViT's or timm's -> ours: {key: array}.

    PyTorch's linear weights are (out, in) and Paddle's (in, out): they are the only matrices called weight in these
    models, position tables being called _rel. Raises ValueError where two keys mean the same parameter.
    """
    from_torch = any(TIMM[0][0].search(key) for key in state)
    entries = [(rename(key), value) for key, value in state.items() if key != PADDLE_NAME_TABLE and not key.endswith(COUNTER)]
    ours = {key: _transposed(key, value) if from_torch else value for key, value in entries}
    if len(ours) != len(entries):
        keys = [key for key, _ in entries]
        raise ValueError('several entries stand for ' + ', '.join(key for key in ours if keys.count(key) > 1))
    return ours


def to_timm(state):
    """Inverse of to_ours for timm: a state dict of ours -> timm's names and layout, without counters of batches."""
    return {rename(key, TO_TIMM): _transposed(key, value) for key, value in state.items()}


def to_paddlevit(state):
    """Inverse of to_ours for PaddleViT: a state dict of ours -> its names. Raises ValueError where it has none."""
    renamed = {rename(key, TO_PADDLEVIT): value for key, value in state.items()}
    foreign = [key for key, name in zip(state, renamed) if not PADDLEVIT_KEY.fullmatch(name)]
    if foreign:
        raise ValueError(f'PaddleViT has no names for {len(foreign)} entries of this model ({", ".join(foreign[:3])}'
                         + (', ...' if len(foreign) > 3 else '') + '): its models are halonet_26t and halonet_50ts')
    return renamed


def _transposed(key, value):
    return value.T if key.endswith('.weight') and value.ndim == 2 else value


# ---- loading

def load_state_dict(model, state_dict, load, partial=False):
    """Translate, check and cast `state_dict`, then hand it to `load`, Paddle's own set_state_dict of `model`.

    Returns (missing keys, unexpected keys), both empty unless `partial`. Raises ValueError as HaloNet.set_state_dict.
    """
    state = to_ours({key: value if hasattr(value, 'astype') else np.asarray(value) for key, value in state_dict.items()})
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    misshapen = [f'{key}: {list(state[key].shape)} in the file, {list(wanted[key].shape)} in the model'
                 for key in wanted if key in state and list(state[key].shape) != list(wanted[key].shape)]
    if (missing or unexpected or misshapen) and not partial:
        raise ValueError('the weights do not fit the model, and nothing was loaded' + ''.join(
            f'\n  {title} ({len(keys)}): ' + ', '.join(keys[:3]) + (', ...' if len(keys) > 3 else '')
            for title, keys in (('missing', missing), ('unexpected', unexpected), ('other shape', misshapen)) if keys))
    fitting = {key: state[key] for key in wanted if key in state and list(state[key].shape) == list(wanted[key].shape)}
    fitting = {key: _cast(key, value, wanted[key].dtype) for key, value in fitting.items()}
    load({**wanted, **fitting})                     # with what stays as it is: Paddle warns of each key that is not there
    return [key for key in wanted if key not in fitting], unexpected


def _cast(key, value, dtype):
    """A tensor or array in the model's dtype. Raises ValueError for what it cannot hold, and for what is no number."""
    if 'complex' in str(value.dtype):
        raise ValueError(f'{key} holds complex numbers; nothing was loaded')
    name = str(dtype).removeprefix('paddle.')
    with np.errstate(over='ignore'):
        if name == 'bfloat16':                      # numpy has none
            value = paddle.to_tensor(value.astype('float32')).astype(dtype)
            numbers = value.astype('float32')
        else:
            numbers = value = value.astype(name)
    if not np.isfinite(np.asarray(numbers)).all():
        raise ValueError(f'{key} holds numbers that are not finite, or too large for {name}; nothing was loaded')
    return value


def load_pretrained(model, path, *, ema=False, fine_tune=False):
    """Load a weight file, a checkpoint or a model of the Hugging Face hub into `model`, strictly.

    path: a file of any format that weight_files.read knows (its .pdparams ending may be left out), or a name such as
    timm/halonet26t.a1h_in1k. ema: a checkpoint's averaged weights instead of the raw ones. fine_tune: adapt(...) first.
    A model without a classifier (num_classes 0) leaves the file's out. Raises FileNotFoundError, and ValueError, naming the
    file, where it is damaged or does not fit.
    """
    try:
        found = find(path)
    except (ValueError, OSError) as error:
        raise type(error)(f'-pretrained {error}') from error
    try:
        wanted = model.state_dict()
        room = 8 * sum(value.size for value in wanted.values()) + HEADS      # float64 is the largest type of numbers
        state = to_ours(read(found, ema, room))
        state = {key: value for key, value in state.items() if key not in HEAD or key in wanted}
        model.set_state_dict(adapt(state, model) if fine_tune else state)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(found) else f'{found}: {error}') from None


# ---- fine-tuning

def adapt(state, model):
    """`state` with what another task or window size changes made to fit `model`, each change named in the log.

    Another number of classes, or a file without a classifier: the model's own, fresh head. Another attention window:
    position tables stretched to its size.
    """
    state, wanted = dict(state), model.state_dict()
    old, new = (tuple(values[HEAD[0]].shape) if HEAD[0] in values else () for values in (state, wanted))
    if len(new) == 2 and old != new and (len(old) == 2 and old[0] == new[0] or not any(key in state for key in HEAD)):
        state.update({key: wanted[key].numpy() for key in HEAD})
        log.info('fresh head for %d classes: the weights have %s', new[1], f'one for {old[1]}' if old else 'none')
    for key, value in wanted.items():
        table = state.get(key, value)
        if key.endswith('_rel') and table.ndim == 2 and len(table) != len(value) and table.shape[1] == value.shape[1]:
            state[key] = stretch_table(table, len(value))
            log.info('%s: interpolated from a window of %d pixels to one of %d', key, len(table) // 2 + 1, len(value) // 2 + 1)
    return state


def stretch_table(table, rows):
    """A table of relative positions (2w-1, d) for another window: (rows, d), linear between its neighbours.

    Offset 0 stays offset 0 and the ends stay the ends, so an offset keeps its share of the window, as in ViTDet and MViTv2:
    windows are enlarged with the image, where the same part of the scene spans more pixels. Keeping offsets in pixels
    instead would leave the new outer offsets, those across the halo, without any learnt value.
    """
    at = np.linspace(0, len(table) - 1, rows)
    return np.stack([np.interp(at, np.arange(len(table)), column) for column in table.T], axis=1).astype(table.dtype)


# ---- finding

def find(path):
    """The file that `path` means: itself, with .pdparams, or fetched from the hub. Raises FileNotFoundError, ValueError."""
    found = next((name for name in (path, f'{path}.pdparams') if os.path.isfile(name)), None)
    if found:
        return found
    if HUB_PREFIX.match(path) or HUB_NAME.fullmatch(path) and not path.endswith(ENDINGS) \
            and not os.path.exists(os.path.dirname(path)):
        return fetch(path)
    raise FileNotFoundError(f'{path}: no such file')


def fetch(name):
    """The weight file of the hub's model `name` ([hf-hub:]OWNER/MODEL[@REVISION]), from the cache where it is there already.

    huggingface_hub sees to HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN, and lets one of several processes download
    while the others wait. Raises ValueError, saying what is wrong.
    """
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError:
        raise ValueError(f'{name}: no such file; models of the Hugging Face hub need pip install huggingface_hub') from None
    for client in ('httpx', 'httpx2'):              # Paddle makes every request of theirs a line on the console
        logging.getLogger(client).setLevel(logging.WARNING)
    repo, _, revision = HUB_PREFIX.sub('', name).partition('@')
    problem = 'may not be asked (HF_HUB_OFFLINE)' if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)
    for file in HUB_FILES:
        try:
            return hf_hub_download(repo, file, revision=revision or None, local_files_only=bool(problem))
        except Exception as error:
            kinds, last = {kind.__name__ for kind in type(error).__mro__}, error
            if 'EntryNotFoundError' not in kinds:
                break                               # the other file has no better chance
    reason = next((text for kind, text in HUB_ERRORS if kind in kinds), f'fails: {type(last).__name__}: {last}')
    if problem and 'LocalEntryNotFoundError' in kinds:
        reason = f'{problem}, and the cache has no weights of it'
    raise ValueError(f'{name}: no such file, and the hub ({constants.ENDPOINT}) {reason}') from last


def _unreachable(url, seconds=10):
    """Why no HTTP server answers at `url` within `seconds`, or ''. huggingface_hub itself would try for minutes."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=seconds):
            return ''
    except urllib.error.HTTPError:
        return ''
    except (OSError, ValueError, http.client.HTTPException) as error:
        if 'SSL' in str(error):                     # huggingface_hub has certificates of its own
            return ''
        return f'cannot be reached ({getattr(error, "reason", error)}: look at the network, HF_ENDPOINT and the proxy)'
