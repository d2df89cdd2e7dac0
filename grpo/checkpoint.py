"""Checkpoints that are whole or not there: written under a temporary name, then renamed.

checkpoints/step-000100/adapter_config.json + adapter_model.safetensors     peft's layout, or a whole model (weights.py)
                        trainer.json                                        step, quarantined ids, best so far
                        trainer.safetensors                                 master weights and optimizer state
checkpoints/best.json, last.json                                            which folder is which
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from grpo.weights import save_policy


class Checkpoints:
    """The checkpoints of one run: the last, and the best by held-out accuracy."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def save(self, step: int, policy, engine, state: dict, *, best: bool) -> None:
        """Write the state after `step` optimizer steps; every rank must call. Older ones but the best are removed."""
        temporary, final = self.folder / f".tmp-{step:06d}", self.folder / f"step-{step:06d}"
        if engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        engine.gather([])  # no rank writes before the folder stands
        save_policy(policy, engine, temporary)
        tensors = engine.state()
        if engine.rank == 0:
            save_file(tensors, temporary / "trainer.safetensors")
            write_json(temporary / "trainer.json", {**state, "step": step})  # a resumed state has one
            if final.exists():  # saved before at this step: it stays whole until the new one has its name
                shutil.rmtree(self._aside(final), ignore_errors=True)
                os.replace(final, self._aside(final))
            os.replace(temporary, final)
            if best:  # before `last`: a run killed between the two repeats this step and names its best again
                write_json(self.folder / "best.json", {"folder": final.name})
            write_json(self.folder / "last.json", {"folder": final.name})
            keep = {self._named("last"), self._named("best")}
            for old in self.folder.glob("step-*"):
                if old not in keep:
                    shutil.rmtree(old)
            for old in self.folder.glob(".old-*"):
                shutil.rmtree(old)
        engine.gather([])

    def load(self, engine) -> dict | None:
        """Put the last checkpoint back and return its state; None when the run has none."""
        folder = self._named("last")
        if folder is None:
            return None
        engine.load_state(load_file(folder / "trainer.safetensors"))
        return json.loads((folder / "trainer.json").read_text())

    def _named(self, which: str) -> Path | None:
        pointer = self.folder / f"{which}.json"
        if not pointer.exists():
            return None
        folder = self.folder / json.loads(pointer.read_text())["folder"]
        return folder if folder.exists() else self._aside(folder)

    @staticmethod
    def _aside(folder: Path) -> Path:
        return folder.with_name(f".old-{folder.name}")


def write_json(path: Path, value) -> None:
    """Write JSON under a temporary name, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
