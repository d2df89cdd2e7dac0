"""Synthetic run folders: what a run writes, made in milliseconds, healthy unless told otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

CHOICES = ["dog", "rain", "bell", "train"]


def healthy(step: int, steps: int, seed: int = 0) -> dict:
    """One row of metrics like those of the main job: accuracy 0.22 to 0.9, and fewer live groups, less entropy."""
    rng = np.random.default_rng(1000 * seed + step)
    done = 1 / (1 + math.exp(-8 * (step / steps - 0.4)))
    right = min(1.0, 0.22 + 0.68 * done + 0.03 * rng.standard_normal())
    return {
        "step": step, "reward": 1.5 + right, "reward_std": 0.4, "frac_reward_zero_std": min(1.0, 0.2 + 0.65 * done),
        "rewards/accuracy/mean": right, "rewards/format/mean": 0.98, "rewards/length/mean": 0.99,
        "completions/mean_length": 24.7 + 0.3 * rng.standard_normal(), "completions/clipped_ratio": 0.003,
        "kl": 0.1 * done + 0.002, "entropy": 0.07 - 0.061 * done, "grad_norm": 0.03 + 0.1 * done, "loss": 1e-6,
        "sampling/sampling_logp_difference/mean": 2e-8, "sampling/importance_sampling_ratio/mean": 1.0,
        "num_tokens": 4500 * step, "step_time": 1.3, "learning_rate": 1e-3,
    }  # fmt: skip


def healthy_rows(steps: int = 100, seed: int = 0) -> list[dict]:
    rows = [{"step": 0, "accuracy/heldout": 0.25}]
    for step in range(1, steps + 1):
        row = healthy(step, steps, seed)
        if step % 25 == 0 or step == steps:
            row["accuracy/heldout"] = row["rewards/accuracy/mean"]
        rows.append(row)
    return rows


def group(step: int, n: int = 4, *, name: str = "q", right: int = 2, **changes) -> list[dict]:
    """The `n` completions of one question, the first `right` of them right."""
    rows = []
    for g in range(n):
        answer = "bell" if g < right else CHOICES[(g + step) % 2]
        rows.append({
            "step": step, "id": f"{name}-{step}", "question": "Which sound is this?", "choices": CHOICES,
            "gold": "bell", "sample": g, "completion": "<think>a ring</think>\n<semantic_elements>bell tower"
            f"</semantic_elements>\n<answer>{answer}</answer>", "truncated": False, "tokens": 20 + g,
            "answered": CHOICES.index(answer), "reward": 1.5 + (g < right),
            "rewards": {"accuracy": float(g < right), "format": 1.0, "length": 1.0},
            "advantage": 0.7 if g < right else -0.7, "clip_sha256": "0" * 64, "version": step,
        } | changes)  # fmt: skip
    return rows


def write_run(folder: Path, *, overrides=("seed=0",), rows=None, samples=None, steps: int | None = None,
              finished: bool = True) -> Path:  # fmt: skip
    """A run folder with metrics, samples, config, Hydra's records and (when finished) a summary."""
    rows = healthy_rows() if rows is None else rows
    steps = steps or (rows[-1]["step"] if rows else 1)
    (folder / ".hydra").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if samples is None:
        samples = [
            r for s in sorted({1, steps // 2, steps} - {0}) for k in (0, 2, 4) for r in group(s, name=f"q{k}", right=k)
        ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in samples))
    given = dict(o.split("=", 1) for o in overrides)
    (folder / "config.yaml").write_text(
        json.dumps(
            {"steps": steps, "seed": 0, "loss": {"beta": 0.01}} | {k: v for k, v in given.items() if k != "loss"}
        )
    )
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(list(overrides)))
    choices = {"loss": given.get("loss", "grpo"), "model": "tiny"}
    (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": choices}}}))
    if finished:
        (folder / "summary.json").write_text(json.dumps({
            "steps": steps, "seconds": 1.3 * steps, "accuracy/chance": 0.25, "questions/heldout": 200,
        }))  # fmt: skip
    return folder


def sweep(root: Path, losses=("grpo", "dapo"), seeds=(0, 1, 2), steps: int = 60) -> Path:
    """A multirun: every loss with every seed; dapo is 0.05 better, grpo is the baseline."""
    for loss in losses:
        for seed in seeds:
            rows = healthy_rows(steps, seed)
            for row in rows:
                if "accuracy/heldout" in row and row["step"]:
                    row["accuracy/heldout"] = (
                        0.6 + 0.05 * losses.index(loss) + 0.02 * seed + 0.01 * losses.index(loss) * seed
                    )
            write_run(
                root / f"loss={loss},seed={seed}", overrides=[f"loss={loss}", f"seed={seed}", "resume=false"], rows=rows
            )
    return root
