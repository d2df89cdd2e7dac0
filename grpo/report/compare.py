"""Many runs side by side: the overrides that differ, seeds as repeats, intervals, and paired differences.

A setting is what runs share when the seed is left out. Intervals are 95 % by Student's t over seeds; one seed has none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from grpo.config import FREE_ON_RESUME
from grpo.report.read import RunData

SEED = "seed"

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom (any statistics table).
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` runs; `half` is half the width of its 95 % interval, None for a single run."""

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True)
class Setting:
    """The runs that differ in nothing but the seed."""

    label: str
    values: tuple[str, ...]  # one for each column
    runs: tuple[RunData, ...]


@dataclass(frozen=True)
class Paired:
    """A setting against the baseline, run by run of the same seed: mean of (setting - baseline)."""

    label: str
    metric: str
    difference: Estimate
    seeds: tuple[str, ...]


def t_quantile(df: int) -> float:
    """97.5 % quantile of Student's t. Above 30: the normal's 1.96 with its first correction, within 0.001."""
    return T975[df - 1] if df <= 30 else 1.959964 + 2.372 / df


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and 95 % interval of the numbers among `values`; None when there are none."""
    known = [v for v in values if v is not None]
    n = len(known)
    if not n:
        return None
    mean = math.fsum(known) / n
    if n == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((v - mean) ** 2 for v in known) / (n - 1)
    half = t_quantile(n - 1) * math.sqrt(variance / n)
    return Estimate(mean, half if half > 1e-12 * abs(mean) else 0.0, n)  # below that it is rounding


def columns(runs: Sequence[RunData]) -> list[str]:
    """The override keys whose values differ between runs, the seed last."""
    keys = dict.fromkeys(k for r in runs for k in r.overrides if _is_setting(k))
    known = [r for r in runs if r.config or r.overrides]  # an unreadable folder must not make every key differ
    differ = [k for k in keys if len({r.value(k) for r in known}) > 1]
    return sorted(differ, key=lambda k: (k == SEED, "." in k))


def settings(runs: Sequence[RunData], keys: Sequence[str]) -> list[Setting]:
    """Runs grouped by their values of `keys` without the seed, in order of appearance. Runs that logged nothing are
    left out: they are listed as failed, not averaged."""
    seeds, keys = SEED in keys, [k for k in keys if k != SEED]
    groups: dict[tuple[str, ...], list[RunData]] = {}
    for run in runs:
        if run.rows:
            # Where nothing tells runs apart, not even a seed, each stands for itself.
            values = tuple(run.value(k) for k in keys)
            groups.setdefault(values if keys or seeds else (run.name,), []).append(run)
    if not keys:
        return [Setting((*v, "all runs")[0], (), tuple(members)) for v, members in groups.items()]
    return [Setting(_label(keys, v), v, tuple(members)) for v, members in groups.items()]


def find_baseline(groups: Sequence[Setting], name: str | None) -> Setting | None:
    """The setting called `name`: its label, one of its `key=value`s or values, or a run's name. Without a
    name plain GRPO where it is among them, else the first. Raises ValueError when the name fits none or several."""
    if not groups:
        return None
    if name is None:
        return next((g for g in groups if "grpo" in g.values), groups[0])
    exact = [g for g in groups if name == g.label or name in [r.name for r in g.runs]]
    loose = [g for g in groups if name in g.values or name in g.label.split(", ")]
    found = exact or loose
    if len(found) != 1:
        kind = "fits several" if found else "fits no setting"
        raise ValueError(f"--baseline {name!r} {kind}; settings: " + "; ".join(g.label for g in groups))
    return found[0]


def over_seeds(group: Setting, metric: str) -> Estimate | None:
    """A figure of a setting. Runs that repeat a seed count once, by their mean: they are no further evidence."""
    by_seed: dict[str, list[float]] = {}
    for run in group.runs:
        value = figures(run).get(metric)
        if value is not None:
            by_seed.setdefault(run.value(SEED) or run.name, []).append(value)
    return estimate([math.fsum(v) / len(v) for v in by_seed.values()])


def paired(groups: Sequence[Setting], baseline: Setting, metrics: Sequence[str]) -> list[Paired]:
    """Every other setting against the baseline over the seeds that both have, one entry a metric.

    The two runs of a pair are compared at the last step that both have evaluated, so that a run that is still going
    is not held against a finished one.
    """
    out = []
    before = _by_seed(baseline)
    for group in groups:
        if group is baseline:
            continue
        both = {s: (a, before[s]) for s, a in _by_seed(group).items() if s in before}
        for metric in metrics:
            pairs = {s: _difference(a, b, metric) for s, (a, b) in both.items()}
            pairs = {s: d for s, d in pairs.items() if d is not None}
            if pairs:
                out.append(Paired(group.label, metric, estimate(list(pairs.values())), tuple(pairs)))
    return out


def _difference(a: RunData, b: RunData, metric: str) -> float | None:
    evaluated = [dict(r.series("accuracy/heldout")).keys() for r in (a, b)]
    common = evaluated[0] & evaluated[1]
    until = max(common) if common else min(a.rows[-1]["step"], b.rows[-1]["step"])
    x, y = figures(a, until).get(metric), figures(b, until).get(metric)
    return None if x is None or y is None else x - y


# ---------------------------------------------------------------- what one run amounts to

LAST = 10  # training steps that "at the end" averages over; fewer in a short run


def figures(run: RunData, until: float | None = None) -> dict[str, float | None]:
    """The figures of one run's row in the table, up to a step; a figure that cannot be known is None."""
    if until is not None:
        run = replace(run, rows=tuple(r for r in run.rows if r["step"] <= until))
    accuracy = run.series("accuracy/heldout")
    best = max(accuracy, key=lambda p: (p[1], -p[0]), default=None)
    out = {
        "steps": float(run.rows[-1]["step"]) if run.rows else None,
        "accuracy/start": accuracy[0][1] if accuracy else None,
        "accuracy/final": accuracy[-1][1] if accuracy else None,
        "accuracy/best": best[1] if best else None,
        "accuracy/best_step": float(best[0]) if best else None,
        "reward": _end(run, "reward"),
    }
    for name in reward_parts([run]):
        out[name] = _end(run, name)
    for name in ("completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std", "kl", "entropy"):
        out[name] = _end(run, name)
    tokens = run.series("num_tokens")
    out["tokens"] = tokens[-1][1] if tokens else run.summary.get("tokens")
    # A run under way has no summary yet, and older runs' counts only the time since they were resumed.
    known = [run.summary.get("seconds"), math.fsum(v for _, v in run.series("step_time")) or None]
    seconds = max((s for s in known if s is not None), default=None)
    out["hours"] = None if seconds is None else seconds / 3600
    if run.device and run.ranks and seconds is not None:
        spent = run.summary.get("device_seconds", seconds * run.ranks)
        out["device_hours" if run.device == "cpu" else "gpu_hours"] = spent / 3600
    return out


def reward_parts(runs: Sequence[RunData]) -> list[str]:
    """Names like rewards/accuracy/mean of all runs, in order of appearance."""
    return list(dict.fromkeys(
        k for r in runs for row in (*r.rows[:2], *r.rows[-1:]) for k in row
        if k.startswith("rewards/") and k.endswith("/mean")
    ))  # fmt: skip


def _end(run: RunData, name: str) -> float | None:
    points = run.series(name)
    last = points[-max(1, min(LAST, len(points) // 4)) :]
    return math.fsum(v for _, v in last) / len(last) if last else None


def _label(keys: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{k}={v}" for k, v in zip(keys, values, strict=True) if v) or "defaults"


def _by_seed(group: Setting) -> Mapping[str, RunData]:
    return {r.value(SEED): r for r in reversed(group.runs) if r.value(SEED)}  # of a repeated seed the first run


def _is_setting(key: str) -> bool:
    return re.split("[./]", key, maxsplit=1)[0] not in FREE_ON_RESUME | {"hydra"}
