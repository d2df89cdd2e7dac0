"""A rollout engine that gives up once, for whole runs: `rollout._target_=tests.grpo.rollout.flaky.Flaky`."""

import time
from pathlib import Path

from grpo.rollout import Done, RolloutError, Sampling, ignore
from grpo.rollout.hf import HFRollout


class Flaky(HFRollout):
    """Raises RolloutError at step `step` (of sampling) or at evaluation number `evaluation`, unless `mended` exists.

    With `hangs` it makes the file `mended` there, and then samples no further for ten minutes.
    """

    def __init__(
        self, policy, *, mended: str, step: int = -1, evaluation: int = -1, hangs: bool = False, batch: int = 256
    ):
        super().__init__(policy, batch=batch)
        self.mended, self.step, self.evaluation, self.evaluations = Path(mended), step, evaluation, 0
        self.hangs = hangs

    def generate(self, prompts, copies, sampling: Sampling, done: Done = ignore):
        self.evaluations += sampling.greedy
        now = self.evaluations - 1 == self.evaluation if sampling.greedy else sampling.step == self.step
        if now and not self.mended.exists():
            if not self.hangs:
                raise RolloutError("the engine is gone")
            groups = super().generate(prompts[:1], copies, sampling)
            self.mended.touch()
            time.sleep(600)
            return groups
        return super().generate(prompts, copies, sampling, done)
