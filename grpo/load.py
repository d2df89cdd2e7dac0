"""From what a user names to a model that answers: a run's folder, an export, or any Qwen2.5-Omni checkpoint.

evaluate, answer, export, serve and demo all take their model through here, and with it the prompt it was trained with.
Prompts are rebuilt from plain values: nothing that came with a model is instantiated (docs/use-your-model.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

import conf
from data.prompt import Prompt
from grpo.config import ConfigError

PROMPT_FILE = "prompt.json"  # in an export: the plain values of its prompt, and its hash
PROMPT_KEYS = ("system", "instruction", "words", "options")


@dataclass(frozen=True)
class Found:
    """A model on disk (or on the hub): the base checkpoint, perhaps an adapter, and how it was asked in training."""

    name: str  # as the user gave it
    base: str  # folder or hub name of a checkpoint
    adapter: Path | None = None  # folder with peft's files
    prompt: Mapping | None = None  # values of PROMPT_KEYS; None: it does not say
    max_tokens: int | None = None
    dtype: str | None = None
    run: Path | None = None  # the run's folder, if it is one
    step: int | None = None  # of the run's checkpoint
    processor: str | None = None
    origin: str | None = None  # of weights that were trained whole: the checkpoint from which they started

    @property
    def identity(self) -> dict:
        """What is written beside every number: base and adapter by name and hash (a base on the hub by name), step."""
        adapter = [self.adapter / "adapter_model.safetensors"] if self.adapter else []
        base = sorted(Path(self.base).glob("*.safetensors"))
        return {"model": self.name, "base": self.base, "base_sha256": _digest(base), "adapter_sha256": _digest(adapter),
                "step": self.step}  # fmt: skip


def find(name: str | Path, checkpoint: str | int = "best", processor: str | None = None) -> Found:
    """Look at what `name` is. `checkpoint`: of a run, best, last or a step; best falls back on last.

    Raises ConfigError, saying what would be right, for a folder that is none of the three.
    """
    folder = Path(name)
    if (folder / "checkpoints").is_dir():
        return _run(folder, checkpoint, processor)
    if folder.is_dir():
        if (folder / "adapter_config.json").exists():
            base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
            prompt = _json(folder.parent / PROMPT_FILE)
            return Found(str(name), base, folder, prompt and prompt["prompt"], processor=processor)
        if not (folder / "config.json").exists():
            raise ConfigError(f"{folder} is no model: a run's folder (with checkpoints/), an export, an adapter or a "
                              f"checkpoint (with config.json) is wanted")  # fmt: skip
        said = _json(folder / PROMPT_FILE)
        if said is None:
            return Found(str(name), str(folder), processor=processor)
        return Found(str(name), str(folder), None, said["prompt"], said.get("max_tokens"), processor=processor)
    if folder.is_absolute() or str(name).startswith(".") or len(folder.parts) != 2:
        raise ConfigError(f"there is no model {name}: give a run's folder (outputs/NAME), an export, a checkpoint's "
                          f"folder or a hub name (OWNER/NAME)")  # fmt: skip
    if folder.parts[0] in ("outputs", "multirun", "exports"):
        raise ConfigError(f"there is no folder {name}")
    return Found(str(name), str(name), processor=processor)


def newest_run(root: str | Path = "outputs") -> Path:
    """The run under `root` whose checkpoint is youngest. Raises ConfigError where there is none."""
    runs = [p for p in Path(root).glob("*") if (p / "checkpoints" / "last.json").exists()]
    if not runs:
        raise ConfigError(f"no run under {root}/ has a checkpoint: name a model with --model")
    return max(runs, key=lambda p: (p / "checkpoints" / "last.json").stat().st_mtime)


def _run(folder: Path, checkpoint: str | int, processor: str | None) -> Found:
    pointers = folder / "checkpoints"
    if checkpoint in ("best", "last"):
        named = _json(pointers / f"{checkpoint}.json") or _json(pointers / "last.json")
        if named is None:
            raise ConfigError(f"{folder} has no checkpoint yet")
        adapter = pointers / named["folder"]
    elif str(checkpoint).isdecimal():
        adapter = pointers / f"step-{int(checkpoint):06d}"
    else:
        raise ConfigError(f"checkpoint {checkpoint!r} of {folder} must be best, last or the number of a step")
    whole = (adapter / "model.safetensors.index.json").exists()
    if not whole and not (adapter / "adapter_config.json").exists():
        there = ", ".join(sorted(p.name for p in pointers.glob("step-*")))
        raise ConfigError(f"{adapter} is not there; {pointers} holds {there or 'nothing'}")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    said = json.loads((adapter / ("config.json" if whole else "adapter_config.json")).read_text())
    base, origin = (str(adapter), said.get("_name_or_path")) if whole else (said["base_model_name_or_path"], None)
    if not base or (not Path(base).exists() and (Path(base).is_absolute() or base.startswith("."))):
        raise ConfigError(f"{folder} was trained on the checkpoint {base}, which is not there: start from the folder "
                          f"in which it was trained, or put it back")  # fmt: skip
    prompt = config["prompt"]
    if prompt.get("_target_", "data.prompt.Prompt") != "data.prompt.Prompt":  # code of the user's own: must be named
        prompt = None
    values = prompt and {k: prompt.get(k) for k in PROMPT_KEYS if k in prompt}
    return Found(str(folder), base, None if whole else adapter, values,
                 config["max_tokens"], config["model"]["dtype"], folder, int(adapter.name.rpartition("-")[2]),
                 processor or (None if whole else config["model"].get("processor")), origin)  # fmt: skip


def prompt_of(found: Found, named: str | None = None, words: int | None = None) -> Prompt:
    """The prompt of a model, or conf/prompt/NAME.yaml where it is `named`; `words` sets another thinking budget.

    Raises ConfigError where the model does not say its prompt and none is named.
    """
    if named is not None:
        if named not in _shipped():
            raise ConfigError(f"prompt {named!r} is not one of {', '.join(sorted(_shipped()))}")
        values = {k: v for k, v in yaml.safe_load(_shipped()[named].read_text()).items() if k in PROMPT_KEYS}
        if str(values.get("words", "")).startswith("${"):
            values["words"] = 25 if words is None else words
    elif found.prompt is None:
        raise ConfigError(f"{found.name} does not say which prompt it was trained with: name one of "
                          f"{', '.join(sorted(_shipped()))} (card is the published model's)")  # fmt: skip
    else:
        values = dict(found.prompt)
    if words is not None:
        if "{words}" not in values["instruction"]:
            raise ConfigError(f"think_words={words}, but the prompt of {found.name} names no number of words")
        values["words"] = words
    return Prompt(**values)


def _shipped() -> dict[str, Path]:
    return {p.stem: p for p in (Path(conf.__file__).parent / "prompt").glob("*.yaml")}


def open_policy(found: Found, prompt, *, dtype: str | None = None, attention: str = "auto", temperature: float = 1.0,
                lora: bool = True):  # fmt: skip
    """The model with its adapter, ready to answer. `lora=False` leaves the adapter off: the base alone.

    Raises ConfigError when it cannot be loaded.
    """
    from grpo.policy import Policy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or found.dtype or ("bfloat16" if device == "cuda" else "float32")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {dtype!r} must be float32, bfloat16 or float16")
    adapter = None
    if found.adapter is not None and lora:
        said = json.loads((found.adapter / "adapter_config.json").read_text())
        adapter = {"r": said["r"], "alpha": said["lora_alpha"], "dropout": 0.0, "targets": said["target_modules"],
                   "audio_tower": True}  # fmt: skip
    try:
        policy = Policy(found.base, adapter, prompt=prompt, dtype=dtype, device=device, attention=attention,
                        temperature=temperature, processor=found.processor)  # fmt: skip
    except OSError as error:
        raise ConfigError(f"{found.base} cannot be loaded: {' '.join(str(error).split())[:300]}. If only its processor "
                          f"is missing: processor=Qwen/Qwen2.5-Omni-7B") from error  # fmt: skip
    if adapter:
        policy.load_adapter(load_file(found.adapter / "adapter_model.safetensors"))
    return policy.eval().requires_grad_(False)


def _digest(files: list[Path]) -> str | None:
    """12 hex digits of the files' SHA-256, a block at a time; None for no files."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:12] if files else None


def _json(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None
