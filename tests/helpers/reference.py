"""References of the tests: timm's results, tables of published key names, a slow and plain attention.

fixtures/timm_logits.npz: `NAME.HxW.logits` (2, 1000) of timm 1.0.31's halo models in eval mode on
`seeded_images((2, 3, H, W))`, every float32 entry of the state dict set to `seeded_weight(key, shape)`;
`NAME.keys`: JSON {timm's key: shape} as bytes.
fixtures/timm_h1_float64.npz: `logits` of halonet_h1, the same but for model and images in float64.
fixtures/paddlevit_keys.npz: NAME -> JSON {key: shape} as bytes, of the .pdparams files that PaddleViT
published.
fixtures/timm_recipes.npz: what timm 1.0.31 makes of a few numbers in training; made by make_timm_recipes.py.
TIMM_LOSSES: timm's halonet26t in train mode from the same weights, on one batch; see
test_halonet.test_training_trajectory.
"""
import json
import zlib
from pathlib import Path

import numpy as np
import paddle

FIXTURES = Path(__file__).parent.parent / 'fixtures'
TIMM_LOSSES = [7.204110145568848, 6.326181411743164, 5.623709201812744, 4.997720718383789,
               4.421803951263428, 3.878613233566284]
TINY = [                                            # for images of 32x32 and more
    'MODEL.STAGES', ['conv', 'halo*2'], 'MODEL.WIDTHS', [16, 32], 'MODEL.STRIDES', [1, 2],
    'MODEL.HEADS', [0, 2], 'MODEL.STEM_WIDTH', 8, 'MODEL.BLOCK_SIZE', 4, 'MODEL.HALO_SIZE', 1,
    'MODEL.NUM_CLASSES', 10]


with np.load(FIXTURES / 'timm_logits.npz') as _file:
    TIMM_NAMES = sorted(key[:-len('.keys')] for key in _file.files if key.endswith('.keys'))


def timm_logits(name):
    with np.load(FIXTURES / 'timm_logits.npz') as file:
        return file[f'{name}.logits']


def timm_h1_float64():
    with np.load(FIXTURES / 'timm_h1_float64.npz') as file:
        return file['logits']


def timm_keys(name):
    with np.load(FIXTURES / 'timm_logits.npz') as file:
        return json.loads(bytes(file[f'{name}.keys']))


def timm_recipes(prefix):
    """Return the entry `prefix` of timm_recipes.npz, or {rest of the key: value} of those below it."""
    def value(key):
        return json.loads(bytes(file[key])) if file[key].dtype == np.uint8 else file[key]

    with np.load(FIXTURES / 'timm_recipes.npz') as file:
        if prefix in file:
            return value(prefix)
        return {key[len(prefix) + 1:]: value(key) for key in file if key.startswith(prefix + '.')}


def paddlevit_keys(name):
    with np.load(FIXTURES / 'paddlevit_keys.npz') as file:
        return json.loads(bytes(file[name]))


def seeded_images(shape, seed=0):
    """Standard normal float32 pixels that depend on `seed` and the shape alone."""
    return np.random.default_rng([seed, 7]).standard_normal(shape).astype('float32')


def seeded_weight(key, shape, seed=0):
    """Return the float32 array for timm's entry `key`: its kind sets the distribution, its name the values.

    Attention is sharp (queries have a gain of 6), so that a wrong key or offset shows. Residual branches are
    small (0.3).
    """
    def deviation():
        if key.endswith('_rel'):
            return shape[-1] ** -0.5
        if len(shape) == 1:                         # biases, running means
            return 0.1
        return (6 if '.self_attn.q.' in key else 2 ** 0.5) * np.prod(shape[1:]) ** -0.5

    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    if key.endswith('running_var'):
        value = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 1 and key.endswith('weight'):
        value = (0.3 if 'conv3_1x1' in key else 0.8) * rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.normal(0, deviation(), shape)
    return value.astype('float32')


def timm_key(key):
    """A key of ours -> timm's: they differ in Paddle's own names of running statistics."""
    return key.replace('._mean', '.running_mean').replace('._variance', '.running_var')


def fill_seeded(model):
    """Give `model` the seeded weights by timm's names. Linear layers are (out, in) there, (in, out) here."""
    for key, tensor in model.state_dict().items():
        if key == 'head.fc.weight':
            tensor.set_value(seeded_weight(key, tuple(tensor.shape[::-1])).T)
        else:
            tensor.set_value(seeded_weight(timm_key(key), tuple(tensor.shape)))
    return model


def naive_halo_attention(q, kv, height_rel, width_rel, *, num_heads, block_size, halo_size, stride=1,
                         window='block'):
    """Compute attention.halo_attention in float64, one query pixel at a time, from positions alone."""
    (B, _, rows, columns), (_, _, H, W), d = q.shape, kv.shape, height_rel.shape[1]
    v, w, b = kv.shape[1] // num_heads - d, block_size + 2 * halo_size, block_size // stride
    out = np.zeros((B, num_heads * v, rows, columns))
    for image, n, y, x in np.ndindex(B, num_heads, rows, columns):
        query = q[image, n * d:(n + 1) * d, y, x]
        logits, values = np.full((w, w), -np.inf), np.zeros((w, w, v))
        for i, j in np.ndindex(w, w):               # the window starts halo_size before the block
            row, column = y // b * block_size - halo_size + i, x // b * block_size - halo_size + j
            if row >= H + halo_size or column >= W + halo_size:
                continue                            # padding of a map that does not divide into blocks
            if window == 'inside' and not (0 <= row < H and 0 <= column < W):
                continue
            if window == 'query' and max(abs(row - y * stride), abs(column - x * stride)) > halo_size:
                continue
            key = np.zeros(d)
            if 0 <= row < H and 0 <= column < W:    # outside: a key of zeros that takes part
                key, values[i, j] = np.split(kv[image, n * (d + v):(n + 1) * (d + v), row, column], [d])
            position = height_rel[i - y % b + w - 1] + width_rel[j - x % b + w - 1]
            logits[i, j] = query @ key / np.sqrt(d) + query @ position
        share = np.exp(logits - logits.max())
        out[image, n * v:(n + 1) * v, y, x] = np.tensordot(share / share.sum(), values, 2)
    return out


def arrays(model):
    """A copy of everything in the state dict of `model`, as {key: array}."""
    return {key: tensor.numpy().copy() for key, tensor in model.state_dict().items()}


def run(model, images):
    with paddle.no_grad():
        return model(paddle.to_tensor(images)).numpy()
