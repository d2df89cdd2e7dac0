"""Shortcut probes: the same questions asked so that a model that does not listen, or likes a letter, is found out.

silent       zeros of the clip's length
no_audio     the same prompt without its audio part
shuffled     the clip of another question
permuted     the choices in other orders
always_a     no model at all: the first choice, always
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.question import Clip, Question
from grpo.config import ConfigError
from grpo.rollout import sample_seed

PROBES = ("silent", "no_audio", "shuffled", "permuted", "always_a")


@dataclass(frozen=True)
class Variant:
    """One way to ask all questions of a benchmark. `orders[i][j]` is the place that the j-th shown choice came from."""

    name: str
    questions: Sequence[Question]  # as shown, with ids unchanged
    clip: Callable[[Question], Clip | None]  # None: no audio part
    orders: Sequence[Sequence[int]]


def plain(questions: Sequence[Question], clip: Callable, name: str = "predictions") -> Variant:
    """As they are."""
    return Variant(name, questions, clip, [range(len(q.choices)) for q in questions])


def variants(
    probe: str, questions: Sequence[Question], clip: Callable, *, seed: int, permutations: int
) -> list[Variant]:
    """The ways of asking that make up a probe. Raises ConfigError for an unknown one."""
    if probe == "silent":
        return [plain(questions, lambda q: _silence(clip(q)), probe)]
    if probe in ("no_audio", "always_a"):
        return [plain(questions, lambda q: None, probe)]
    if probe == "shuffled":
        others = other_clips(questions, seed)
        return [plain(questions, lambda q: clip(others[q.id]), probe)]
    if probe == "permuted":
        return [_permuted(questions, clip, seed, k) for k in range(permutations)]
    raise ConfigError(f"probes: {probe!r} is not one of {', '.join(PROBES)}")


def other_clips(questions: Sequence[Question], seed: int) -> dict[str, Question]:
    """Question id -> a question about another clip: the clips are moved on by one around a shuffled circle.

    Raises ConfigError where all questions are about one clip.
    """
    owners = {q.stretch: q for q in questions}
    circle = list(owners)
    if len(circle) < 2:
        raise ConfigError("probes: shuffled needs questions about at least two clips")
    random.Random(seed).shuffle(circle)
    after = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    return {q.id: owners[after[q.stretch]] for q in questions}


def order(question: Question, seed: int, k: int) -> list[int]:
    """The k-th other order of a question's choices: shuffled by its name, then turned until it is not the original."""
    places = list(range(len(question.choices)))
    random.Random(sample_seed(seed, k, question.id, "order")).shuffle(places)
    while places == sorted(places):
        places = [*places[1:], places[0]]
    return places


def _permuted(questions: Sequence[Question], clip: Callable, seed: int, k: int) -> Variant:
    orders = [order(q, seed, k) for q in questions]
    shown = [replace(q, choices=tuple(q.choices[i] for i in places),
                     answer=None if q.answer is None else places.index(q.answer))
             for q, places in zip(questions, orders, strict=True)]  # fmt: skip
    return Variant(f"permuted-{k}", shown, clip, orders)


def _silence(clip: Clip) -> Clip:
    return Clip(np.zeros_like(clip.samples), clip.hz)
