"""Which questions at which step: distinct, all of them once an epoch, without memory."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.question import Question
from data.sampler import Sampler


def questions(n):
    return [Question(f"q{i}", None, "?", ("a", "b"), 0) for i in range(n)]


def ids(batch):
    return [q.id for q in batch]


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40)).filter(lambda s: s[1] <= s[0])


@settings(max_examples=150, deadline=None)
@given(shapes, st.integers(0, 99))
def test_batches_are_distinct_and_every_epoch_is_whole(shape, seed):
    n, size = shape
    sampler = Sampler(questions(n), size, seed)
    steps = [ids(sampler.batch(step)) for step in range(4 * n // size + 1)]
    assert all(len(set(step)) == size for step in steps)
    flow = list(itertools.chain(*steps))
    for epoch in range(len(flow) // n):
        assert Counter(flow[epoch * n : (epoch + 1) * n]) == Counter(q.id for q in questions(n))


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 200))
def test_a_step_needs_no_steps_before_it(shape, step):
    n, size = shape
    walked = Sampler(questions(n), size, 3)
    for s in range(step):
        walked.batch(s)
    assert ids(walked.batch(step)) == ids(Sampler(questions(n), size, 3).batch(step))


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 50), st.data())
def test_bad_questions_are_replaced(shape, step, data):
    n, size = shape
    bad = frozenset(f"q{i}" for i in data.draw(st.sets(st.integers(0, n - 1), max_size=n - size)))
    sampler = Sampler(questions(n), size, 0)
    plain, mended = ids(sampler.batch(step)), ids(sampler.batch(step, bad))
    assert len(set(mended)) == size and not bad & set(mended)
    assert set(plain) - bad <= set(mended)  # good ones keep their step
    assert mended == ids(Sampler(questions(n), size, 0).batch(step, bad))


def test_far_steps_of_a_small_set_are_quick():
    assert len(Sampler(questions(1999), 1000, 0).batch(10**6)) == 1000


def test_seeds_and_epochs_shuffle_anew():
    sampler = Sampler(questions(20), 20, 0)
    orders = [ids(sampler.batch(0)), ids(sampler.batch(1)), ids(Sampler(questions(20), 20, 1).batch(0))]
    assert len(set(map(tuple, orders))) == 3
    assert Sampler(questions(20), 5, 0).epoch(6) == 1.5


def test_too_few_questions():
    with pytest.raises(ValueError, match="questions=3 a step, but there are 2"):
        Sampler(questions(2), 3, 0)
    with pytest.raises(ValueError, match="leave 1 good ones"):
        Sampler(questions(3), 2, 0).batch(0, frozenset({"q0", "q1"}))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 99), st.integers(2, 6))
def test_options_stand_in_another_order_every_epoch(n, seed, options):
    """Every epoch asks each question with its own options and gold; the order is a function of (seed, epoch, id)."""
    asked = [Question(f"q{i}", None, "?", tuple(f"{i}.{k}" for k in range(options)), i % options) for i in range(n)]
    sampler, again = (Sampler(asked, 1, seed, shuffle_options=True) for _ in range(2))
    plain = Sampler(asked, 1, seed)
    for step in range(3 * n):
        (q,), (before,) = sampler.batch(step), plain.batch(step)
        assert q.id == before.id and sorted(q.choices) == sorted(before.choices) and q.gold == before.gold
        assert q == before.shuffled(seed, step // n)
    assert again.batch(3 * n - 1) == sampler.batch(3 * n - 1)  # resumed there, without the steps before


def test_shuffled_golds_are_even_and_independent():
    """3,000 draws over 4 places: 750 +- 4 x 24 each; of two questions or epochs, one in four agree."""
    q = Question("q", None, "?", ("a", "b", "c", "d"), 0)
    golds = [q.shuffled(0, epoch).answer for epoch in range(3000)]
    assert all(abs(golds.count(place) - 750) < 96 for place in range(4))
    assert abs(sum(a == b for a, b in itertools.pairwise(golds)) - 750) < 96
    other = Question("r", None, "?", ("a", "b", "c", "d"), 0)
    assert abs(sum(other.shuffled(0, e).answer == g for e, g in enumerate(golds)) - 750) < 96


def test_a_replaced_question_keeps_its_epochs_order():
    sampler = Sampler(questions(6), 2, 0, shuffle_options=True)
    for step in range(9):
        lost = sampler.batch(step)[0].id
        for q in sampler.batch(step, frozenset({lost})):
            assert any(q == q0.shuffled(0, e) for q0 in questions(6) if q0.id == q.id for e in range(5))
