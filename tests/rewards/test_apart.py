"""Reward functions in a process of their own: the same numbers, and nothing that one does holds up or ends the run."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from rewards.accuracy import accuracy
from rewards.format import format
from rewards.length import length
from rewards.weighted import RewardError, WeightedRewards
from tests.rewards.test_weighted import CONTEXT_OF_B, PERFECT, moody


def wild(completion: str, *, factor: float = 1.0) -> float:
    """Does what its completion says."""
    if completion == "loop":
        while True:
            pass
    if completion == "backtrack":  # within C code, which holds Python's lock
        re.match(r"(a+)+$", "a" * 60 + "b")
    if completion == "swallow":
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    if completion == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "exit":
        raise SystemExit(3)
    if completion == "children":  # which hold the pipe of the answers
        os.fork() or time.sleep(60)
        time.sleep(60)
    if completion == "own alarm":
        signal.alarm(0), time.sleep(60)
    if completion == "reads":
        return float(len(sys.stdin.read()))
    if completion == "dies later":
        threading.Timer(2.0, os._exit, [3]).start()
    if completion == "terminates":
        sleeper = subprocess.Popen(["sleep", "60"])
        sleeper.terminate()
        return float(sleeper.wait(10))
    if completion == "hard exit":
        os._exit(3)
    if completion == "print":
        print("not an answer")
    return factor * len(completion)


def of(seconds=10.0, **functions) -> WeightedRewards:
    return WeightedRewards({n: {"weight": 1.0, "function": f} for n, f in functions.items()}, 1.0, seconds)


def test_the_same_scores_as_in_the_trainer():
    functions = {"accuracy": accuracy, "format": format, "length": partial(length, target=25, alpha=0.1, delta=0.5),
                 "moody": moody}  # fmt: skip
    texts, contexts = [PERFECT, "raise", "nan", "text", "", "é\ud800"], [CONTEXT_OF_B] * 6
    here, apart = (of(seconds, **functions).score(texts, contexts=contexts) for seconds in (None, 30))
    assert apart.failures == here.failures and len(here.failures) == 3
    assert str(apart.components) == str(here.components)  # nan is not itself
    assert apart.components[0] == [1.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("completion", "told"),
    [("loop", "no answer within 3 s"), ("backtrack", "no answer within 3 s"), ("swallow", "no answer within 3 s"),
     ("children", "no answer within 3 s"), ("own alarm", "no answer within 3 s"),
     ("crash", "ended with SIGSEGV"), ("exit", "SystemExit: 3"), ("hard exit", "ended with status 3")],
)  # fmt: skip
def test_what_never_returns_or_crashes_costs_its_completion_alone(completion, told):
    rewards = of(3 if "3 s" in told else 30, wild=wild, format=format)
    for _ in range(2):  # and the next call finds it well
        scores = rewards.score(["a", completion, "abc"], contexts=[CONTEXT_OF_B] * 3)
        assert [c[0] for c in scores.components[::2]] == [1.0, 3.0] and math.isnan(scores.components[1][0])
        assert [c[1] for c in scores.components] == [0.0, 0.0, 0.0]  # the other component stands
        (failure,) = scores.failures
        assert (failure.index, failure.component) == (1, "wild") and told in failure.error


def test_what_it_prints_is_no_answer(capfd):
    assert of(wild=partial(wild, factor=2)).score(["print"], contexts=[{}]).total == [10.0]
    assert "not an answer" in capfd.readouterr().err


def test_a_signal_to_the_whole_job_is_for_the_trainer():
    rewards = of(wild=wild)
    rewards.score(["a"], contexts=[{}])
    process = rewards._call._process
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
    assert rewards.score(["ab"], contexts=[{}]).total == [2.0] and rewards._call._process is process


def test_one_that_dies_between_two_calls_costs_nothing():
    rewards = of(wild=wild)
    assert rewards.score(["dies later"], contexts=[{}]).total == [10.0]
    rewards._call._process.wait(30)
    assert rewards.score(["ab"], contexts=[{}]).total == [2.0]


def test_one_that_does_not_even_read_is_bounded_too():
    rewards = of(3, wild=wild)
    rewards.score(["a"], contexts=[{}])
    rewards._call._process.send_signal(signal.SIGSTOP)
    scores = rewards.score(["x" * 2**20, "ab"], contexts=[{}] * 2)
    assert "no answer within 3 s" in scores.failures[0].error and scores.total[1] == 2.0


def test_it_has_no_input_and_ends_what_it_starts():
    assert of(10, wild=wild).score(["reads", "terminates"], contexts=[{}] * 2).total == [0.0, -signal.SIGTERM]


def test_closed_it_is_gone_and_started_anew():
    rewards = of(60, wild=wild)
    rewards.score(["a"], contexts=[{}])
    process = rewards._call._process
    rewards.close()
    assert process.poll() is not None and rewards.score(["ab"], contexts=[{}]).total == [2.0]


def test_it_ends_with_its_trainer():
    rewards = of(wild=wild)
    rewards.score(["a"], contexts=[{}])
    process = rewards._call._process
    process.stdin.close()  # as the system does it
    assert process.wait(10) == 0


def test_more_calls_than_a_pipe_holds():
    texts = [str(i) * 400 for i in range(1000)]
    assert of(30, wild=wild).score(texts, contexts=[{}] * 1000).total == [float(len(t)) for t in texts]


def test_any_thread_may_ask():
    rewards, found = of(3, wild=wild), []
    thread = threading.Thread(target=lambda: found.append(rewards.score(["a", "loop"], contexts=[{}] * 2)))
    thread.start(), thread.join(30)
    assert found[0].total[0] == 1.0 and "no answer" in found[0].failures[0].error


def test_what_cannot_be_imported_by_its_name_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"components\.mine cannot run in a process of its own .* seconds: null"):
        of(mine=lambda completion: 1.0)
    of(None, mine=lambda completion: 1.0)
    with pytest.raises(ValueError, match="seconds must be above 0"):
        of(0.0, mine=wild)


class Judge:
    @staticmethod
    def nested(completion: str, *, choices, scale=(), inner=None) -> float:
        assert choices == ("cat", "dog") and isinstance(choices, tuple)
        return sum(scale) * inner(completion)


def asked(completion: str, *, table) -> float:
    return float(table["module"] + len(table["name"]))


def test_hyper_parameters_arrive_as_they_are_or_are_refused():
    assert of(30, asked=partial(asked, table={"module": 2, "name": "abc"})).score(["a"], contexts=[{}]).total == [5.0]
    for odd in ({1: 0.5}, {"inner": {None: 1}}, {"$function": 1}, b"bytes"):
        with pytest.raises(ValueError, match=r"components\.asked cannot run in a process of its own"):
            of(30, asked=partial(asked, table=odd))


def test_hyper_parameters_may_be_lists_and_functions():
    function = partial(Judge.nested, scale=[1, 2], inner=partial(wild, factor=2))
    assert of(30, nested=function).score(["abc"], contexts=[CONTEXT_OF_B]).total == [18.0]
    with pytest.raises(ValueError, match="cannot run in a process of its own"):
        of(30, nested=partial(Judge.nested, inner=object()))


def test_functions_that_cannot_be_imported_there(tmp_path, monkeypatch, capfd):
    (tmp_path / "only_once.py").write_text(
        "import os\nif os.environ.get('SECOND'):\n    raise OSError('no model here')\n"
        "os.environ['SECOND'] = '1'\ndef f(completion):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SECOND", "")
    from only_once import f

    with pytest.raises(RewardError, match="could not be imported: its process ended with status 1"):
        of(f=f).score(["a"], contexts=[{}])
    assert "no model here" in capfd.readouterr().err
