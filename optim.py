"""The mathematics of an update: loss, decay groups, optimizers, learning rate, gradient clipping, averaged weights."""
import math
from contextlib import contextmanager

import paddle
import paddle.nn.functional as F


def cross_entropy(logits, targets):
    """Soft-target cross-entropy of each sample in float32: logits (B, K), targets (B, K) -> (B,)."""
    return -(targets * F.log_softmax(logits.astype('float32'), axis=-1)).sum(-1)


def lr_at(step, *, total_steps, warmup_steps, base_lr, warmup_lr, end_lr):
    """Learning rate of optimizer step `step` (counted from 0): linear from warmup_lr to base_lr, then half a cosine to end_lr.

    The last step, total_steps - 1, has end_lr.
    """
    if step < warmup_steps:
        return warmup_lr + (base_lr - warmup_lr) * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1)
    return end_lr + (base_lr - end_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def scaled_lr(base_lr, global_batch, reference_batch):
    """Linear scaling of the learning rate with the batch (Goyal et al. 2017); reference_batch 0: none."""
    return base_lr * global_batch / reference_batch if reference_batch else base_lr


def trainable(model):
    """{name: parameter}; Paddle counts batch-norm statistics as parameters too, and they are left out here."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.stop_gradient}


def set_values(tensors, values):
    """Copy `values` into the tensors of the same names."""
    for name, value in values.items():
        tensors[name].set_value(value)


def decay_groups(model, weight_decay):
    """Parameter groups: decay on matrices and kernels, none on norms, biases and tables of relative positions."""
    decayed, free = [], []
    for name, parameter in trainable(model).items():
        (free if parameter.ndim < 2 or name.endswith('_rel') else decayed).append(parameter)
    return [{'params': decayed, 'weight_decay': weight_decay}, {'params': free, 'weight_decay': 0.0}]


def build_optimizer(config, model):
    """The optimizer that TRAIN.OPTIMIZER names; its learning rate is set before each step."""
    train = config.TRAIN
    groups = decay_groups(model, train.WEIGHT_DECAY)
    if train.OPTIMIZER == 'adamw':
        return paddle.optimizer.AdamW(0.0, *train.BETAS, epsilon=train.EPS, parameters=groups)
    return paddle.optimizer.Momentum(0.0, train.MOMENTUM, parameters=groups, use_nesterov=True)


def clip_gradients(model, max_norm):
    """Scale all gradients together so that their joint norm is at most max_norm (0: leave them).

    Paddle's own ClipGradByGlobalNorm would take the norm of each parameter group for itself.
    """
    if max_norm:
        paddle.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], max_norm)


def optimizer_state(optimizer, model):
    """The optimizer's state by structured parameter names: Paddle's own names count the layers of the whole process."""
    structured = {parameter.name: name for name, parameter in model.named_parameters()}
    state = {}
    for key, value in optimizer.state_dict().items():
        name = next((n for n in structured if key.startswith(n + '_')), None)
        if name:
            state[f'{structured[name]}|{key[len(name) + 1:]}'] = value
    return state


def load_optimizer_state(optimizer, model, state):
    """Inverse of optimizer_state, for the same model built in any process."""
    parameters = dict(model.named_parameters())
    optimizer.set_state_dict({f'{parameters[name].name}_{slot}': paddle.to_tensor(value)
                              for name, slot, value in ((*key.split('|'), value) for key, value in state.items())})


class Ema:
    """Exponential moving average of the parameters; batch-norm statistics are averages already and stay the model's."""

    splits = ('val', 'val_ema')

    def __init__(self, model, decay):
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in trainable(model).items()}

    @paddle.no_grad()
    def update(self, model):
        """After each optimizer step: average = decay * average + (1 - decay) * weights."""
        for name, value in trainable(model).items():
            self.average[name].lerp_(value.detach(), 1 - self.decay)

    @contextmanager
    def applied(self, model, split):
        """Within, `model` has the averaged parameters if `split` is 'val_ema', and its own if it is 'val'."""
        own = {}
        if split == 'val_ema':
            own = {name: value.detach().clone() for name, value in trainable(model).items()}
            set_values(trainable(model), self.average)
        try:
            yield
        finally:
            set_values(trainable(model), own)

    def state_dict(self):
        return self.average

    def load(self, state):
        set_values(self.average, state)


class NoEma:
    """In Ema's place where TRAIN.EMA_DECAY is 0."""

    splits = ('val',)

    def update(self, model):
        pass

    @contextmanager
    def applied(self, model, split):
        yield

    def state_dict(self):
        return {}

    def load(self, state):
        pass


def build_ema(config, model):
    return Ema(model, config.TRAIN.EMA_DECAY) if config.TRAIN.EMA_DECAY else NoEma()
