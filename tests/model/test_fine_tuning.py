"""Weights adapted to another number of classes and to other attention windows."""
import numpy as np
import paddle
import pytest
import reference as ref
from tiny_models import assert_holds, build_tiny, other_arrays

from config import get_config
from halonet import build_halonet
from model import weights


def hat(rows, new_rows):
    """Linear interpolation of a table as a matrix (new_rows, rows), from distances alone."""
    w, new_w = (rows + 1) // 2, (new_rows + 1) // 2
    old_offsets = np.arange(1 - w, w)
    at = np.arange(1 - new_w, new_w) * (w - 1) / (new_w - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - old_offsets))


@pytest.mark.parametrize('w, new_w', [(12, 14), (14, 12), (12, 23), (5, 4), (8, 12), (14, 14)])
def test_position_tables_are_interpolated_about_offset_0(w, new_w):
    table = np.random.default_rng(0).normal(size=(2 * w - 1, 3)).astype('float32')
    stretched = weights.stretch_table(table, 2 * new_w - 1)
    assert stretched.dtype == np.float32
    np.testing.assert_allclose(stretched, hat(2 * w - 1, 2 * new_w - 1) @ table, atol=1e-6)
    np.testing.assert_array_equal(
        stretched[[0, new_w - 1, -1]], table[[0, w - 1, -1]]
    )  # the ends and offset 0
    np.testing.assert_allclose(weights.stretch_table(table[::-1], 2 * new_w - 1), stretched[::-1], atol=1e-6)
    if new_w == 2 * w - 1:                          # every second row is an old one
        np.testing.assert_array_equal(stretched[::2], table)


def saved(model, path):
    paddle.save(model.state_dict(), str(path))
    return str(path)


def test_another_number_of_classes_gives_a_fresh_head(tmp_path, caplog):
    path = saved(ref.fill_seeded(build_tiny()), tmp_path / 'ten.pdparams')
    model = build_halonet(get_config(None, [*ref.TINY, 'MODEL.NUM_CLASSES', 3]))
    before = ref.arrays(model)
    with pytest.raises(ValueError, match=r'head\.fc\.weight: \[32, 10\] in the file, \[32, 3\] in the model'):
        weights.load_pretrained(model, path)
    assert_holds(model, before)
    with caplog.at_level('INFO'):
        weights.load_pretrained(model, path, fine_tune=True)
    assert caplog.messages == ['fresh head for 3 classes: the weights have one for 10']
    assert_holds(
        model,
        {
            key: before[key] if key.startswith('head.fc.') else array
            for key, array in weights.read(path).items()
        },
    )


@pytest.mark.parametrize('drop', [['head.fc.weight', 'head.fc.bias'], ['head.fc.weight'], ['head.fc.bias']])
def test_absent_classifier_gives_a_fresh_head_and_half_a_one_is_refused(tmp_path, caplog, drop):
    """A whole head may be missing; half a one is damage."""
    state = {key: array for key, array in other_arrays(build_tiny()).items() if key not in drop}
    paddle.save(state, str(tmp_path / 'features.pdparams'))
    model = build_tiny()
    if len(drop) == 1:
        with pytest.raises(ValueError, match=rf'missing \(1\): {drop[0]}'):
            weights.load_pretrained(model, str(tmp_path / 'features'), fine_tune=True)
        return
    before = ref.arrays(model)
    with caplog.at_level('INFO'):
        weights.load_pretrained(model, str(tmp_path / 'features'), fine_tune=True)
    assert caplog.messages == ['fresh head for 10 classes: the weights have none']
    assert_holds(model, {**state, **{key: before[key] for key in drop}})


@pytest.mark.parametrize('change', [['MODEL.HALO_SIZE', 2], ['MODEL.BLOCK_SIZE', 8], ['MODEL.BLOCK_SIZE', 2]])
def test_another_window_gives_interpolated_tables(tmp_path, caplog, change):
    path = saved(ref.fill_seeded(build_tiny()), tmp_path / 'a.pdparams')
    model, file = build_halonet(get_config(None, [*ref.TINY, *change])), weights.read(path)
    with pytest.raises(ValueError, match='other shape'):
        weights.load_pretrained(model, path)
    with caplog.at_level('INFO'):
        weights.load_pretrained(model, path, fine_tune=True)
    w = len(model.state_dict()['stages.1.0.self_attn.pos_embed.height_rel']) // 2 + 1
    assert sorted(caplog.messages) == [
        f'stages.1.{block}.self_attn.pos_embed.{side}_rel: interpolated from a window of 6 pixels '
        f'to one of {w}'
        for block in (0, 1)
        for side in ('height', 'width')
    ]
    for key, array in ref.arrays(model).items():
        np.testing.assert_allclose(
            array, hat(11, 2 * w - 1) @ file[key] if key.endswith('_rel') else file[key], atol=1e-6
        )


def test_fitting_weights_are_loaded_unchanged_and_nothing_is_logged(tmp_path, caplog):
    path, model = saved(ref.fill_seeded(build_tiny()), tmp_path / 'a.pdparams'), build_tiny()
    with caplog.at_level('INFO'):
        weights.load_pretrained(model, path, fine_tune=True)
    assert_holds(model, weights.read(path))
    assert not caplog.messages


@pytest.mark.parametrize('change, message', [
    (['MODEL.HEADS', [0, 4]], r'height_rel: \[11, 4\] in the file, \[11, 2\] in the model'),
    (['MODEL.WIDTHS', [16, 64]], r'other shape \(42\): stages'),
    (['MODEL.WIDTHS', [16, 64], 'MODEL.NUM_CLASSES', 3], r'other shape \(43\): stages'),
])
def test_other_misfits_are_refused_when_fine_tuning(tmp_path, change, message):
    path, model = (
        saved(build_tiny(), tmp_path / 'a.pdparams'),
        build_halonet(get_config(None, [*ref.TINY, *change])),
    )
    before = ref.arrays(model)
    with pytest.raises(ValueError, match=f'(?s)^{path}: the weights do not fit.*{message}'):
        weights.load_pretrained(model, path, fine_tune=True)
    assert_holds(model, before)


# ---- other channels than RGB

GREY = ['DATA.CHANNELS', 1, 'DATA.MEAN', [0.5], 'DATA.STD', [0.5]]


@pytest.mark.parametrize('stem', ['3x3', 'tiered'])
def test_weights_of_rgb_give_a_grey_image_the_same_logits(tmp_path, caplog, stem):
    opts = [*ref.TINY, 'MODEL.STEM', stem, 'MODEL.STEM_POOL', stem == 'tiered']
    rgb = ref.fill_seeded(build_halonet(get_config(None, opts))).eval()
    path = saved(rgb, tmp_path / 'rgb.pdparams')
    grey = build_halonet(get_config(None, [*opts, *GREY])).eval()
    with pytest.raises(ValueError, match=r'\[\d+, 3, 3, 3\] in the file, \[\d+, 1, 3, 3\] in the model'):
        weights.load_pretrained(grey, path)
    with caplog.at_level('INFO'):
        weights.load_pretrained(grey, path, fine_tune=True)
    assert 'adapted from RGB to 1 channels' in caplog.text
    images = ref.seeded_images((2, 1, 32, 32))
    np.testing.assert_allclose(ref.run(grey, images), ref.run(rgb, images.repeat(3, axis=1)), atol=1e-4)


@pytest.mark.parametrize('channels', [2, 4, 5, 6, 7])
def test_weights_for_more_channels_repeat_those_of_rgb(channels):
    """timm's rule. An image whose channels are equal then gives what it gave in RGB, for multiples of 3."""
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype('float32')
    adapted = weights.adapt_stem(weight, channels)
    assert adapted.shape == (4, channels, 3, 3) and adapted.dtype == np.float32
    for i in range(channels):
        np.testing.assert_allclose(adapted[:, i], weight[:, i % 3] * 3 / channels, rtol=1e-6)
    if channels % 3 == 0:
        np.testing.assert_allclose(adapted.sum(1), weight.sum(1), atol=1e-5)


def test_other_stems_are_not_adapted(tmp_path):
    """Weights for four channels fit four channels, and no others."""
    four = get_config(None, [*ref.TINY, 'DATA.CHANNELS', 4, 'DATA.MEAN', [0.5], 'DATA.STD', [0.5]])
    path = saved(build_halonet(four), tmp_path / 'four.pdparams')
    weights.load_pretrained(build_halonet(four), path, fine_tune=True)
    for opts in ([], GREY):
        with pytest.raises(ValueError, match=r', 4, 3, 3\] in the file'):
            weights.load_pretrained(build_halonet(get_config(None, [*ref.TINY, *opts])), path, fine_tune=True)
