"""What evaluation reports: shares with Wilson intervals, paired tests, consistency. Standard library only."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import mean

GROUPS = ("task", "difficulty", "category", "sub-category", "language")  # of a row's `meta`, where it has them


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share, after Wilson (1927): also for 0 or n right it has a width. (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p that of the items on which two runs differ each is as likely to be the better one."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def share(rows: Sequence[Mapping], rule: str) -> dict:
    """n, right, accuracy and interval of `rule` (strict, official, official_verbatim) over rows of predictions."""
    right = sum(bool(row[rule]) for row in rows)
    low, high = wilson(right, len(rows))
    return {"n": len(rows), "right": right, "accuracy": right / len(rows) if rows else 0.0, "low": low, "high": high}


def summary(rows: Sequence[Mapping]) -> dict:
    """All figures of one benchmark: rules in total and per group, states, lengths. Withheld answers are not scored."""
    rows = [row for row in rows if not row.get("hidden")]
    groups: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name in GROUPS:
            value = row.get("meta", {}).get(name)
            for one in value if isinstance(value, list) else [value]:  # MMAU has lists of one here
                if isinstance(one, str) and one:
                    groups[name][one].append(row)
    rules = ("strict", "official", "official_verbatim")
    words = [len(row["think"].split()) for row in rows if row.get("think") is not None]
    return {
        "total": {rule: share(rows, rule) for rule in rules},
        "groups": {name: {value: {rule: share(part, rule) for rule in rules} for value, part in sorted(parts.items())}
                   for name, parts in groups.items()},
        "states": dict(Counter(row["state"] for row in rows)),
        "think_words": mean(words) if words else None,
        "tokens": mean(row["tokens"] for row in rows) if rows else 0.0,
        "chosen": dict(sorted(Counter(row["letter"] or "none" for row in rows).items())),
        "gold": dict(sorted(Counter(row["gold_letter"] for row in rows if row["gold_letter"]).items())),
    }  # fmt: skip


def paired(mine: Iterable[Mapping], theirs: Iterable[Mapping], rule: str) -> dict:
    """McNemar's comparison by id: n shared, right in one of the two only, and the exact p. Withheld answers apart."""
    a, b = ({row["id"]: bool(row[rule]) for row in rows if not row.get("hidden")} for rows in (mine, theirs))
    shared = a.keys() & b.keys()
    only_a, only_b = sum(a[i] and not b[i] for i in shared), sum(b[i] and not a[i] for i in shared)
    return {"n": len(shared), "not_shared": len(a.keys() ^ b.keys()), "only_this": only_a, "only_other": only_b,
            "difference": (only_a - only_b) / len(shared) if shared else 0.0, "p": mcnemar(only_a, only_b)}  # fmt: skip


def permuted(runs: Sequence[Sequence[Mapping]]) -> dict:
    """Consistency and correctness over runs with different orders of the choices (arXiv 2510.04584).

    consistency: share of agreeing pairs among an item's runs, mean over items; no option agrees with nothing.
    correctness: share of an item's runs that are right, mean over items.
    Of runs that asked an item in one and the same order (two options have two) one counts: it agrees with itself.
    """
    by_id: dict[str, dict[tuple, Mapping]] = defaultdict(dict)
    for number, run in enumerate(runs):
        for row in run:
            by_id[row["id"]].setdefault(tuple(row["order"] or [number]), row)  # a bad row has no order
    items = [list(rows.values()) for rows in by_id.values()]
    agree = [mean(_option(a) is not None and _option(a) == _option(b) for a, b in combinations(rows, 2))
             for rows in items if len(rows) > 1]  # fmt: skip
    right = [mean(bool(row["strict"]) for row in rows) for rows in items if not rows[0].get("hidden")]
    return {
        "runs": len(runs),
        "consistency": mean(agree or [0.0]),
        "correctness": mean(right or [0.0]),
    }


def _option(row: Mapping) -> str | None:
    """The text of the option that was chosen: one that is printed twice is one option."""
    return None if row["chosen"] is None else row["choices"][list(row["order"]).index(row["chosen"])]


# ---------------------------------------------------------------- for people


def table(name: str, figures: Mapping) -> list[str]:
    """Markdown of one benchmark: a line in total and one a group, the rules side by side."""
    lines = [f"## {name}", ""]
    lines += [f"{figures['note']}", ""] if figures.get("note") else []
    lines += ["| | | n | strict | 95 % | official | 95 % | official, as written |", "|---|---|---|---|---|---|---|---|"]
    lines.append(_line("all", "", figures["total"]))
    for group, parts in figures["groups"].items():
        lines += [_line(group, value, rules) for value, rules in parts.items()]
    states = ", ".join(f"{state} {n}" for state, n in figures["states"].items())
    words = "" if figures["think_words"] is None else f"; {figures['think_words']:.1f} words of thought"
    lines += ["", f"Parse states: {states}. {figures['tokens']:.1f} tokens an answer{words}.", ""]
    for probe, value in figures.get("probes", {}).items():
        lines.append(f"- {probe}: {_probe(value, figures['total']['strict']['accuracy'])}")
    for rule, test in figures.get("against", {}).items():
        lines.append(
            f"- against the named run, {rule}: {test['difference']:+.3f} on {test['n']} shared items (right only "
            f"here {test['only_this']}, only there {test['only_other']}), McNemar p = {test['p']:.3g}"
            + (f"; {test['not_shared']} items are in one of the two only" if test["not_shared"] else "")
        )
    return [*lines, ""]


def _line(group: str, value: str, rules: Mapping) -> str:
    cells = [group, " ".join(value.replace("|", "/").split()), str(rules["strict"]["n"])]
    for rule in ("strict", "official"):
        cells += [f"{rules[rule]['accuracy']:.3f}", f"{rules[rule]['low']:.3f} to {rules[rule]['high']:.3f}"]
    return "| " + " | ".join([*cells, f"{rules['official_verbatim']['accuracy']:.3f}"]) + " |"


def _probe(value: Mapping, plain: float) -> str:
    if "consistency" in value:
        return (f"{value['runs']} runs in different orders, consistency {value['consistency']:.3f}, "
                f"correctness {value['correctness']:.3f}")  # fmt: skip
    strict = value["total"]["strict"]
    return (f"strict {strict['accuracy']:.3f} ({strict['low']:.3f} to {strict['high']:.3f}), "
            f"{strict['accuracy'] - plain:+.3f} against the plain questions")  # fmt: skip
