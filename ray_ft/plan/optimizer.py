"""Bytes of an optimizer's state and of what it needs while it updates weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ray_ft.plan.shapes import Parameter
from ray_ft.recipe import Optimizer

FP32 = 4
BLOCK = 1 << 24  # elements that ray_ft.train.{adafactor,eight_bit,rounding} work on at once
UNIT_8BIT = 256  # elements that share a float32 scale in 8-bit moments


def state(settings: Optimizer, parameters: Sequence[Parameter], shares: Sequence[float]) -> float:
    """Bytes of the moments on one worker.

    Args:
        shares: elements that the worker holds of each parameter.
    """
    if settings.name == "adafactor":
        return float(sum(_factored(p.shape) for p in parameters) * FP32)
    return sum(shares) * (2 + 2 * FP32 / UNIT_8BIT if settings.name == "adamw_8bit" else 2 * FP32)


def scratch(settings: Optimizer, parameters: Sequence[Parameter], shares: Sequence[float]) -> float:
    """Most bytes beside state, weights and gradients while the parameters are updated."""
    if settings.name == "adamw":
        return 0.0  # one fused kernel
    block = min(max(shares, default=0.0), BLOCK) * FP32
    # The update; for weights in bfloat16 also its sum with the weight, random bits, what they make of it, the choice
    # between the two, and what that depends on.
    blocks = 1 if settings.weights == "float32" else 5.25
    sums = 2 * state(settings, parameters, shares) if settings.name == "adafactor" else 0.0
    return blocks * block + sums


def _factored(shape: tuple[int, ...]) -> int:
    """Elements of Adafactor's second moment, whole on each worker: of a matrix the means of rows and of columns."""
    return shape[0] + math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
