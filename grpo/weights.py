"""What a checkpoint holds of the policy: its adapter, or, where whole weights are trained, a model that stands alone.

    adapter_config.json + adapter_model.safetensors                          peft's layout
    config.json + model-*.safetensors + processor                            full-Omni layout, as grpo.export writes it

A layer at a time is whole on a rank, and written by rank 0 before the next: also under ZeRO-3 no rank holds the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo.export import UNUSED, full_config, local, processor_files, weight_files
from grpo.sync.full import by_layer, weights
from grpo.sync.names import OMNI


def save_policy(policy, engine, folder: Path) -> None:
    """Write the policy of this moment into `folder`, which is there on rank 0. Every rank must call.

    Raises OSError or SafetensorError on rank 0, once the others have no need of it, where something cannot be written.
    """
    if getattr(policy, "has_adapter", True):
        with engine.gathered():
            if engine.rank == 0:
                policy.save_adapter(folder)
        return
    index: dict[str, str] = {}
    failed: Exception | None = None
    for number, tensors in enumerate(_layers(policy, engine), start=1):
        if engine.rank == 0 and failed is None:
            file = f"model-{number:05d}.safetensors"
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                failed = error  # the other ranks still gather layers with this one
            index |= dict.fromkeys(tensors, file)
    if failed is not None:
        raise failed
    if engine.rank == 0:
        base = local(policy.path)
        if rest := _others(base, index):
            save_file(rest, folder / "model-00000.safetensors", metadata={"format": "pt"})
            index |= dict.fromkeys(rest, "model-00000.safetensors")
        for file in [*processor_files(local(policy.processor_path)), base / "generation_config.json"]:
            if file.exists():
                shutil.copyfile(file, folder / file.name)
        dtype = str(policy.thinker.dtype).removeprefix("torch.")
        config = full_config(json.loads((base / "config.json").read_text()), dtype) | {"_name_or_path": policy.path}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        said = {"metadata": {}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(said, indent=1) + "\n")


@torch.no_grad()
def _layers(policy, engine) -> Iterator[dict[str, Tensor]]:
    """Checkpoint's name -> weight on the CPU, layer by layer; empty on all ranks but the first."""
    for layer in by_layer(weights(policy.model)):
        with engine.gathered([p for weight in layer for p in weight.parameters]):
            yield {w.name: w.tensor().to("cpu", copy=True).contiguous() for w in layer} if engine.rank == 0 else {}


def _others(base: Path, index: dict[str, str]) -> dict[str, Tensor]:
    """What the checkpoint has and the policy left out: the vision tower, which vLLM's loader looks for."""
    found = {}
    for file in weight_files(base):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                whole = name if name.startswith(OMNI) else OMNI + name
                if not name.startswith(UNUSED) and whole not in index:
                    found[whole] = tensors.get_tensor(name)
    return found
