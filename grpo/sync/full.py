"""sync=full: merged weights by their checkpoint names, a layer at a time. For full fine-tuning, and as the oracle.

The first sync sends every weight, later ones the fused groups with a weight that is trained. Under ZeRO-3 one layer at
a time is gathered, never the model: a rank needs room for its share and a single layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from grpo.batch import Group
from grpo.sync import Receipt
from grpo.sync.broadcast import Broadcast
from grpo.sync.delivery import Delivery
from grpo.sync.merge import merged
from grpo.sync.names import checkpoint_name, whole_groups
from grpo.sync.probe import Probe


@dataclass(frozen=True)
class Weight:
    """One weight of the checkpoint as the trainer holds it: `a` and `b` where it has an adapter."""

    name: str  # the checkpoint's
    base: nn.Parameter
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale: float = 1.0

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def layer(self) -> str:
        """`thinker.model.layers.7`, or the module itself where there are no layers."""
        found = re.match(r".*?\.\d+(?=\.)", self.name)
        return found[0] if found else self.module

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.base, self.a, self.b) if p is not None]

    @property
    def trained(self) -> bool:
        return any(p.requires_grad for p in self.parameters)

    def tensor(self) -> Tensor:
        """Its present value. The parameters must be whole (gathered)."""
        return self.base.detach() if self.a is None else merged(self.base, self.a, self.b, self.scale)


def weights(model: nn.Module) -> list[Weight]:
    """All weights of a Thinker, with or without peft around it, in the model's order."""
    adapted = {f"{n}.base_layer.weight": m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    found = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        more = {}
        if module := adapted.get(name):
            more = {"a": module.lora_A["default"].weight, "b": module.lora_B["default"].weight,
                    "scale": module.scaling["default"]}  # fmt: skip
        found.append(Weight(checkpoint_name(name), parameter, **more))
    return found


def by_layer(found: Sequence[Weight]) -> list[list[Weight]]:
    """Weights of one layer together, so that fused groups are never cut."""
    layers: dict[str, list[Weight]] = {}
    for weight in found:
        layers.setdefault(weight.layer, []).append(weight)
    return list(layers.values())


class Full:
    """See the module.

    `transport`: direct gives the tensors to `rollout.send` (by reference in one process, else through shared memory);
    broadcast sends them from GPU to GPU (grpo/sync/broadcast.py) by way of `address` and `port` (null: any free one).
    """

    def __init__(self, policy, engine, rollout, *, transport: str = "direct", address: str = "127.0.0.1",
                 port: int | None = None, probe_every: int = 10, probe_limit: float | None = None):  # fmt: skip
        if transport not in ("direct", "broadcast"):
            raise ValueError(f"transport must be direct or broadcast, got {transport!r}")
        self.engine, self.rollout = engine, rollout
        self.probe = Probe(policy, engine, rollout, every=probe_every, limit=probe_limit)
        self.all = weights(policy.model)
        groups = whole_groups(weight.module for weight in self.all if weight.trained)
        members = {module for group in groups for module in group}
        self.trained = [weight for weight in self.all if weight.module in members]
        self.first = True
        self.load = partial(rollout.send, "bridge_load")
        if transport == "broadcast":
            self.load = partial(Broadcast(engine, rollout, address=address, port=port).send, "bridge_receive")

    @torch.no_grad()
    def push(self, version: int, groups: Sequence[Group] = ()) -> Receipt:
        delivery = Delivery("full", version, self.engine, self.rollout)
        sent, self.first = self.all if self.first else self.trained, False
        for layer in by_layer(sent):
            with self.engine.gathered([p for weight in layer for p in weight.parameters]):
                tensors = {weight.name: weight.tensor() for weight in layer} if delivery.pushes else {}
                delivery.send(self.load, tensors, tensors, version=version)
        audio = any(weight.name.startswith("thinker.audio_tower.") for weight in sent)
        return delivery.close(self.probe, groups, audio_changed=audio)
