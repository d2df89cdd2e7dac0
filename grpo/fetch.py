"""What a job without network will need, fetched beforehand: `python -m grpo.fetch [experiment=NAME]`, `make fetch`.

The words are the run's. Its model comes from the Hugging Face hub into the cache (HF_HOME), safetensors and text only:
no pickles, no code. revision=COMMIT pins it; the folder that is printed then goes into the run as model.path=FOLDER.
Data is not fetched, for the sets have no address of their own: what is missing is named, and how it is made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from grpo.config import ConfigError, composed, one_line_errors

# Weights as safetensors, and text. Python files, .bin and .pt never come.
WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "LICENSE*"]


def fetch_model(path: str | None, revision: str | None, download: Callable) -> str:
    """Bring `path` into the cache; returns one line of what is there now. Raises ConfigError.

    download: huggingface_hub.snapshot_download, or what stands for it.
    """
    if path is None:
        return "model   made on the spot: nothing to fetch"
    if Path(path).is_dir():
        return f"model   {path} is a folder: nothing to fetch"
    try:
        folder = Path(download(path, revision=revision, allow_patterns=WANTED))
    except Exception as error:  # of the network, of the hub, of a name: the hub's own words say it best
        raise ConfigError(f"model.path={path}: {' '.join(str(error).split())[:300]}") from error
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"model.path={path}: {folder} has no safetensors; weights in another form are not loaded")
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) / 1e9
    pinned = f"; in the run: model.path={folder}" if revision else ""
    return f"model   {path} is there, {size:.1f} GB, commit {folder.name}{pinned}"


def missing_data(data: Mapping) -> list[str]:
    """A line for each manifest of a composed `data` that is not there."""
    lines = []
    for part in ("train", "eval"):
        path = (data.get(part) or {}).get("path")
        if path and not Path(path).exists():
            lines.append(f"data    {part}: there is no {path}: write it with python -m data.prepare (docs/data.md), "
                         f"or name another with data.{part}.path=")  # fmt: skip
    return lines


def fetch(cfg: DictConfig, revision: str | None, download: Callable) -> list[str]:
    """Fetch for a composed run; returns what is missing still. Prints a line for each thing."""
    print(fetch_model(cfg.model.path, revision, download))
    lacking = missing_data(OmegaConf.to_container(cfg.data, resolve=True))
    for line in lacking or ["data    is there"]:
        print(line)
    return lacking


def main() -> None:
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        sys.exit(__doc__)
    revision = next((w.partition("=")[2] for w in words if w.startswith("revision=")), None)
    os.environ.pop("HF_HUB_OFFLINE", None)  # this is the one place that may ask the network
    from huggingface_hub import snapshot_download

    with one_line_errors():
        cfg = composed([w for w in words if not w.startswith("revision=")])
        sys.exit(1 if fetch(cfg, revision, snapshot_download) else 0)


if __name__ == "__main__":
    main()
