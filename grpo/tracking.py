"""What a run writes: metrics.jsonl, samples.jsonl, summary.json, and wandb. The only door to wandb."""

from __future__ import annotations

import json
import math
import secrets
import sys
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from grpo.checkpoint import sync, write_json
from grpo.config import ConfigError, RunError


class RunLog:
    """The files of one run. Step 0 is the state before training. On resume, lines of steps after `done` are dropped:
    they will be written again. So is what says how the leg before ended: the run goes on.

    What cannot be written raises RunError: a run whose numbers are lost is not worth its time.
    """

    def __init__(self, folder: Path, tracker, done: int = -1):
        self.folder, self.tracker = Path(folder), tracker
        for name in ("metrics.jsonl", "samples.jsonl"):
            self._keep(self.folder / name, done)
        for name in ("summary.json", "failure.json"):
            (self.folder / name).unlink(missing_ok=True)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._append("metrics.jsonl", {"step": step, **values})
        self.tracker.log(step, values)

    def samples(self, rows: list[dict]) -> None:
        for row in rows:
            self._append("samples.jsonl", row)

    def sample_table(self, step: int, rows: list[dict]) -> None:
        self.tracker.table(step, rows)

    def summary(self, values: Mapping) -> None:
        write_json(self.folder / "summary.json", dict(values))
        self.tracker.finish(values)

    def close(self) -> None:
        """The run is not over, this leg of it is."""
        self.tracker.finish({})

    def sync(self) -> None:
        """Wait until disk has all lines: what a checkpoint has behind it must not get lost with the machine."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (self.folder / name).exists():
                sync(self.folder / name)

    def _append(self, name: str, row: Mapping) -> None:
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_no_nan(row), ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise RunError(f"{self.folder / name} cannot be written ({error.strerror}): make room, or let it be "
                           f"written, and go on with resume=true") from error  # fmt: skip

    @staticmethod
    def _keep(path: Path, done: int) -> None:
        """Raises ConfigError for a whole line that is no JSON: what follows it must not get lost unseen."""
        if not path.exists():
            return
        temporary = path.with_name(f".{path.name}.tmp")
        # As bytes, whose lines end at \n alone: a completion may hold U+2028, and a kill may cut a character in two.
        with path.open("rb") as old, temporary.open("wb") as new:
            for i, line in enumerate(old, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    if not line.endswith(b"\n"):
                        break  # the half line of a killed run
                    raise ConfigError(f"{path}, line {i} is not JSON: mend or remove it before you resume") from error
                if row["step"] <= done:
                    new.write(line.removesuffix(b"\n") + b"\n")
        temporary.replace(path)


def _no_nan(value):
    """JSON has no NaN: a number that is none is written as null, and can be seen to be."""
    if isinstance(value, Mapping):
        return {k: _no_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class NoTracker:
    """Nothing beyond the run folder's own files."""

    def start(self, folder: Path, config: dict, name: str) -> None: ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def table(self, step: int, rows: list[dict]) -> None: ...

    def finish(self, summary: Mapping) -> None: ...


class Wandb:
    """Weights & Biases. `mode="offline"` writes into the run folder and needs neither account nor network.

    All legs of a run are one there: its id stands in wandb.json. Whatever wandb raises is told once, and the run goes
    on without it: the folder's own files have every number.
    """

    def __init__(self, *, mode: str = "offline", project: str = "audsem-grpo"):
        if mode not in ("offline", "online"):
            raise ValueError(f"tracking.mode must be 'offline' or 'online', got {mode!r}")
        self.mode, self.project, self.run, self.lost = mode, project, None, False

    def start(self, folder: Path, config: dict, name: str) -> None:
        with self._survived("start"):
            import wandb  # 0.5 s that tracking=none does without

            known = folder / "wandb.json"
            if not known.exists():
                write_json(known, {"id": secrets.token_hex(4)})
            settings = wandb.Settings(silent=True, console="off", finish_timeout=60)
            self.run = wandb.init(dir=str(folder), mode=self.mode, project=self.project, name=name, config=config,
                                  id=json.loads(known.read_text())["id"], settings=settings,
                                  resume="allow" if self.mode == "online" else None)  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with self._survived("log"):
            self.run.log(dict(values), step=step)

    def table(self, step: int, rows: list[dict]) -> None:
        with self._survived("table"):
            import wandb

            columns = ["step", "question", "gold", "completion", "reward", "advantage", *rows[0]["rewards"]]
            cells = [[*(row[c] for c in columns[:6]), *row["rewards"].values()] for row in rows]
            self.run.log({"samples": wandb.Table(columns=columns, data=cells)}, step=step)

    def finish(self, summary: Mapping) -> None:
        with self._survived("finish"):
            self.run.summary.update(dict(summary))
            self.run.finish()

    @contextmanager
    def _survived(self, what: str):
        try:
            with suppress(Exception) if self.lost else nullcontext():
                yield
        except Exception as error:  # no network, no account, a full disk, a service that died
            self.lost = True
            reason = str(error).partition("\n")[0]
            print(f"wandb     {what}: {type(error).__name__}: {reason}; the run goes on without it", file=sys.stderr)
