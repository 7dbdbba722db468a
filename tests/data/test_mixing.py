"""Erasing, mixup and cutmix of a batch: against arithmetic by hand and timm's documented distributions."""
import collections
import math

import numpy as np
import paddle
import pytest
from reference import timm_recipes

from data import mixing


def rng(*key):
    return np.random.default_rng([1, *key])


# random erasing

def test_erase_boxes_have_their_probability_and_fit():
    draw = rng()
    boxes = [mixing.erase_box(draw, 300, 500, 0.3) for _ in range(8000)]
    assert abs(np.mean([box is not None for box in boxes]) - 0.3) < 0.02
    top, left, height, width = np.array([box for box in boxes if box]).T
    assert (top >= 0).all() and (top + height <= 300).all() and (left >= 0).all()
    assert (left + width <= 500).all()
    assert max(top + height) == 300 and max(left + width) == 500
    assert mixing.erase_box(rng(), 1, 1, 1.0) is None


def test_erase_areas_and_ratios():
    draw = rng()
    boxes = np.array([mixing.erase_box(draw, 2000, 2000, 1.0) for _ in range(4000)])
    area, ratio = boxes[:, 2] * boxes[:, 3] / 4e6, np.log(boxes[:, 2] / boxes[:, 3])
    # an area above 0.3 with the most oblong ratio does not fit: repeating such draws shifts the means
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.006 and area.min() > 0.0199 and area.max() < 0.3335
    assert abs(ratio.mean()) < 0.04 and abs(ratio.std() - 2 * math.log(1 / 0.3) / 12 ** 0.5) < 0.03


def batch(size, height=12, width=20, seed=0):
    return paddle.to_tensor(rng(seed).standard_normal((size, 3, height, width), dtype=np.float32))


def test_erase_fills_its_box_only():
    images = batch(3)
    before = images.numpy()
    boxes = [(2, 5, 4, 10), None, (0, 0, 12, 1)]
    zeros = mixing.erase(images, boxes, [rng(i) for i in range(3)], 'const').numpy()
    expected = before.copy()
    expected[0, :, 2:6, 5:15] = 0
    expected[2, :, :, 0] = 0
    assert np.array_equal(zeros, expected) and np.array_equal(images.numpy(), before)
    noise = mixing.erase(images, boxes, [rng(i) for i in range(3)], 'pixel').numpy()
    assert np.array_equal(noise[zeros != 0], before[zeros != 0])
    expected[0, :, 2:6, 5:15] = rng(0).standard_normal((3, 4, 10), dtype=np.float32)
    assert np.array_equal(noise[:2], expected[:2])


def test_erase_noise_is_standard_normal():
    noise = mixing.erase(paddle.zeros([1, 3, 100, 100]), [(0, 0, 100, 100)], [rng()], 'pixel').numpy()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs(np.corrcoef(noise.reshape(3, -1))[0, 1]) < 0.05


def test_erase_batch_depends_on_the_sample_not_on_its_batch():
    options = {'seed': 3, 'probability': 0.6, 'mode': 'pixel'}
    images, indices = batch(8), np.array([7, 3, 90, 2, 11, 5, 6, 0])
    whole = mixing.erase_batch(images, indices, 2, **options).numpy()
    parts = [mixing.erase_batch(images[i:i + 4], indices[i:i + 4], 2, **options).numpy() for i in (0, 4)]
    assert np.array_equal(whole, np.concatenate(parts))
    erased = (whole != images.numpy()).any((1, 2, 3))
    assert 0 < erased.sum() < 8
    assert not np.array_equal(whole, mixing.erase_batch(images, indices, 3, **options).numpy())
    assert mixing.erase_batch(images, indices, 2, seed=3, probability=0, mode='pixel') is images


# targets, mixup, cutmix

def test_one_hot_equals_arithmetic():
    targets = mixing.one_hot(paddle.to_tensor([2, 0]), 4, 0.2)
    assert targets.dtype == paddle.float32
    np.testing.assert_allclose(targets.numpy(), [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]],
                               rtol=1e-6)
    assert mixing.one_hot(paddle.to_tensor([1]), 3).numpy().tolist() == [[0, 1, 0]]


def mixed_by(mix, images, targets, draw):
    """`mix` with samples named 10, 11, ..."""
    return mix(images, targets, draw, paddle.arange(10, 10 + len(images)))


def mixing_case(size=5):
    images, targets = batch(size), mixing.one_hot(paddle.arange(size), 9, 0.1)
    return images, targets, [1, 0, 3, 2, 4]


def test_mixup_equals_arithmetic():
    images, targets, partner = mixing_case()
    before = images.numpy(), targets.numpy()
    mixed, soft = mixed_by(mixing.make_mix(0.4, 0), images, targets, rng(2))
    draw = rng(2)
    draw.random()                                             # whether to mix at all
    lam = draw.beta(0.4, 0.4)
    assert 0.05 < lam < 0.95
    np.testing.assert_allclose(mixed.numpy(), before[0] * lam + before[0][partner] * (1 - lam), rtol=1e-5,
                               atol=1e-6)
    np.testing.assert_allclose(soft.numpy(), before[1] * lam + before[1][partner] * (1 - lam), rtol=1e-5,
                               atol=1e-7)
    assert np.array_equal(images.numpy(), before[0]) and np.array_equal(targets.numpy(), before[1])


def test_cutmix_on_oblong_images_equals_arithmetic(monkeypatch):
    def fixed_box(draw, height, width, lam):
        return (2, 5, 6, 16), 1 - 30 / (height * width)

    monkeypatch.setattr(mixing, 'cut_box', fixed_box)
    images, targets, partner = mixing_case()
    before = images.numpy(), targets.numpy()
    mixed, soft = mixed_by(mixing.make_mix(0, 1.0), images, targets, rng())
    expected = before[0].copy()
    expected[:, :, 2:5, 6:16] = before[0][partner][:, :, 2:5, 6:16]
    assert np.array_equal(mixed.numpy(), expected)
    np.testing.assert_allclose(soft.numpy(), before[1] * 0.875 + before[1][partner] * 0.125, rtol=1e-6)
    assert np.array_equal(images.numpy(), before[0]) and np.array_equal(targets.numpy(), before[1])


def test_cutmix_draws_its_box_over_the_whole_oblong_image():
    images, targets, partner = mixing_case()
    for seed in range(8):
        draw = rng(seed)
        draw.random()                                         # whether to mix at all
        (top, bottom, left, right), _ = mixing.cut_box(draw, 12, 20, draw.beta(1.0, 1.0))
        expected = images.numpy()
        expected[:, :, top:bottom, left:right] = images.numpy()[partner][:, :, top:bottom, left:right]
        mixed, _ = mixed_by(mixing.make_mix(0, 1.0), images, targets, rng(seed))
        assert np.array_equal(mixed.numpy(), expected)


def test_cut_boxes_have_their_area_and_corrected_lambda():
    draw = rng()
    boxes = [mixing.cut_box(draw, 102, 300, 0.75) for _ in range(3000)]
    top, bottom, left, right = np.array([box for box, _ in boxes]).T
    # sides times sqrt(1 - lambda)
    assert max(bottom - top) == 51 and max(right - left) == 150
    assert (top >= 0).all() and bottom.max() == 102 and (left >= 0).all() and right.max() == 300
    assert np.allclose([lam for _, lam in boxes], 1 - (bottom - top) * (right - left) / 30600)
    # the centre is uniform in the image: half of the boxes keep their height, half their width
    assert abs((bottom - top == 51).mean() - 0.5) < 0.04 and abs((right - left == 150).mean() - 0.5) < 0.04


@pytest.mark.parametrize('lam', [0.0, 1.0])
def test_cutmix_with_lambda_zero_and_one(lam):
    draw = rng()
    for _ in range(20):
        (top, bottom, left, right), true = mixing.cut_box(draw, 8, 6, lam)
        assert 0 <= top <= bottom <= 8 and 0 <= left <= right <= 6 and 0 <= true <= 1
        assert lam < 1 or true == 1


def test_extreme_lambdas_give_finite_results():
    images, targets, _ = mixing_case(4)
    for seed in range(30):
        # lambda is nearly always 0 or 1
        mixed, soft = mixed_by(mixing.make_mix(0.01, 0.01), images, targets, rng(seed))
        assert np.isfinite(mixed.numpy()).all() and np.allclose(soft.sum(1).numpy(), 1, atol=1e-5)


@pytest.mark.parametrize('mode', mixing.IMAGES_PER_DRAW)
@pytest.mark.parametrize('alphas', [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixing_does_not_depend_on_the_split_of_a_batch(alphas, mode):
    images, targets, _ = mixing_case(8)
    mix, indices = mixing.make_mix(*alphas, mode=mode), np.array([7, 3, 90, 2, 11, 5, 6, 0])
    changed = 0
    before = images.numpy(), targets.numpy()
    for seed in range(5):
        whole = mix(images, targets, rng(seed), indices)
        known = (np.isin(whole[0].numpy(), images.numpy()).all()
                 and np.isin(whole[1].numpy(), targets.numpy()).all())
        changed += not known
        parts = [mix(images[i:i + 4], targets[i:i + 4], rng(seed), indices[i:i + 4]) for i in (0, 4)]
        for all_at_once, *split in zip(whole, *parts):
            assert np.array_equal(all_at_once.numpy(), np.concatenate([part.numpy() for part in split]))
    assert changed >= 3 and np.array_equal(images.numpy(), before[0])
    assert np.array_equal(targets.numpy(), before[1])


@pytest.mark.parametrize('size', [8, 5])
@pytest.mark.parametrize('mode', ['pair', 'elem', 'half'])
def test_draws_for_pairs_and_images_equal_arithmetic(mode, size):
    """Compare each image with the draw of its own generator, over steps in which all kinds of draws occur."""
    images, targets, _ = mixing_case(size)
    partner, indices = [min(i ^ 1, size - 1) for i in range(size)], np.arange(10, 10 + size)
    kinds = collections.Counter()
    mix = mixing.make_mix(0.8, 1.0, 0.7, 0.5, mode)
    for seed in range(4):
        mixed, soft = (x.numpy() for x in mixed_by(mix, images, targets, rng(seed)))
        key = rng(seed).integers(2 ** 63)
        rows = range(0, size, 2) if mode == 'half' else range(size)
        assert len(mixed) == len(soft) == len(rows)
        for row, i in enumerate(rows):
            drawer = i if mode == 'elem' else i // 2 * 2
            lam, box = mix.draw(np.random.default_rng([key, indices[drawer]]), 12, 20)
            kinds['none' if lam == 1 else 'cutmix' if box else 'mixup'] += 1
            own, other = images.numpy()[i], images.numpy()[partner[i]]
            expected = own * lam + other * (1 - lam) if not box else own.copy()
            if box:
                top, bottom, left, right = box
                expected[:, top:bottom, left:right] = other[:, top:bottom, left:right]
                assert np.array_equal(mixed[row], expected)
            np.testing.assert_allclose(mixed[row], expected, rtol=1e-5, atol=1e-6)
            own, other = targets.numpy()[i], targets.numpy()[partner[i]]
            np.testing.assert_allclose(soft[row], own * lam + other * (1 - lam), atol=1e-6)
    assert len(kinds) == 3


@pytest.mark.parametrize('mode', mixing.IMAGES_PER_DRAW)
def test_lambdas_are_distributed_as_in_timm(mode):
    images, targets = paddle.zeros([4, 3, 16, 24]), paddle.eye(4)
    mix, kept = mixing.make_mix(0.2, 1.0, 0.8, 0.4, mode), []
    for i in range(1500):
        soft = mixed_by(mix, images, targets, rng(i))[1].numpy()
        kept.append([soft[0, 0], soft[1, 2 if mode == 'half' else 1]])
    # the sums are of float32: 1 may be a little more
    kept = np.array(kept)
    ours, timm_s = np.histogram(kept[:, 0].clip(0, 1), 10, (0, 1))[0] / 1500, timm_recipes(f'shares.{mode}')
    assert abs(ours - timm_s).max() < 0.04 and abs(ours.cumsum() - timm_s.cumsum()).max() < 0.05
    assert abs((abs(kept[:, 0] - kept[:, 1]) < 1e-6).mean() - timm_recipes(f'same.{mode}')) < 0.04


def test_mixup_and_cutmix_have_their_probabilities():
    images, targets, _ = mixing_case(2)
    mix, draw, counts = mixing.make_mix(1.0, 1.0, 0.6, 0.25), rng(), collections.Counter()
    for _ in range(800):
        mixed, soft = (tensor.numpy() for tensor in mixed_by(mix, images, targets, draw))
        copied = np.isin(mixed, images.numpy()).all()
        counts['none' if np.array_equal(soft, targets.numpy()) else 'cutmix' if copied else 'mixup'] += 1
    # a cut of no pixel counts here, too
    assert abs(counts['none'] / 800 - 0.4) < 0.06
    assert abs(counts['cutmix'] / 800 - 0.6 * 0.25) < 0.05


def test_no_mix_returns_its_inputs():
    images, targets, _ = mixing_case()
    for alphas in ((0, 0), (0.2, 1.0, 0.0)):
        mix = mixing.make_mix(*alphas)
        assert isinstance(mix, mixing.NoMix)
        mixed, soft = mixed_by(mix, images, targets, rng())
        assert mixed is images and soft is targets
