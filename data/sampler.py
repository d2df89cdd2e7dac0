"""Which questions at which step: a pure function of (seed, step), so that a resumed run needs no position."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from data.question import Question


class Sampler:
    """`per_step` distinct questions a step, from one seeded permutation of all questions after another.

    Raises ValueError when a step is larger than the data set.
    """

    def __init__(self, questions: Sequence[Question], per_step: int, seed: int):
        if not 1 <= per_step <= len(questions):
            raise ValueError(f"questions={per_step} a step, but there are {len(questions)} training questions")
        self.questions, self.per_step, self.seed = list(questions), per_step, seed
        self._order = lru_cache(maxsize=4)(self._permutation)

    def batch(self, step: int, bad: frozenset[str] = frozenset()) -> list[Question]:
        """The questions of `step`. One whose id is in `bad`, or that the batch holds already (where two epochs meet),
        gives its place to the next question of the order that is neither."""
        first = step * self.per_step
        batch: dict[str, Question] = {}
        for slot in range(first, first + self.per_step + 2 * len(self.questions)):
            question = self._at(slot)
            if question.id not in bad and question.id not in batch:
                batch[question.id] = question
                if len(batch) == self.per_step:
                    return list(batch.values())
        raise ValueError(f"{len(bad)} bad questions leave fewer than the {self.per_step} that a step needs")

    def epoch(self, step: int) -> float:
        """Passes over the data made before `step`."""
        return step * self.per_step / len(self.questions)

    def _at(self, slot: int) -> Question:
        epoch, position = divmod(slot, len(self.questions))
        return self.questions[self._order(epoch)[position]]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.questions))
