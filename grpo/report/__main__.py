"""`python -m grpo.report RUN... [--out DIR] [--baseline NAME]`: report.html, .md and .csv, also while the runs go.

With `--to PNG` only the curves of these runs are drawn, into one picture.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpo.report.build import build
from grpo.report.curves import curves


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m grpo.report", description="Report on one run or many.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run or multirun folders; runs are found below them"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write into (default: the folder given, or report/ for several)"
    )
    parser.add_argument("--baseline", help="what others are compared with: a setting (loss=grpo), its value, or a run")
    parser.add_argument("--to", type=Path, metavar="PNG", help="only draw the curves of these run folders, into PNG")
    given = parser.parse_args(arguments)
    missing = [p for p in given.runs if not p.is_dir()]
    if missing:
        sys.exit(f"error: no such folder: {', '.join(map(str, missing))}")
    if given.to:
        try:
            print(curves(*given.runs, to=given.to))
        except FileNotFoundError as error:
            sys.exit(f"error: {error}")
        return
    out = given.out or (given.runs[0] if len(given.runs) == 1 else Path("report"))
    try:
        runs = build(given.runs, out, baseline=given.baseline)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    bad = [r for r in runs if r.state in ("failed", "unreadable")]
    print(f"{len(runs)} runs, {len(bad)} of them failed or unreadable: {out / 'report.html'} (and .md, .csv)")
    for run in bad:
        print(f"  {run.name}: {run.failure or '; '.join(run.problems)}")


if __name__ == "__main__":
    main()
