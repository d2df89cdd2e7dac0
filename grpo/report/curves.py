"""The picture and the closing lines of runs, from their metrics.jsonl alone."""

from __future__ import annotations

import json
from pathlib import Path


def read_metrics(folder: Path) -> list[dict]:
    """The whole lines of metrics.jsonl. Raises FileNotFoundError with the folder's name if it has none."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no metrics.jsonl: is it a run folder?")
    with path.open("rb") as file:  # as bytes, whose lines end at \n alone; the last may still be being written
        return [json.loads(line) for line in file if line.endswith(b"\n")]


def curves(*folders: Path, to: Path | None = None) -> Path:
    """Draw accuracy, reward, length and KL against the step into `to` (curves.png of the first run). One colour a run.

    Runs are named by their folders, with the folder around it where two have the same name.
    """
    import matplotlib  # 0.5 s that whoever only reads a report does without

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = [Path(folder).resolve() for folder in folders]
    unique = len({p.name for p in paths}) == len(paths)
    runs = {p.name if unique else f"{p.parent.name}/{p.name}": read_metrics(p) for p in paths}
    alone = len(runs) == 1
    parts = [k for k in next(iter(runs.values()))[-1] if k.startswith("rewards/") and k.endswith("/mean")]
    panels = [
        ("accuracy, greedy, held-out", ["accuracy/heldout"]),
        ("reward and its parts" if alone else "reward", ["reward", *parts] if alone else ["reward"]),
        ("completion length (tokens)", ["completions/mean_length"]),
        ("KL and entropy (nats per token)" if alone else "KL (nats per token)", ["kl", "entropy"] if alone else ["kl"]),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.6), constrained_layout=True)
    for axis, (title, names) in zip(axes, panels, strict=True):
        for run, rows in runs.items():
            for name in names:
                points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
                if points:
                    label = name.removeprefix("rewards/").removesuffix("/mean") if alone else run
                    marker = "o" if name == "accuracy/heldout" else None
                    axis.plot(*zip(*points, strict=True), label=label, marker=marker, ms=3, lw=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1.02)
    for axis in axes[1::2] if alone else axes[:1]:
        axis.legend(fontsize=8)
    summary = Path(folders[0]) / "summary.json"
    if summary.exists():
        chance = json.loads(summary.read_text())["accuracy/chance"]
        axes[0].axhline(chance, color="grey", ls="--", lw=1)
        axes[0].text(0, chance + 0.02, "chance", color="grey", fontsize=8)
    to = Path(folders[0]) / "curves.png" if to is None else Path(to)
    figure.savefig(to, dpi=110)
    plt.close(figure)
    return to


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
