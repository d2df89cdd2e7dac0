"""Clips are made ready ahead of time, once each, and what goes wrong there is told to who asks."""

import threading

import pytest

from grpo.loading import Loader
from tests.conftest import make_question

QUESTIONS = [make_question(str(i)) for i in range(6)]


def test_each_question_is_made_once_while_it_is_kept():
    made = []
    loader = Loader(lambda q: made.append(q.id) or q.id, keep=2, workers=0)
    assert [loader(QUESTIONS[i]) for i in (0, 1, 0, 2, 0, 1)] == ["0", "1", "0", "2", "0", "1"]
    assert made == ["0", "1", "2", "1"]  # 1 was the one not used for longest
    made.clear()
    assert [Loader(lambda q: made.append(q.id) or q.id, keep=0, workers=2)(QUESTIONS[0]) for _ in range(2)] == ["0"] * 2
    assert made == ["0", "0"]


def test_what_is_asked_for_soon_is_made_beside_other_work():
    go, begun, made = threading.Event(), threading.Semaphore(0), []

    def make(question):
        begun.release()
        assert go.wait(60)
        made.append(question.id)
        return question.id

    loader = Loader(make, keep=10, workers=2)
    loader.ahead(QUESTIONS[:3])
    assert begun.acquire(timeout=60) and begun.acquire(timeout=60)  # two threads are at it, and nobody waits
    loader.ahead(QUESTIONS[:3])
    go.set()
    assert [loader(q) for q in QUESTIONS[:3]] == ["0", "1", "2"] and sorted(made) == ["0", "1", "2"]
    loader.close()


def test_an_error_is_raised_to_who_asks_and_tried_anew():
    faults = [OSError("the disk is away")]

    def make(question):
        if faults:
            raise faults.pop()
        return question.id

    loader = Loader(make, keep=10, workers=1)
    loader.ahead(QUESTIONS[:1])
    with pytest.raises(OSError, match="away"):
        loader(QUESTIONS[0])
    assert loader(QUESTIONS[0]) == "0"
    loader.close()
