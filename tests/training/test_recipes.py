"""The recipe files: what they say, how they combine with a model, and that they train."""
import math
import os
import re

import numpy as np
import paddle
import pytest
from runs import ROOT, TINY, make_images, options, program, records

from config import flatten, get_config
from data import mixing
from halonet import build_halonet
from training import builders, engine, optim

CONFIGS = os.path.join(ROOT, 'configs')
OTHERS = ('_halonet_h.yaml', '_finetune.yaml')      # no recipes for ImageNet
RECIPES = sorted(name for name in os.listdir(CONFIGS) if name.startswith('_') and name not in OTHERS)
PUBLISHED = {                                # by arXiv 2110.00476 (A1), timm's docs, PaddleViT's configs
    '_a1h.yaml': {
        'OPTIMIZER': 'lamb', 'BASE_LR': 0.005, 'LR_BATCH': 2048, 'WEIGHT_DECAY': 0.01, 'NUM_EPOCHS': 600,
        'WARMUP_EPOCHS': 5, 'END_LR': 1e-6, 'LOSS': 'bce', 'SMOOTHING': 0.1, 'MIXUP_ALPHA': 0.2,
        'CUTMIX_ALPHA': 1.0, 'AUG_REPEATS': 3, 'LR_SCHEDULE': 'cosine'},
    '_ra.yaml': {
        'OPTIMIZER': 'rmsprop', 'EPS': 0.001, 'LR_SCHEDULE': 'step', 'DECAY_EPOCHS': 2.4, 'DECAY_RATE': 0.97,
        'NUM_EPOCHS': 450, 'WEIGHT_DECAY': 1e-5, 'EMA_DECAY': 0.9999, 'AUTO_AUGMENT': 'rand-m9-mstd0.5',
        'RANDOM_ERASE_PROB': 0.2, 'BASE_LR': 0.048, 'LR_BATCH': 768, 'WARMUP_LR': 1e-6},
    '_c1.yaml': {
        'OPTIMIZER': 'sgd', 'CLIP_MODE': 'agc', 'LR_SCHEDULE': 'cosine', 'BASE_LR': 0.6, 'LR_BATCH': 1536,
        'WEIGHT_DECAY': 1e-4, 'NUM_EPOCHS': 240, 'WARMUP_EPOCHS': 5, 'AUTO_AUGMENT': 'rand-m7-mstd0.5-inc1'},
    '_paddlevit.yaml': {
        'OPTIMIZER': 'adamw', 'BASE_LR': 0.003, 'LR_BATCH': 128, 'WEIGHT_DECAY': 0.3, 'NUM_EPOCHS': 300,
        'WARMUP_EPOCHS': 3, 'GRAD_CLIP': 0, 'MIXUP_ALPHA': 0.8, 'CUTMIX_ALPHA': 1.0,
        'RANDOM_ERASE_PROB': 0.25},
    '_imagenet.yaml': {
        'OPTIMIZER': 'adamw', 'BASE_LR': 0.00125, 'LR_BATCH': 512, 'WEIGHT_DECAY': 0.04, 'NUM_EPOCHS': 300},
}


def combined(folder, recipe, model='halonet_50ts_256.yaml'):
    """A user's config of a model with a recipe, as docs/training.md has it."""
    path = os.path.join(folder, 'own.yaml')
    with open(path, 'w', encoding='utf-8') as file:
        file.write(f'BASE: [{CONFIGS}/{model}, {CONFIGS}/{recipe}]\n')
    return path


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipe_has_the_published_options_and_overrides_another(recipe, tmp_path):
    alone, config = get_config(os.path.join(CONFIGS, recipe)), get_config(combined(tmp_path, recipe))
    assert {key: alone.TRAIN[key] for key in PUBLISHED[recipe]} == PUBLISHED[recipe]
    assert config.TRAIN == alone.TRAIN                                       # nothing of _imagenet.yaml stays
    assert config.DATA.BATCH_SIZE == alone.DATA.BATCH_SIZE
    assert (config.MODEL.DROPOUT, config.MODEL.DROPPATH) == (alone.MODEL.DROPOUT, alone.MODEL.DROPPATH)
    assert config.MODEL.NAME == 'halonet_50ts' and config.MODEL.HALO_SIZE == 3
    crop_pct = 0.95 if recipe == '_imagenet.yaml' else 0.94                  # the others leave the model's
    assert config.DATA.CROP_PCT == crop_pct


def test_recipe_of_fine_tuning_overrides_that_of_a_model(tmp_path):
    alone, config = get_config(f'{CONFIGS}/_finetune.yaml'), get_config(combined(tmp_path, '_finetune.yaml'))
    assert config.TRAIN == alone.TRAIN and config.DATA.BATCH_SIZE == alone.DATA.BATCH_SIZE
    assert config.MODEL.NUM_CLASSES == -1 and config.MODEL.NAME == 'halonet_50ts'


@pytest.mark.parametrize('recipe', RECIPES)
def test_header_names_its_source_and_that_it_was_not_run(recipe):
    with open(os.path.join(CONFIGS, recipe), encoding='utf-8') as file:
        header = ' '.join(line[2:].strip() for line in file if line.startswith('#'))
    assert 'None of it was run on ImageNet by this project.' in header and 'published' in header.lower()
    assert 'nspired by' in header or 'predecessor' in header


def test_docs_name_every_recipe_and_existing_options():
    with open(os.path.join(ROOT, 'docs', 'training.md'), encoding='utf-8') as file:
        text = file.read().split('\n## Recipes\n')[1].split('\n## ')[0]
    assert set(re.findall(r'^\| `(_\w+\.yaml)`', text, re.M)) == set(RECIPES)
    for name, images in re.findall(r'^\| `(_\w+\.yaml)`.* (\d+) \|$', text, re.M):
        config = get_config(os.path.join(CONFIGS, name))
        assert int(images) == (64 if name == '_paddlevit.yaml' else config.TRAIN.LR_BATCH)
        assert int(images) % config.DATA.BATCH_SIZE == 0
    names = {key.split('.')[-1] for key in flatten(get_config())}
    for option in re.findall(r'`([A-Z]+_[A-Z_*]+)\b', text):
        assert any(re.fullmatch(option.replace('*', r'\w*'), name) for name in names), option


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images') / 'data', train=24)


def run(images, output, cfg=None, *opts):
    return engine.run(get_config(cfg, [*TINY, 'DATA.DATA_PATH', images, 'OUTPUT', str(output), *opts]))


def weights_of(folder, name='final.pdparams'):
    return {key: value.numpy() for key, value in paddle.load(os.path.join(folder, name)).items()}


@pytest.mark.parametrize('recipe', RECIPES)
def test_every_recipe_trains(recipe, images, tmp_path):
    """Two epochs of three steps, at the learning rate that the recipe has for so small a batch."""
    results = run(images, tmp_path / 'run', combined(tmp_path, recipe))
    train = records(tmp_path / 'run', 'train')
    assert len(train) == 6 and all(math.isfinite(record['loss']) for record in train)
    published = PUBLISHED[recipe]
    assert train[3]['lr'] == pytest.approx(published['BASE_LR'] * 8 / published['LR_BATCH'], abs=1e-8)
    averages = get_config(os.path.join(CONFIGS, recipe)).TRAIN.EMA_DECAY > 0
    assert results.keys() == ({'val', 'val_ema'} if averages else {'val'})
    for name in results:
        weights = weights_of(tmp_path / 'run', f'final{name[3:]}.pdparams')
        assert all(np.isfinite(value).all() for value in weights.values())


LEARNING = ['TRAIN.NUM_EPOCHS', 20, 'TRAIN.CROP_SCALE', [0.8, 1.0], 'TRAIN.LR_BATCH', 0]


@pytest.mark.parametrize('name, lr', [('lamb', 0.02), ('rmsprop', 0.002), ('sgd', 0.05)])
def test_other_optimizers_learn(name, lr, images, tmp_path):
    opts = ['TRAIN.OPTIMIZER', name, 'TRAIN.BASE_LR', lr, 'TRAIN.EPS', 1e-3 if name == 'rmsprop' else 1e-6]
    assert run(images, tmp_path, None, *LEARNING, *opts)['val']['acc1'] > 90


EVERYTHING = [
    'MODEL.FREEZE_NORM', True, 'TRAIN.OPTIMIZER', 'lamb', 'TRAIN.EPS', 1e-3, 'TRAIN.LOSS', 'bce',
    'TRAIN.BCE_THRESHOLD', 0.2, 'TRAIN.AUG_REPEATS', 3, 'TRAIN.MIXUP_ALPHA', 0.8, 'TRAIN.CUTMIX_ALPHA', 1.0,
    'TRAIN.RANDOM_ERASE_PROB', 0.5, 'TRAIN.AUTO_AUGMENT', 'v0-mstd0.5', 'TRAIN.CLIP_MODE', 'agc',
    'TRAIN.GRAD_CLIP', 0.1, 'TRAIN.LAYER_DECAY', 0.8, 'TRAIN.LR_SCHEDULE', 'step',
    'TRAIN.DECAY_EPOCHS', 0.5, 'TRAIN.EMA_DECAY', 0.9, 'TRAIN.EMA_WARMUP', 0.7, 'TRAIN.BASE_LR', 0.01]


def compare(one, other, tolerance):
    for name in ('final.pdparams', 'final_ema.pdparams'):
        one_s, other_s = weights_of(one, name), weights_of(other, name)
        assert max(np.abs(one_s[key] - other_s[key]).max() for key in one_s) < tolerance


@pytest.mark.parametrize('mode', ['elem', 'pair', 'half'])
def test_accumulated_step_equals_one_pass(mode, images, tmp_path):
    run(images, tmp_path / 'one', None, *EVERYTHING, 'TRAIN.MIXUP_MODE', mode)
    run(images, tmp_path / 'two', None, *EVERYTHING, 'TRAIN.MIXUP_MODE', mode, 'DATA.BATCH_SIZE', 4,
        'TRAIN.ACCUM_ITER', 2)
    assert len(records(tmp_path / 'one', 'train')) == len(records(tmp_path / 'two', 'train')) == 6
    compare(tmp_path / 'one', tmp_path / 'two', 1e-5)


def test_ema_warmup_begins_with_the_first_step(images, tmp_path):
    """After one step the average is the weights, whatever EMA_DECAY is; after two it is not."""
    opts = ['DATA.BATCH_SIZE', 24, 'TRAIN.WARMUP_EPOCHS', 0, 'TRAIN.BASE_LR', 0.1, 'TRAIN.END_LR', 0.1,
            'TRAIN.EMA_DECAY', 0.999, 'TRAIN.EMA_WARMUP', 0.7]
    for epochs in (1, 2):
        folder = tmp_path / str(epochs)
        run(images, folder, None, *opts, 'TRAIN.NUM_EPOCHS', epochs)
        own, average = weights_of(folder), weights_of(folder, 'final_ema.pdparams')
        assert (max(abs(own[key] - average[key]).max() for key in own) < 1e-6) == (epochs == 1)


def test_training_is_built_from_the_options(images):
    config = get_config(None, [
        *TINY, 'DATA.DATA_PATH', images, *EVERYTHING, 'TRAIN.MIXUP_MODE', 'pair', 'TRAIN.ACCUM_ITER', 3,
        'TRAIN.MIXUP_PROB', 0.5, 'TRAIN.MIXUP_SWITCH_PROB', 0.25])
    training = builders.build_training(config, build_halonet(config), 'cpu', '')
    assert training.mix == mixing.Mix(0.8, 1.0, 0.5, 0.25, 'pair')
    assert (training.loader.sampler.repeats, training.loader.sampler.step_size) == (3, 24)
    logits, targets = paddle.randn([2, 4]), paddle.to_tensor([[0.1, 0.9, 0, 0], [0.3, 0.3, 0.4, 0]])
    losses = training.loss(logits, targets).tolist()
    assert losses == optim.binary_cross_entropy(logits, targets, 0.2).tolist()
    assert losses != optim.binary_cross_entropy(logits, targets).tolist()
    assert training.clip.keywords == {'limit': 0.1, 'mode': 'agc'}
    assert training.lr_at.keywords['schedule'] == 'step'
    assert training.ema.decay_at(1) == pytest.approx(1 - 2 ** -0.7)


@pytest.mark.slow
def test_two_processes_equal_one_with_everything_on(images, tmp_path):
    words = ['-data_path', images, '-output']
    batch = TINY.index('DATA.BATCH_SIZE')
    common = options([*TINY[:batch], *TINY[batch + 2:], *EVERYTHING, 'TRAIN.MIXUP_MODE', 'elem'])
    program('main_multi_gpu.py', *words, tmp_path / 'two', '-nprocs', 2, '-batch_size', 4, *common)
    program('main_single_gpu.py', *words, tmp_path / 'one', '-batch_size', 8, *common)
    compare(tmp_path / 'one', tmp_path / 'two', 1e-5)
