"""Updates against their published formulas and against timm's own code, through real steps."""
import math

import numpy as np
import paddle
import pytest
from reference import timm_keys, timm_recipes

from config import get_config
from halonet import build_halonet
from model.layers import conv2d
from training import optim

TINY = [
    'MODEL.STEM', '3x3', 'MODEL.STEM_WIDTH', 8, 'MODEL.STAGES', ['conv', 'halo'], 'MODEL.WIDTHS', [16, 32],
    'MODEL.STRIDES', [1, 2], 'MODEL.HEADS', [0, 2], 'MODEL.BLOCK_SIZE', 4, 'MODEL.HALO_SIZE', 1,
    'MODEL.NUM_CLASSES', 4]


def make(*opts):
    config = get_config(None, [*TINY, *opts])
    model = build_halonet(config)
    return model, optim.build_optimizer(config, model)


def step(model, optimizer, lr, seed=0):
    """One update on random images; returns the gradients."""
    rng = np.random.default_rng(seed)
    logits = model(paddle.to_tensor(rng.standard_normal((2, 3, 32, 32), 'float32')))
    optim.cross_entropy(logits, paddle.eye(4)[:2]).mean().backward()
    gradients = {name: p.grad.numpy() for name, p in optim.trainable(model).items()}
    optimizer.set_lr(lr)
    optimizer.step()
    optimizer.clear_grad()
    return gradients


def values(model):
    return {name: p.numpy().copy() for name, p in optim.trainable(model).items()}


def test_cross_entropy_equals_the_formula():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5)).astype('float32')
    targets = rng.dirichlet(np.ones(5), 3).astype('float32')                 # they sum to 1 for each sample
    expected = np.log(np.exp(logits).sum(-1)) - (targets * logits).sum(-1)
    losses = optim.cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(targets))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_losses_equal_timm_s():
    given = timm_recipes('loss')
    logits, soft = paddle.to_tensor(given['logits']), paddle.to_tensor(given['targets'])
    smooth = paddle.to_tensor(0.8 * np.eye(7, dtype='float32')[given['labels']] + 0.2 / 7)

    def loss(targets, *opts):
        losses = optim.build_loss(get_config(None, opts), np.zeros(0, int))(logits, targets)
        assert losses.shape == [6] and losses.dtype == paddle.float32
        return losses.mean().item()
    assert loss(soft) == pytest.approx(given['soft'], rel=1e-5)
    assert loss(smooth) == pytest.approx(given['smooth'], rel=1e-5)
    assert loss(soft, 'TRAIN.LOSS', 'bce') == pytest.approx(given['bce'], rel=1e-5)
    assert loss(smooth, 'TRAIN.LOSS', 'bce') == pytest.approx(given['bce_smooth'], rel=1e-5)
    threshold = ['TRAIN.LOSS', 'bce', 'TRAIN.BCE_THRESHOLD', 0.2]
    assert loss(soft, *threshold) == pytest.approx(given['bce_threshold'], rel=1e-5)
    assert loss(soft.astype('float16'), *threshold) == pytest.approx(given['bce_threshold'])


def test_norm_of_many_gradients_is_exact():
    """Squares that are added one after another in float32 would lose 0.6 % of it."""
    layer = paddle.nn.Linear(4000, 1500)
    rng = np.random.default_rng(0)
    gradients = {'weight': rng.normal(size=(4000, 1500)), 'bias': rng.normal(size=1500)}
    parameters = dict(layer.named_parameters())
    for name, gradient in gradients.items():
        parameters[name].grad = paddle.to_tensor(gradient, 'float32')
    optim.clip_norm(parameters, 1.0)
    squares = [np.square(gradient.astype('float32'), dtype=float).sum() for gradient in gradients.values()]
    norm = np.sqrt(sum(squares))
    for name, gradient in gradients.items():
        np.testing.assert_allclose(parameters[name].grad, gradient.astype('float32') / norm, rtol=1e-6)


def test_class_weights_are_powers_of_the_images_with_mean_1():
    labels = np.repeat([0, 1, 3], [80, 15, 5])
    for power in (0.0, 0.5, 1.0):
        weights = optim.class_weights(labels, 4, power)
        assert weights[labels].mean() == pytest.approx(1) and weights[2] == 1
        assert weights[3] / weights[0] == pytest.approx((80 / 5) ** power)
    assert optim.class_weights(labels, 4, 1.0)[[0, 1, 3]] * [80, 15, 5] == pytest.approx([100 / 3] * 3)


@pytest.mark.parametrize('loss', ['ce', 'bce'])
def test_weighted_losses_equal_the_formula(loss):
    """Hard targets: the loss of a sample times the weight of its class. Soft ones: term by term."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [6, 3, 1])
    logits, soft = rng.normal(size=(10, 3)), rng.dirichlet(np.ones(3), 10)
    weights = (1 / np.array([6, 3, 1])) * 10 / 3
    build = optim.build_loss(get_config(None, [
        'TRAIN.LOSS', loss, 'TRAIN.CLASS_WEIGHTS', 1.0, 'MODEL.NUM_CLASSES', 3]), labels)
    for targets in (np.eye(3)[labels], soft):
        if loss == 'ce':
            terms = targets * (np.log(np.exp(logits).sum(-1, keepdims=True)) - logits)
            expected = (weights * terms).sum(-1)
        else:
            terms = np.log1p(np.exp(logits)) - targets * logits
            expected = (weights * terms).mean(-1)
        losses = build(paddle.to_tensor(logits, 'float32'), paddle.to_tensor(targets, 'float32'))
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_learning_rate_is_linear_then_cosine():
    kwargs = dict(total_steps=101, warmup_steps=20, base_lr=1.0, warmup_lr=0.1, end_lr=0.01)
    assert optim.lr_at(0, **kwargs) == pytest.approx(0.1)
    assert optim.lr_at(10, **kwargs) == pytest.approx(0.55)
    assert optim.lr_at(20, **kwargs) == pytest.approx(1.0)
    assert optim.lr_at(40, **kwargs) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2)
    assert optim.lr_at(100, **kwargs) == pytest.approx(0.01)
    assert optim.lr_at(0, **{**kwargs, 'warmup_steps': 0}) == 1.0
    assert optim.scaled_lr(0.1, 512, 256) == 0.2 and optim.scaled_lr(0.1, 512, 0) == 0.1


def test_learning_rates_equal_timm_s():
    kwargs = dict(base_lr=0.5, warmup_lr=0.001, warmup_steps=10, end_lr=0.01)
    cosine, steps = timm_recipes('lr.cosine'), timm_recipes('lr.step')
    rates = [optim.lr_at(t, total_steps=100, **kwargs) for t in range(100)]
    np.testing.assert_allclose(rates, cosine[:100], rtol=1e-6)
    cooled = [optim.lr_at(t, total_steps=110, cooldown_steps=10, **kwargs) for t in range(110)]
    np.testing.assert_allclose(cooled, cosine, rtol=1e-6)                   # timm's stays at its end, too
    by_step = dict(kwargs, schedule='step', decay_steps=2.4 * 7, decay_rate=0.9)
    stepped = [optim.lr_at(t, total_steps=110, **by_step) for t in range(110)]
    np.testing.assert_allclose(stepped, steps, rtol=1e-6)
    assert optim.lr_at(109, total_steps=110, **by_step | {'end_lr': 0.4}) == 0.4
    assert optim.lr_at(109, total_steps=110, cooldown_steps=1, **by_step) == 0.01


def test_schedule_is_built_from_epochs():
    opts = ['TRAIN.LR_SCHEDULE', 'step', 'TRAIN.DECAY_EPOCHS', 2.4, 'TRAIN.DECAY_RATE', 0.5,
            'TRAIN.NUM_EPOCHS', 8, 'TRAIN.WARMUP_EPOCHS', 1.5, 'TRAIN.WARMUP_LR', 0.1, 'TRAIN.END_LR', 1e-3,
            'TRAIN.COOLDOWN_EPOCHS', 1]
    lr_at = optim.build_schedule(get_config(None, opts), 2.0, steps_per_epoch=10)
    expected = {0: 0.1, 14: 0.1 + 1.9 * 14 / 15, 15: 2.0, 23: 2.0, 24: 1.0, 47: 1.0, 48: 0.5, 69: 0.5,
                70: 1e-3, 79: 1e-3}
    assert {step: lr_at(step) for step in expected} == pytest.approx(expected)
    opts = ['TRAIN.NUM_EPOCHS', 8, 'TRAIN.COOLDOWN_EPOCHS', 1]
    cosine = optim.build_schedule(get_config(None, opts), 2.0, steps_per_epoch=10)
    assert cosine(50) == 2.0 and cosine(68) > 1e-3
    assert cosine(69) == pytest.approx(1e-6) and cosine(79) == 1e-6


OPTIMIZERS = {'adamw': ['TRAIN.EPS', 1e-6], 'sgd': ['TRAIN.MOMENTUM', 0.8], 'lamb': ['TRAIN.EPS', 1e-6],
              'rmsprop': ['TRAIN.EPS', 1e-3]}


class Parameters(paddle.nn.Layer):
    """The parameters of timm_recipes.npz under their names."""

    def __init__(self):
        super().__init__()
        for name, value in timm_recipes('parameter').items():
            initial = paddle.nn.initializer.Assign(value)
            self._parameters[name] = self.create_parameter(list(value.shape), default_initializer=initial)

    def set_gradients(self, step):
        for name, gradient in timm_recipes(f'gradient.{step}').items():
            (self._parameters[name] * paddle.to_tensor(gradient)).sum().backward()


def test_every_optimizer_is_compared():
    with pytest.raises(ValueError, match='it can be') as error:
        get_config(None, ['TRAIN.OPTIMIZER', 'other'])
    choices = str(error.value).split('it can be ')[1].split(' or ')
    assert choices == [*OPTIMIZERS]


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_optimizers_equal_timm_s(name):
    assert timm_recipes(f'optimizer.{name}.5'), 'add it to tests/helpers/make_timm_recipes.py and run that'
    model = Parameters()
    opts = ['TRAIN.OPTIMIZER', name, 'TRAIN.WEIGHT_DECAY', 0.1, *OPTIMIZERS[name]]
    optimizer = optim.build_optimizer(get_config(None, opts), model)
    for t in range(6):
        model.set_gradients(t)
        optimizer.set_lr(0.02)
        optimizer.step()
        optimizer.clear_grad()
        for key, value in timm_recipes(f'optimizer.{name}.{t}').items():   # first and last step
            np.testing.assert_allclose(model._parameters[key].numpy(), value, atol=2e-6, err_msg=key)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_weight_decay_of_matrices_and_kernels_only(name):
    after = []
    for decay in (0.5, 0.0):
        paddle.seed(0)
        model, optimizer = make('TRAIN.OPTIMIZER', name, 'TRAIN.WEIGHT_DECAY', decay)
        step(model, optimizer, 0.1)
        after.append(values(model))
    changed = {key for key in after[0] if (after[0][key] != after[1][key]).any()}
    assert changed == {key for key in after[0] if not free_of_decay(key)}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_layer_decay_scales_the_updates(name):
    steps = []
    for decay in (1.0, 0.5):
        paddle.seed(0)
        model, optimizer = make('TRAIN.OPTIMIZER', name, 'TRAIN.LAYER_DECAY', decay, 'TRAIN.EPS', 1e-3)
        before = values(model)
        step(model, optimizer, 0.5)
        steps.append({key: value - before[key] for key, value in values(model).items()})
    scales = {'stem': 0.125, 'stages.0.0': 0.25, 'stages.1.0': 0.5, 'head': 1.0}
    for key, expected in steps[0].items():
        scale, = (scale for prefix, scale in scales.items() if key.startswith(prefix + '.'))
        np.testing.assert_allclose(steps[1][key], scale * expected, rtol=1e-4, atol=3e-7, err_msg=key)
    grouped = [id(p) for group in optim.decay_groups(model, 0.1, 0.5) for p in group['params']]
    assert len({*grouped}) == len(steps[0])


def test_layer_decay_has_the_layers_of_timm():
    scales = timm_recipes('layers')
    names = [name for name in timm_keys('halonet50ts') if name in scales]
    assert len(names) == len(scales) and optim.layer_scales(names, 0.75) == pytest.approx(scales)
    assert set(optim.layer_scales(names, 1.0).values()) == {1.0}


def test_final_convolution_belongs_to_the_last_block():
    """As timm's factors for sehalonet33ts: 1 for the head, the decay for both."""
    names = ['stem.conv1.conv.weight', 'stages.0.0.conv1_1x1.conv.weight', 'stages.0.1.conv1_1x1.conv.weight',
             'final_conv.conv.weight', 'head.fc.weight']
    assert list(optim.layer_scales(names, 0.5).values()) == [0.125, 0.25, 0.5, 0.5, 1.0]


def free_of_decay(name):
    return name.endswith(('bias', '_rel')) or '.bn.' in name or 'post_attn' in name


def test_adamw_with_decay_groups_equals_the_formula():
    model, optimizer = make('TRAIN.WEIGHT_DECAY', 0.5, 'TRAIN.EPS', 1e-6)
    before, lr = values(model), 0.01
    m, v = {name: 0.0 for name in before}, {name: 0.0 for name in before}
    for t in (1, 2):
        gradients = step(model, optimizer, lr, seed=t)
        for name, g in gradients.items():
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g * g
            decay = 0 if free_of_decay(name) else lr * 0.5
            update = (m[name] / (1 - 0.9 ** t)) / (np.sqrt(v[name] / (1 - 0.999 ** t)) + 1e-6)
            before[name] = before[name] * (1 - decay) - lr * update
    for name, value in values(model).items():
        np.testing.assert_allclose(value, before[name], atol=2e-5, err_msg=name)
    decayed = set()
    for group in optim.decay_groups(model, 1.0):
        if group['weight_decay']:
            decayed |= {id(parameter) for parameter in group['params']}
    names = {name for name, parameter in optim.trainable(model).items() if id(parameter) in decayed}
    assert names == {name for name in before if not free_of_decay(name)}


def test_sgd_with_nesterov_momentum_equals_the_formula():
    model, optimizer = make('TRAIN.WEIGHT_DECAY', 0.1, 'TRAIN.OPTIMIZER', 'sgd', 'TRAIN.MOMENTUM', 0.8)
    before, lr = values(model), 0.1
    velocity = {name: 0.0 for name in before}
    for t in (1, 2):
        gradients = step(model, optimizer, lr, seed=t)
        for name, g in gradients.items():
            g = g + (0 if free_of_decay(name) else 0.1) * before[name]
            velocity[name] = 0.8 * velocity[name] + g
            before[name] = before[name] - lr * (g + 0.8 * velocity[name])
    for name, value in values(model).items():
        np.testing.assert_allclose(value, before[name], atol=2e-6, err_msg=name)


def test_clipping_takes_one_norm_over_all_groups():
    model, _ = make()
    x = paddle.randn([2, 3, 32, 32])
    (model(x) ** 2).sum().backward()
    gradients = {name: p.grad.numpy().copy() for name, p in optim.trainable(model).items()}
    norm = math.sqrt(sum((g.astype('float64') ** 2).sum() for g in gradients.values()))
    optim.clip_gradients(model, 0)
    assert all((p.grad.numpy() == gradients[name]).all() for name, p in optim.trainable(model).items())
    optim.clip_gradients(model, norm / 4)
    for name, p in optim.trainable(model).items():
        np.testing.assert_allclose(p.grad.numpy(), gradients[name] / 4, rtol=1e-4, atol=1e-9, err_msg=name)


@pytest.mark.parametrize('mode, limit', [('norm', 1.0), ('value', 0.5), ('agc', 0.3)])
def test_clipping_equals_timm_s(mode, limit):
    model, given, clipped = Parameters(), timm_recipes('gradient.0'), timm_recipes(f'clip.{mode}')
    model.set_gradients(0)
    optim.clip_gradients(model, limit, mode)
    for name, value in clipped.items():
        gradient = model._parameters[name].grad
        np.testing.assert_allclose(gradient, value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert any((value != given[name]).any() for name, value in clipped.items())


def test_agc_clips_each_unit_but_those_of_the_head():
    model, _ = make()
    model.unused = paddle.nn.Linear(2, 2)
    trainable = optim.trainable(model)
    (model(paddle.randn([2, 3, 32, 32])) ** 2).sum().backward()
    gradients = {name: p.grad.numpy().copy() for name, p in trainable.items() if p.grad is not None}
    assert len(gradients) == len(trainable) - 2
    optim.clip_gradients(model, 0.01, 'agc')
    for name, g in gradients.items():
        axes = tuple(range(1, g.ndim)) or None
        norm = np.sqrt((trainable[name].numpy().astype('float64') ** 2).sum(axes, keepdims=True))
        grad_norm = np.sqrt((g.astype('float64') ** 2).sum(axes, keepdims=True))
        scale = np.minimum(1, 0.01 * np.maximum(norm, 1e-3) / np.maximum(grad_norm, 1e-6))
        expected = g if name.startswith('head') else g * scale
        np.testing.assert_allclose(trainable[name].grad.numpy(), expected, rtol=1e-4, atol=1e-9, err_msg=name)


def test_ema_warms_up_as_timm_s():
    model = paddle.nn.Linear(1, 1, bias_attr=False)
    model.weight.set_value(np.array([[3.0]], 'float32'))
    config = get_config(None, ['TRAIN.EMA_DECAY', 0.8, 'TRAIN.EMA_WARMUP', 2 / 3])
    ema, averages = optim.build_ema(config, model), []
    for t, value in enumerate(timm_recipes('ema.values')):
        model.weight.set_value(np.array([[value]], 'float32'))
        ema.update(model, t)
        averages.append(ema.average['weight'].item())
    np.testing.assert_allclose(averages, timm_recipes('ema.averages'), rtol=1e-5, atol=1e-6)
    assert ema.decay_at(0) == 0 and ema.decay_at(10 ** 6) == 0.8
    assert ema.decay_at(5) == pytest.approx(1 - 6 ** (-2 / 3))


def test_ema_equals_the_recursion_and_restores_the_model():
    model, optimizer = make()
    ema = optim.Ema(model, 0.75)
    expected = values(model)
    for t in range(3):
        step(model, optimizer, 0.01, seed=t)
        ema.update(model, t)
        expected = {name: 0.75 * expected[name] + 0.25 * value for name, value in values(model).items()}
    own = {key: value.numpy() for key, value in model.state_dict().items()}
    with ema.applied(model, 'val_ema'):
        for name, value in values(model).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-7, err_msg=name)
        now = {key: value.numpy() for key, value in model.state_dict().items()}
        statistics = [key for key in now if key.endswith(('_mean', '_variance'))]
        assert statistics and all((now[key] == own[key]).all() for key in statistics)
    assert all((value.numpy() == own[key]).all() for key, value in model.state_dict().items())
    with ema.applied(model, 'val'):
        assert all((value.numpy() == own[key]).all() for key, value in model.state_dict().items())


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_optimizer_state_loads_with_other_parameter_names(name):
    with paddle.utils.unique_name.guard():
        model, optimizer = make('TRAIN.OPTIMIZER', name)
        step(model, optimizer, 0.01)
        state = {key: np.asarray(value) for key, value in optim.optimizer_state(optimizer, model).items()}
        weights = {key: value.numpy() for key, value in model.state_dict().items()}
        step(model, optimizer, 0.01, seed=1)
    with paddle.utils.unique_name.guard():
        for _ in range(3):
            conv2d(1, 1, 1)                          # shifts the numbers in Paddle's names
        other, other_optimizer = make('TRAIN.OPTIMIZER', name)
        assert [p.name for p in other.parameters()] != [p.name for p in model.parameters()]
        other.set_state_dict(weights)
        optim.load_optimizer_state(other_optimizer, other, state)
        step(other, other_optimizer, 0.01, seed=1)
    assert all((value == values(model)[key]).all() for key, value in values(other).items())


def test_schedule_without_code_is_refused():
    with pytest.raises(ValueError, match='TRAIN.LR_SCHEDULE is linear'):
        optim.lr_at(5, total_steps=10, warmup_steps=0, base_lr=1.0, warmup_lr=0.0, end_lr=0.0,
                    schedule='linear')
