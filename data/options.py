"""Published options and answers, in whatever dress, as bare texts and an index."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from string import ascii_uppercase

from data.manifest import RowError

MARK = r"(?:\({0}\)|{0}[.):])(?=\s|$)\s*"  # "A. ", "A) ", "A: ", "(A) "
LONGEST_INVITATION = 200  # characters: looked for in more of them, it takes a minute over a page of blanks
LONGEST_LITERAL = 20_000  # characters: Python's parser takes long over deep ones


def bare(choices: Sequence[str]) -> list[str]:
    """Options without their letters, if EVERY option carries its own in order: "A. dog", "B. cat".

    "A dog" keeps its article, and "A. Vivaldi" its initial unless the next option is "B. ...".
    """
    marks = [re.match(MARK.format(a), c.strip()) for a, c in zip(ascii_uppercase, choices, strict=False)]
    if len(choices) < 2 or len(choices) > len(marks) or not all(marks):
        return [c.strip() for c in choices]
    return [c.strip()[m.end() :] for m, c in zip(marks, choices, strict=True)]


def index(answer, choices: Sequence[str]) -> int:
    """The option that a published answer names: by index, by text, as "B. text" or by letter, in that order.

    `choices` are bare. Raises RowError where it names none, or letter and text disagree.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise RowError("answer_range", f"answer {answer} is not an index into {len(choices)} choices")
    if not isinstance(answer, str) or not answer.strip():
        raise RowError("no_answer", f"the answer {answer!r} names no option"[:300])
    text = answer.strip()
    for read in (str.strip, lambda s: " ".join(s.casefold().split()).rstrip(".")):
        if found := [i for i, c in enumerate(choices) if read(c) == read(text)]:
            return found[0]  # printed twice, it is the same option
    for i, (letter, choice) in enumerate(zip(ascii_uppercase, choices, strict=False)):
        if mark := re.match(MARK.format(letter), text):
            rest = " ".join(text[mark.end() :].casefold().split()).rstrip(".")
            if rest and rest != " ".join(choice.casefold().split()).rstrip("."):
                raise RowError("answer_range", f"answer {text!r} has the letter of option {choice!r}"[:300])
            return i
        if text.upper() == letter:
            return i
    raise RowError("answer_range", f"answer {text!r} is none of the {len(choices)} choices"[:300])


def listed(choices) -> list[str]:
    """Options from a list, a mapping of letters to texts, or either written out as JSON or as Python in a cell."""
    if isinstance(choices, str):
        choices = _literal(choices)
    if isinstance(choices, Mapping):
        choices = [choices[k] for k in sorted(choices) if choices[k] is not None]  # Arrow fills absent ones with null
    if not isinstance(choices, list | tuple) or not all(isinstance(c, str | int | float) for c in choices):
        raise RowError("bad_type", f"choices must be a list of texts, got {choices!r}"[:300])
    return bare([str(c) for c in choices])


def within(text: str) -> tuple[str, list[str]]:
    """(question, options) of a text that holds both: lines "A. text", inline "(A) text (B) text", or a Python list.

    Raises RowError where there are none.
    """
    if len(text) > LONGEST_LITERAL:
        raise RowError("num_choices", f"a question of {len(text)} characters")
    head, _, rest = text.partition("\nChoices:\n")
    if not rest:
        first = re.search(r"(?:^|\s)(?:\(A\)|A[.):])\s", text)
        head, rest = (text[: first.start()], text[first.start() :].strip()) if first else (text, "")
    if rest:
        # Where they stand as lines, what looks like a letter within an option is none.
        before = r"^" if re.search("^" + MARK.format("B"), rest, re.MULTILINE) else r"(?<=\s)"
        options, at = [], 0
        for letter, after in pairwise(ascii_uppercase):
            if not (mark := re.compile(MARK.format(letter)).match(rest, at)):
                break
            following = re.compile(before + MARK.format(after), re.MULTILINE).search(rest, mark.end())
            end = following.start() if following else len(rest)
            options.append(rest[mark.end() : end].strip())
            at = end
        if len(options) >= 2:
            return _asked(head), options
    ends = [end.end() for end in re.finditer(r"['\"]\s*\]", text)] or [0]  # first: a list that never ends takes long
    if found := re.search(r"\[\s*['\"].*['\"]\s*\]", text[: ends[-1]], re.DOTALL):
        return _asked(text[: found.start()]), listed(found.group())
    raise RowError("num_choices", f"no options in {text!r}: they stand as 'A. text' lines, (A) text or a list"[:400])


def _asked(head: str) -> str:
    """The question without "Choices:" or "Please choose the answer from the following options:" behind it."""
    invitation = r"\s*(?:(?:please )?(?:choose|select)[^?.]*)?(?:choices|options)\s*:\s*$"
    near = max(0, len(head) - LONGEST_INVITATION)
    return (head[:near] + re.sub(invitation, "", head[near:], flags=re.IGNORECASE)).strip()


def _literal(text: str):
    if len(text) > LONGEST_LITERAL:
        raise RowError("bad_type", f"a cell of {len(text)} characters for the choices")
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    parts = [p.strip() for p in re.split(r"\n|\|", text) if p.strip()]
    if len(parts) < 2:
        raise RowError("bad_type", f"choices {text!r}: neither JSON, nor a Python list, nor texts between |"[:300])
    return parts
