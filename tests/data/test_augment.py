"""Augmentation of an image: against arithmetic, Pillow, timm's tables and documented distributions."""
import collections
import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from reference import timm_recipes

from data import augment, generators, operations

FILL = (124, 116, 104)


def rng(*key):
    return np.random.default_rng([1, *key])


def picture(width=40, height=30, seed=0):
    return Image.fromarray(rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pixels(image):
    return np.asarray(image).astype(int)


# generators

def test_generators_depend_on_their_keys_only():
    keys = itertools.product((0, 1), (generators.ERASE, generators.MIX), (0, 1), (0, 1))
    first = {key: generators.rng_for(*key).random() for key in keys}
    assert len(set(first.values())) == 16
    np.random.seed(0)
    assert all(generators.rng_for(seed, purpose, np.int64(epoch), index).random() == value
               for (seed, purpose, epoch, index), value in first.items())


# crop, flip, colours

def test_crop_equals_pillow_crop_and_bicubic_resize():
    image = picture()
    left, top, width, height = augment._crop_box(40, 30, rng(5), (0.08, 1.0), (3 / 4, 4 / 3))
    expected = image.crop((left, top, left + width, top + height)).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(augment.random_resized_crop(image, (16, 16), rng(5))), pixels(expected))


def test_crop_boxes_have_uniform_area_and_log_uniform_ratio():
    draw = rng()
    boxes = np.array([augment._crop_box(1600, 900, draw, (0.05, 0.25), (0.5, 2.0)) for _ in range(4000)])
    left, top, width, height = boxes.T
    area, ratio = width * height / (1600 * 900), np.log2(width / height)
    assert abs(area.mean() - 0.15) < 0.004 and abs(area.std() - 0.2 / 12 ** 0.5) < 0.003
    assert 0.0499 < area.min() < 0.051 and 0.249 < area.max() < 0.2503
    assert abs(ratio.mean()) < 0.05 and abs(ratio.std() - 2 / 12 ** 0.5) < 0.03 and abs(ratio).max() < 1.01
    assert (left >= 0).all() and (left + width <= 1600).all() and (top >= 0).all()
    assert (top + height <= 900).all()
    assert abs((left / (1600 - width)).mean() - 0.5) < 0.03
    assert abs((top / (900 - height)).mean() - 0.5) < 0.03


def test_crop_ratios_are_width_over_height():
    boxes = [augment._crop_box(900, 900, rng(i), (0.1, 0.2), (2.0, 3.0)) for i in range(100)]
    assert all(1.97 < width / height < 3.03 for _, _, width, height in boxes)


@pytest.mark.parametrize('size, box', [
    ((1000, 9), (494, 0, 12, 9)), ((9, 1000), (0, 494, 9, 12)), ((1, 1), (0, 0, 1, 1)),
    ((100, 90), (0, 0, 100, 90))])
def test_crop_falls_back_to_largest_centre_crop(size, box):
    # five times the area never fits
    assert augment._crop_box(*size, rng(), (5.0, 5.0), (3 / 4, 4 / 3)) == box


def test_image_one_pixel_high_is_cropped():
    assert all(augment.random_resized_crop(picture(200, 1), (8, 8), rng(i)).size == (8, 8) for i in range(20))


def test_flip_has_its_probability():
    image, draw = picture(), rng()
    flipped = [np.array_equal(pixels(augment.random_flip(image, draw, 0.3)), pixels(image)[:, ::-1])
               for _ in range(1000)]
    assert abs(np.mean(flipped) - 0.3) < 0.05
    assert augment.random_flip(image, rng(), 0) is image


class Recorder:
    """A backend that notes the operations it is asked for."""

    def __init__(self):
        self.calls = []

    def apply(self, image, name, value, sampling=None):
        self.calls.append((name, value))
        return image


def test_color_jitter_draws_all_orders_and_uniform_factors():
    recorder, draw = Recorder(), rng()
    calls = recorder.calls
    for _ in range(1200):
        augment.color_jitter(None, 0.4, draw, recorder)
    orders = collections.Counter(tuple(name for name, _ in calls[i:i + 3]) for i in range(0, len(calls), 3))
    assert len(orders) == 6 and all(150 < count < 250 for count in orders.values())
    for name in ('Brightness', 'Contrast', 'Color'):
        factors = np.array([factor for called, factor in calls if called == name])
        assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4 and abs(factors.mean() - 1) < 0.03
    calls.clear()
    for _ in range(200):
        augment.color_jitter(None, 2.0, draw, recorder)
    assert 0 <= min(factor for _, factor in calls) < 0.1 and 2.8 < max(factor for _, factor in calls) <= 3


def test_color_jitter_pixels():
    # contrast and saturation leave it; brightness multiplies
    gray = Image.new('RGB', (4, 4), (100, 100, 100))
    values = {int(pixels(augment.color_jitter(gray, 0.2, rng(i)))[0, 0, 0]) for i in range(100)}
    assert min(values) in range(80, 84) and max(values) in range(117, 121)
    image = picture()
    assert augment.color_jitter(image, 0, rng()) is image


# RandAugment: the strings

def test_usual_string_is_parsed():
    policy = augment.parse_auto_augment('rand-m9-mstd0.5-inc1')
    assert policy == augment.RandAugment(magnitude=9, deviation=0.5, increasing=True)
    assert policy.layers == 2 and policy.probability == 0.5 and policy.weights is None
    assert policy.largest == 10
    assert policy.ops == (
        'AutoContrast', 'Equalize', 'Invert', 'Rotate', 'Posterize', 'Solarize', 'SolarizeAdd', 'Color',
        'Contrast', 'Brightness', 'Sharpness', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')


@pytest.mark.parametrize('text, expected', [
    ('rand', {}),
    ('rand-m7-n3-p0.8', {'magnitude': 7, 'layers': 3, 'probability': 0.8}),
    ('rand-inc0-mmax15-m12', {'largest': 15, 'magnitude': 12}),
    ('rand-mstd100', {'deviation': 100.0}),
    ('rand-mstd101-inc1', {'deviation': math.inf, 'increasing': True}),
    ('rand-t3a', {'ops': ('Solarize', 'Desaturate', 'GaussianBlur'), 'increasing': True}),
])
def test_options_of_strings_are_parsed(text, expected):
    assert augment.parse_auto_augment(text) == augment.RandAugment(**expected)


@pytest.mark.parametrize('text, weights', [
    ('rand-w0', {'Rotate': 0.3, 'Brightness': 0.005}),
    ('rand-tweights', {'Rotate': 3 / 10.1, 'Invert': 0.05 / 10.1}),
    ('rand-t3aw', {'GaussianBlur': 6 / 33, 'Invert': 1 / 33})])
def test_weights_of_operations_sum_to_one(text, weights):
    policy = augment.parse_auto_augment(text)
    assert sum(policy.weights) == pytest.approx(1) and len(policy.weights) == len(policy.ops)
    assert policy.increasing == (text != 'rand-w0')
    for name, weight in weights.items():
        assert policy.weights[policy.ops.index(name)] == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize('text', [
    '', 'augmix-m5', 'original-m9', 'v0-inc1', 'v1',
    'rand-', 'rand-m', 'rand-m9-x3', 'rand-m9-m8', 'rand-m-3', 'rand-n0', 'rand-n1.5', 'rand-p1.5',
    'rand-inc2', 'rand-mmax0', 'rand-w1', 'rand-tother', 'rand-w0-tweights', 'rand-n14-w0', 'rand m9',
    'rand-m9\n', 'rand-m²'])
def test_wrong_strings_are_refused_with_the_grammar(text):
    with pytest.raises(ValueError, match='rand-m9-mstd0.5-inc1') as error:
        augment.parse_auto_augment(text)
    assert repr(text) in str(error.value)


# AutoAugment

@pytest.mark.parametrize('name', ['original', 'originalr', 'v0', 'v0r', '3a'])
def test_policies_equal_timm(name):
    policy = augment.parse_auto_augment(name)
    expected = [[(op.replace('Rel', ''), chance, level) for op, chance, level in choice]
                for choice in timm_recipes('policies')[name]]
    assert [[*choice] for choice in policy.choices] == expected and policy.deviation == 0
    assert augment.parse_auto_augment(f'{name}-mstd0.5') == augment.AutoAugment(policy.choices, 0.5)
    assert augment.parse_auto_augment(f'{name}-mstd101').deviation == 101               # unlike rand-mstd101


def test_choices_of_a_policy_are_drawn_uniformly_and_in_order(monkeypatch):
    drawn = record(monkeypatch, '3a', 1500)
    counts = collections.Counter(image[0] for image in drawn)
    assert counts.keys() == {('Solarize', 5), ('Desaturate', 10), ('GaussianBlurRand', 10)}
    assert min(counts.values()) > 430
    drawn = record(monkeypatch, 'v0', 5000)
    # one choice starts so, always applied
    turned = [image for image in drawn if image[0:1] == [('Rotate', 7)]]
    assert abs(len(turned) / 5000 - 1 / 25) < 0.01
    assert {len(image) for image in turned} == {1, 2}
    assert all(image[1:] in ([], [('TranslateY', 9)]) for image in turned)
    assert abs(np.mean([len(image) == 2 for image in turned]) - 0.8) < 0.1
    choices = augment.parse_auto_augment('v0').choices
    expected = sum(chance for choice in choices for _, chance, _ in choice) / 25
    assert abs(sum(map(len, drawn)) / 5000 - expected) < 0.03


def test_magnitudes_of_a_policy_deviate(monkeypatch):
    images = record(monkeypatch, '3a-mstd0.5')
    drawn = np.array([magnitude for image in images for name, magnitude in image if name == 'Solarize'])
    assert abs(np.median(drawn) - 5) < 0.06 and abs(drawn.std() - 0.5) < 0.04


# RandAugment: what is drawn

def record(monkeypatch, text, images=3000):
    """[[(operation, magnitude), ...] of each image] for a policy."""
    drawn = []
    monkeypatch.setattr(augment, 'apply_op',
                        lambda image, name, magnitude, *rest, **options: drawn[-1].append((name, magnitude)))
    draw, policy = rng(), augment.parse_auto_augment(text)
    for _ in range(images):
        drawn.append([])
        policy(None, draw)
    return drawn


def test_operations_are_drawn_uniformly(monkeypatch):
    drawn = record(monkeypatch, 'rand-m9-n3-p0.4')
    counts = collections.Counter(name for image in drawn for name, _ in image)
    expected = 3000 * 3 * 0.4 / 15
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    # one fair draw in a thousand is above
    assert len(counts) == 15 and chi_square < 36.1
    assert abs(sum(counts.values()) / 9000 - 0.4) < 0.02
    assert any(len({name for name, _ in image}) < len(image) for image in drawn)      # with replacement
    assert {magnitude for image in drawn for _, magnitude in image} == {9}


def test_weighted_operations_are_drawn_without_replacement(monkeypatch):
    drawn = record(monkeypatch, 'rand-n3-p1-tweights')
    assert all(len({name for name, _ in image}) == 3 for image in drawn)
    first = collections.Counter(image[0][0] for image in drawn)
    assert abs(first['Rotate'] / 3000 - 3 / 10.1) < 0.03 and abs(first['ShearX'] / 3000 - 2 / 10.1) < 0.03


def magnitudes(monkeypatch, text):
    return np.array([magnitude for image in record(monkeypatch, text) for _, magnitude in image])


def test_magnitudes_are_clipped_normal(monkeypatch):
    drawn = magnitudes(monkeypatch, 'rand-m9-mstd0.5-p1')
    assert drawn.max() == 10 and abs((drawn == 10).mean() - 0.0228) < 0.008           # 2 deviations above
    assert abs(np.median(drawn) - 9) < 0.03 and abs(np.percentile(drawn, 15.87) - 8.5) < 0.04
    assert magnitudes(monkeypatch, 'rand-m1-mstd2-p1').min() == 0
    assert magnitudes(monkeypatch, 'rand-m14-mmax15-p1').max() == 14


def test_magnitudes_are_uniform_for_infinite_deviation(monkeypatch):
    drawn = magnitudes(monkeypatch, 'rand-m8-mstd101-p1')
    assert np.allclose(np.percentile(drawn, [0, 25, 50, 75, 100]), [0, 2, 4, 6, 8], atol=0.2)
    assert drawn.max() <= 8


# RandAugment: the operations

@pytest.mark.parametrize('name, magnitude, plain, increasing', [
    ('Rotate', 9, {27, -27}, {27, -27}), ('Posterize', 9, {3}, {1}), ('Posterize', 10, {4}, {0}),
    ('Posterize', 0, {0}, {4}),
    ('Solarize', 9, {230}, {26}), ('Solarize', 10, {256}, {0}), ('Solarize', 20, {256}, {0}),
    ('SolarizeAdd', 9, {99}, {99}), ('SolarizeAdd', 20, {128}, {128}), ('Color', 9, {1.72}, {0.19, 1.81}),
    ('Contrast', 5, {1.0}, {0.55, 1.45}),
    ('Brightness', 10, {1.9}, {0.1, 1.9}), ('Sharpness', 0, {0.1}, {1.0}),
    ('Brightness', 20, {3.7}, {0.1, 2.8}),
    ('ShearX', 9, {0.27, -0.27}, {0.27, -0.27}), ('ShearY', 10, {0.3, -0.3}, {0.3, -0.3}),
    ('TranslateX', 9, {0.405, -0.405}, {0.405, -0.405}),
    ('TranslateY', 10, {0.45, -0.45}, {0.45, -0.45}), ('Desaturate', 0, {0.5}, {0.5}),
    ('Desaturate', 9, {0.05}, {0.05}),
    ('GaussianBlur', 9, {1.81}, {1.81}), ('GaussianBlur', 20, {2.0}, {2.0}),
])
def test_values_of_operations(name, magnitude, plain, increasing):
    draw, recorder = rng(), Recorder()
    for wanted, up in ((plain, False), (increasing, True)):
        recorder.calls.clear()
        for _ in range(60):
            augment.apply_op(None, name, magnitude, draw, fill=FILL, increasing=up, backend=recorder)
        assert {called for called, _ in recorder.calls} == {name}
        values = [value for _, value in recorder.calls]
        assert {round(value, 6) for value in values} == wanted
        shares = np.array(list(collections.Counter(values).values())) / 60
        assert (abs(shares - 1 / len(wanted)) < 0.25).all()


TIMM_ARGUMENTS = timm_recipes('arguments')
# timm's name: ours, or None for an operation in pixels
OURS = {'TranslateXRel': 'TranslateX', 'TranslateYRel': 'TranslateY', 'TranslateX': None, 'TranslateY': None}


@pytest.mark.parametrize('timm_name', TIMM_ARGUMENTS)
def test_values_of_operations_equal_timm(timm_name):
    name = OURS.get(timm_name, timm_name)
    if name is None:
        return
    increasing = name.endswith('Increasing') and name not in operations.OPS
    op = operations.OPS[name.replace('Increasing', '') if increasing else name]
    for level, expected in TIMM_ARGUMENTS[timm_name].items():
        draw = rng()
        ours = [float(op.draw_value(int(level) / 10, draw, increasing)) for _ in range(40)]
        if name == 'Desaturate':
            ours = [1 - factor for factor in ours]            # timm takes it from 1 later on
        # timm draws the radius later on, from 0.1 to twice the argument
        if name == 'GaussianBlurRand':
            ends = sorted([0.1, 2 * expected[0]])
            assert ends[0] <= min(ours) and max(ours) <= ends[1]
            assert max(ours) - min(ours) > 0.8 * (ends[1] - ends[0])
        else:
            np.testing.assert_allclose(sorted({round(value, 9) for value in ours}), expected, atol=1e-8)


def test_values_of_all_operations_are_checked():
    checked = test_values_of_operations.pytestmark[0].args[1]
    without_value = {'AutoContrast', 'Equalize', 'Invert'}
    assert {row[0] for row in checked} | without_value | TIMM_ARGUMENTS.keys() >= set(operations.OPS)
    assert all(operations.OPS[name].value is None for name in without_value)


def by_hand(name, value):
    """(image -> expected pixels) of an operation: arithmetic where it is short, else Pillow's own."""
    x = pixels
    return {
        'Invert': lambda i: 255 - x(i),
        'Posterize': lambda i: x(i) // 2 ** (8 - value) * 2 ** (8 - value),
        'Solarize': lambda i: np.where(x(i) < value, x(i), 255 - x(i)),
        'SolarizeAdd': lambda i: np.where(x(i) < 128, np.minimum(x(i) + value, 255), x(i)),
        'AutoContrast': lambda i: x(ImageOps.autocontrast(i)),
        'Equalize': lambda i: x(ImageOps.equalize(i)),
        'Brightness': lambda i: x(ImageEnhance.Brightness(i).enhance(value)),
        'Contrast': lambda i: x(ImageEnhance.Contrast(i).enhance(value)),
        'Color': lambda i: x(ImageEnhance.Color(i).enhance(value)),
        'Desaturate': lambda i: x(ImageEnhance.Color(i).enhance(value)),
        'Sharpness': lambda i: x(ImageEnhance.Sharpness(i).enhance(value)),
        'GaussianBlur': lambda i: x(i.filter(ImageFilter.GaussianBlur(value))),
    }[name]


@pytest.mark.parametrize('name, value', [
    ('Invert', None), ('Posterize', 4), ('Posterize', 1), ('Posterize', 0), ('Posterize', 8),
    ('Solarize', 26), ('Solarize', 256), ('SolarizeAdd', 99), ('AutoContrast', None), ('Equalize', None),
    ('Brightness', 0.5), ('Contrast', 1.7), ('Color', 0.2),
    ('Desaturate', 0.05), ('Sharpness', 1.8), ('GaussianBlur', 1.5)])
def test_pixels_of_operations(name, value):
    # leaves room for autocontrast
    image = Image.fromarray((np.asarray(picture()) // 2 + 40).astype(np.uint8))
    before = pixels(image)
    assert np.array_equal(pixels(operations.PILLOW.apply(image, name, value)), by_hand(name, value)(image))
    assert np.array_equal(pixels(image), before)


def test_posterize_clips_bits_outside_the_range():
    image = picture()
    assert pixels(operations.PILLOW.apply(image, 'Posterize', -4)).max() == 0
    assert np.array_equal(pixels(operations.PILLOW.apply(image, 'Posterize', 12)), pixels(image))


def apply(image, name, value, resample=Image.Resampling.BILINEAR):
    return pixels(operations.PILLOW.apply(image, name, value, operations.Sampling(resample, FILL)))


def test_translate_moves_by_a_fraction_of_the_side():
    image = picture(40, 30)
    right = apply(image, 'TranslateX', -0.25)
    assert np.array_equal(right[:, 10:], pixels(image)[:, :-10]) and (right[:, :10] == FILL).all()
    up = apply(image, 'TranslateY', 0.1)
    assert np.array_equal(up[:-3], pixels(image)[3:]) and (up[-3:] == FILL).all()


def test_shear_moves_each_row_by_its_height():
    image = picture(40, 30)
    sheared = apply(image, 'ShearX', 1.0, Image.Resampling.NEAREST)
    for y in (0, 10, 29):                                     # pixel centre (x, y) + 0.5 reads at x + y + 1
        assert np.array_equal(sheared[y, :39 - y], pixels(image)[y, y + 1:])
        assert (sheared[y, 39 - y:] == FILL).all()
    turned = image.transpose(Image.Transpose.TRANSPOSE)
    assert np.array_equal(apply(turned, 'ShearY', 0.3), apply(image, 'ShearX', 0.3).swapaxes(0, 1))


def test_rotate_is_counter_clockwise_about_the_centre():
    image = picture(30, 30)
    assert np.array_equal(apply(image, 'Rotate', 90), np.rot90(pixels(image)))
    assert (apply(image, 'Rotate', 45)[0, 0] == FILL).all()


def test_affine_operations_draw_both_filters(monkeypatch):
    filters = []
    monkeypatch.setitem(operations.OPS, 'Rotate', operations.Op(
        lambda image, value, sampling: filters.append(sampling.resample)))
    draw = rng()
    for _ in range(200):
        augment.apply_op(None, 'Rotate', 9, draw, fill=FILL, increasing=True)
    counts = collections.Counter(filters)
    assert set(counts) == {Image.Resampling.BILINEAR, Image.Resampling.BICUBIC} and min(counts.values()) > 70


@pytest.mark.parametrize('text', [
    'rand-m10-mstd2-mmax30-inc1-p1', 'rand-m10-mstd2-mmax30-p1', 'rand-m10-n4-p1-t3aw', 'rand-n9-w0-p1',
    'original-mstd2',
    'v0r', '3a'])
def test_policies_run_on_any_size_without_changing_the_input(text):
    policy = augment.parse_auto_augment(text)
    for seed, size in enumerate([(1, 1), (7, 20), (32, 32)] * 20):
        image = picture(*size, seed)
        before = pixels(image)
        out = policy(image, rng(seed), FILL)
        assert out.size == size and out.mode == 'RGB' and np.array_equal(pixels(image), before)
        assert np.array_equal(pixels(out), pixels(policy(image, rng(seed), FILL)))
