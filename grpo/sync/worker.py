"""The trainer's end inside vLLM: a worker extension that receives weights. The same code in-process, in a server and
on every tensor-parallel worker. One of two doors to vllm.

    adapter   bridge_adapter                LoRA tensors, registered under a fresh id
    delta     bridge_delta                  LoRA tensors, merged here into the kept base weights
    full      bridge_load, once a layer     whole weights
              bridge_join, bridge_receive   the same by broadcast (grpo/sync/broadcast.py)

Weights go in by checkpoint name through vLLM's layerwise reload, because an engine repacks its matrices (a CPU's drops
the originals). Only the modules named are touched, whole fused groups at a time.

Tensors come as `tensors` (same process), `path` (a safetensors file inside GRPO_SYNC_DIR) or `data` (safetensors bytes
in base64). No pickles, and no path outside that folder.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import Tensor, nn
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

from grpo.sync.broadcast import broadcast, join, store
from grpo.sync.merge import merged
from grpo.sync.names import SyncError, module_of, whole_groups

EXCHANGE = "GRPO_SYNC_DIR"


class Bridge:
    """Mixed into vLLM's worker class: `self` is the worker. What receives weights answers with what it matched."""

    # ---------------------------------------------------------------- adapter

    def bridge_adapter(self, version: int, id: int, config: Mapping, tensors=None, path=None, data=None) -> dict:
        """Register a LoRA adapter under `id`, in place of every other one."""
        tensors = received(tensors, path, data)
        manager = self.model_runner.lora_manager
        inner = manager._adapter_manager
        adapter = LoRAModel.from_lora_tensors(
            id, own(tensors), PEFTHelper.from_dict(dict(config)), device="cpu", dtype=manager.lora_config.lora_dtype,
            weights_mapper=inner.model.hf_to_vllm_mapper.get_rename_mapper(),
        )  # fmt: skip
        changed = len(adapter.loras)
        if lost := sorted(set(adapter.loras) - lora_modules(inner)):
            raise SyncError(f"vLLM has no module for {len(lost)} of {changed} adapted ones, first {lost[0]!r}: it "
                            f"would take this adapter without a word and ignore it")  # fmt: skip
        manager.remove_all_adapters()
        inner.add_adapter(adapter)
        inner.activate_adapter(id)
        self._bridge_held = version
        return answer(tensors, changed, version)

    # ---------------------------------------------------------------- delta

    def bridge_delta(self, version: int, scale: Mapping[str, float], tensors=None, path=None, data=None) -> dict:
        """Hold base + B A · scale for every adapted module. Tensors by peft's names, `scale` by checkpoint module."""
        tensors = received(tensors, path, data)
        pairs: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, which = module_of(name)
            pairs.setdefault(module, {})[which] = tensor.to(self.device)
        kept = self._bridge_kept(pairs)
        for module, pair in pairs.items():
            if len(pair) < 2 or f"{module}.weight" not in kept.get(module, {}):
                raise SyncError(f"{module} came with {' and '.join(pair)} for {sorted(kept.get(module, {}))}: a matrix "
                                f"of the checkpoint and both halves of its adapter are wanted")  # fmt: skip
        for group in whole_groups(pairs):  # one at a time: merged matrices of the whole model would fill a GPU
            weights = {name: tensor for module in group for name, tensor in kept[module].items()}
            for module in (m for m in group if m in pairs):
                a, b, name = pairs[module]["A"], pairs[module]["B"], f"{module}.weight"
                weights[name] = merged(weights[name].to(self.device), a, b, scale[module])
            self.bridge_load(version, weights)
        return answer(tensors, len(pairs), version)

    def _bridge_kept(self, modules: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Base weights of the fused groups around `modules`: from the checkpoint at first use, then kept on the CPU."""
        base = self.__dict__.setdefault("_bridge_base", {})
        members = [module for group in whole_groups(modules) for module in group]
        for module in members:
            if module not in base:
                base[module] = read(self._bridge_checkpoint(), module, self.model_config.dtype)
        return {module: base[module] for module in members}

    # ---------------------------------------------------------------- full

    def bridge_load(self, version: int, tensors=None, path=None, data=None) -> dict:
        """Load weights by their checkpoint names, fused groups whole. They may come in several calls of one version."""
        tensors = received(tensors, path, data)
        whole_or_raise(tensors, self._bridge_checkpoint())
        model = self.model_runner.get_model()
        layers = [model.get_submodule(name) for name in sorted(engine_modules(model, modules_of(tensors)))]
        for layer in layers:
            initialize_layerwise_reload(layer)
        model.load_weights(tensors.items())
        for layer in layers:  # now, not after the last call: until then the loader may hold on to the sender's tensors
            finalize_layerwise_reload(layer, self.model_config)
        self._bridge_held = version
        self.__dict__.setdefault("_bridge_touched", {}).update(dict.fromkeys(modules_of(tensors)))
        return answer(tensors, len(tensors), version)

    def bridge_reset(self) -> int:
        """Hold the checkpoint's own weights again, whatever an earlier run sent. Returns the number of modules."""
        touched, index = list(self.__dict__.get("_bridge_touched", {})), self._bridge_checkpoint()
        for group in whole_groups(touched):
            tensors = [read(index, module, self.model_config.dtype) for module in group]
            self.bridge_load(0, {name: tensor for weights in tensors for name, tensor in weights.items()})
        if getattr(self.model_runner, "lora_manager", None) is not None:
            self.model_runner.lora_manager.remove_all_adapters()
        self._bridge_held, self._bridge_touched = 0, {}
        return len(touched)

    def bridge_join(self, address: str, port: int, ranks: int) -> bool:
        """Join the trainer's rank 0 in a process group; it is rank 0 there, tensor-parallel worker r is 1 + r."""
        self._bridge_group = join(store(address, port, ranks), 1 + self.rank, ranks, self.device.type)
        return True

    def bridge_receive(self, version: int, shapes: Mapping[str, Sequence]) -> dict:
        """Take a broadcast of weights, named with dtype and shape in the order in which they come, and load them."""
        tensors = {}
        for name, (dtype, shape) in shapes.items():
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            broadcast(self._bridge_group, tensors[name])
        return self.bridge_load(version, tensors)

    def _bridge_checkpoint(self) -> dict[str, dict[str, Path]]:
        if "_bridge_index" not in self.__dict__:
            self._bridge_index = checkpoint_index(self.model_config)
        return self._bridge_index

    # ---------------------------------------------------------------- what is held

    def bridge_version(self) -> int:
        """Of the weights last received; 0 for the checkpoint's own."""
        return self.__dict__.get("_bridge_held", 0)


# ---------------------------------------------------------------- tensors on their way in


def received(tensors: Mapping[str, Tensor] | None, path: str | None, data: str | None) -> dict[str, Tensor]:
    """The tensors of a call, whichever of its three ways they came. Raises SyncError for a path outside EXCHANGE."""
    if sum(way is not None for way in (tensors, path, data)) != 1:
        raise SyncError("give the tensors in one way: tensors=, path= or data=")
    if tensors is not None:
        return dict(tensors)
    if data is not None:
        return load(base64.b64decode(data, validate=True))
    folder = os.environ.get(EXCHANGE)
    if not folder or not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise SyncError(f"{path} is not inside {EXCHANGE}, the folder from which this engine takes weights")
    return load_file(path)


def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies: vLLM multiplies alpha/r into B in place, which in one process would be the trainer's parameter."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def answer(tensors: Mapping[str, Tensor], changed: int, version: int) -> dict:
    return {"keys": len(tensors), "bytes": sum(t.nbytes for t in tensors.values()), "changed": changed,
            "version": version}  # fmt: skip


# ---------------------------------------------------------------- names inside vLLM


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules of some weights, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def engine_modules(model: nn.Module, modules: Iterable[str]) -> set[str]:
    """vLLM's names of the checkpoint's modules: `...self_attn.q_proj` is inside `...self_attn.qkv_proj`.

    Raises SyncError when the engine has no such module.
    """
    known, found = dict(model.named_modules()), set()
    for module in modules:
        mapped = model.hf_to_vllm_mapper.apply_list([f"{module}.weight"])
        name = mapped[0].removesuffix(".weight") if mapped else module
        parent, _, last = name.rpartition(".")
        packs = [f"{parent}.{pack}" for pack, parts in model.packed_modules_mapping.items() if last in parts]
        place = next((candidate for candidate in (name, *packs) if candidate in known), None)
        if place is None:
            raise SyncError(f"vLLM's model has no module for {module!r}: is it another model than the trainer's?")
        found.add(place)
    return found


def lora_modules(manager) -> set[str]:
    """vLLM's names of all modules that can carry an adapter, fused ones by their parts."""
    parts = {part for members in manager.packed_modules.values() for part in members}
    return (set(manager.modules) - set(manager.packed_modules)) | parts


# ---------------------------------------------------------------- the checkpoint


def checkpoint_index(model_config) -> dict[str, dict[str, Path]]:
    """Module -> its weights' names -> file, of all safetensors files of the checkpoint that vLLM was started with."""
    folder = Path(model_config.model)
    if not folder.is_dir():  # a name on the hub: vLLM has it in its cache
        folder = Path(download_weights_from_hf(model_config.model, None, ["*.safetensors"]))
    index: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                index.setdefault(name.rpartition(".")[0], {})[name] = file
    return index


def read(index: Mapping[str, Mapping[str, Path]], module: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's weights from the checkpoint, in the dtype that trainer and engine compute in."""
    out = {}
    for name, file in index.get(module, {}).items():
        with safe_open(file, "pt") as weights:
            out[name] = weights.get_tensor(name).to(dtype)
    return out


def whole_or_raise(names: Iterable[str], index: Mapping[str, Mapping[str, Path]]) -> None:
    """Raise SyncError unless the checkpoint knows every name, and every fused group among them is complete."""
    names = set(names)
    for name in names:
        if name not in index.get(name.rpartition(".")[0], {}):
            raise SyncError(f"{name!r} is no weight of the checkpoint that the engine was started with")
    for group in whole_groups(modules_of(names)):
        if missing := sorted({n for module in group for n in index.get(module, {})} - names):
            raise SyncError(f"{missing[0]!r} is missing: vLLM keeps it in one matrix with weights that came, and a "
                            f"part of that matrix is garbage")  # fmt: skip
