"""Updates against their published formulas, through real steps."""
import math

import numpy as np
import paddle
import pytest

import optim
from config import get_config
from halonet import build_halonet

TINY = ['MODEL.STEM', '3x3', 'MODEL.STEM_WIDTH', 8, 'MODEL.STAGES', ['conv', 'halo'], 'MODEL.WIDTHS', [16, 32],
        'MODEL.STRIDES', [1, 2], 'MODEL.HEADS', [0, 2], 'MODEL.BLOCK_SIZE', 4, 'MODEL.HALO_SIZE', 1, 'MODEL.NUM_CLASSES', 4]


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
    logits, targets = rng.normal(size=(3, 5)).astype('float32'), rng.dirichlet(np.ones(5), 3).astype('float32')
    expected = np.log(np.exp(logits).sum(-1)) - (targets * logits).sum(-1)   # the targets of a sample sum to 1
    np.testing.assert_allclose(optim.cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(targets)), expected, rtol=1e-5)


def test_learning_rate_is_linear_then_cosine():
    kwargs = dict(total_steps=101, warmup_steps=20, base_lr=1.0, warmup_lr=0.1, end_lr=0.01)
    assert optim.lr_at(0, **kwargs) == pytest.approx(0.1)
    assert optim.lr_at(10, **kwargs) == pytest.approx(0.55)
    assert optim.lr_at(20, **kwargs) == pytest.approx(1.0)
    assert optim.lr_at(40, **kwargs) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2)
    assert optim.lr_at(100, **kwargs) == pytest.approx(0.01)
    assert optim.lr_at(0, **{**kwargs, 'warmup_steps': 0}) == 1.0
    assert optim.scaled_lr(0.1, 512, 256) == 0.2 and optim.scaled_lr(0.1, 512, 0) == 0.1


def free_of_decay(name):
    return name.endswith(('bias', '_rel')) or '.bn.' in name or 'post_attn' in name


def test_adamw_and_its_decay_groups_equal_the_formula():
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
    decayed = {id(p) for p in optim.decay_groups(model, 1.0)[0]['params']}
    assert {name for name, p in optim.trainable(model).items() if id(p) in decayed} == {n for n in before if not free_of_decay(n)}


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


def test_ema_equals_the_recursion_and_leaves_the_model_alone():
    model, optimizer = make()
    ema = optim.Ema(model, 0.75)
    expected = values(model)
    for t in range(3):
        step(model, optimizer, 0.01, seed=t)
        ema.update(model)
        expected = {name: 0.75 * expected[name] + 0.25 * value for name, value in values(model).items()}
    own = {key: value.numpy() for key, value in model.state_dict().items()}
    with ema.applied(model, 'val_ema'):
        for name, value in values(model).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-7, err_msg=name)
        statistics = {key: value.numpy() for key, value in model.state_dict().items() if key.endswith(('_mean', '_variance'))}
        assert statistics and all((value == own[key]).all() for key, value in statistics.items())
    assert all((value.numpy() == own[key]).all() for key, value in model.state_dict().items())
    with ema.applied(model, 'val'):
        assert all((value.numpy() == own[key]).all() for key, value in model.state_dict().items())


@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_optimizer_state_moves_to_a_model_with_other_parameter_names(name):
    with paddle.utils.unique_name.guard():
        model, optimizer = make('TRAIN.OPTIMIZER', name)
        step(model, optimizer, 0.01)
        state = {key: np.asarray(value) for key, value in optim.optimizer_state(optimizer, model).items()}
        weights = {key: value.numpy() for key, value in model.state_dict().items()}
        step(model, optimizer, 0.01, seed=1)
    with paddle.utils.unique_name.guard():
        for _ in range(3):
            paddle.nn.Conv2D(1, 1, 1)                # shifts the numbers in Paddle's names
        other, other_optimizer = make('TRAIN.OPTIMIZER', name)
        assert [p.name for p in other.parameters()] != [p.name for p in model.parameters()]
        other.set_state_dict(weights)
        optim.load_optimizer_state(other_optimizer, other, state)
        step(other, other_optimizer, 0.01, seed=1)
    assert all((value == values(model)[key]).all() for key, value in values(other).items())
