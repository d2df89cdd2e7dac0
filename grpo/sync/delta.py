"""sync=delta: only the adapter's A and B travel; the engine merges them into base weights that it keeps.

    W_v = W_0 + (B_v A_v)·alpha/r        for every adapted matrix, always from the same W_0

Decoding runs at the speed of a model without adapter, and nothing drifts: version v depends on A_v and B_v only.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.batch import Group
from grpo.sync import Receipt
from grpo.sync.delivery import Delivery
from grpo.sync.names import checkpoint_name
from grpo.sync.probe import Probe


class Delta:
    """See the module."""

    def __init__(self, policy, engine, rollout, *, probe_every: int = 10, probe_limit: float | None = None):
        if not policy.has_adapter:
            raise ValueError("sync=delta sends an adapter, and model.lora is null: use sync=full")
        self.policy, self.engine, self.rollout = policy, engine, rollout
        self.probe = Probe(policy, engine, rollout, every=probe_every, limit=probe_limit)
        adapted = {n: m for n, m in policy.model.named_modules() if hasattr(m, "lora_A")}
        self.scale = {checkpoint_name(name): module.scaling["default"] for name, module in adapted.items()}
        self.audio = any(name.startswith("thinker.audio_tower.") for name in self.scale)

    def push(self, version: int, groups: Sequence[Group] = ()) -> Receipt:
        delivery = Delivery("delta", version, self.engine, self.rollout)
        with self.engine.gathered():
            tensors = self.policy.adapter()
            delivery.send(self.rollout.send, tensors, "bridge_delta", tensors, version=version, scale=self.scale)
        return delivery.close(self.probe, groups, audio_changed=self.audio)
