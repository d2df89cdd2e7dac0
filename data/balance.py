"""Where the right options stand: a model that always says A must not get far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from string import ascii_uppercase


def balance(golds: Sequence[tuple[int, int]]) -> dict:
    """From (gold index, number of options) of each question: counts by letter, chance, best constant answer, text."""
    counts = Counter(ascii_uppercase[answer] for answer, _ in golds)
    if not golds:
        return {"counts": {}, "chance": 0.0, "always": 0.0, "text": "none"}
    letter, most = counts.most_common(1)[0]
    chance, always = sum(1 / n for _, n in golds) / len(golds), most / len(golds)
    text = ", ".join(f"{a}: {n}" for a, n in sorted(counts.items()))
    text += f"; always {letter} scores {always:.1%}, chance {chance:.1%}"
    # Four standard errors: an even draw hardly ever gets there.
    if always - chance > 4 * (chance * (1 - chance) / len(golds)) ** 0.5:
        text += ": not even, train with data.shuffle_options=true"
    return {"counts": dict(sorted(counts.items())), "chance": chance, "always": always, "text": text}
