"""Many evaluations by `python -m grpo.evaluate -m think_words=25,50,75,100,150 ...`: one table and one plot at the end.

Accuracy against the length of the thought as it was measured, with each budget at its point: the published ablation
(arXiv 2505.14142). The same for models trained with other budgets: `-m model=outputs/a,outputs/b`.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from grpo.multirun import Multirun

FIELDS = ("job", "bench", "think_words", "measured_words", "tokens", "n", "strict", "low", "high", "official")


class Sweep(Multirun):
    """As for training runs: names folders after what is swept, notes failures. At the end it draws what there is."""

    def __init__(self, root: str = "evaluations"):
        super().__init__(root)

    def on_multirun_end(self, config: DictConfig, **_) -> None:
        folder = Path(config.hydra.sweep.dir)
        if points := gather(folder):
            write_table(points, folder / "sweep.csv")
            draw(points, folder / "thinking.png")
            print(f"sweep     {len({p['job'] for p in points})} evaluations: {folder}/sweep.csv and thinking.png")
        failed = sorted(folder.rglob("failure.json"))
        for path in failed:
            print(
                f"failed    {path.parent.relative_to(folder)}: {json.loads(path.read_text())['error']}", file=sys.stderr
            )
        if failed:
            sys.exit(1)


def gather(folder: Path) -> list[dict]:
    """One point a job and benchmark under `folder`, in order of the thought's measured length."""
    points = []
    for path in sorted(folder.rglob("metrics.json")):
        metrics = json.loads(path.read_text())
        for bench, figures in metrics["benches"].items():
            strict, official = (figures["total"][rule] for rule in ("strict", "official"))
            points.append({
                "job": str(path.parent.relative_to(folder)), "bench": bench,
                "think_words": metrics["settings"]["think_words"], "measured_words": figures["think_words"],
                "tokens": figures["tokens"], "n": strict["n"], "strict": strict["accuracy"], "low": strict["low"],
                "high": strict["high"], "official": official["accuracy"],
            })  # fmt: skip
    return sorted(points, key=lambda p: (p["bench"], p["measured_words"] or 0.0, p["job"]))


def write_table(points: Sequence[dict], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(points)


def draw(points: Sequence[dict], path: Path) -> None:
    """Strict accuracy with its 95 % interval against words of thought; a line a benchmark, a budget a point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for bench in dict.fromkeys(p["bench"] for p in points):
        mine = [p for p in points if p["bench"] == bench and p["measured_words"] is not None]
        x, y = [p["measured_words"] for p in mine], [p["strict"] for p in mine]
        errors = [[p["strict"] - p["low"] for p in mine], [p["high"] - p["strict"] for p in mine]]
        axis.errorbar(x, y, errors, marker="o", ms=4, capsize=3, lw=1.2, label=f"{bench} (n = {mine[0]['n']})"
                      if mine else bench)  # fmt: skip
        for p in mine:
            label = p["job"] if p["think_words"] is None else str(p["think_words"])
            axis.annotate(label, (p["measured_words"], p["strict"]), xytext=(4, 5), textcoords="offset points", size=8)
    axis.set_xlabel("words of thought, measured (points: the budget asked for)")
    axis.set_ylabel("strict accuracy, 95 % interval")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
