"""Find the temperature that calibrates logits, over all batches and processes of an evaluation.

Temperature scaling is of Guo et al. 2017, arXiv 1706.04599: softmax(logits / T). It changes no prediction.
"""
from __future__ import annotations

import numpy as np
import paddle
from paddle.nn import functional as F

TEMPERATURES = np.geomspace(0.125, 16, 85)          # each 1.06 times the one before


class TemperatureSearch:
    """Sums the cross-entropy of images at many temperatures; `sums` is (T,) float64, on the device."""

    def __init__(self) -> None:
        self.sums = paddle.zeros([len(TEMPERATURES)], 'float64')

    @paddle.no_grad()
    def add(self, labels: paddle.Tensor, logits: paddle.Tensor) -> None:
        """Add a batch: labels (B,), logits (B, K)."""
        logits = logits.astype('float32')
        for i, temperature in enumerate(TEMPERATURES.tolist()):
            losses = F.cross_entropy(logits / temperature, labels, reduction='none')
            self.sums[i] += losses.astype('float64').sum()


def best_temperature(sums: np.ndarray) -> float:
    """Return the temperature of the lowest cross-entropy; NaN if it is beyond those that were tried.

    sums: (T,), of TEMPERATURES. A parabola through the lowest three, by the logarithm, gives it.
    """
    lowest = int(np.argmin(sums))
    if not np.isfinite(sums).all() or lowest in (0, len(sums) - 1):
        return float('nan')
    left, middle, right = sums[lowest - 1:lowest + 2]
    shift = 0.5 * (left - right) / (left - 2 * middle + right)
    step = np.log(TEMPERATURES[1] / TEMPERATURES[0])
    return float(TEMPERATURES[lowest] * np.exp(shift * step))
