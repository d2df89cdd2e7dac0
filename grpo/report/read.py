"""Run folders as they are found. Nothing here raises for what one holds: a report of fifty runs must not fail for one.

Everything in a run folder is untrusted: numbers that are none are dropped, text stays text, YAML is read as plain data.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

MAX_LINE = 4_000_000  # bytes of one line of metrics.jsonl or samples.jsonl
MAX_FILE = 256_000_000  # bytes of metrics.jsonl: 500 steps take less than one
MAX_YAML = 1_000_000
MAX_NUMBER = 1e100  # sums and squares of larger ones overflow; no run measures such a thing
MAX_STEP = 10**9  # of a run whose config does not say how many it has
QUIET_SECONDS = 1800  # a run without summary.json that wrote nothing for this long counts as stopped
MARKS = ("metrics.jsonl", "samples.jsonl", "summary.json", "config.yaml", "failure.json", ".hydra")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same language, ten times faster


@dataclass(frozen=True)
class RunData:
    """One run folder. `rows` are metrics.jsonl by step; a value is a finite float, or None where the run wrote null
    (RunLog writes NaN and infinity so) or a number beyond MAX_NUMBER."""

    name: str  # short, unique in the report
    folder: Path
    state: str  # finished | running | stopped | failed | unreadable
    problems: tuple[str, ...] = ()  # what is wrong with the folder, in words
    overrides: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)  # Hydra's group choices, such as loss: grpo
    config: Mapping = field(default_factory=dict)
    rows: tuple[Mapping[str, float | None], ...] = ()
    summary: Mapping[str, float] = field(default_factory=dict)
    device: str = ""  # what each rank trained on: a GPU's name or cpu; unknown of older runs
    ranks: float | None = None
    failure: str | None = None

    def value(self, key: str) -> str:
        """What the run had for the override `key`: as given, else the group choice, else the resolved config's."""
        for source in (self.overrides, self.choices):
            if key in source:
                return source[key]
        node = self.config
        for part in key.lstrip("+~").split("."):
            if not isinstance(node, Mapping) or part not in node:
                return ""
            node = node[part]
        return _plain(node)

    def series(self, name: str) -> list[tuple[int, float]]:
        """[(step, value)] of a metric where it is a number."""
        return [(int(r["step"]), r[name]) for r in self.rows if r.get(name) is not None]


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among and below `paths`, sorted, each once. Links to folders are not followed below them."""
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        for folder, names, files in os.walk(path):
            here = Path(folder)
            if _is_run(set(names) | set(files)):
                found.setdefault(here.resolve(), here)
                names.clear()
            names[:] = sorted(
                n for n in names if not n.startswith(".") and n not in ("checkpoints", "wandb", "rollouts")
            )
    return sorted(found.values(), key=lambda p: [_natural(part) for part in p.parts])


def read_run(folder: Path, name: str | None = None, now: float | None = None) -> RunData:
    """Everything but the samples. Never raises for the folder's contents; `problems` says what could not be read."""
    folder, problems = Path(folder), []
    try:
        config = _yaml(folder / "config.yaml", problems) or _yaml(folder / ".hydra" / "config.yaml", problems)
        rows = _metrics(folder, _mapping(config), problems)
        summary = _numbers(_json(folder / "summary.json", problems))
        failure = _json(folder / "failure.json", problems)
        provenance = _json(folder / "provenance.json", problems)
        hydra = _yaml(folder / ".hydra" / "hydra.yaml", problems)
        overrides = _overrides(_yaml(folder / ".hydra" / "overrides.yaml", problems))
        runtime = _mapping(_mapping(_mapping(hydra).get("hydra")).get("runtime"))
        choices = {str(k): _plain(v) for k, v in _mapping(runtime.get("choices")).items() if isinstance(v, str)}
    except Exception as error:  # a folder made to break this must not take the other runs with it
        return RunData(name or folder.name, folder, "unreadable", (f"{type(error).__name__}: {str(error)[:300]}",))
    said = str(failure.get("error", "no reason given"))[:2000] if isinstance(failure, dict) and failure else None
    state = _state(folder, rows, summary, said, _mapping(config), problems, time.time() if now is None else now)
    return RunData(name or folder.name, folder, state, tuple(problems), overrides, choices, _mapping(config),
                   tuple(rows), summary, _plain(provenance.get("device", "")), number(provenance.get("ranks")),
                   said)  # fmt: skip


def read_runs(paths: Iterable[Path], now: float | None = None) -> list[RunData]:
    """All runs among and below `paths`, named by what tells their folders apart."""
    folders = find_runs(paths)
    root = Path(os.path.commonpath([f.resolve().parent for f in folders])) if folders else Path()
    names = [str(f.resolve().relative_to(root)) for f in folders]
    return [read_run(f, n, now) for f, n in zip(folders, names, strict=True)]


def lines(path: Path, counts: dict[str, int], limit: int = MAX_FILE) -> Iterator[dict]:
    """The JSON objects of a .jsonl file. `counts` gains bad (lines that are none), half (an unfinished last line)."""
    read = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            read += len(line)
            if read > limit:
                counts["unread"] = 1
                return
            row = parse_line(line)
            if row is not None:
                yield row
            elif line.strip():
                at_end = not line.endswith(b"\n") and len(line) < MAX_LINE
                counts["half" if at_end else "bad"] = counts.get("half" if at_end else "bad", 0) + 1


def parse_line(line: bytes) -> dict | None:
    """A JSON object, or None where the bytes are not one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def number(value) -> float | None:
    """`value` as a float of a sane size, else None. True and False are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if abs(value) <= MAX_NUMBER else None  # NaN compares false


# ---------------------------------------------------------------- parts of a folder


def _metrics(folder: Path, config: Mapping, problems: list[str]) -> list[dict]:
    """The rows by step. Steps beyond the config's are left out: one would squeeze the curves of all runs flat."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        problems.append("no metrics.jsonl: nothing was logged")
        return []
    wanted = number(config.get("steps"))
    most = wanted if wanted and 0 < wanted < MAX_STEP else MAX_STEP
    counts: dict[str, int] = {}
    rows: dict[int, dict] = {}
    try:
        for row in lines(path, counts):
            step = number(row.get("step"))
            if step is None or step < 0 or step != int(step) or step > most:
                kind = "beyond" if step is not None and step > most else "bad"
                counts[kind] = counts.get(kind, 0) + 1
                continue
            # Text in a metric's place is dropped; null and NaN stay as None: the run saw a number that was none.
            kept = {k: number(v) for k, v in row.items() if v is None or number(v) is not None or isinstance(v, float)}
            huge = sum(v is None and isinstance(row[k], float) and math.isfinite(row[k]) for k, v in kept.items())
            counts["huge"] = counts.get("huge", 0) + huge
            rows[int(step)] = kept | {"step": int(step)}  # a resumed run may have written a step twice
    except OSError as error:
        problems.append(f"metrics.jsonl could not be read ({error.strerror or error})")
    if counts.get("bad"):
        problems.append(f"metrics.jsonl: {_count(counts['bad'], 'line')} left out: no metrics")
    if counts.get("beyond"):
        problems.append(f"metrics.jsonl: {_count(counts['beyond'], 'line')} left out: steps beyond {most:.0f}")
    if counts.get("huge"):
        problems.append(f"metrics.jsonl: {_count(counts['huge'], 'number')} left out: beyond {MAX_NUMBER:.0e}")
    if counts.get("unread"):
        problems.append(f"metrics.jsonl: larger than {MAX_FILE // 10**6} MB, read up to there")
    if not rows and not counts.get("bad") and not counts.get("beyond"):
        problems.append("metrics.jsonl has no complete line yet")
    return [rows[s] for s in sorted(rows)]


def _state(folder, rows, summary, failure, config, problems, now: float) -> str:
    if failure:
        return "failed"
    if not rows:
        running = _age(folder / ".hydra", now) < QUIET_SECONDS or _age(folder / "metrics.jsonl", now) < QUIET_SECONDS
        return "running" if running and len(problems) < 2 else "unreadable"
    wanted = number(config.get("steps"))
    if summary and (wanted is None or summary.get("steps", rows[-1]["step"]) >= wanted):
        return "finished"
    if not summary and _age(folder / "metrics.jsonl", now) < QUIET_SECONDS:
        return "running"
    return "stopped"


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except OSError:
        return math.inf


def _json(path: Path, problems: list[str]):
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes()[:MAX_LINE])
    except (OSError, ValueError, RecursionError):
        problems.append(f"{path.name} is not readable JSON")
        return {}
    return value if isinstance(value, dict) else {}


def _yaml(path: Path, problems: list[str]):
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_YAML:
            raise ValueError("too large")
        return yaml.load(path.read_bytes(), Loader=LOADER) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        problems.append(f"{path.name} is not readable YAML")
        return {}


def _numbers(value: Mapping) -> dict[str, float]:
    return {str(k): number(v) for k, v in value.items() if number(v) is not None}


def _overrides(value) -> dict[str, str]:
    # Only text: writing out a nested value could take for ever (YAML aliases multiply).
    pairs = (v.partition("=") for v in value if isinstance(v, str)) if isinstance(value, list) else ()
    return {key.lstrip("+").strip()[:200]: text.strip()[:500] for key, sign, text in pairs if sign}


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _mapping(value) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def _plain(value) -> str:
    """A scalar as Hydra would write it; anything nested is empty."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)[:500] if isinstance(value, str | int | float) else ""


def _is_run(names: set[str]) -> bool:
    return "multirun.yaml" not in names and bool(names & set(MARKS))


def _natural(text: str) -> tuple:
    return (0, int(text), "") if text.isascii() and text.isdigit() and len(text) < 18 else (1, 0, text)
