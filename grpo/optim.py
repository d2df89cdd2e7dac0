"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def constant(step: int, steps: int) -> float:
    """1 at every step."""
    return 1.0


def linear(step: int, steps: int) -> float:
    """From 1 down to 0 at the end of the run: the published run's schedule."""
    return 1.0 - step / steps


def cosine(step: int, steps: int) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


class Schedule:
    """`lr` times a warm-up over `warmup` steps times `shape(step, steps)`."""

    def __init__(self, *, lr: float, warmup: int, shape):
        if lr < 0 or warmup < 0:
            raise ValueError(f"optim.schedule: lr and warmup must be at least 0, got {lr} and {warmup}")
        self.lr, self.warmup, self.shape = lr, warmup, shape

    def __call__(self, step: int, steps: int) -> float:
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * self.shape(step, steps)
