"""Writes tests/fixtures/timm_recipes.npz by timm 1.0.31, which the tests do not need.

What training does to a few numbers by timm's own code: optimizer steps, gradient clipping, losses,
learning rates, averaged weights, layer-wise factors, AutoAugment's policies, the arguments of every
operation, and the fractions of mixed images.
"""
import json
import random
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import auto_augment, mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad

OPTIMIZERS = {                              # ours: timm's name and options beside the learning rate
    'adamw': ('adamw', {'eps': 1e-6}), 'sgd': ('sgd', {'momentum': 0.8}),
    'lamb': ('lamb', {'eps': 1e-6, 'max_grad_norm': None}),
    'rmsprop': ('rmsproptf', {'momentum': 0.9, 'alpha': 0.9, 'eps': 0.001}),
}
STEPS = 6
RNG = np.random.default_rng(2)
SHAPES = {                                          # the classifier is (in, out), as in Paddle
    'stem.conv.weight': (4, 3, 3, 3), 'stages.0.0.self_attn.pos_embed.height_rel': (5, 4),
    'stages.0.0.bn.bias': (4,), 'head.fc.weight': (6, 5), 'head.fc.bias': (5,)}
PARAMETERS = {name: RNG.normal(0, 0.5, shape).astype('float32') for name, shape in SHAPES.items()}
GRADIENTS = [{name: RNG.normal(0, 1, shape).astype('float32') for name, shape in SHAPES.items()}
             for _ in range(STEPS)]


class Tiny(torch.nn.Module):
    """PARAMETERS under their names; the classifier as torch has it, (out, in)."""

    def __init__(self):
        super().__init__()
        for name, value in PARAMETERS.items():
            parameter = torch.nn.Parameter(torch.tensor(turned(name, value)))
            self.register_parameter(name.replace('.', '!'), parameter)

    def named(self):
        return {name.replace('!', '.'): p for name, p in self.named_parameters()}


def turned(name, value):
    return value.T.copy() if name == 'head.fc.weight' else value


def given():
    yield from ((f'parameter.{name}', value) for name, value in PARAMETERS.items())
    for step in range(STEPS):
        yield from ((f'gradient.{step}.{name}', g) for name, g in GRADIENTS[step].items())


def set_gradients(model, step):
    for name, p in model.named().items():
        p.grad = torch.tensor(turned(name, GRADIENTS[step][name]))


def optimizer_steps():
    for name, (timm_name, options) in OPTIMIZERS.items():
        model = Tiny()
        free = [p for key, p in model.named().items() if p.ndim < 2 or key.endswith('_rel')]
        decayed = [p for key, p in model.named().items() if not (p.ndim < 2 or key.endswith('_rel'))]
        groups = [{'params': decayed, 'weight_decay': 0.1}, {'params': free, 'weight_decay': 0.0}]
        optimizer = create_optimizer_v2(groups, timm_name, lr=0.02, **options)
        for step in range(STEPS):
            set_gradients(model, step)
            optimizer.step()
            if step in (0, STEPS - 1):
                for key, p in model.named().items():
                    yield f'optimizer.{name}.{step}.{key}', turned(key, p.detach().numpy().copy())


def clipped_gradients():
    for mode, limit in (('norm', 1.0), ('value', 0.5), ('agc', 0.3)):
        model = Tiny()
        set_gradients(model, 0)
        inner = [p for key, p in model.named().items()                       # as timm's train.py
                 if mode != 'agc' or not key.startswith('head.')]
        dispatch_clip_grad(inner, limit, mode)
        for key, p in model.named().items():
            yield f'clip.{mode}.{key}', turned(key, p.grad.numpy().copy())


def losses():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (6, 7)).astype('float32')
    targets = rng.dirichlet(np.full(7, 0.3), 6).astype('float32')
    labels = rng.integers(0, 7, 6)
    yield from {'loss.logits': logits, 'loss.targets': targets, 'loss.labels': labels}.items()
    x, soft, hard = torch.tensor(logits), torch.tensor(targets), torch.tensor(labels)
    yield 'loss.soft', SoftTargetCrossEntropy()(x, soft).numpy()
    yield 'loss.smooth', LabelSmoothingCrossEntropy(0.2)(x, hard).numpy()
    yield 'loss.bce', BinaryCrossEntropy()(x, soft).numpy()
    yield 'loss.bce_threshold', BinaryCrossEntropy(target_threshold=0.2)(x, soft).numpy()
    yield 'loss.bce_smooth', BinaryCrossEntropy(smoothing=0.2)(x, hard).numpy()


def learning_rates():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    cosine = CosineLRScheduler(
        optimizer, t_initial=100 - 1 - 10, lr_min=0.01, warmup_t=10, warmup_lr_init=0.001,
        warmup_prefix=True, t_in_epochs=False)
    step = StepLRScheduler(
        optimizer, decay_t=2.4 * 7, decay_rate=0.9, warmup_t=10, warmup_lr_init=0.001,
        warmup_prefix=False, t_in_epochs=False)
    for name, schedule in (('cosine', cosine), ('step', step)):
        yield f'lr.{name}', np.array([schedule._get_lr(t)[0] for t in range(110)])


def averages():
    model = torch.nn.Linear(1, 1, bias=False)
    values = np.random.default_rng(4).normal(size=40).astype('float32')
    model.weight.data.fill_(3.0)
    ema = ModelEmaV3(model, decay=0.8, use_warmup=True, warmup_power=2 / 3)
    results = []
    for step, value in enumerate(values, 1):
        model.weight.data.fill_(float(value))
        ema.update(model, step)
        results.append(ema.module.weight.item())
    yield 'ema.values', values
    yield 'ema.averages', np.array(results)


def layers():
    model = timm.create_model('halonet50ts', num_classes=10)
    groups = param_groups_layer_decay(model, layer_decay=0.75)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: group['lr_scale'] for group in groups for p in group['params']}
    yield 'layers', text(scales)


def text(value):
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def policies():
    names = ('original', 'originalr', 'v0', 'v0r', '3a')
    yield 'policies', text({name: [[(op.name, op.prob, op.magnitude) for op in choice]
                                   for choice in auto_augment.auto_augment_policy(name)] for name in names})
    random.seed(0)
    hparams = {'translate_pct': 0.45, 'translate_const': 1}
    yield 'arguments', text({
        name: {level: sorted({round(float(arguments(level, hparams)[0]), 9) for _ in range(40)})
               for level in range(0, 21, 2)}
        for name, arguments in auto_augment.LEVEL_TO_ARG.items() if arguments})


def shares():
    """Count how often the fraction that an image keeps lies in each tenth from 0 to 1, and how often
    neighbours keep the same fraction."""
    np.random.seed(0)
    for mode in ('batch', 'pair', 'elem', 'half'):
        mix = mixup.FastCollateMixup if mode == 'half' else mixup.Mixup
        mix = mix(0.2, 1.0, prob=0.8, switch_prob=0.4, mode=mode, label_smoothing=0, num_classes=4)
        kept = []
        for _ in range(8000):
            if mode == 'half':
                targets = mix([(np.zeros((3, 16, 24), 'uint8'), i) for i in range(4)])[1].numpy()
                assert targets.shape == (2, 4)
                kept.append([targets[0, 0], targets[1, 1]])
            else:
                targets = mix(torch.zeros(4, 3, 16, 24), torch.arange(4))[1].numpy()
                kept.append([targets[0, 0], targets[3, 3]])                # partners
        kept = np.array(kept)
        yield f'shares.{mode}', np.histogram(kept[:, 0], 10, (0, 1))[0] / len(kept)
        yield f'same.{mode}', (abs(kept[:, 0] - kept[:, 1]) < 1e-6).mean()


if __name__ == '__main__':
    torch.manual_seed(0)
    parts = (given, optimizer_steps, clipped_gradients, losses, learning_rates, averages, layers, policies,
             shares)
    path = Path(__file__).parent.parent / 'fixtures' / 'timm_recipes.npz'
    np.savez_compressed(path, **{key: value for part in parts for key, value in part()})
