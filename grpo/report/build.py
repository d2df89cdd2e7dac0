"""From run folders to report.html, report.md and report.csv."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from grpo.report.compare import columns, find_baseline, settings
from grpo.report.diagnosis import diagnose
from grpo.report.page import content, render
from grpo.report.read import RunData, read_runs
from grpo.report.samples import Budget
from grpo.report.tables import as_csv, as_markdown


def build(
    paths: Sequence[Path], out: Path, *, baseline: str | None = None, budget: Budget | None = None
) -> list[RunData]:
    """Write the three files into `out` and return the runs found among and below `paths`.

    Raises FileNotFoundError when there is no run, ValueError when `baseline` fits no setting or several.
    """
    runs = read_runs(paths)
    if not runs:
        raise FileNotFoundError(f"no run folder in {', '.join(map(str, paths))}: one holds metrics.jsonl or .hydra/")
    keys = columns(runs)
    groups = settings(runs, keys)
    base = find_baseline(groups, baseline)
    findings = [diagnose(run.rows) for run in runs]
    out.mkdir(parents=True, exist_ok=True)
    page = render(content(runs, keys, groups, base, findings, budget or Budget()))
    for name, text in [
        ("report.html", page),
        ("report.md", as_markdown(runs, keys, groups, base, findings)),
        ("report.csv", as_csv(runs, keys)),
    ]:
        temporary = out / f".{name}.{os.getpid()}.tmp"
        temporary.write_bytes(text.encode("utf-8", errors="replace"))  # half of a surrogate pair becomes "?"
        os.replace(temporary, out / name)
    return runs
