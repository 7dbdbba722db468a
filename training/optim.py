"""The mathematics of an update: losses, learning rate, decay groups, optimizers, gradient clipping, averaged weights."""
import math
from contextlib import contextmanager
from functools import partial

import paddle
import paddle.nn.functional as F

# ---- losses

def cross_entropy(logits, targets):
    """Soft-target cross-entropy of each sample in float32: logits (B, K), targets (B, K) -> (B,)."""
    return -(targets * F.log_softmax(logits.astype('float32'), axis=-1)).sum(-1)


def binary_cross_entropy(logits, targets, threshold=-1.0):
    """Binary cross-entropy of each sample, the mean of its classes, in float32: logits (B, K), targets (B, K) -> (B,).

    Targets above `threshold` count as 1 and others as 0; a negative threshold leaves them soft. As in timm.
    """
    if threshold >= 0:
        targets = (targets > threshold).astype('float32')
    return F.binary_cross_entropy_with_logits(logits.astype('float32'), targets, reduction='none').mean(-1)


def build_loss(config):
    """The loss that TRAIN.LOSS names: logits (B, K), targets (B, K) -> (B,)."""
    train = config.TRAIN
    return {'ce': cross_entropy, 'bce': partial(binary_cross_entropy, threshold=train.BCE_THRESHOLD)}[train.LOSS]


# ---- learning rate

def lr_at(step, *, total_steps, warmup_steps, base_lr, warmup_lr, end_lr, schedule='cosine', cooldown_steps=0, decay_steps=1,
          decay_rate=1.0):
    """Learning rate of optimizer step `step` (counted from 0): linear from warmup_lr to base_lr, the schedule, the cool-down.

    cosine: half a cosine that its last step ends at end_lr. step: base_lr * decay_rate ** (decay_steps passed since step 0,
    as TensorFlow and timm count), but not below end_lr. The last cooldown_steps have end_lr.
    """
    if step < warmup_steps:
        return warmup_lr + (base_lr - warmup_lr) * step / warmup_steps
    last = total_steps - 1 - cooldown_steps
    if step > last:
        return end_lr
    if schedule == 'step':
        return max(base_lr * decay_rate ** (step // decay_steps), end_lr)
    progress = (step - warmup_steps) / max(last - warmup_steps, 1)
    return end_lr + (base_lr - end_lr) * (1 + math.cos(math.pi * progress)) / 2


def build_schedule(config, base_lr, steps_per_epoch):
    """A function of the optimizer step: the learning rate as TRAIN says, after warm-up `base_lr`."""
    train = config.TRAIN
    return partial(lr_at, schedule=train.LR_SCHEDULE, base_lr=base_lr, warmup_lr=train.WARMUP_LR, end_lr=train.END_LR,
                   total_steps=train.NUM_EPOCHS * steps_per_epoch, warmup_steps=round(train.WARMUP_EPOCHS * steps_per_epoch),
                   cooldown_steps=round(train.COOLDOWN_EPOCHS * steps_per_epoch),
                   decay_steps=train.DECAY_EPOCHS * steps_per_epoch, decay_rate=train.DECAY_RATE)


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


# ---- optimizers

def layer_scales(names, decay):
    """{name: factor of its learning rate}: 1 for the head, times `decay` for each layer further down: blocks, stem. As in timm.

    `names` of parameters are in the order of the network; the final convolution counts to the last block.
    """
    layer = {name: '.'.join(name.split('.')[:3]) if name.startswith('stages.') else name.split('.')[0] for name in names}
    last_block = next((key for key in reversed(layer.values()) if key.startswith('stages.')), None)
    layer = {name: last_block if key == 'final_conv' else key for name, key in layer.items()}
    below_head = {key: i for i, key in enumerate(reversed(dict.fromkeys(layer.values())))}
    return {name: decay ** below_head[layer[name]] for name in names}


def decay_groups(model, weight_decay, layer_decay=1.0):
    """Parameter groups: decay on matrices and kernels, none on norms, biases and tables of relative positions.

    Paddle's 'learning_rate' of a group is a factor of the optimizer's.
    """
    parameters, groups = trainable(model), {}
    for name, scale in layer_scales(parameters, layer_decay).items():
        free = parameters[name].ndim < 2 or name.endswith('_rel')
        group = {'params': [], 'weight_decay': 0.0 if free else weight_decay, 'learning_rate': scale}
        groups.setdefault((scale, free), group)['params'].append(parameters[name])
    return list(groups.values())


class RMSProp(paddle.optimizer.RMSProp):
    """TensorFlow's: epsilon inside the root, learning rate inside the momentum, and the mean square starts at 1."""

    def _add_accumulator(self, name, param, *args, **kwargs):
        if name == self._mean_square_acc_str:
            kwargs['fill_value'] = 1.0              # Paddle starts at 0, which makes the first steps huge
        return super()._add_accumulator(name, param, *args, **kwargs)


def _lamb(groups, train):
    # Paddle's Lamb takes no decay from groups: it asks for each parameter. Like timm's it adapts those with decay only; timm's
    # clips the gradients to a norm of 1 by itself, which here is GRAD_CLIP 1.0
    free = {parameter.name for group in groups if not group['weight_decay'] for parameter in group['params']}
    groups = [{'params': group['params'], 'learning_rate': group['learning_rate']} for group in groups]
    return paddle.optimizer.Lamb(0.0, train.WEIGHT_DECAY, *train.BETAS, epsilon=train.EPS, parameters=groups,
                                 exclude_from_weight_decay_fn=lambda parameter: parameter.name in free)


OPTIMIZERS = {
    'adamw': lambda groups, train: paddle.optimizer.AdamW(0.0, *train.BETAS, epsilon=train.EPS, parameters=groups),
    'sgd': lambda groups, train: paddle.optimizer.Momentum(0.0, train.MOMENTUM, parameters=groups, use_nesterov=True),
    'lamb': _lamb,
    'rmsprop': lambda groups, train: RMSProp(0.0, train.RMSPROP_ALPHA, train.EPS, train.MOMENTUM, parameters=groups),
}


def build_optimizer(config, model):
    """The optimizer that TRAIN.OPTIMIZER names; its learning rate is set before each step."""
    train = config.TRAIN
    return OPTIMIZERS[train.OPTIMIZER](decay_groups(model, train.WEIGHT_DECAY, train.LAYER_DECAY), train)


# ---- gradients

def clip_norm(parameters, limit):
    """Scale all gradients together so that their joint norm is at most `limit`.

    Paddle's own ClipGradByGlobalNorm would take the norm of each parameter group for itself.
    """
    paddle.nn.utils.clip_grad_norm_(parameters.values(), limit)


def clip_value(parameters, limit):
    """Cut each number of the gradients to -limit .. limit."""
    paddle.nn.utils.clip_grad_value_(parameters.values(), limit)


@paddle.no_grad()
def clip_agc(parameters, factor, least=1e-3):
    """Adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171): no unit's gradient exceeds `factor` times its weights.

    Norms are of one output channel, one row of a position table, or a whole vector. The classifier is left alone, as in timm.
    """
    for name, parameter in parameters.items():
        if not name.startswith('head.'):
            axes = list(range(1, parameter.ndim)) or None
            norm, grad_norm = (x.square().sum(axes, keepdim=True).sqrt() for x in (parameter, parameter.grad))
            limit = norm.clip(min=least) * factor
            parameter.grad.multiply_(paddle.where(grad_norm < limit, paddle.ones_like(limit), limit / grad_norm.clip(min=1e-6)))


CLIPS = {'norm': clip_norm, 'value': clip_value, 'agc': clip_agc}


def clip_gradients(model, limit, mode='norm'):
    """Limit the gradients of `model` in place, by one of CLIPS; limit 0 leaves them."""
    if limit:
        CLIPS[mode]({name: p for name, p in trainable(model).items() if p.grad is not None}, limit)


# ---- state

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
    """Exponential moving average of the parameters; batch-norm statistics are averages already and stay the model's.

    `warmup` is the power of its warm-up, in which the decay of step t (from 0) is 1 - (1 + t) ** -warmup; 0: none.
    """

    splits = ('val', 'val_ema')

    def __init__(self, model, decay, warmup=0.0):
        self.decay, self.warmup = decay, warmup
        self.average = {name: value.detach().clone() for name, value in trainable(model).items()}

    @paddle.no_grad()
    def update(self, model, step):
        """After optimizer step `step` (counted from 0): average = decay * average + (1 - decay) * weights."""
        decay = self.decay_at(step)
        for name, value in trainable(model).items():
            self.average[name].lerp_(value.detach(), 1 - decay)

    def decay_at(self, step):
        return min(self.decay, 1 - (1 + step) ** -self.warmup) if self.warmup else self.decay

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

    def update(self, model, step):
        pass

    @contextmanager
    def applied(self, model, split):
        yield

    def state_dict(self):
        return {}

    def load(self, state):
        pass


def build_ema(config, model):
    train = config.TRAIN
    return Ema(model, train.EMA_DECAY, train.EMA_WARMUP) if train.EMA_DECAY else NoEma()
