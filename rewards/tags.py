"""Read `<think>…</think><semantic_elements>…</semantic_elements><answer>…</answer>` out of a completion.

A tag is exactly `<name>` or `</name>`: case counts, no attributes, no spaces. A block is an opening tag whose NEXT tag
is its own closing tag. Everything else follows from that:

    two blocks of one name    both are kept in `blocks`; the plain field (`answer`) holds the first
    a missing block           None
    an unclosed tag           no block: `<think>a` gives None
    a stray closing tag       ignored by the fields, never well formed
    nested tags               the inner block counts, the outer does not: in `<think>a<answer>B</answer></think>`
                              the answer is B and think is None
    line breaks               allowed anywhere

Every scan here is linear in the length of the text, whatever the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

TAGS = ("think", "semantic_elements", "answer")


@dataclass(frozen=True)
class Tags:
    """What the tags of one completion enclose, all contents stripped of outer white space.

    Example: parse("<think>a bark</think> <answer>B. dog</answer>", tags=("think", "answer"))
        think="a bark", semantic_elements=None, answer="B. dog", well_formed=True,
        blocks={"think": ("a bark",), "semantic_elements": (), "answer": ("B. dog",)},
        opened={"think": 1, "semantic_elements": 0, "answer": 1}, closed likewise
    """

    think: str | None
    semantic_elements: str | None
    answer: str | None
    blocks: Mapping[str, tuple[str, ...]]  # name -> contents of all its blocks, in order
    opened: Mapping[str, int]  # name -> number of opening tags
    closed: Mapping[str, int]  # name -> number of closing tags
    well_formed: bool  # the blocks asked for, each once, in order, none empty, and nothing but white space around them


def parse(completion: str, *, tags: Sequence[str] = TAGS) -> Tags:
    """Find the blocks of `completion`; `well_formed` is judged against the names in `tags`, in their order.

    The three names of TAGS are always looked for, so a block that `tags` leaves out is not mistaken for plain text.
    Raises ValueError when `tags` is not a list of names.
    """
    tags = tuple(tags) if not isinstance(tags, str) else ()
    if not tags:
        raise ValueError("tags must be a list of at least one name, such as [think, semantic_elements, answer]")
    names = tuple(dict.fromkeys((*TAGS, *tags)))
    marks = list(re.finditer("<(/?)(" + "|".join(map(re.escape, names)) + ")>", completion))

    blocks: dict[str, list[str]] = {name: [] for name in names}
    for left, right in pairwise(marks):
        if left[2] == right[2] and not left[1] and right[1]:
            blocks[left[2]].append(completion[left.end() : right.start()].strip())

    # Well formed: <a> </a> <b> </b> and no other mark, text inside every block, white space outside.
    in_order = [m[0] for m in marks] == [part for name in tags for part in (f"<{name}>", f"</{name}>")]
    edges = [0, *(edge for m in marks for edge in m.span()), len(completion)]
    between = [completion[a:b].strip() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    well_formed = in_order and all(between[1::2]) and not any(between[::2])

    opened, closed = Counter(m[2] for m in marks if not m[1]), Counter(m[2] for m in marks if m[1])
    return Tags(
        **{name: blocks[name][0] if blocks[name] else None for name in TAGS},
        blocks={name: tuple(found) for name, found in blocks.items()},
        opened={name: opened[name] for name in names},
        closed={name: closed[name] for name in names},
        well_formed=well_formed,
    )


def published_block(completion: str, name: str) -> str | None:
    """The reference's reading, `re.search("<name>(.*?)</name>")` without DOTALL: the first block within one line.

    Written with `find`, because that pattern takes quadratic time on many opening tags. Stripped; None without a block.
    """
    for line in completion.split("\n"):
        start = line.find(f"<{name}>")
        end = line.find(f"</{name}>", start)
        if start >= 0 and end >= 0:
            return line[start + len(name) + 2 : end].strip()
    return None
