"""curves.png and the closing lines of a run, from its metrics.jsonl alone."""

from __future__ import annotations

import json
from pathlib import Path


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl. Raises FileNotFoundError with the folder's name if it has none."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no metrics.jsonl: is it a run folder?")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curves(folder: Path) -> Path:
    """Draw accuracy, reward parts, length, KL and entropy against the step into curves.png."""
    import matplotlib  # 0.5 s that whoever only reads a report does without

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    summary = Path(folder) / "summary.json"
    summary = json.loads(summary.read_text()) if summary.exists() else {}
    parts = [k for k in rows[-1] if k.startswith("rewards/") and k.endswith("/mean")]
    panels = [
        ("accuracy, greedy, held-out", ["accuracy/heldout"]),
        ("reward and its parts", ["reward", *parts]),
        ("completion length (tokens)", ["completions/mean_length"]),
        ("KL and entropy (nats per token)", ["kl", "entropy"]),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.6), constrained_layout=True)
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                label = name.removeprefix("rewards/").removesuffix("/mean")
                axis.plot(
                    *zip(*points, strict=True), label=label, marker="o" if name == "accuracy/heldout" else None, ms=3
                )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    axes[0].set_ylim(0, 1.02)
    if "accuracy/chance" in summary:
        axes[0].axhline(summary["accuracy/chance"], color="grey", ls="--", lw=1)
        axes[0].text(0, summary["accuracy/chance"] + 0.02, "chance", color="grey", fontsize=8)
    path = Path(folder) / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def closing_lines(summary: dict, folder: Path) -> str:
    """Five lines that say how the run went."""
    gib = summary["peak_memory_bytes"] / 2**30
    heldout = summary["questions/heldout"]
    return (
        f"accuracy  {summary['accuracy/start']:.3f} at the start -> {summary['accuracy/final']:.3f} now, best "
        f"{summary['accuracy/best']:.3f} (chance {summary['accuracy/chance']:.3f}; {heldout} held-out)\n"
        f"reward    {summary['reward/first']:.3f} -> {summary['reward/last']:.3f} (first and last ten steps)\n"
        f"trained   {summary['steps']} steps, {summary['completions']} completions, {summary['tokens']} tokens\n"
        f"cost      {summary['seconds']:.0f} s, peak memory {gib:.2f} GiB\n"
        f"written   {folder}: metrics.jsonl samples.jsonl summary.json curves.png checkpoints/"
    )
