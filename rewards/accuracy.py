"""Is the answer right? `named` reads it as options, `accuracy` pays for the gold one, `exact` does as published."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from rewards.tags import parse, published_block

# An answer longer than this names no option: Unicode normalisation takes quadratic time on hostile combining marks.
LONGEST_ANSWER = 4000

DECORATION = "*_`\"'“”‘’ "
PUNCTUATION = ".,;:!? "

# "b", "(B)", "B. dog", "b) dog", "B: dog", "B - dog", "Option B", "**B.** dog". A letter with text after it needs a
# separator: in "a dog" the letter is an article. Only one is taken, so that "B. -5" and "B. .5" keep their text.
LABEL = re.compile(
    r"(?:(?i:option|choice|answer)[ :]+)?[(\[@]*([A-Za-z])[@]*"
    r"(?:(?:[)\]][@]*[.:]?|[.:]|[-–—](?= ))[@]*(.*)|[.,;:!?@]*)".replace("@", DECORATION)
)


def named(answer_text: str, choices: Sequence[str]) -> set[int]:
    """Indices of the options that an answer may mean: one if it is clear, several if not, none if it names none.

    It names an option by letter ("B", "(b)", "Option B"), text ("dog") or both ("B. dog"), compared after Unicode NFKC,
    case folding and collapsing of white space; outer emphasis, quotes and closing punctuation are ignored. In order:

    1. The whole answer equals an option's text: that option. With choices ("B", "A") the answer "B" is the first.
    2. A letter with text: the letter's option if the text is that option's text, else (they contradict) both.
    3. A letter alone: its option, and with it the one whose text the bare letter is ("B." with choices ("B", "A")).

    Source: this project; what it mends in published scorers is in docs/rewards.md.
    """
    answer_text = " ".join(answer_text.split())
    if len(answer_text) > LONGEST_ANSWER:
        return set()
    answer_text = _composed(answer_text)
    for whole in (answer_text, answer_text.strip(DECORATION)):
        if found := _options_with_text(whole, choices, (_composed, _folded)):
            return found
    loosely = _options_with_text(answer_text, choices)
    label = LABEL.fullmatch(answer_text.lstrip(DECORATION))
    letter = ord(label[1].lower()) - ord("a") if label else len(choices)
    if letter >= len(choices):
        return loosely
    text = label[2] or ""
    if not text.strip(DECORATION + PUNCTUATION):
        return loosely | _options_with_text(label[1], choices) | {letter}
    if loosely:
        return loosely
    said = _options_with_text(text, choices)
    return {letter} if letter in said else said | {letter} if said else said


def choice(answer_text: str | None, choices: Sequence[str]) -> int | None:
    """Index of the one option that an answer names (`named`), None where it names none or several."""
    found = named(answer_text, choices) if answer_text is not None else set()
    return next(iter(found)) if len(found) == 1 else None


def accuracy(completion: str, *, choices: Sequence[str], answer: int) -> float:
    """1.0 if every answer block names the gold option, else 0.0.  r = 1[choice(answer block) = gold]

    Only answer blocks are read, so no word or number outside them makes an answer right; no block, or two blocks that
    disagree, is wrong. Raises ValueError when `answer` is not an index of `choices`.
    """
    _check_gold(choices, answer)
    answers = dict.fromkeys(parse(completion).blocks["answer"])
    return float(bool(answers) and all(choice(text, choices) == answer for text in answers))


def exact(completion: str, *, choices: Sequence[str], answer: int) -> float:
    """The reference's string rule: 1.0 if the first answer block equals "B. full text", case included, else 0.0.

    The block must lie within one line; without one the whole completion is compared. Source: the released code of
    AudSemThinker (arXiv 2505.14142). Left out: its symbolic check, which first ran math-verify on the whole completion
    and so called a wrong option right as soon as any number, even one in the thought, was shared with the gold
    (docs/rewards.md, departure 1).
    Raises ValueError when `answer` is not an index of `choices`.
    """
    _check_gold(choices, answer)
    block = published_block(completion, "answer")
    gold = f"{chr(ord('A') + answer)}. {choices[answer]}"
    return float((completion.strip() if block is None else block) == gold.strip())


def _check_gold(choices: Sequence[str], answer: int) -> None:
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer={answer} is not the index of one of the {len(choices)} choices: mend the question")


def _composed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _folded(text: str) -> str:
    return _composed(_composed(text).casefold())


def _unpunctuated(text: str) -> str:
    return _folded(text).rstrip(PUNCTUATION)


def _bare(text: str) -> str:
    return _folded(text).strip(DECORATION).rstrip(PUNCTUATION).rstrip(DECORATION)


def _options_with_text(
    text: str, choices: Sequence[str], readings: Sequence = (_composed, _folded, _unpunctuated, _bare)
) -> set[int]:
    """Options whose text equals `text` in the first, strictest reading that finds any: "Us" and "US" stay apart."""
    for reading in readings:
        wanted = reading(text)
        found = {i for i, c in enumerate(choices) if reading(c) == wanted} if wanted else set()
        if found:
            return found
    return set()
