"""Make a model of a run that others can use: `python -m grpo.export RUN OUT`.

    OUT/config.json, model*.safetensors, ...   the merged model, full-Omni layout: for transformers and vLLM
    OUT/adapter/                               the LoRA adapter alone, for transformers + peft
    OUT/adapter-vllm/                          the same under the names that vLLM knows
    OUT/prompt.json, README.md                 how it is asked (with the prompt's hash), and the model card

Weights are merged tensor by tensor by the rule that trainer and rollout engines share (grpo/sync/merge.py), a file of
the base at a time: the whole model is never in memory. SOURCE may also be a bare Thinker (the published
gijs/audsemthinker-qa-grpo): it is written in the layout that vLLM loads.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.card import card
from grpo.config import ConfigError
from grpo.load import PROMPT_FILE, Found, find, prompt_of
from grpo.predict import hash_of
from grpo.sync.merge import merged
from grpo.sync.names import OMNI, SyncError, adapter_for_vllm, module_of

# What makes a processor, by any transformers of the last years. Never spk_dict.pt: a pickle, and only for speech.
PROCESSOR = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
             "special_tokens_map.json", "preprocessor_config.json", "processor_config.json",
             "video_preprocessor_config.json", "chat_template.json", "chat_template.jinja")  # fmt: skip
UNUSED = ("talker", "token2wav")  # of the full model: what speaks


def local(name: str) -> Path:
    """The folder of a checkpoint; one on the hub is fetched into its cache, without pickles."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"]))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"{name} is neither a folder nor to be had from the hub: {str(error).splitlines()[0]}"
        ) from error


def processor_files(folder: Path) -> list[Path]:
    """What makes a processor in `folder`, as far as it is there."""
    return [folder / name for name in PROCESSOR if (folder / name).exists()]


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights: those its index names, else all. Raises ConfigError for one elsewhere."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if odd := [name for name in names if Path(name).name != name]:
        raise ConfigError(f"{index} names {odd[0]!r}, which lies in another folder: not a checkpoint's own file")
    return [folder / name for name in names]


def export(found: Found, out: Path, *, prompt, scores: list[Path] = [], title: str | None = None,  # noqa: B006
           licence: str | None = None) -> Path:  # fmt: skip
    """Write everything to `out` (under a temporary name, then renamed). Raises ConfigError."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is there already: choose another folder")
    base = local(found.base)
    processor = local(found.processor) if found.processor else base
    temporary = out.with_name(f".{out.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        there = processor_files(processor)
        if not {"preprocessor_config.json", "processor_config.json"} & {file.name for file in there}:
            raise ConfigError(f"{processor} has a tokenizer only: say where the processor is, --processor "
                              f"Qwen/Qwen2.5-Omni-7B")  # fmt: skip
        for file in there:
            shutil.copyfile(file, temporary / file.name)
        if (base / "generation_config.json").exists():
            shutil.copyfile(base / "generation_config.json", temporary / "generation_config.json")
        dtype = getattr(torch, found.dtype) if found.dtype else None
        stored = write_weights(base, found.adapter, temporary, dtype)
        config = full_config(json.loads((base / "config.json").read_text()), stored)
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        if found.adapter:
            write_adapters(found.adapter, temporary)
        said = {"prompt": {"system": prompt.system, "instruction": prompt.instruction, "options": prompt.options},
                "max_tokens": found.max_tokens, "prompt_hash": rendered_hash(temporary, prompt)}  # fmt: skip
        (temporary / PROMPT_FILE).write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n")
        text = card(found, said, name=title or str(out), dtype=stored, scores=scores, licence=licence)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def rendered_hash(folder: Path, prompt) -> str:
    """`prompt_hash` from an export's own processor."""
    from grpo.policy import Qwen2_5OmniProcessor

    processor = Qwen2_5OmniProcessor.from_pretrained(folder)
    return hash_of(prompt, lambda m: processor.apply_chat_template(m, tokenize=False, add_generation_prompt=True))


def full_config(config: Mapping, dtype: str) -> dict:
    """The config of a whole Qwen2.5-Omni without the parts that speak, from its own or from a bare Thinker's."""
    config = dict(config)
    if config.get("model_type") == "qwen2_5_omni_thinker":
        config = {"model_type": "qwen2_5_omni", "thinker_config": config}
    elif "thinker_config" not in config:
        raise ConfigError(f"model_type {config.get('model_type')!r} is neither a Qwen2.5-Omni nor its Thinker")
    config = {k: v for k, v in config.items() if k not in ("talker_config", "token2wav_config", "torch_dtype")}
    return config | {"architectures": ["Qwen2_5OmniForConditionalGeneration"], "enable_audio_output": False,
                     "dtype": dtype}  # fmt: skip


def write_weights(base: Path, adapter: Path | None, out: Path, dtype: torch.dtype | None) -> str:
    """Merged Thinker weights under checkpoint names, a file for each of the base's. Returns their dtype.

    Raises ConfigError when the base has no safetensors or lacks a weight that the adapter changes.
    """
    files = weight_files(base)
    if not files:
        raise ConfigError(f"{base} holds no *.safetensors")
    lora = _lora(adapter)
    kept = [(file, names) for file in files if (names := [n for n in _names(file) if not n.startswith(UNUSED)])]
    index, total, seen = {}, 0, ""
    for number, (file, names) in enumerate(kept, start=1):
        alone = len(kept) == 1
        name = "model.safetensors" if alone else f"model-{number:05d}-of-{len(kept):05d}.safetensors"
        tensors = dict(_merged(file, names, lora, dtype))
        total += sum(t.nbytes for t in tensors.values())
        index |= dict.fromkeys(tensors, name)
        seen = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        save_file(tensors, out / name, metadata={"format": "pt"})
        if not alone:
            where = {"metadata": {"total_size": total}, "weight_map": index}
            (out / "model.safetensors.index.json").write_text(json.dumps(where, indent=1) + "\n")
    if lora:
        raise ConfigError(f"{base} has no weight {next(iter(lora))}.weight, which the adapter changes")
    return seen


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _merged(file: Path, names: list[str], lora: dict, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for name in names:
            weight = tensors.get_tensor(name)
            weight = weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight
            whole = name if name.startswith(OMNI) else OMNI + name
            if parts := lora.pop(whole.removesuffix(".weight"), None):
                weight = merged(weight, *parts)
            yield whole, weight.contiguous()


def _lora(adapter: Path | None) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Checkpoint's module -> (A, B, alpha/r). Raises ConfigError for an adapter of another kind."""
    if adapter is None:
        return {}
    said = json.loads((adapter / "adapter_config.json").read_text())
    if said.get("use_rslora") or said.get("use_dora") or said.get("rank_pattern") or said.get("alpha_pattern"):
        raise ConfigError(f"{adapter} is no plain LoRA (rslora, dora or ranks by pattern): merge it with peft")
    halves: dict[str, dict[str, Tensor]] = {}
    try:
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
            module, which = module_of(name)
            halves.setdefault(module, {})[which] = tensor
    except SyncError as error:
        raise ConfigError(f"{adapter}: {error}") from error
    return {module: (half["A"], half["B"], said["lora_alpha"] / said["r"]) for module, half in halves.items()}


def write_adapters(adapter: Path, out: Path) -> None:
    """The adapter for peft, as it is, and under vLLM's names."""
    said = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for folder in ("adapter", "adapter-vllm"):
        (out / folder).mkdir()
    shutil.copyfile(adapter / "adapter_config.json", out / "adapter" / "adapter_config.json")
    shutil.copyfile(adapter / "adapter_model.safetensors", out / "adapter" / "adapter_model.safetensors")
    modules = sorted({module_of(name)[0].rpartition(".")[2] for name in tensors})
    plain = {"peft_type": "LORA", "r": said["r"], "lora_alpha": said["lora_alpha"], "bias": "none",
             "target_modules": modules, "base_model_name_or_path": said["base_model_name_or_path"]}  # fmt: skip
    (out / "adapter-vllm" / "adapter_config.json").write_text(json.dumps(plain, indent=1) + "\n")
    save_file({adapter_for_vllm(name): tensor for name, tensor in tensors.items()},
              out / "adapter-vllm" / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m grpo.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("source", help="a run's folder, an adapter, a checkpoint's folder or a hub name")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--checkpoint", default="best", help="of a run: best, last or a step (default: best)")
    parser.add_argument("--processor", help="where the processor is, if the base comes without")
    parser.add_argument("--prompt", help="a name of conf/prompt, for a model that does not say its prompt (card)")
    parser.add_argument("--scores", type=Path, nargs="*", default=[], help="folders of evaluations, for the model card")
    parser.add_argument("--title", help="the model's name on its card, such as its hub name (default: OUT)")
    parser.add_argument("--license", dest="licence", help="of the new weights; decide it from those of base and data")
    args = parser.parse_args(words)
    try:
        found = find(args.source, args.checkpoint, args.processor)
        prompt = prompt_of(found, args.prompt)
        out = export(found, args.out, prompt=prompt, scores=args.scores, title=args.title, licence=args.licence)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    print(f"written   {out}: merged model ({size / 2**30:.2f} GiB), README.md, prompt.json"
          + (", adapter/, adapter-vllm/" if found.adapter else ""))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
