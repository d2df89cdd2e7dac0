"""A rollout engine that gives up once, for whole runs: `rollout._target_=tests.grpo.rollout.flaky.Flaky`."""

from pathlib import Path

from grpo.rollout import Done, RolloutError, Sampling, ignore
from grpo.rollout.hf import HFRollout


class Flaky(HFRollout):
    """Raises RolloutError at step `step` (of sampling) or at evaluation number `evaluation`, unless `mended` exists."""

    def __init__(self, policy, *, mended: str, step: int = -1, evaluation: int = -1, batch: int = 256):
        super().__init__(policy, batch=batch)
        self.mended, self.step, self.evaluation, self.evaluations = Path(mended), step, evaluation, 0

    def generate(self, prompts, copies, sampling: Sampling, done: Done = ignore):
        self.evaluations += sampling.greedy
        now = self.evaluations - 1 == self.evaluation if sampling.greedy else sampling.step == self.step
        if now and not self.mended.exists():
            raise RolloutError("the engine is gone")
        return super().generate(prompts, copies, sampling, done)
