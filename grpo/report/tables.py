"""The report's tables as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from grpo.report.compare import Estimate, Setting, figures, over_seeds, paired
from grpo.report.diagnosis import Finding
from grpo.report.page import COMPARED, NAMES, binomial, figure_names, repeats
from grpo.report.read import RunData
from grpo.report.samples import cut


def as_csv(runs: Sequence[RunData], columns: Sequence[str]) -> str:
    """One line a run: name, state, the overrides that differ, all figures at full precision, problems."""
    names = figure_names(runs)
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow(_cell(c) for c in ("run", "state", *columns, *names, "problems"))
    for run in runs:
        known = figures(run)
        numbers = ["" if known.get(n) is None else repr(known[n]) for n in names]
        said = "; ".join([*([run.failure] if run.failure else []), *run.problems])
        write.writerow([_cell(run.name), run.state, *(_cell(run.value(c)) for c in columns), *numbers, _cell(said)])
    return out.getvalue()


def as_markdown(runs: Sequence[RunData], columns: Sequence[str], groups: Sequence[Setting], baseline: Setting | None,
                findings: Sequence[Sequence[Finding]]) -> str:  # fmt: skip
    """Findings, settings (mean ± half of the 95 % interval over seeds), paired differences, runs."""
    names = [n for n in figure_names(runs) if n not in ("steps", "accuracy/best_step")]
    parts = ["# GRPO report", ""]
    said = [f"- **{_text(r.name)}** is {r.state}. {_text(r.failure or '')} {_text('; '.join(r.problems))}".rstrip()
            for r in runs if r.failure or r.problems or r.state in ("stopped", "unreadable")]  # fmt: skip
    said += [f"- **{_text(r.name)}**: {f.text}. Try: {f.advice}." for r, found in zip(runs, findings, strict=True)
             for f in found]  # fmt: skip
    parts += ["## What to look at", "", *(said or ["No known sickness shows, and every folder could be read."]), ""]
    if groups:
        parts += ["## Settings", "", "Mean over seeds ± half of its 95 % interval. " + repeats(groups), ""]
        rows = [[_text(g.label), str(len(g.runs)), *(_estimate(over_seeds(g, n)) for n in names)] for g in groups]
        parts += [*_table(["setting", "seeds", *map(_name, names)], rows), ""]
    pairs = paired(groups, baseline, COMPARED) if baseline else []
    if pairs:
        parts += ["## Against the baseline", "", f"Setting minus {_text(baseline.label)}, paired by seed. "
                  + binomial(runs), ""]  # fmt: skip
        rows = [[_text(p.label), _name(p.metric), f"{p.difference.mean:+.4g}", _interval(p.difference),
                 str(p.difference.n)] for p in pairs]  # fmt: skip
        parts += [*_table(["setting", "figure", "difference", "95 % interval", "n"], rows), ""]
    rows = [
        [_text(r.name), r.state, *(_text(r.value(c)) for c in columns), *(_number(figures(r).get(n)) for n in names)]
        for r in runs
    ]
    parts += ["## Runs", "", *_table(["run", "state", *map(_text, columns), *map(_name, names)], rows), ""]
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def _name(name: str) -> str:
    return _text(NAMES.get(name, name.removeprefix("rewards/").removesuffix("/mean")))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _estimate(e: Estimate | None) -> str:
    return "" if e is None else f"{e.mean:.4g}" + ("" if e.half is None else f" ± {e.half:.2g}")


def _interval(e: Estimate) -> str:
    return "one pair: none" if e.half is None else f"{e.mean - e.half:+.4g} to {e.mean + e.half:+.4g}"


def _text(text: str) -> str:
    """Text of a run inside a Markdown table: one line, no markup."""
    text = re.sub(r"\s+", " ", cut(text, 300)).strip()
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]!#~])", r"\\\1", text)


def _cell(text: str) -> str:
    """Text of a run inside CSV. A spreadsheet would run a cell that starts like a formula: it gets an apostrophe."""
    text = cut(text, 2000).replace("\x00", "")
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
