"""Is an answer right by a benchmark's published rule? The strict rule of our own is read in grpo/predict.py.

A rule takes the text of the ANSWER, what stands in <answer>…</answer>, not the whole completion. Standard library only.
Departure from every published scorer: an item without a usable answer is wrong; theirs leave it out of the denominator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from string import ascii_uppercase

# ---- published rules: (prediction, choices, gold index) -> bool ----


def token_sets(prediction: str, choices: Sequence[str], answer: int) -> bool:
    """MMAU's rule, MMAR's too, on sets of words W(s): the maximal runs of Unicode word characters in lower case.

        right = W(p) not empty, W(gold) within W(p), and W(p) disjoint from U { W(c) - W(gold) : W(c) != W(gold) }

    Traps: letters count as words, so "A. dog" fails where a wrong option says "a"; a letter alone is nearly always
    wrong; options with the same words in another order cannot be told apart. Source: Sakshi113/MMAU @110127f.
    """
    said, gold = _words(prediction), _words(choices[answer])
    forbidden = set().union(*(words - gold for c in choices if (words := _words(c)) != gold))
    return bool(said) and gold <= said and not said & forbidden


def first_letter(prediction: str, choices: Sequence[str], answer: int) -> bool:
    """MMSU's rule: a first character A to D, else such a second to last one, names the option.

    Options with the gold's text are all right. Trap: "Dog" is D. Departure: where the published code falls through to
    the letter of the item before (an empty answer, "None"), this one says wrong.
    Source: dingdongwang/MMSU_Bench @f0ef334.
    """
    named = _letter(prediction)
    return named is not None and choices[named : named + 1] == choices[answer : answer + 1]


def first_letter_alone(prediction: str, choices: Sequence[str], answer: int) -> bool:
    """AIR-Bench's rule: as MMSU's, but of options with the gold's text only the first is right.

    Source: OFA-Sys/AIR-Bench @9832476.
    """
    return _letter(prediction) == list(choices).index(choices[answer])


def letter_or_containment(prediction: str, choices: Sequence[str], answer: int) -> bool:
    """MuChoMusic's rule, on what follows the last "The correct answer is:": if exactly one of the capitals A to D
    occurs as a character, that option, else the first option that the text contains.

    Trap: "Drums" is D, the capitals of words count. Source: mulab-mir/muchomusic @d3c9a42.
    """
    text = prediction.split("The correct answer is:")[-1].strip()
    if len(letters := set("ABCD") & set(text)) == 1:
        return "ABCD".index(letters.pop()) == answer
    contained = (i for i, c in enumerate(choices) if c.lower().strip() in text.lower())
    return next(contained, None) == answer


def whole_text(prediction: str, choices: Sequence[str], answer: int) -> bool:
    """Top-1 as DCASE words it: the option's text, with or without its right letter ("B. text"), case and all.

    No scorer is published that could be read: this is the metric's definition, not a copy of their code.
    """
    gold = choices[answer].strip()
    return prediction.strip() in (gold, f"{ascii_uppercase[answer]}. {gold}")


RULES: dict[str, Callable[[str, Sequence[str], int], bool]] = {
    "mmau": token_sets,
    "mmau_mini": token_sets,
    "mmau_test": token_sets,
    "mmar": token_sets,
    "mmsu": first_letter,
    "air_bench": first_letter_alone,
    "muchomusic": letter_or_containment,
    "dcase2025": whole_text,
    "dcase2026": whole_text,
}
LETTERED = ("mmsu", "air_bench", "muchomusic")  # rules that read a letter: of the bare text "Drums" they make D


def official(prediction: str, choices: Sequence[str], answer: int, benchmark: str) -> bool:
    """The published rule of `benchmark`, a name of RULES. Raises ValueError for another name or a gold out of range."""
    if benchmark not in RULES:
        raise ValueError(f"no published rule for benchmark {benchmark!r}; there are {', '.join(RULES)}")
    _check_gold(choices, answer)
    return RULES[benchmark](prediction, choices, answer)


def _letter(text: str) -> int | None:
    text = text.strip().replace("\n", "")
    if text == "None":
        return None
    return next(("ABCD".index(c) for c in (text[:1], text[-2:-1]) if c and c in "ABCD"), None)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _check_gold(choices: Sequence[str], answer: int) -> None:
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer={answer!r} is not the index of one of the {len(choices)} choices")
