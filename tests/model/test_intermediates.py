"""Feature maps and classifiers by timm's names: what they return, and which map has which number."""
from functools import partial

import numpy as np
import paddle
import pytest
import reference as ref
from runs import ROOT

from config import get_config
from halonet import FeatureMaps, build_halonet, map_numbers

# strides and widths by timm 1.0.28: create_model(NAME).feature_info
TIMM = {
    'halonet_26t_256': [(2, 64), (4, 256), (8, 512), (16, 1024), (32, 2048)],
    'halonet_h3_320': [(2, 64), (4, 96), (8, 192), (16, 384), (32, 1024)],      # this one by the paper
}


def small(name):
    """The network of a config with one block in each stage."""
    config = get_config(f'{ROOT}/configs/{name}.yaml')
    stages = [stage.split('*')[0].split()[-1] for stage in config.MODEL.STAGES]
    config = get_config(f'{ROOT}/configs/{name}.yaml', ['MODEL.STAGES', stages])
    return ref.fill_seeded(build_halonet(config)).eval()


@pytest.mark.parametrize('name', TIMM)
def test_maps_are_those_of_the_parts(name):
    network, images = small(name), paddle.to_tensor(ref.seeded_images((2, 3, 64, 64)))
    last, maps = network.forward_intermediates(images)
    assert [(64 // found.shape[2], found.shape[1]) for found in maps] == TIMM[name]
    expected = network.features(images)
    for found, wanted in zip(maps[1:-1], expected):
        np.testing.assert_array_equal(found.numpy(), wanted.numpy())
    np.testing.assert_array_equal(last.numpy(), network.forward_features(images).numpy())
    np.testing.assert_array_equal(maps[-1].numpy(), last.numpy())
    np.testing.assert_array_equal(network.head(last).numpy(), network(images).numpy())
    if name == 'halonet_26t_256':                   # the stem's map is that before the pool
        before = network.stem.conv3(network.stem.conv2(network.stem.conv1(images)))
        np.testing.assert_allclose(maps[0].numpy(), before.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize('indices, numbers', [
    (None, [0, 1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (5, [0, 1, 2, 3, 4]), ([0, -1], [0, 4]), ((3, 1), [1, 3]),
    ((1, 1), [1]),
    ([], [])])
def test_indices_choose_as_in_timm(indices, numbers):
    assert map_numbers(5, indices) == numbers


@pytest.mark.parametrize('indices', [0, 6, -1, [5], [-6]])
def test_other_indices_are_refused(indices):
    with pytest.raises(IndexError):
        map_numbers(5, indices)


def test_classifier_is_replaced():
    network, images = small('halonet_26t_256'), paddle.to_tensor(ref.seeded_images((1, 3, 64, 64)))
    before = network.forward_features(images).mean([2, 3]).numpy()
    network.reset_classifier(7)
    assert network(images).shape == [1, 7]
    assert network.head.fc.weight.numpy().std() == pytest.approx(0.01, rel=0.1)
    network.reset_classifier(0)
    np.testing.assert_allclose(network(images).numpy(), before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_hub_gives_classifiers_and_feature_maps(tmp_path):
    weights = str(tmp_path / 'w.pdparams')
    load = partial(paddle.hub.load, ROOT, 'halonet_digits', source='local')
    digits = ref.fill_seeded(load())
    paddle.save(digits.state_dict(), weights)
    loaded = load(pretrained=weights, num_classes=3)
    images = paddle.to_tensor(ref.seeded_images((2, 3, 32, 32)))
    features = load(pretrained=weights, features_only=True, out_indices=[1, 3])
    for model in (digits, loaded, features):
        model.eval()
    assert loaded(images).shape == [2, 3]
    assert type(features).__name__ == FeatureMaps.__name__
    _, maps = digits.forward_intermediates(images, [1, 3])
    for found, wanted, info in zip(features(images), maps, features.feature_info):
        np.testing.assert_array_equal(found.numpy(), wanted.numpy())
        assert [32 // found.shape[2], found.shape[1]] == [info['stride'], info['width']]
    same = loaded.forward_features(images).numpy()
    np.testing.assert_array_equal(same, digits.forward_features(images).numpy())
