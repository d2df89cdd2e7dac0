"""Greedy accuracy on held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo.rollout import Rollout, RolloutError, Sampling


def accuracy(questions: Sequence, encode: Callable, rollout: Rollout, engine, *, correct: Callable, max_tokens: int,
             batch: int = 64) -> float:  # fmt: skip
    """Share of `questions` answered correctly, greedily, one completion each; ranks share the work.

    `correct(completion_text, question)` is 1.0 or 0.0. Every question stays in the denominator. Raises RolloutError on
    all ranks if one of them got no answers.
    """

    def count() -> float:
        mine, right = list(questions[engine.rank :: engine.world]), 0.0
        for i in range(0, len(mine), batch):
            part = mine[i : i + batch]
            groups = rollout.generate([encode(q) for q in part], 1, Sampling(max_tokens=max_tokens, greedy=True))
            right += sum(correct(g.completions[0].text, q) for g, q in zip(groups, part, strict=True))
        return right

    right = engine.together(count, RolloutError)
    return engine.reduce({"right": float(right)})["right"] / len(questions)
