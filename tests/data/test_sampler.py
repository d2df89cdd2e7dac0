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
