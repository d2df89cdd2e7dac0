"""sync=adapter: the LoRA tensors go to the engine, which applies them beside its own weights at every token.

Least to do at a sync, some work at every layer of every decoding step. Each version has a name and an id of its own, so
that keys and values of an older one are never taken for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.batch import Group
from grpo.sync import Receipt
from grpo.sync.delivery import Delivery
from grpo.sync.names import adapter_for_vllm
from grpo.sync.probe import Probe


class Adapter:
    """See the module. `adapters` is for the rollout engine, which reads it when it starts."""

    def __init__(self, policy, engine, rollout, *, adapters: bool = True, probe_every: int = 10,
                 probe_limit: float | None = None):  # fmt: skip
        if not adapters:
            raise ValueError("adapters must be true: without it the rollout engine takes no adapter")
        if not policy.has_adapter:
            raise ValueError("sync=adapter sends an adapter, and model.lora is null: use sync=full")
        self.policy, self.engine, self.rollout = policy, engine, rollout
        self.probe = Probe(policy, engine, rollout, every=probe_every, limit=probe_limit)
        lora = policy.model.peft_config["default"]
        self.config = {
            "peft_type": "LORA", "r": lora.r, "lora_alpha": lora.lora_alpha, "bias": "none",
            "target_modules": sorted({name.rpartition(".")[2] for name in policy.model.targeted_module_names}),
        }  # fmt: skip

    def push(self, version: int, groups: Sequence[Group] = ()) -> Receipt:
        delivery = Delivery("adapter", version, self.engine, self.rollout)
        with self.engine.gathered():
            tensors = {adapter_for_vllm(name): tensor for name, tensor in self.policy.adapter().items()}
            delivery.send(self.rollout.load_adapter, tensors, version, tensors, self.config)
        return delivery.close(self.probe, groups, audio_changed=False)  # an engine has no adapters in the audio tower
