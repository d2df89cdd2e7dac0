"""Checkpoints that are whole or not there: written under a temporary name, checked by hash, renamed.

checkpoints/step-000100/adapter_config.json + adapter_model.safetensors     peft's layout, or a whole model (weights.py)
                        trainer.json                                        step, quarantined ids, best so far
                        trainer.safetensors                                 master weights and optimizer state
                        manifest.json                                       size and sha256 of each; written last
checkpoints/best.json, last.json                                            which folder is which
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grpo.config import RunError
from grpo.watch import WATCH
from grpo.weights import save_policy

MANIFEST = "manifest.json"


class CheckpointError(RunError, OSError):
    """A checkpoint could not be written, or none can be read: names the folder, the reason, and what is still there."""


class Checkpoints:
    """The checkpoints of one run: the last `keep`, and the best by held-out accuracy."""

    def __init__(self, folder: Path, keep: int = 1):
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, policy, engine, state: dict, *, best: bool) -> None:
        """Write the state after `step` optimizer steps; every rank must call. Older ones but the best are removed.

        Raises CheckpointError, on all ranks, where it could not be written; those before it are whole then.
        """
        temporary, final = self.folder / f".tmp-{step:06d}", self.folder / f"step-{step:06d}"

        def prepare() -> None:
            if engine.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        def finish() -> None:
            if engine.rank == 0:
                save_file(tensors, temporary / "trainer.safetensors")
                write_json(temporary / "trainer.json", {**state, "step": step})  # a resumed state has one
                seal(temporary)
                self._name(temporary, final, best)

        self._together(engine, step, prepare)  # no rank writes before the folder stands
        self._together(engine, step, lambda: save_policy(policy, engine, temporary))
        tensors = engine.state()
        self._together(engine, step, finish)

    def load(self, engine, say=print) -> dict | None:
        """Put the last whole checkpoint back and return its state; None when the run has none.

        One that is not whole is named with its reason by `say`, and the one before is taken. Raises CheckpointError
        when there are some and none is whole.
        """
        folder, lines = engine.gather([self._choose() if engine.rank == 0 else None])[0]
        for line in lines:
            say(line)
        if folder is None:
            if lines:
                raise CheckpointError(f"no checkpoint in {self.folder} can be read: take a copy of one from elsewhere, "
                                      f"or start a new run")  # fmt: skip
            return None
        engine.load_state(load_file(folder / "trainer.safetensors"))
        return json.loads((folder / "trainer.json").read_text())

    # ---------------------------------------------------------------- writing, on rank 0

    def _together(self, engine, step: int, call) -> None:
        """`call()` on every rank. What the first could not write is told to all: none waits for it."""

        def attempt() -> None:
            try:
                call()
            except (OSError, SafetensorError) as error:
                shutil.rmtree(self.folder / f".tmp-{step:06d}", ignore_errors=True)  # it takes room
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                last = self._named("last")
                raise CheckpointError(
                    f"the checkpoint of step {step} could not be written to {self.folder} ({reason}); "
                    f"{last.name if last else 'none'} is the last whole one. Make room, or let it be written, and go "
                    f"on with resume=true"
                ) from error

        engine.together(attempt, CheckpointError)

    def _name(self, temporary: Path, final: Path, best: bool) -> None:
        if final.exists():  # saved before at this step: it stays whole until the new one has its name
            shutil.rmtree(_aside(final), ignore_errors=True)
            os.replace(final, _aside(final))
        os.replace(temporary, final)
        sync(self.folder)
        if best:  # before `last`: a run killed between the two repeats this step and names its best again
            write_json(self.folder / "best.json", {"folder": final.name})
        write_json(self.folder / "last.json", {"folder": final.name})
        # Later ones are of a future that was left: the run went on from before them.
        older = sorted((p for p in self.folder.glob("step-*") if p.name <= final.name), reverse=True)
        keep = {*older[: self.keep], self._named("best")}
        for old in self.folder.glob("step-*"):
            if old not in keep:
                shutil.rmtree(old)
        for old in {*self.folder.glob(".old-*"), *self.folder.glob(".tmp-*")} - keep:
            shutil.rmtree(old)

    # ---------------------------------------------------------------- choosing, on rank 0

    def _choose(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint no later than what last.json names, and a line for each that is passed over."""
        try:
            last = json.loads((self.folder / "last.json").read_text())["folder"]
        except (OSError, ValueError, KeyError):
            last = "step-~"  # after all of them
        names = {p.name.removeprefix(".old-") for p in self.folder.glob("*step-*") if not p.name.startswith(".tmp")}
        lines: list[str] = []
        for name in sorted((n for n in names if n <= last), reverse=True):
            for folder in (self.folder / name, _aside(self.folder / name)):
                if not folder.exists():
                    continue
                if (wrong := damage(folder)) is None:
                    return folder, lines
                lines.append(f"passed over the checkpoint {folder}: {wrong}")
        return None, lines

    def _named(self, which: str) -> Path | None:
        pointer = self.folder / f"{which}.json"
        if not pointer.exists():
            return None
        folder = self.folder / json.loads(pointer.read_text())["folder"]
        return folder if folder.exists() else _aside(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".old-{folder.name}")


def seal(folder: Path) -> None:
    """Write the manifest of a folder's files, and wait until disk has it all."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        sync(path)
        WATCH.busy()
    write_json(folder / MANIFEST, {"files": files})
    sync(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, naming the file; None when every byte is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, said in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != said["bytes"]:
            return f"{name} has {size} bytes, {said['bytes']} were written"
        if sha256(path) != said["sha256"]:
            return f"{name} is not what was written (sha256)"
    return None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
            WATCH.busy()  # whole weights of a large model take many minutes
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until disk has a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value) -> None:
    """Write JSON under a temporary name, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
