"""Sync strategies: how the rollout engine comes to hold the trainer's weights. `push(version)` after every step.

shared    the engine samples from the trainer's own weights: nothing travels
adapter   LoRA tensors, which the engine applies at every layer while decoding
delta     LoRA tensors, which the engine merges into base weights that it keeps: decodes at full speed
full      merged weights, a layer at a time: needs no adapter, and is the oracle for the others
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from grpo.batch import Group


@dataclass(frozen=True)
class Receipt:
    """What one sync did."""

    strategy: str
    version: int  # now held by the engine
    keys: int = 0  # tensors sent; each matched a weight of the engine
    bytes: int = 0  # sent to each engine
    changed: int = 0  # weight matrices that the engine was given values for
    seconds: float = 0.0
    probe_error: float | None = None  # max |log-prob(engine) - log-prob(trainer)|, nats; None: not probed this time

    def metrics(self) -> dict[str, float]:
        if self.strategy == "shared":
            return {}
        probed = {} if self.probe_error is None else {"sync/probe_error": self.probe_error}
        return {"sync/bytes": float(self.bytes), "sync/changed": float(self.changed), **probed}


class Sync(Protocol):
    """What the loop needs of a strategy. Every rank calls."""

    def push(self, version: int, groups: Sequence[Group] = ()) -> Receipt:
        """Bring the engine to `version`. `groups`: this rank's last rollout, of which the probe takes a few samples.

        Raises SyncError on every rank when the engine does not hold the trainer's weights afterwards.
        """


class Shared:
    """For rollout engines that sample from the trainer's own weights: nothing travels, only the version moves on."""

    def __init__(self, policy, engine, rollout):
        if hasattr(rollout, "every_rank"):
            raise ValueError("sync=shared is for engines without weights of their own (rollout=hf); this one would "
                             "sample from the checkpoint for ever: use sync=delta, adapter or full")  # fmt: skip
        self.rollout = rollout

    def push(self, version: int, groups: Sequence[Group] = ()) -> Receipt:
        self.rollout.version = version
        return Receipt("shared", version)
