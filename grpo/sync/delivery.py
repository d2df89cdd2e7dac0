"""One sync on its way: sends, counts, and ends in a receipt, or in the same error on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from grpo.batch import Group
from grpo.sync import Receipt
from grpo.sync.names import SyncError
from grpo.sync.probe import Probe


class Delivery:
    """Sends from the ranks that push. A failure is kept until `close`: the other ranks are in collectives with us."""

    def __init__(self, strategy: str, version: int, engine, rollout):
        self.strategy, self.version, self.engine, self.rollout = strategy, version, engine, rollout
        self.pushes = rollout.every_rank or engine.rank == 0
        self.keys = self.bytes = self.changed = 0
        self.error: Exception | None = None
        self.began = time.perf_counter()

    def send(self, call: Callable[..., list], tensors: Mapping[str, Tensor], *args, **kwargs) -> None:
        """`call(...)` must answer for every worker of every engine that each of `tensors` was matched."""
        self.keys += len(tensors)
        self.bytes += sum(t.nbytes for t in tensors.values())
        answers = self.run(call, *args, **kwargs)
        if answers is None:
            return
        if odd := [a for a in answers if a["keys"] != len(tensors)] or not answers:
            self.error = SyncError(f"{len(tensors)} tensors were sent, and the engine answered {odd or 'nothing'}")
        else:
            self.changed += answers[0]["changed"]

    def run(self, call: Callable, *args, **kwargs):
        """What `call` returns; None on a rank that does not push, or after an error."""
        if not self.pushes or self.error:
            return None
        try:
            return call(*args, **kwargs)
        except Exception as error:
            self.error = error
            return None

    def close(self, probe: Probe, groups: Sequence[Group], *, audio_changed: bool) -> Receipt:
        """Make the engine forget what older weights computed, then probe. SyncError on all ranks if any failed."""
        self.run(self.rollout.refresh, self.version, audio_changed=audio_changed)
        failed = self.engine.gather([f"rank {self.engine.rank}: {self.error}"] if self.error else [])
        if failed:
            message = f"weights of version {self.version} did not reach the engine ({self.strategy}): {failed[0]}"
            raise SyncError(message) from self.error
        self.rollout.version = self.version
        seconds = time.perf_counter() - self.began
        return Receipt(self.strategy, self.version, self.keys, self.bytes, self.changed, seconds,
                       probe_error=probe(groups))  # fmt: skip
