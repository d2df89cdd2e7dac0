"""Benchmarks as configured by conf/bench/*.yaml: a manifest, its official rule, and what its rows say."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.audio import load
from data.manifest import Problem, read
from data.question import Clip, Question
from data.scoring import RULES
from grpo.config import ConfigError

KEYS = {"path": str, "root": str, "rule": str, "items": int, "min_seconds": float, "max_seconds": float}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. `problems` are rows that could not be used: they are asked of nobody, but counted as wrong."""

    name: str
    path: Path
    sha256: str  # of the manifest file
    rule: str  # of data.scoring.official
    items: int | None  # of the official release, to be told where rows are missing
    questions: Sequence[Question]
    problems: Sequence[Problem] = ()
    min_seconds: float = 0.03
    max_seconds: float = 300.0

    def clip(self, question: Question) -> Clip:
        """The waveform of a question. Raises ClipError."""
        return load(question.audio, span=question.span, start=question.start, end=question.end,
                    min_seconds=self.min_seconds, max_seconds=self.max_seconds)  # fmt: skip


def benchmarks(specs: Mapping | None) -> list[Benchmark]:
    """The benchmarks of a composed config's `bench`. Raises ConfigError for wrong keys and missing manifests."""
    return [open_benchmark(str(name), spec) for name, spec in (specs or {}).items()]


def open_benchmark(name: str, spec: Mapping) -> Benchmark:
    """Read one benchmark's manifest."""
    if not isinstance(spec, Mapping) or (odd := sorted(spec.keys() - KEYS.keys())):
        wrong = odd[0] if isinstance(spec, Mapping) else spec
        raise ConfigError(f"bench.{name}: {wrong!r} is not one of {', '.join(KEYS)}; a bench file starts with "
                          f"'# @package bench.{name}'")  # fmt: skip
    for key in ("path", "rule"):
        if not spec.get(key):
            raise ConfigError(f"bench.{name}.{key} must be given")
    path = Path(spec["path"])
    try:
        manifest = read(path, root=spec.get("root"), hidden=True)
    except FileNotFoundError as error:
        raise ConfigError(f"bench.{name}: there is no manifest {path}: make it with `python -m data.prepare`, or set "
                          f"bench.{name}.path (or BENCH_DIR, the folder of them all)") from error  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"bench.{name}: {error}") from error
    if (clips := [q.audio for q in manifest]) and not any(clip.exists() for clip in clips):
        raise ConfigError(f"bench.{name}: no clip of {path} is there, such as {clips[0]}: set bench.{name}.root, the "
                          f"folder that its audio paths start from")  # fmt: skip
    if spec["rule"] not in RULES:
        raise ConfigError(f"bench.{name}.rule={spec['rule']}: there is no such rule, only {', '.join(RULES)}")
    limits = {k: float(spec[k]) for k in ("min_seconds", "max_seconds") if spec.get(k) is not None}
    return Benchmark(
        name, path, hashlib.sha256(path.read_bytes()).hexdigest(), spec["rule"], spec.get("items"), manifest.questions,
        manifest.problems, **limits,
    )  # fmt: skip
