"""The mathematics of an update: losses, learning rates, optimizers, clipping, averaged weights."""
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional, Union

from system import paddle_internals

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.optimizer import Optimizer
from yacs.config import CfgNode

Loss = Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor]       # logits, targets (B, K) -> losses (B,)

# ---- losses


def cross_entropy(logits: paddle.Tensor, targets: paddle.Tensor,
                  weights: Optional[paddle.Tensor] = None) -> paddle.Tensor:
    """Compute each sample's soft-target cross-entropy: logits, targets (B, K) -> losses (B,), float32.

    weights (K,) multiply the terms of the classes, as in PyTorch.
    """
    if weights is not None:
        targets = targets * weights
    return -(targets * F.log_softmax(logits.astype('float32'), axis=-1)).sum(-1)


def binary_cross_entropy(logits: paddle.Tensor, targets: paddle.Tensor, threshold: float = -1.0,
                         weights: Optional[paddle.Tensor] = None) -> paddle.Tensor:
    """Compute each sample's binary cross-entropy: logits, targets (B, K) -> losses (B,), float32.

    A loss is the mean over classes. Targets above `threshold` count as 1 and others as 0. A negative
    threshold leaves them soft. As in timm. weights (K,) multiply the terms of the classes.
    """
    if threshold >= 0:
        targets = (targets > threshold).astype('float32')
    logits = logits.astype('float32')
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction='none')   # (B, K)
    if weights is not None:
        losses = losses * weights
    return losses.mean(-1)


def class_weights(labels: np.ndarray, num_classes: int, power: float) -> np.ndarray:
    """Return float32 weights (num_classes,) in proportion to (images of the class) ** -power.

    Their mean over the images is 1. A class without an image has the weight 1.
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = np.maximum(counts, 1) ** -float(power)
    weights *= counts.sum() / (weights * counts).sum()
    return np.where(counts > 0, weights, 1.0).astype('float32')


def build_loss(config: CfgNode, labels: np.ndarray) -> Loss:
    """Return the loss that TRAIN.LOSS names: logits (B, K), targets (B, K) -> (B,).

    labels: those of all training images, for TRAIN.CLASS_WEIGHTS.
    """
    weights = None
    if config.TRAIN.CLASS_WEIGHTS:
        weights = paddle.to_tensor(
            class_weights(labels, config.MODEL.NUM_CLASSES, config.TRAIN.CLASS_WEIGHTS))
    if config.TRAIN.LOSS == 'bce':
        return partial(binary_cross_entropy, weights=weights, threshold=config.TRAIN.BCE_THRESHOLD)
    assert config.TRAIN.LOSS == 'ce', config.TRAIN.LOSS
    return partial(cross_entropy, weights=weights)


# ---- learning rate

def lr_at(step: int, *, total_steps: int, warmup_steps: int, base_lr: float, warmup_lr: float,
          end_lr: float, schedule: str = 'cosine', cooldown_steps: int = 0, decay_steps: float = 1,
          decay_rate: float = 1.0) -> float:
    """Compute the learning rate of optimizer step `step`, counted from 0.

    It rises linearly from warmup_lr to base_lr, then follows the schedule. The last cooldown_steps have
    end_lr. cosine: half a cosine; its last step has end_lr. step: base_lr * decay_rate ** (decay_steps
    passed since step 0, as TensorFlow and timm count), at least end_lr.
    """
    if step < warmup_steps:
        return warmup_lr + (base_lr - warmup_lr) * step / warmup_steps
    last = total_steps - 1 - cooldown_steps
    if step > last:
        return end_lr
    if schedule == 'step':
        return max(base_lr * decay_rate ** (step // decay_steps), end_lr)
    if schedule != 'cosine':
        raise ValueError(f'TRAIN.LR_SCHEDULE is {schedule}, which lr_at does not handle')
    progress = (step - warmup_steps) / max(last - warmup_steps, 1)
    return end_lr + (base_lr - end_lr) * (1 + math.cos(math.pi * progress)) / 2


def build_schedule(config: CfgNode, base_lr: float, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the schedule of TRAIN, optimizer step -> learning rate; it is `base_lr` after warm-up."""
    train = config.TRAIN
    return partial(
        lr_at, schedule=train.LR_SCHEDULE, base_lr=base_lr, warmup_lr=train.WARMUP_LR, end_lr=train.END_LR,
        total_steps=train.NUM_EPOCHS * steps_per_epoch,
        warmup_steps=round(train.WARMUP_EPOCHS * steps_per_epoch),
        cooldown_steps=round(train.COOLDOWN_EPOCHS * steps_per_epoch),
        decay_steps=train.DECAY_EPOCHS * steps_per_epoch, decay_rate=train.DECAY_RATE)


def scaled_lr(base_lr: float, global_batch: int, reference_batch: int) -> float:
    """Scale a learning rate linearly with the batch (Goyal et al. 2017); reference_batch 0: leave it."""
    if not reference_batch:
        return base_lr
    return base_lr * global_batch / reference_batch


# ---- parameters

def trainable(model: nn.Layer) -> dict[str, paddle.Tensor]:
    """Return {name: parameter} of what is trained; Paddle's parameters() has batch-norm statistics, too."""
    return {name: value for name, value in model.named_parameters() if not value.stop_gradient}


def set_values(tensors: Mapping[str, paddle.Tensor], values: Mapping[str, Any]) -> None:
    """Copy each of `values` into the tensor of the same name."""
    for name, value in values.items():
        tensors[name].set_value(value)


def flattened(tensors: Iterable[paddle.Tensor]) -> paddle.Tensor:
    """Return a copy of all tensors, without gradients, as one vector."""
    return paddle.concat([tensor.detach().reshape([-1]) for tensor in tensors])


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Return {parameter name: factor of its learning rate}, as in timm.

    The head has the factor 1. Each layer below it has `decay` times that of the layer above: the
    blocks, last the stem. `names` are in the order of the network. The final convolution belongs to the
    last block.
    """
    layer_of = {name: _layer_of(name) for name in names}
    blocks = [layer for layer in layer_of.values() if layer.startswith('stages.')]
    for name, layer in layer_of.items():
        if layer == 'final_conv':
            layer_of[name] = blocks[-1]
    layers = list(dict.fromkeys(layer_of.values()))                          # each once, the stem first
    depth = {layer: len(layers) - 1 - i for i, layer in enumerate(layers)}   # 0: the head
    return {name: decay ** depth[layer] for name, layer in layer_of.items()}


def _layer_of(name: str) -> str:
    """Return the layer of a parameter: 'stem', a block such as 'stages.0.1', 'final_conv' or 'head'."""
    parts = name.split('.')
    if parts[0] == 'stages':
        return '.'.join(parts[:3])
    return parts[0]


def decay_groups(model: nn.Layer, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Return Paddle's parameter groups: with weight decay matrices and kernels, without it all others.

    Those are norms, biases and tables of relative positions. Paddle's 'learning_rate' of a group is a
    factor of the optimizer's.
    """
    parameters = trainable(model)
    groups: dict[tuple, dict] = {}
    for name, scale in layer_scales(parameters, layer_decay).items():
        decays = parameters[name].ndim >= 2 and not name.endswith('_rel')
        group = {'params': [], 'weight_decay': weight_decay if decays else 0.0, 'learning_rate': scale}
        groups.setdefault((scale, decays), group)['params'].append(parameters[name])
    return list(groups.values())


# ---- optimizers

def lamb(groups: list[dict], weight_decay: float, betas: list[float], eps: float) -> Optimizer:
    """Return Paddle's Lamb for parameter groups that have this weight decay or none.

    Like timm's it adapts the parameters with weight decay only. timm's also clips the gradients to a
    norm of 1, which here is TRAIN.GRAD_CLIP 1.0.
    """
    without_decay: set[str] = set()                 # Paddle's Lamb asks for each parameter, not for groups
    for group in groups:
        if not group['weight_decay']:
            without_decay.update(parameter.name for parameter in group['params'])
    groups = [{'params': group['params'], 'learning_rate': group['learning_rate']} for group in groups]
    return paddle.optimizer.Lamb(
        0.0, weight_decay, *betas, epsilon=eps, parameters=groups,
        exclude_from_weight_decay_fn=lambda parameter: parameter.name in without_decay)


def build_optimizer(config: CfgNode, model: nn.Layer) -> Optimizer:
    """Return the optimizer that TRAIN.OPTIMIZER names; its learning rate is set before each step."""
    train = config.TRAIN
    groups = decay_groups(model, train.WEIGHT_DECAY, train.LAYER_DECAY)
    if train.OPTIMIZER == 'adamw':
        return paddle.optimizer.AdamW(0.0, *train.BETAS, epsilon=train.EPS, parameters=groups)
    if train.OPTIMIZER == 'sgd':
        return paddle.optimizer.Momentum(0.0, train.MOMENTUM, parameters=groups, use_nesterov=True)
    if train.OPTIMIZER == 'lamb':
        return lamb(groups, train.WEIGHT_DECAY, train.BETAS, train.EPS)
    assert train.OPTIMIZER == 'rmsprop', train.OPTIMIZER
    return paddle_internals.RMSProp(
        0.0, train.RMSPROP_ALPHA, train.EPS, train.MOMENTUM, parameters=groups)


# ---- gradients

@paddle.no_grad()
def clip_norm(parameters: dict[str, paddle.Tensor], limit: float) -> None:
    """Scale all gradients together so that their joint norm is at most `limit`, as PyTorch's clip_grad_norm_.

    Paddle 3.3.1 has two functions for that. ClipGradByGlobalNorm takes a norm for each parameter group.
    clip_grad_norm_ adds squares one after another on a CPU: with 2 million weights 0.1 % are lost.
    """
    gradients = [parameter.grad for parameter in parameters.values()]
    norm = flattened(gradients).square().sum().sqrt()
    factor = (limit / (norm + 1e-6)).clip(max=1.0)
    for gradient in gradients:
        gradient.multiply_(factor)


def clip_value(parameters: dict[str, paddle.Tensor], limit: float) -> None:
    """Clip each number of the gradients to -limit .. limit."""
    nn.utils.clip_grad_value_(parameters.values(), limit)


@paddle.no_grad()
def clip_agc(parameters: dict[str, paddle.Tensor], factor: float, least: float = 1e-3) -> None:
    """Clip by adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171).

    The norm of no unit's gradient exceeds `factor` times the norm of its weights. A unit is one output
    channel, one row of a position table, or a whole vector. The classifier is left out, as in timm.
    """
    for name, parameter in parameters.items():
        if name.startswith('head.'):
            continue
        axes = list(range(1, parameter.ndim)) or None
        norm = _unit_norms(parameter, axes)
        grad_norm = _unit_norms(parameter.grad, axes)
        limit = norm.clip(min=least) * factor
        scale = limit / grad_norm.clip(min=1e-6)
        parameter.grad.multiply_(paddle.where(grad_norm < limit, paddle.ones_like(limit), scale))


def _unit_norms(x: paddle.Tensor, axes: Optional[list[int]]) -> paddle.Tensor:
    return x.square().sum(axes, keepdim=True).sqrt()


CLIPS = {'norm': clip_norm, 'value': clip_value, 'agc': clip_agc}


def clip_gradients(model: nn.Layer, limit: float, mode: str = 'norm') -> None:
    """Clip the gradients of `model` in place, by one of CLIPS; limit 0 leaves them."""
    if limit:
        with_gradient = {name: p for name, p in trainable(model).items() if p.grad is not None}
        CLIPS[mode](with_gradient, limit)


# ---- state

def optimizer_state(optimizer: Optimizer, model: nn.Layer) -> dict[str, paddle.Tensor]:
    """Return the optimizer's state as {'parameter|slot': tensor}, by the model's names of parameters.

    Paddle's own names count the layers that the whole process has made.
    """
    structured = {parameter.name: name for name, parameter in model.named_parameters()}
    state = {}
    for key, value in optimizer.state_dict().items():
        own_name = next((name for name in structured if key.startswith(f'{name}_')), None)
        if own_name:
            slot = key[len(own_name) + 1:]
            state[f'{structured[own_name]}|{slot}'] = value
    return state


def load_optimizer_state(optimizer: Optimizer, model: nn.Layer, state: Mapping[str, Any]) -> None:
    """Load what optimizer_state returned, for the same model built in any process."""
    parameters = dict(model.named_parameters())
    by_own_names = {}
    for key, value in state.items():
        name, slot = key.split('|')
        by_own_names[f'{parameters[name].name}_{slot}'] = paddle.to_tensor(value)
    optimizer.set_state_dict(by_own_names)


# ---- averaged weights

class Ema:
    """Exponential moving average of the parameters, without batch-norm statistics: they are averages already.

    With `warmup` > 0 the decay of step t (from 0) is at most 1 - (1 + t) ** -warmup. All parameters are
    one flat tensor here, so that an update is two launches on a GPU and not one for each parameter.
    """

    splits = ('val', 'val_ema')

    def __init__(self, model: nn.Layer, decay: float, warmup: float = 0.0):
        self.decay, self.warmup = decay, warmup
        self.restart(model)

    def restart(self, model: nn.Layer) -> None:
        """Set the average to the model's parameters."""
        parameters = trainable(model)
        self.shapes = {name: value.shape for name, value in parameters.items()}
        self.flat = flattened(parameters.values())

    @paddle.no_grad()
    def update(self, model: nn.Layer, step: int) -> None:
        """Set average = decay * average + (1 - decay) * weights, after optimizer step `step` (from 0)."""
        weight = paddle.full([1], 1 - self.decay_at(step), self.flat.dtype)
        self.flat.lerp_(flattened(trainable(model).values()), weight)

    @property
    def average(self) -> dict[str, paddle.Tensor]:
        """Return a copy of the average, {name: value}."""
        parts = self.flat.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def decay_at(self, step: int) -> float:
        """Return the decay of an optimizer step, counted from 0."""
        if not self.warmup:
            return self.decay
        return min(self.decay, 1 - (1 + step) ** -self.warmup)

    @contextmanager
    def applied(self, model: nn.Layer, split: str) -> Iterator[None]:
        """Give `model` the averaged parameters within the block for the split val_ema, its own for val."""
        own = {}
        if split == 'val_ema':
            own = {name: value.detach().clone() for name, value in trainable(model).items()}
            set_values(trainable(model), self.average)
        try:
            yield
        finally:
            set_values(trainable(model), own)

    def state_dict(self) -> dict[str, paddle.Tensor]:
        return self.average

    def load(self, state: Mapping[str, Any]) -> None:
        """Copy a saved average, {name: value}."""
        average = self.average
        set_values(average, state)
        self.flat = flattened(average.values())


class NoEma:
    """Stands for Ema where TRAIN.EMA_DECAY is 0: averages nothing."""

    splits = ('val',)

    def restart(self, model: nn.Layer) -> None:
        pass

    def update(self, model: nn.Layer, step: int) -> None:
        pass

    @contextmanager
    def applied(self, model: nn.Layer, split: str) -> Iterator[None]:
        yield

    def state_dict(self) -> dict[str, paddle.Tensor]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        pass


def build_ema(config: CfgNode, model: nn.Layer) -> Union[Ema, NoEma]:
    """Return the moving average that TRAIN.EMA_DECAY and EMA_WARMUP describe."""
    if not config.TRAIN.EMA_DECAY:
        return NoEma()
    return Ema(model, config.TRAIN.EMA_DECAY, config.TRAIN.EMA_WARMUP)
