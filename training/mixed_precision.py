"""Mixed precision: its dtype, the context of a forward pass, and the scale of the loss for float16."""
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Callable

from system import paddle_internals
from utils import log

import paddle

Autocast = Callable[[], AbstractContextManager]     # makes the context of a forward pass
CAPABILITY = {'float16': (7, 0), 'bfloat16': (8, 0)}         # compute capability that Paddle's autocast needs
LEAST_SCALE = 2.0 ** -14                            # a loss scale below it says that no scale will do


def choose_dtype(dtype: str, device: str) -> str:
    """Return the dtype that AMP_DTYPE means on this device: float16, bfloat16, or '' if it has none.

    Paddle would go on in float32 with a mere warning. This logs why. float32 is that of a resumed run.
    """
    if device == 'cpu':
        log.info('-amp: mixed precision needs a GPU; going on in float32')
        return ''
    if dtype == 'float32':
        log.info('-amp: the run began in float32 and goes on so; AMP_DTYPE float16 would change it')
        return ''
    if device != 'gpu':                             # Paddle's autocast knows what other devices can do
        return 'float16' if dtype == 'auto' else dtype
    capability = tuple(paddle.device.cuda.get_device_capability())
    if dtype == 'auto':
        dtype = 'bfloat16' if capability >= CAPABILITY['bfloat16'] else 'float16'
    if capability >= CAPABILITY[dtype]:
        return dtype
    log.warning('-amp: %s needs a GPU of compute capability %d.%d, and this one has %d.%d; '
                'going on in float32', dtype, *CAPABILITY[dtype], *capability)
    return ''


def make_autocast(dtype: str) -> Autocast:
    """Return what makes the context of a forward pass: Paddle's level O1 in `dtype`, or none for ''."""
    if not dtype:
        return nullcontext
    return partial(paddle.amp.auto_cast, level='O1', dtype=dtype)


class LossScaler(paddle_internals.GradScaler):
    """Scales the loss, so that small gradients do not vanish in float16.

    A step whose gradients overflow is skipped and halves the scale. 2000 steps without one double it.
    """

    def update(self) -> None:
        """End a step: adapt the scale, and log a skipped step.

        Raises FloatingPointError if the gradients overflow at every scale.
        """
        skipped = self.skipped
        super().update()
        if self.skipped == skipped:
            return
        scale = self.scale_factor()
        log.info('float16: the gradients of a step overflowed; the step is skipped, the loss scale is %g now',
                 scale)
        if scale < LEAST_SCALE:
            raise FloatingPointError(
                f'the gradients are not finite at any loss scale, even {scale:g}; lower TRAIN.BASE_LR, '
                'set AMP_DTYPE bfloat16 or look at the data. The checkpoints before are intact')

    def record(self) -> dict[str, float]:
        """Return what a record of the training has of it: the scale, and the steps skipped in the run."""
        if not self.is_enable():
            return {}
        return {'loss_scale': self.scale_factor(), 'skipped_steps': self.skipped}

    def state_dict(self) -> dict[str, Any]:
        """Return Paddle's state, and the number of skipped steps; {} if nothing is scaled."""
        state = super().state_dict()
        return {**state, 'skipped': self.skipped} if state else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; earlier versions did not count the skipped steps."""
        super().load_state_dict(state)
        self.skipped = state.get('skipped', 0)
