"""The comparison with timm's trainer: both sides get the same recipe. The trainings run outside the tests."""
import pytest

from config import get_config
from dev.compare_timm import compare
from halonet import build_halonet, count_parameters


@pytest.mark.parametrize('name', compare.RECIPES)
@pytest.mark.parametrize('task', compare.TASKS)
def test_both_trainers_get_the_same_recipe(name, task, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(compare, 'run', lambda command, log, **_: commands.append(list(map(str, command))))
    sides = compare.Sides(tmp_path, tmp_path / 'python', tmp_path / 'timm')
    recipe = compare.RECIPES[name]

    compare.train_ours(sides, task, recipe, 3, tmp_path / 'run')
    compare.train_timm(sides, task, recipe, 3, tmp_path / 'run')

    ours, theirs = commands
    config = get_config(compare.CONFIG, ours[ours.index('-opts') + 1:])

    def flag(name):
        return theirs[theirs.index(f'--{name}') + 1]

    for key in recipe.keys() & compare.FLAGS.keys():
        group, option = key.split('.')
        assert flag(compare.FLAGS[key]) == str(config[group][option])
    assert recipe.keys() - compare.FLAGS.keys() <= {'TRAIN.LOSS'}
    assert ('--bce-loss' in theirs) == (config.TRAIN.LOSS == 'bce')
    assert int(flag('epochs')) + int(flag('warmup-epochs')) == config.TRAIN.NUM_EPOCHS
    assert int(flag('warmup-epochs')) == config.TRAIN.WARMUP_EPOCHS
    assert float(flag('smoothing')) == config.TRAIN.SMOOTHING
    assert int(flag('batch-size')) == config.DATA.BATCH_SIZE
    assert int(flag('seed')) == config.SEED == 3
    assert theirs[theirs.index('--input-size') + 1:][:3] == ['3', *2 * [str(config.DATA.IMAGE_SIZE)]]
    assert flag('model-kwargs') == f'stride={config.MODEL.STRIDES[1]}'


def test_equal_means_are_found_equal_and_others_not():
    theirs = [50.0, 51.0, 52.0, 53.0, 54.0]
    assert compare.compare(theirs, theirs) == ['52.0 ± 1.6', '52.0 ± 1.6', '+0.0 (-2.3 to +2.3)', '1.00']
    assert compare.compare(theirs, [value + 10 for value in theirs])[-1] == '0.00'


def test_the_network_has_the_parameters_of_timms():
    """The number is that of `timm_side.halonet_small(num_classes=9)` in timm 1.0.28."""
    config = get_config(compare.CONFIG, ['MODEL.NUM_CLASSES', 9])
    assert count_parameters(build_halonet(config)) == 86_085
