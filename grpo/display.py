"""What a person sees while a run goes on: a progress line on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class Display:
    """Progress and tables of rank 0; silent on other ranks."""

    def __init__(self, rank: int = 0, log_every: int = 10):
        self.console = Console(quiet=rank != 0, highlight=False, soft_wrap=True)
        self.live = rank == 0 and self.console.is_terminal
        self.log_every = log_every
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TextColumn("left"),
                   TimeRemainingColumn())  # fmt: skip
        self.progress = Progress(*columns, console=self.console, disable=not self.live)
        self.task = None

    def say(self, text: str) -> None:
        """A line (or block) for people."""
        self.console.print(Text(text))
        sys.stdout.flush()

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """Begin a stage of `total` units."""
        self.stop()
        self.stage, self.total, self.began = stage, total, done
        self.progress.start()
        self.task = self.progress.add_task(stage, total=total, completed=done, figures="")

    def update(self, done: int, figures: Mapping[str, float]) -> None:
        """Show how far the stage is, with its figures."""
        text = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        self.progress.update(self.task, completed=done, figures=text)
        if not self.live and (done % self.log_every == 0 or done == self.total):
            seconds_left = self.progress.tasks[-1].time_remaining if self.progress.tasks else None
            left = f"  left {seconds_left:.0f} s" if seconds_left else ""
            self.say(f"{self.stage} {done}/{self.total}  {text}{left}")

    def stop(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None
        self.progress.stop()

    def samples(self, step: int, rows: list[dict]) -> None:
        """A table of completions with every reward component."""
        names = list(rows[0]["rewards"])
        table = Table(title=f"step {step}: {rows[0]['question']}  gold: {rows[0]['gold']}", title_justify="left")
        table.add_column("completion", overflow="fold", ratio=1)
        for name in [*names, "reward", "advantage"]:
            table.add_column(name, justify="right")
        for row in rows:
            cells = [*(row["rewards"][n] for n in names), row["reward"], row["advantage"]]
            table.add_row(Text(row["completion"].replace("\n", " ")), *(f"{c:.2f}" for c in cells))
        self.console.print(table)
