"""The proof that a sync worked: the engine's log-probs of a few kept completions against the trainer's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from grpo.batch import Group
from grpo.rollout import RolloutError
from grpo.sync.names import SyncError

# Float32 agrees to 1e-5, weights that did not arrive differ by more from the first steps on. In bfloat16 the two sides
# round differently (0.01 to 0.05), so that only gross faults show.
LIMIT = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.1}


class Probe:
    """Compares at versions 1, 1 + every, 1 + 2 every, ... and at the first sync of a process (`every` 0: never); past
    `limit` nats the run stops.

    The turn is the version's, not a count of ours, so that a resumed run probes where the whole one did as well.

    Takes the first `completions` of this rank's last rollout, up to `tokens` tokens each.
    """

    def __init__(self, policy, engine, rollout, *, every: int = 10, limit: float | None = None, completions: int = 2,
                 tokens: int = 16):  # fmt: skip
        if not hasattr(rollout, "score"):
            raise ValueError("this sync is for engines with weights of their own: use rollout=vllm or vllm_server with "
                             "it, or sync=shared")  # fmt: skip
        self.policy, self.engine, self.rollout = policy, engine, rollout
        self.every, self.completions, self.tokens, self.first = every, completions, tokens, True
        self.limit = LIMIT[str(policy.thinker.dtype).removeprefix("torch.")] if limit is None else limit

    def __call__(self, groups: Sequence[Group]) -> float | None:
        """Largest difference over all ranks in nats; None when it is not the turn. Raises SyncError past the limit."""
        if not groups or not self.every or ((self.rollout.version - 1) % self.every and not self.first):
            return None
        self.first = False
        short = [replace(c, token_ids=c.token_ids[: self.tokens]) for c in groups[0].completions[: self.completions]]
        kept = [Group(groups[0].prompt, tuple(short))]
        mine, (theirs,) = self._trainer(kept), self.engine.together(lambda: self.rollout.score(kept), RolloutError)
        gaps = [abs(a - b) for row, other in zip(mine, theirs, strict=True) for a, b in zip(row, other, strict=True)]
        worst = max(gaps) if all(map(math.isfinite, gaps)) else math.inf  # max passes over a NaN
        error = self.engine.reduce({"gap": worst}, "max")["gap"]
        if not error <= self.limit:
            raise SyncError(
                f"after the sync to version {self.rollout.version} the engine's log-probs differ from the trainer's by "
                f"{error:.3g} nats (limit {self.limit:g}): it would sample from another policy than the one that is "
                f"trained. Try sync=full; if that agrees, the strategy in use is at fault, else the engine's dtype, "
                f"attention or checkpoint is. sync.probe_limit moves the limit"
            )
        return error

    @torch.no_grad()
    def _trainer(self, groups: Sequence[Group]) -> list[list[float]]:
        training = self.policy.training
        self.policy.eval()
        logp_NT, _ = self.engine(self.policy.prepare(groups))
        self.policy.train(training)
        lengths = [len(c.token_ids) for g in groups for c in g.completions]
        return [row[:n] for row, n in zip(logp_NT.tolist(), lengths, strict=True)]
