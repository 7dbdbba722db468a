"""Judge logits by the protocol of an evaluation: a subset of the classes, several right labels."""
from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor

from data.protocol import Protocol


class Judge:
    """Changes logits and labels so that all that is computed of them follows a protocol."""

    def __init__(self, protocol: Protocol, num_classes: int) -> None:
        self.right = protocol.right
        self.mask: Tensor | None = None             # (K,): 0, or minus infinity for a class that is left out
        if protocol.classes is not None:
            mask: np.ndarray = np.full(num_classes, -np.inf, np.float32)
            mask[protocol.classes] = 0
            self.mask = paddle.to_tensor(mask)

    @paddle.no_grad()
    def __call__(self, logits: Tensor, labels: Tensor, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return logits (B, K) and labels (B,) of a batch, whose images have these indices (B,) in the list.

        A class that is left out has the logit minus infinity. Of several right labels the image has the
        one with the largest logit: the first in the order of `topk`.
        """
        if self.mask is not None:
            logits = logits.astype('float32') + self.mask
        if self.right is not None:
            labels = best_right_label(logits.astype('float32'), paddle.to_tensor(self.right[indices]))
        return logits, labels


def best_right_label(logits: Tensor, right: Tensor) -> Tensor:
    """Return the right label with the largest logit: logits (B, K), right (B, M), -1: none -> (B,)."""
    own = logits.take_along_axis(right.clip(min=0), axis=1)                  # (B, M)
    own = paddle.where(right < 0, paddle.full_like(own, float('-inf')), own)
    best = right.take_along_axis(own.argmax(axis=1, keepdim=True), axis=1).squeeze(1)
    # logits of 16 bits may be equal: then utils.Totals sees them in the order of topk, as here
    top = logits.topk(min(5, logits.shape[1]), axis=1)[1]                    # (B, 5 or K)
    is_right = (top.unsqueeze(2) == right.unsqueeze(1)).any(axis=2)
    for i in reversed(range(top.shape[1])):
        best = paddle.where(is_right[:, i], top[:, i], best)
    return best
