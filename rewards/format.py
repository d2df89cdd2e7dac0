"""Does the completion have the asked shape? `format` is this project's rule, `published` the reference's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from rewards.tags import TAGS, parse


def format(completion: str, *, tags: Sequence[str] = TAGS) -> float:
    """1.0 if each tag encloses some text exactly once, in order, not nested, with only white space outside; else 0.0.

    Source: the model card of AudSemThinker-QA-GRPO (presence, order and encapsulation; arXiv 2505.14142).
    Departures from the released code: empty blocks and tags inside blocks pay nothing, since nothing is encapsulated;
    white space around the blocks is free; the value is 1.0 (its 0.5 is a weight here). There is no partial credit.
    Raises ValueError when `tags` is not a list of names.
    """
    return float(parse(completion, tags=tags).well_formed)


def published(completion: str, *, semantic: bool = True) -> float:
    """The reference's rule: 0.5 if the pattern below covers the whole completion, else 0.0.

        <think>.*?</think>\\s*<semantic_elements>.*?</semantic_elements>\\s*<answer>.*?</answer>     (DOTALL)

    Source: the released code of AudSemThinker (arXiv 2505.14142); `semantic=False` leaves the middle block out. It
    accepts empty blocks and further tags inside blocks, and rejects outer white space. Instead of the pattern, whose
    time is quadratic, both ends are compared, and the first junction of two blocks is searched, then the next after it.
    """
    head, tail = "<think>", "</answer>"
    if not (completion.startswith(head) and completion.endswith(tail)):
        return 0.0
    names = TAGS if semantic else ("think", "answer")
    position = len(head)
    for left, right in pairwise(names):
        junction = re.compile(rf"</{left}>\s*<{right}>").search(completion, position)
        if junction is None:
            return 0.0
        position = junction.end()
    return 0.5
