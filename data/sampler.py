"""Which questions at which step: a pure function of (seed, step), so that a resumed run needs no position."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd

import numpy as np

from data.question import Question


class Sampler:
    """`per_step` distinct questions a step, from one seeded permutation of all questions after another.

    Slot k of the run is position k % n of epoch k // n. With `shuffle_options` a question's options stand in another
    order every epoch, a function of (seed, epoch, id). Raises ValueError when a step is larger than the data set.
    """

    def __init__(self, questions: Sequence[Question], per_step: int, seed: int, shuffle_options: bool = False):
        if not 1 <= per_step <= len(questions):
            raise ValueError(f"questions={per_step} a step, but there are {len(questions)} training questions")
        self.questions, self.per_step, self.seed = list(questions), per_step, seed
        self.shuffle_options = shuffle_options
        self._order = lru_cache(maxsize=4)(self._compute_order)

    def batch(self, step: int, bad: frozenset[str] = frozenset()) -> list[Question]:
        """The questions of `step`. One whose id is in `bad` gives its place to the next of the order that is neither
        bad nor in the batch. Raises ValueError if too few good ones are left."""
        first = step * self.per_step
        batch: dict[str, Question] = {}
        for slot in range(first, first + self.per_step + 2 * len(self.questions)):  # spans at least one whole epoch
            epoch, position = divmod(slot, len(self.questions))
            question = self.questions[self._order(epoch)[position]]
            if question.id not in bad and question.id not in batch:
                batch[question.id] = question.shuffled(self.seed, epoch) if self.shuffle_options else question
                if len(batch) == self.per_step:
                    return list(batch.values())
        raise ValueError(f"{len(bad)} bad questions leave {len(batch)} good ones, a step needs {self.per_step}")

    def epoch(self, step: int) -> float:
        """Passes over the data made before `step`."""
        return step * self.per_step / len(self.questions)

    def _compute_order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation [n], repaired where it shares a batch with the end of the epoch before.

        A repair moves only the first `per_step` positions. Where an epoch has two batches or more its end is thus as
        it was shuffled; else the repairs hang together back to the last epoch that began with a batch of its own.
        """
        n, size = len(self.questions), self.per_step
        begin = max(0, epoch - 1) if n >= 2 * size else epoch - epoch % (size // gcd(n, size))
        order = None
        for e in range(begin, epoch + 1):
            previous, order = order, np.random.default_rng([self.seed, e]).permutation(n)
            head = -e * n % size  # this epoch's questions in the batch that the epoch before began
            if head and previous is not None:
                tail = set(previous[head - size :].tolist())
                swaps = (i for i in range(head, n) if order[i] not in tail)
                for i in [i for i in range(head) if order[i] in tail]:
                    j = next(swaps)
                    order[i], order[j] = order[j], order[i]
        return order
