"""Seconds a step of whole runs, by stage and as ratios: of every rollout engine, here or at the true 7B shapes.

Every case is `python -m grpo.train` in a process of its own. The cases take turns, `rounds` times, so that a machine
that slows down slows all of them; a figure is the median over the steps of all rounds, after `skip` steps of each.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo.report.curves import read_metrics

STAGES = ("time/rollout", "time/sync", "time/update", "step_time")
LONG = ["data.eval.count=8", "eval.every=100000", "checkpoint.every=100000", "samples.every=100000", "tracking=none"]
HERE = {
    "hf": ["rollout=hf"],
    "vllm": ["rollout=vllm"],
    "vllm_server": ["rollout=vllm_server"],
    "vllm lag=1": ["rollout=vllm", "rollout.lag=1"],
    "vllm_server lag=1": ["rollout=vllm_server", "rollout.lag=1"],
}
# Published shapes of a step: 2 questions a device, 6 completions, at most 512 tokens; clips of 10 s.
REAL = ["model=qwen2_5_omni_7b", "optim=published", "questions=2", "generations=6",
        "max_tokens=512", "data.train.count=64", "think_words=25"]  # fmt: skip


def real(cache: Path) -> list[str]:
    """What makes a run one of the 7B model with random weights."""
    from grpo.tiny import random_checkpoint

    random_checkpoint(cache / "random-7b")
    return [*REAL, f"model.path={cache / 'random-7b'}"]


GPU = {
    "vllm delta": ["rollout=vllm", "rollout.kv_cache_gib=8", "rollout.gpu_memory=0.5"],
    "vllm adapter": ["rollout=vllm", "rollout.kv_cache_gib=8", "rollout.gpu_memory=0.5", "sync=adapter"],
    "vllm full": ["rollout=vllm", "rollout.kv_cache_gib=8", "rollout.gpu_memory=0.5", "sync=full"],
    "hf": ["rollout=hf"],
}


def one_run(folder: Path, overrides: Sequence[str], skip: int) -> list[dict[str, float]]:
    """Stages of each step of one run, in seconds. Raises RuntimeError with the run's last words if it fails."""
    command = [sys.executable, "-m", "grpo.train", "name=bench", f"hydra.run.dir={folder}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}")
    return [{stage: row.get(stage, 0.0) for stage in STAGES} for row in read_metrics(folder) if row["step"] > skip]


def measure(cases: Mapping[str, Sequence[str]], shared: Sequence[str], *, rounds: int, skip: int) -> dict[str, dict]:
    """(median, least, most) of each stage of each case. Prints a line for each run that is done."""
    steps: dict[str, list] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as out:
        for i in range(rounds):
            for number, (name, overrides) in enumerate(cases.items()):
                mine = one_run(Path(out) / f"{number}-{i}", [*shared, *overrides], skip)
                steps[name] += mine
                middle = statistics.median(step["step_time"] for step in mine)
                print(f"{name}, round {i + 1} of {rounds}: {len(mine)} steps, median {middle:.3g} s", flush=True)
    return {
        name: {s: [f(step[s] for step in mine) for f in (statistics.median, min, max)] for s in STAGES}
        for name, mine in steps.items()
    }


def table(times: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown: median seconds with their range, and the ratio of the whole step to the first case's."""
    first = next(iter(times.values()))["step_time"][0]
    lines = ["| | rollout | sync | update | step | step, ratio |", "|---|---|---|---|---|---|"]
    for name, stages in times.items():
        cells = [f"{m:.3g} ({a:.3g} to {b:.3g})" for m, a, b in (stages[s] for s in STAGES)]
        lines.append(f"| {name} | {' | '.join(cells)} | {stages['step_time'][0] / first:.2f} |")
    return "\n".join(lines)
