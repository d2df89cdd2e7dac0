"""Held-out accuracy: greedy, over every question, shared by the ranks."""

from types import SimpleNamespace

import pytest

from grpo.evaluate import accuracy

RIGHT = {0, 1, 4}  # of 5 questions


class Rollout:
    """Says the number of the question; remembers how it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, copies, sampling):
        self.asked.append((len(prompts), copies, sampling.greedy, sampling.max_tokens))
        return [SimpleNamespace(completions=[SimpleNamespace(text=str(p))]) for p in prompts]


def measure(rank=0, world=1, batch=2, elsewhere=0.0):
    engine = SimpleNamespace(
        rank=rank, world=world, reduce=lambda values: {k: v + elsewhere for k, v in values.items()}
    )
    rollout, judged = Rollout(), []

    def correct(text, question):
        judged.append(question)
        return float(text == str(question) and question in RIGHT)

    share = accuracy(range(5), lambda q: q, rollout, engine, correct=correct, max_tokens=9, batch=batch)
    return share, judged, rollout.asked


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_every_question_counts_whatever_the_batch(batch):
    share, judged, asked = measure(batch=batch)
    assert share == 3 / 5 and judged == [0, 1, 2, 3, 4]
    assert sum(n for n, *_ in asked) == 5 and max(n for n, *_ in asked) <= batch
    assert all(a[1:] == (1, True, 9) for a in asked)


def test_ranks_share_the_questions_and_agree():
    (first, mine, _), (second, theirs, _) = measure(0, 2, elsewhere=1.0), measure(1, 2, elsewhere=2.0)
    assert (mine, theirs) == ([0, 2, 4], [1, 3]) and first == second == 3 / 5
