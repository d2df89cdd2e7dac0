"""Names of one weight in the trainer, in the checkpoint (which vLLM loads by) and in an adapter for vLLM.

    trainer     base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight     (peft around the Thinker)
                model.layers.0.self_attn.q_proj.weight                                 (without an adapter)
    checkpoint  thinker.model.layers.0.self_attn.q_proj.weight
    adapter     base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight         (peft's files, Policy.adapter)
    for vLLM    base_model.model.thinker.model.layers.0.self_attn.q_proj.lora_A.weight

An adapter under the wrong name loads without a word and changes nothing, so a name that does not fit is an error here,
and a name that the engine does not know is one there (grpo/sync/worker.py).
"""

from __future__ import annotations

from collections.abc import Iterable

PEFT = "base_model.model."
OMNI = "thinker."
# vLLM keeps each of these in one matrix and repacks it as a whole: a part of one is no update but garbage.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SyncError(RuntimeError):
    """The engine does not hold the trainer's weights: says which, and what to do."""


def checkpoint_name(trainer: str) -> str:
    """Checkpoint's name of a trainer's weight or module. Raises SyncError for an adapter's own weight."""
    name = trainer.removeprefix(PEFT).replace(".base_layer.", ".")
    if ".lora_" in name:
        raise SyncError(f"{trainer} is an adapter's weight, which no checkpoint holds")
    return OMNI + name


def adapter_for_vllm(peft: str) -> str:
    """vLLM's name of an adapter's tensor. Raises SyncError unless it is one of peft's names."""
    module_of(peft)
    return PEFT + OMNI + peft.removeprefix(PEFT)


def module_of(peft: str) -> tuple[str, str]:
    """(checkpoint's module, "A" or "B") of an adapter's tensor. Raises SyncError unless the name is one of peft's."""
    module, dot, which = peft.removesuffix(".weight").rpartition(".lora_")
    if not (peft.startswith(PEFT) and peft.endswith(".weight") and dot and which in ("A", "B")):
        raise SyncError(f"{peft!r} is not peft's name of a LoRA tensor: adapter of another model or peft?")
    return OMNI + module.removeprefix(PEFT), which


def group_of(module: str) -> tuple[str, ...]:
    """The modules that vLLM holds in one matrix with `module`, itself included."""
    parent, _, last = module.rpartition(".")
    for members in FUSED:
        if last in members:
            return tuple(f"{parent}.{member}" for member in members)
    return (module,)


def whole_groups(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """The fused groups that contain any of `modules`, each once, in order of first appearance."""
    return list(dict.fromkeys(group_of(module) for module in modules))
