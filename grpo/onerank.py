"""What stands for grpo.engine.Engine where nothing is trained: one process, no optimizer, no DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext


class OneRank:
    """A single rank, for evaluation and for the syncs that bring a rollout engine to a trained adapter."""

    rank, world, stage = 0, 1, 0

    def __init__(self, policy=None):
        self.policy = policy

    def __call__(self, *args):
        return self.policy(*args)

    def gather(self, items: list) -> list:
        return list(items)

    def reduce(self, values: Mapping[str, float], how: str = "sum") -> dict[str, float]:
        return dict(values)

    def together(self, call: Callable, error: type[Exception]):
        return call()

    def gathered(self, parameters=None):
        return nullcontext()
