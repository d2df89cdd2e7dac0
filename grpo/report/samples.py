"""The questions worth looking at: a bounded choice of groups, with their clips and, where recorded, per-token figures.

samples.jsonl may have gigabytes. Its lines are in the order of the steps, so a step is found by bisection over bytes:
the work depends on how much is shown, not on how long the run was.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grpo.report.read import MAX_LINE, RunData, number, parse_line

MAX_TEXT = 20_000  # characters of a completion that are shown
MAX_ROWS = 2048  # completions read of one step
MAX_TOKENS = 4000  # per-token figures of one completion
CLIP_SECONDS = 30.0  # of a longer clip the first ones are embedded


@dataclass
class Budget:
    """What a page may hold in all; every group, clip or token left out for it is counted."""

    groups: int = 240
    clip_bytes: int = 12_000_000
    tokens: int = 400_000
    left_out: dict[str, int] = field(default_factory=dict)

    def miss(self, what: str) -> None:
        self.left_out[what] = self.left_out.get(what, 0) + 1


class Reader:
    """Steps of one samples.jsonl by bisection. `lines` counts the lines parsed: the measure of the work done."""

    def __init__(self, path: Path):
        self.path, self.lines, self.rows, self.bytes = Path(path), 0, 0, 0
        self.size = self.path.stat().st_size

    def step(self, step: int) -> list[dict]:
        """The completions of a step, in the file's order; empty when it has none."""
        rows = []
        with self.path.open("rb") as file:
            file.seek(self._start(file, step))
            while len(rows) < MAX_ROWS:
                line, row = self._next(file)
                if not line or (row is not None and row["step"] > step):
                    break
                if row is not None and row["step"] == step:
                    rows.append(row)
                    self.rows, self.bytes = self.rows + 1, self.bytes + len(line)
        return rows

    def _start(self, file, step: int) -> int:
        """A place before the first line of `step` and not long before it."""
        low, high = 0, self.size
        while high - low > 2**16:
            middle = (low + high) // 2
            file.seek(middle)
            file.readline(MAX_LINE)  # the rest of a line
            row, start = None, file.tell()
            while row is None and file.tell() < high:
                start = file.tell()
                line, row = self._next(file)
                if not line:
                    break
            if row is None or row["step"] >= step:
                high = middle
            else:
                low = start
        return low

    def _next(self, file) -> tuple[bytes, dict | None]:
        line = file.readline(MAX_LINE)
        self.lines += 1
        row = parse_line(line)
        return line, row if row is not None and number(row.get("step")) is not None else None


def choose_steps(run: RunData) -> dict[int, list[str]]:
    """Steps to look at -> why: the first and last, the best and worst reward, the most zero-variance and truncated
    groups, those whose tokens were recorded, and the middle."""
    reward = run.series("reward")
    if not reward:
        return {}
    why: dict[int, list[str]] = {}

    def add(step: float, reason: str) -> None:
        why.setdefault(int(step), []).append(reason)

    add(reward[0][0], "first step")
    add(reward[-1][0], "last step")
    add(max(reward, key=lambda p: p[1])[0], "best reward")
    add(min(reward, key=lambda p: p[1])[0], "worst reward")
    for metric, reason in [
        ("frac_reward_zero_std", "most zero-variance"),
        ("completions/clipped_ratio", "most truncated"),
    ]:
        points = run.series(metric)
        if points and (top := max(points, key=lambda p: p[1]))[1] > 0:
            add(top[0], reason)
    steps = {int(s) for s, _ in reward}
    recorded = sorted(s for p in _folders(run.folder / "rollouts") if (s := _step_of(p.name)) in steps)
    for step in dict.fromkeys([*recorded[:1], *recorded[len(recorded) // 2 :][:1], *recorded[-1:]]):
        add(step, "tokens recorded")
    add(reward[len(reward) // 2][0], "middle")
    return why


def choose(run: RunData, budget: Budget, share: int) -> tuple[list[dict], dict]:
    """At most `share` groups of a run as plain data for the page, and what was read: lines parsed, groups taken, about
    how many there are, and a problem in words or None."""
    path = run.folder / "samples.jsonl"
    seen: dict = {"lines": 0, "groups": 0, "about": 0, "problem": None}
    if not path.is_file():
        return [], seen | {"problem": "no samples.jsonl"}
    try:
        reader = Reader(path)
        chosen = _pick(run, reader, share)
    except OSError as error:
        return [], seen | {"problem": f"samples.jsonl could not be read ({error.strerror or error})"}
    groups = [_plain_group(run, why, rows, start, budget) for why, rows, start in chosen]
    seen |= {"lines": reader.lines, "groups": len(groups)}
    if not groups:
        return [], seen | {"problem": "samples.jsonl has no completion of the steps looked for"}
    per_group = reader.bytes / reader.rows * sum(len(g["rows"]) for g in groups) / len(groups)
    return groups, seen | {"about": max(round(reader.size / per_group), len(groups))}


def _pick(run: RunData, reader: Reader, share: int) -> list[tuple[list[str], list[dict], int]]:
    """(why, rows, index of the first row in its step), in the order of the steps."""
    steps = choose_steps(run)
    ordered = list(steps)[: max(1, share)]
    queues = {}
    for step in ordered:
        queues[step] = _by_interest(_groups(reader.step(step)))
    picked, left = [], share
    while left > 0 and any(queues.values()):  # one group of each step in turn, until the share is used
        for step in ordered:
            if queues[step] and left > 0:
                start, group = queues[step].pop(0)
                picked.append((steps[step], group, start))
                left -= 1
    return sorted(picked, key=lambda p: (p[1][0]["step"], p[2]))


def _groups(rows: Sequence[dict]) -> list[tuple[int, list[dict]]]:
    """Rows of a step -> (index of the first row, rows of one question), split where the question changes."""
    out: list[tuple[int, list[dict]]] = []
    for i, row in enumerate(rows):
        if out and out[-1][1][0].get("id") == row.get("id") and row.get("sample") != out[-1][1][0].get("sample"):
            out[-1][1].append(row)
        else:
            out.append((i, [row]))
    return out


def _by_interest(groups: list[tuple[int, list[dict]]]) -> list[tuple[int, list[dict]]]:
    """One of each kind first (mixed, all wrong, all right, truncated), then the rest in order."""
    kinds: dict[str, list] = {}
    for item in groups:
        f = _flags(item[1])
        kind = "cut" if f["truncated"] else "mixed" if not f["zero_variance"] else "right" if f["right"] else "wrong"
        kinds.setdefault(kind, []).append(item)
    out = []
    while any(kinds.values()):
        out += [kinds[k].pop(0) for k in ("mixed", "wrong", "cut", "right") if kinds.get(k)]
    return out


def _flags(rows: Sequence[dict]) -> dict:
    rewards = [number(r.get("reward")) for r in rows]
    right = [_right(r) for r in rows]
    return {
        "zero_variance": len(rows) > 1 and len(set(rewards)) == 1,
        "truncated": any(r.get("truncated") is True for r in rows),
        "right": any(r is True for r in right), "wrong": any(r is False for r in right),
    }  # fmt: skip


def _right(row: Mapping) -> bool | None:
    parts = row.get("rewards")
    value = number(parts.get("accuracy")) if isinstance(parts, dict) else None
    return None if value is None else value >= 0.5


# ---------------------------------------------------------------- plain data for the page


def _plain_group(run: RunData, why: list[str], rows: list[dict], start: int, budget: Budget) -> dict:
    head = rows[0]
    choices = head.get("choices")
    tokens, tokens_note = _tokens(run.folder, int(head["step"]), start, len(rows), budget)
    return {
        "step": int(head["step"]), "why": why, "id": cut(head.get("id"), 200),
        "question": cut(head.get("question"), 4000), "gold": cut(head.get("gold"), 1000),
        "choices": [cut(c, 1000) for c in choices[:64]] if isinstance(choices, list) else [],
        "audio": [head.get("audio"), number(head.get("start")), number(head.get("end"))], "note": tokens_note,
        "flags": _flags(rows),
        "rows": [
            {
                "text": cut(r.get("completion"), MAX_TEXT), "truncated": r.get("truncated") is True,
                "tokens": number(r.get("tokens")), "right": _right(r), "reward": number(r.get("reward")),
                "answered": number(r.get("answered")),
                "advantage": number(r.get("advantage")),
                "rewards": {cut(k, 100): number(v) for k, v in list(r["rewards"].items())[:32]}
                if isinstance(r.get("rewards"), dict) else {},
                "figures": figures,
            }
            for r, figures in zip(rows, tokens, strict=True)
        ],
    }  # fmt: skip


def cut(value, limit: int) -> str:
    """Text of at most `limit` characters; says how many more there were. What is not text becomes its JSON."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= limit else f"{text[:limit]} … [{len(text) - limit:,} more characters]"


class Clips:
    """Clips of the chosen groups as base64 FLAC, each once, up to the budget."""

    def __init__(self, budget: Budget):
        self.budget, self.spent = budget, 0
        self.found: dict[tuple, tuple[str | None, str | None]] = {}  # (path, start, end) -> key, note
        self.data: dict[str, str] = {}

    def add(self, folder: Path, audio, start: float | None, end: float | None) -> tuple[str | None, str | None]:
        """(key into `data` or None, what to say about it)."""
        if not isinstance(audio, str) or not audio:
            return None, "the samples of this run do not say where its clips are"
        where = next((p for p in (Path(audio), folder / audio) if _is_file(p)), None)
        if where is None:
            return None, f"clip not found: {cut(audio, 300)}"
        key = (str(where), start, end)
        if key not in self.found:
            self.found[key] = self._encode(where, start, end)
        return self.found[key]

    def _encode(self, path: Path, start, end) -> tuple[str | None, str | None]:
        if self.spent >= self.budget.clip_bytes:
            self.budget.miss("clips")
            return None, "clip left out: the page holds enough of them"
        import numpy as np  # and torch, with data.audio: only where there are clips to hear
        import soundfile

        from data.audio import ClipError, load

        try:
            clip = load(path, start=start, end=end)
        except (ClipError, OSError, ValueError) as error:
            return None, f"clip not readable: {cut(str(error), 300)}"
        samples = clip.samples[: int(CLIP_SECONDS * clip.hz)]
        note = f"the first {CLIP_SECONDS:.0f} of {clip.seconds:.0f} s" if len(samples) < len(clip.samples) else None
        buffer = io.BytesIO()
        soundfile.write(buffer, np.clip(samples, -1, 1), clip.hz, format="FLAC", subtype="PCM_16")
        if self.spent + len(buffer.getvalue()) > self.budget.clip_bytes:
            self.budget.miss("clips")
            return None, "clip left out: the page holds enough of them"
        self.spent += len(buffer.getvalue())
        name = f"c{len(self.data)}"
        self.data[name] = base64.b64encode(buffer.getvalue()).decode()
        return name, note


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        return False


# ---------------------------------------------------------------- per-token figures


def _tokens(folder: Path, step: int, start: int, count: int, budget: Budget) -> tuple[list[dict | None], str | None]:
    """For `count` completions from row `start` of a step: token texts, ratio, KL, entropy, sampler ratio; None where
    the step was not recorded. The note says why recorded figures are not shown."""
    where = folder / "rollouts" / f"step-{step:06d}"
    nothing: list[dict | None] = [None] * count
    if not (where / "step.json").is_file() or not (where / "tensors.safetensors").is_file():
        return nothing, None
    try:
        from safetensors import safe_open

        texts = json.loads((where / "step.json").read_bytes())["token_texts"]
        with safe_open(where / "tensors.safetensors", framework="numpy") as file:
            names = set(file.keys())
            rows = slice(start, start + count)
            tensors = {n: file.get_slice(n)[rows] for n in names if n.endswith("_NT")}
        if any(len(t) != count for t in tensors.values()) or len(texts) < start + count:
            return nothing, "recorded tokens do not fit this step's completions"
        out: list[dict | None] = []
        for i in range(count):
            t = [cut(x, 200) for x in texts[start + i][:MAX_TOKENS]]
            if budget.tokens < len(t):
                budget.miss("completions' tokens")
                out.append(None)
                continue
            budget.tokens -= len(t)
            out.append({"t": t} | _figures({n: v[i] for n, v in tensors.items()}, len(t)))
        return out, None
    except Exception as error:  # a broken file of one step: shown as such
        return nothing, f"recorded tokens could not be read ({type(error).__name__}: {cut(str(error), 200)})"


def _figures(row: Mapping, length: int) -> dict[str, list[float | None]]:
    """[length] each: ratio pi/pi_old, k3 of the reference, entropy, sampler ratio pi_old/pi_sampler."""

    def values(name: str):
        return [float(v) for v in row[name][:length]] if name in row else None

    logp, old, ref = values("logp_NT"), values("old_logp_NT"), values("ref_logp_NT")
    sampler, entropy, mask = values("sampler_logp_NT"), values("entropy_NT"), values("mask_NT")
    out = {}
    if logp and old:
        out["ratio"] = [_exp(a - b) for a, b in zip(logp, old, strict=True)]
    if logp and ref:
        out["kl"] = [None if (e := _exp(r - p)) is None else e - (r - p) - 1 for p, r in zip(logp, ref, strict=True)]
    if old and sampler:
        out["sampler"] = [_exp(a - b) for a, b in zip(old, sampler, strict=True)]
    if entropy:
        out["entropy"] = entropy
    if mask:
        out["mask"] = mask
    return {n: [None if v is None or not math.isfinite(v) else float(f"{v:.4g}") for v in out[n]] for n in out}


def _exp(x: float) -> float | None:
    return math.exp(x) if math.isfinite(x) and x < 60 else None


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(p for p in path.iterdir() if p.is_dir())
    except OSError:
        return []


def _step_of(name: str) -> int | None:
    digits = name.removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 12 else None
