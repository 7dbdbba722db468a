"""A tiny HaloNet, other weights for it, and what PaddleViT calls them."""
import numpy as np
import reference as ref

from config import get_config
from halonet import build_halonet


def build_tiny():
    return build_halonet(get_config(None, ref.TINY))


def paddlevit_name(key):
    """A key of ours -> what PaddleViT calls it."""
    if key.startswith('stages.'):
        _, stage, block, rest = key.split('.', 3)
        key = f'stage{int(stage) + 1}.blocks.{block}.{rest}'
    for ours, theirs in (
        ('.shortcut.', '.creat_shortcut.'),
        ('height_rel', 'rel_height'),
        ('width_rel', 'rel_width'),
        ('.post_attn.', '.post_attn.bn.'),
        ('head.fc.', 'classifier.1.'),
    ):
        key = key.replace(ours, theirs)
    return key


def other_arrays(model):
    """Random arrays for everything in the state dict, unlike those in the model."""
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=array.shape).astype('float32') for key, array in ref.arrays(model).items()}


def assert_holds(model, expected):
    state = ref.arrays(model)
    assert state.keys() == expected.keys()
    for key in state:
        np.testing.assert_array_equal(state[key], expected[key], err_msg=key)
