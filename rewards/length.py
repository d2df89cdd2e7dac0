"""Is the thought about as long as asked? The published formula, its gated form, and the reference's way to count.

    encourage and n <= t:   L = clip(1 - α (t - n) + δ, 0, 1)
    otherwise:              L = clip(    α (t - n) + δ, 0, 1)

n words of the thought, t `target`, α `alpha`, δ `delta`. Source: the released code of AudSemThinker (arXiv 2505.14142),
after L1 (arXiv 2503.04697) eq. 2, which multiplies the second line by correctness. With t = 25, α = 0.1, δ = 0.5:

    n               0    5   10   11   12   15   18   20   22   25   26   27   28   29   30
    encourage       0    0    0  0.1  0.2  0.5  0.8    1    1    1  0.4  0.3  0.2  0.1    0
    no encourage    1    1    1    1    1    1    1    1  0.8  0.5  0.4  0.3  0.2  0.1    0
"""

from __future__ import annotations

from collections.abc import Sequence

from rewards.accuracy import accuracy
from rewards.tags import parse, published_block


def length(
    completion: str, *, target: int = 25, alpha: float = 0.1, delta: float = 0.5, encourage: bool = True
) -> float:
    """L(n) as above, in [0, 1], n the white-space-separated words of the think block; 0.0 unless there is exactly one.

    Departures from the released code: it counts the whole completion when there is no think block, or when the thought
    holds a line break, and takes the first of several; it defaults to t = 100 and no encouragement, which pays an empty
    thought in full.
    """
    thoughts = parse(completion).blocks["think"]
    return value(len(thoughts[0].split()), target, alpha, delta, encourage) if len(thoughts) == 1 else 0.0


def length_if_correct(
    completion: str,
    *,
    choices: Sequence[str],
    answer: int,
    target: int = 25,
    alpha: float = 0.1,
    delta: float = 0.5,
    encourage: bool = True,
) -> float:
    """L(n) * accuracy, in [0, 1]: a wrong answer earns nothing for its length.

    `encourage=False` is L1's own form (arXiv 2503.04697, eq. 2).

    Raises ValueError when `answer` is not an index of `choices`.
    """
    right = accuracy(completion, choices=choices, answer=answer)
    return right * length(completion, target=target, alpha=alpha, delta=delta, encourage=encourage)


def published(
    completion: str, *, target: int = 100, alpha: float = 0.1, delta: float = 0.5, encourage: bool = False
) -> float:
    """L(n), in [0, 1], n as the reference counts: the first think block within one line, else the whole completion.

    The defaults are those of the released code too; its model card trained with t = 25.
    """
    block = published_block(completion, "think")
    return value(len((completion if block is None else block).split()), target, alpha, delta, encourage)


def value(n: int, target: int, alpha: float, delta: float, encourage: bool) -> float:
    """L(n) of the head of this file, in [0, 1]."""
    if encourage and n <= target:
        return min(max(1 - alpha * (target - n) + delta, 0.0), 1.0)
    return min(max(alpha * (target - n) + delta, 0.0), 1.0)
