"""The report as one HTML file that works offline from file://: template, style and script lie beside this file.

Everything from a run travels as JSON inside a <script type="application/json">, with <, > and & written as escapes, and
reaches the page as text nodes only. The Content-Security-Policy allows this page's own style and script, by their
hashes, and data: sounds; no network at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from grpo.report.compare import Paired, Setting, figures, over_seeds, paired, reward_parts
from grpo.report.diagnosis import Finding
from grpo.report.read import RunData
from grpo.report.samples import Budget, Clips, choose, cut

HERE = Path(__file__).parent
POINTS = 200  # of a curve: longer runs are averaged over equal stretches of steps
COMPARED = ("accuracy/final", "accuracy/best", "reward")  # figures of the paired comparison
# The panels shown at once, in this order; the others wait behind a button.
FIRST = (
    "accuracy/heldout", "reward", "rewards/accuracy/mean", "rewards/format/mean", "rewards/length/mean",
    "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std", "kl", "entropy", "grad_norm",
    "clip_ratio/high_mean", "clip_ratio/low_mean", "sampling/sampling_logp_difference/mean", "tokens_per_second",
)  # fmt: skip
NAMES = {
    "accuracy/heldout": "held-out accuracy", "accuracy/start": "accuracy, start", "accuracy/final": "accuracy, final",
    "accuracy/best": "accuracy, best", "accuracy/best_step": "best at step",
    "rewards/accuracy/mean": "training accuracy", "completions/mean_length": "tokens per completion",
    "completions/clipped_ratio": "truncated", "frac_reward_zero_std": "zero-variance groups", "kl": "KL",
    "grad_norm": "gradient norm", "clip_ratio/high_mean": "clipped high", "clip_ratio/low_mean": "clipped low",
    "sampling/sampling_logp_difference/mean": "sampler mismatch (nats)", "gpu_hours": "GPU-hours",
    "device_hours": "device-hours", "tokens_per_second": "tokens per second",
}  # fmt: skip


def figure_names(runs: Sequence[RunData]) -> list[str]:
    """The figures of the tables, in their order."""
    hours = [n for n in ("gpu_hours", "device_hours") if any(n in figures(r) for r in runs)]
    return ["steps", "accuracy/start", "accuracy/final", "accuracy/best", "accuracy/best_step", "reward",
            *reward_parts(runs), "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std", "kl",
            "entropy", "tokens", "hours", *hours]  # fmt: skip


def content(runs: Sequence[RunData], columns: Sequence[str], groups: Sequence[Setting], baseline: Setting | None,
            findings: Sequence[Sequence[Finding]], budget: Budget) -> dict:  # fmt: skip
    """All that the page shows, as plain data."""
    names = figure_names(runs)
    place = {id(run): i for i, group in enumerate(groups) for run in group.runs}
    at = {id(run): i for i, run in enumerate(runs)}
    samples, clips, left = _samples(runs, budget)
    metrics = _metrics(runs)
    pairs = paired(groups, baseline, COMPARED) if baseline else []
    return {
        "subtitle": _subtitle(runs, groups),
        "names": NAMES, "columns": [cut(c, 200) for c in columns], "figures": names,
        "runs": [
            {"name": cut(r.name, 300), "state": r.state, "problems": [cut(p, 500) for p in r.problems],
             "failure": r.failure and cut(r.failure, 1000), "values": [cut(r.value(c), 300) for c in columns],
             "label": cut(_label(r, columns), 300), "setting": place.get(id(r)), "figures": figures(r),
             "findings": [{"text": f.text, "advice": f.advice} for f in found]}
            for r, found in zip(runs, findings, strict=True)
        ],
        "settings": [
            {"label": cut(g.label, 300), "values": [cut(v, 300) for v in g.values], "runs": [at[id(r)] for r in g.runs],
             "state": _unfinished(g), "estimates": {n: _estimate(g, n) for n in names}}
            for g in groups
        ],
        "settingsNote": "Mean over seeds ± half of its 95 % interval (Student's t over seeds; a single seed has none). "
                        f"Reward, length, KL and the like: mean of the last steps. {repeats(groups)}",
        "paired": [_pair(p, groups) for p in pairs],
        "pairedNote": f"Setting minus baseline ({cut(baseline.label, 300)}), run by run of the same seed, at the last "
                      "step that both have evaluated; n pairs and the 95 % interval of their mean. "
                      f"{binomial(runs)}" if baseline else "",
        "metrics": metrics, "shown": sum(m in FIRST or _is_part(m) for m in metrics),
        "curves": _curves(runs, metrics), "curvesNote": _curves_note(runs),
        "chance": next((r.summary["accuracy/chance"] for r in runs if "accuracy/chance" in r.summary), None),
        "groups": samples, "clips": clips, "samplesNote": left.pop(0), "leftOut": left,
    }  # fmt: skip


def render(data: dict) -> str:
    """The HTML file. Its text is ASCII where it comes from runs, so that no half of a surrogate pair can break it."""
    css, js = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = (f"default-src 'none'; script-src {_hash(js)}; style-src {_hash(css)}; media-src data:; "
              "base-uri 'none'; form-action 'none'")  # fmt: skip
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    page = (HERE / "page.html").read_text(encoding="utf-8")
    before, page = page.split("@CSP@")
    middle, page = page.split("@CSS@")
    body, page = page.split("@DATA@")
    between, end = page.split("@JS@")
    return "".join((before, policy, middle, css, body, text, between, js, end))


def binomial(runs: Sequence[RunData]) -> str:
    """How far an accuracy may be off for the number of held-out questions alone."""
    asked = [r.summary["questions/heldout"] for r in runs if r.summary.get("questions/heldout", 0) >= 1]
    if not asked:
        return ""
    n = min(asked)
    return (f"One accuracy over {n:.0f} held-out questions is itself known to about ±{1.96 * 0.5 / n**0.5:.2f}; pairs "
            "that share their questions share most of that.")  # fmt: skip


def repeats(groups: Sequence[Setting]) -> str:
    """A warning where runs of a setting share a seed."""
    for group in groups:
        seeds = [r.value("seed") for r in group.runs if r.value("seed")]
        if len(set(seeds)) < len(seeds):
            return (f"{cut(group.label, 200)} has several runs of one seed: such runs count once, by their mean, and "
                    "the first of them is paired.")  # fmt: skip
    return ""


# ---------------------------------------------------------------- parts


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _subtitle(runs: Sequence[RunData], groups: Sequence[Setting]) -> str:
    states = [r.state for r in runs]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    devices = ", ".join(dict.fromkeys(r.device for r in runs if r.device))
    where = f" on {cut(devices, 200)}" if devices else ""
    when = datetime.now().strftime("%Y-%m-%d %H:%M")
    return f"{_plural(len(runs), 'run')} ({counts}){where}, {_plural(len(groups), 'setting')}, written {when}"


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _label(run: RunData, columns: Sequence[str]) -> str:
    """What tells the run apart, unless its name, that of a multirun's folder, says just that."""
    values = [f"{c}={run.value(c)}" for c in columns if run.value(c)]
    return "" if ",".join(values) == run.name else ", ".join(values)


def _unfinished(group: Setting) -> str:
    n = sum(r.state != "finished" for r in group.runs)
    return f"{n} unfinished" if n else ""


def _estimate(group: Setting, name: str) -> list | None:
    e = over_seeds(group, name)
    return e and [e.mean, e.half, e.n]


def _pair(p: Paired, groups: Sequence[Setting]) -> dict:
    at = next(i for i, g in enumerate(groups) if g.label == p.label)
    return {"label": cut(p.label, 300), "metric": p.metric, "setting": at, "mean": p.difference.mean,
            "half": p.difference.half, "n": p.difference.n}  # fmt: skip


def _is_part(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")


def _metrics(runs: Sequence[RunData]) -> list[str]:
    """All metrics that are numbers somewhere: the familiar ones first, then reward parts, then the rest."""
    seen = dict.fromkeys(k for r in runs for row in r.rows[:3] + r.rows[-3:] for k in row if k != "step")
    seen |= dict.fromkeys(["accuracy/heldout"] if any(r.series("accuracy/heldout") for r in runs) else [])
    first = [m for m in FIRST if m in seen]
    parts = [m for m in seen if _is_part(m) and m not in first]
    rest = sorted(m for m in seen if m not in first and m not in parts)
    return [cut(m, 200) for m in (*first, *parts, *rest)][:120]


def _curves(runs: Sequence[RunData], metrics: Sequence[str]) -> list[dict]:
    """For each run the ends of its stretches of steps and each metric's mean in them; metrics of few steps (held-out
    accuracy) keep their own steps. Stretches are the same for all runs, so that seeds can be averaged."""
    stride = _stride(runs)
    out = []
    for run in runs:
        ends = sorted({-(-int(r["step"]) // stride) * stride for r in run.rows if r["step"] > 0})
        place = {x: i for i, x in enumerate(ends)}
        shared, own = {}, {}
        for metric in metrics:
            points = run.series(metric)
            if not points:
                continue
            if len(points) * 2 < len(run.rows) or any(s == 0 for s, _ in points):
                own[metric] = [[s for s, _ in points], [_short(v) for _, v in points]]
                continue
            sums, counts = [0.0] * len(ends), [0] * len(ends)
            for s, v in points:
                i = place[-(-s // stride) * stride]
                sums[i], counts[i] = sums[i] + v, counts[i] + 1
            shared[metric] = [_short(a / n) if n else None for a, n in zip(sums, counts, strict=True)]
        out.append({"x": ends, "m": shared, "own": own})
    return out


def _stride(runs: Sequence[RunData]) -> int:
    longest = max((int(r.rows[-1]["step"]) for r in runs if r.rows), default=1)
    return max(1, -(-longest // POINTS))


def _curves_note(runs: Sequence[RunData]) -> str:
    stride = _stride(runs)
    mean = f"Each point is the mean of {stride} steps. " if stride > 1 else ""
    return (f"Each is drawn over the step. {mean}Lines are means over seeds, bands reach from the lowest to the "
            "highest seed; where fewer than half of the seeds have got to, the line ends. Click a setting to bring it "
            "out.")  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _samples(runs: Sequence[RunData], budget: Budget) -> tuple[list[dict], dict[str, str], list[str]]:
    """(groups, clips, what to say: first the line above the browser, then what was left out)."""
    share = max(2, min(60, budget.groups // max(1, len(runs))))
    clips, groups, about, problems = Clips(budget), [], 0, {}
    for i, run in enumerate(runs):
        if not run.rows:
            continue
        chosen, seen = choose(run, budget, min(share, budget.groups - len(groups)))
        about += seen["about"]
        if seen["problem"]:
            problems.setdefault(seen["problem"], []).append(run.name)
        for group in chosen:
            audio = group.pop("audio")
            group["run"] = i
            group["clip"], group["clipNote"] = clips.add(run.folder, *audio)
            groups.append(group)
    say = [f"{len(groups)} of about {about:,} questions asked are on this page, each with all its completions: from "
           "the first and last steps, those with the best and worst reward, the most zero-variance and truncated "
           "groups, and the middle."]  # fmt: skip
    if about > len(groups):
        say.append(f"About {about - len(groups):,} questions stay in the runs' samples.jsonl.")
    say += [f"{n:,} {what} left out: the page holds enough of them." for what, n in budget.left_out.items()]
    say += [f"{cut(', '.join(names), 300)}: {problem}." for problem, names in problems.items()]
    return groups, clips.data, say
