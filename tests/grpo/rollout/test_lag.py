"""rollout.lag: what is sampled when and with which weights; what waits in a checkpoint; what a fault leaves behind."""

import json
import os
import signal
import threading
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from grpo import signals
from grpo.batch import Completion, Encoded, Group
from grpo.collect import Earned
from grpo.config import ConfigError
from grpo.rollout import RolloutError
from grpo.rollout import lag as lag_module
from grpo.rollout.lag import Rollouts
from rewards.weighted import RewardError

STEPS = 5


class Engine:
    rank, world = 0, 1

    def gather(self, items):
        return list(items)

    def together(self, call, error):
        return call()

    def reduce(self, values, how):
        return values


class Recorder:
    """A rollout engine that writes down what it did, and at the steps of `hold` waits until `go` is set."""

    every_rank = False

    def __init__(self):
        self.version, self.log, self.go, self.hold, self.fails = 0, [], threading.Event(), set(), set()

    def generate(self, prompts, copies, sampling, done):
        if sampling.step in self.hold:
            assert self.go.wait(60)
        if sampling.step in self.fails:
            raise RolloutError("gone")
        self.log.append((sampling.step, self.version))
        made = [Completion((7, sampling.step, i), (-0.5, -1 / 3, -1e-9), "text", i == 1, self.version) for i in (0, 1)]
        groups = [Group(p, tuple(made)) for p in prompts]
        for place, group in enumerate(groups):
            done(place, group)
        return groups


@pytest.fixture
def run(monkeypatch):
    prompts = [Encoded(name, None, None, "") for name in ("a", "b")]
    monkeypatch.setattr(lag_module, "load_questions", lambda run, step, asked=(): ([f"{step}a", f"{step}b"], prompts))
    monkeypatch.setattr(lag_module, "score", lambda rewards, question, group: Earned(question, group, [], []))
    return SimpleNamespace(
        rollout=Recorder(), engine=Engine(), clock=lambda stage: nullcontext(), version=0,
        settings=SimpleNamespace(generations=2, max_tokens=8, seed=0, steps=STEPS),
        policy=SimpleNamespace(decode=lambda ids: "text"), rewards=None, waiting=nullcontext,
    )  # fmt: skip


def train(run, rollouts, first=0, last=STEPS):
    """A loop's order of calls: take, update, settle, sync."""
    seen = []
    for step in range(first, last):
        earned = rollouts.take(step)
        assert [e.question for e in earned] == [f"{step}a", f"{step}b"]
        seen.append((step, {c.version for e in earned for c in e.group.completions}))
        run.version += 1
        rollouts.settle()
        run.rollout.version = run.version
    return seen


@pytest.mark.parametrize(("lag", "versions"), [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 2, 3])])
def test_each_step_has_the_weights_that_lag_says(run, lag, versions):
    assert train(run, Rollouts(run, lag)) == [(step, {v}) for step, v in enumerate(versions)]
    assert run.rollout.log == list(enumerate(versions))  # each step once, none beyond the last


def test_the_next_rollout_runs_beside_the_update(run):
    run.rollout.hold = {1}
    rollouts = Rollouts(run, 1)
    rollouts.take(0)
    assert rollouts.asked.step == 1 and not rollouts.asked.groups.done()  # and we are free to train
    run.rollout.go.set()
    rollouts.settle()
    assert run.rollout.log == [(0, 0), (1, 0)]


def test_no_rank_goes_on_to_its_push_while_another_still_samples(run):
    slow = SimpleNamespace(**vars(run) | {"rollout": Recorder()})
    slow.rollout.hold = {1}
    here = threading.Barrier(2)
    for rank in (run, slow):
        rank.engine = Engine()
        rank.engine.together = lambda call, error: [call(), here.wait(60)]
    ranks = [Rollouts(rank, 1) for rank in (run, slow)]
    for rollouts in ranks:
        rollouts._ask(1)
    settled = [threading.Thread(target=rollouts.settle, daemon=True) for rollouts in ranks]
    for thread in settled:
        thread.start()
    ranks[0].asked.groups.result()
    settled[0].join(0.3)  # its own rollout is done, the other's is held
    assert settled[0].is_alive()
    slow.rollout.go.set()
    for thread in settled:
        thread.join(60)
        assert not thread.is_alive()


def test_without_lag_nothing_is_sampled_ahead(run):
    rollouts = Rollouts(run, 0)
    rollouts.take(0)
    assert rollouts.asked is None and run.rollout.log == [(0, 0)] and rollouts.state(0) is rollouts.state(1) is None


def test_weights_that_changed_under_a_rollout_are_refused(run):
    rollouts = Rollouts(run, 1)
    rollouts.take(0)
    run.rollout.version = 9
    rollouts.settle()
    rollouts.asked = lag_module.Asked(1, [], 8, rollouts.asked.groups, {})
    with pytest.raises(RuntimeError, match=r"step 1: completions of weights version \{.*\}, expected 8"):
        rollouts.take(1)


def test_what_waits_survives_a_checkpoint(run):
    whole = Rollouts(run, 1)
    train(run, whole, 0, 3)
    saved = json.loads(json.dumps(whole.state(3)))
    waiting = whole.asked.groups.result()
    again = Rollouts(run, 1)
    again.load_state(3, saved)
    run.rollout.log.clear()
    earned = again.take(3)
    assert [e.group for e in earned] == waiting and [e.question for e in earned] == ["3a", "3b"]
    again.settle()
    assert run.rollout.log == [(4, 3)]  # step 3 was not sampled again


def test_a_step_whose_rewards_fail_is_made_again_of_the_same_completions(run):
    whole = Rollouts(run, 1)
    train(run, whole, 0, 2)
    waiting = whole.asked.groups.result()
    whole.asked.earned[0] = failed = Future()
    failed.set_exception(RewardError("no model here"))
    with pytest.raises(RewardError):
        whole.take(2)  # by now step 3 is on its way
    again = Rollouts(run, 1)
    again.load_state(2, json.loads(json.dumps(whole.state(2))))
    assert [e.group for e in again.take(2)] == waiting


@pytest.fixture
def stopping(monkeypatch, run):
    """A process that can be asked to stop, as one that trains."""
    stopping = signals.Stopping()
    stopping.training(60.0)
    for module in (signals, lag_module):
        monkeypatch.setattr(module, "STOPPING", stopping)
    monkeypatch.setattr(signals, "_later", lambda seconds, call: None)
    run.waiting = lambda: stopping.waiting(RolloutError)
    before = signal.signal(signal.SIGUSR1, stopping._receive)
    yield stopping
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("where", ["take", "settle"])
def test_asked_to_stop_it_waits_no_longer_and_keeps_what_comes_in_time(run, stopping, where):
    run.rollout.hold = {1}
    rollouts = Rollouts(run, 1)
    rollouts.take(0)
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGUSR1]).start()
    with pytest.raises(RolloutError, match="SIGUSR1: no longer waiting"):
        rollouts.take(1) if where == "take" else rollouts.settle()
    stopping.grace = 0.0
    assert rollouts.state(1) is None  # not yet, and no time left
    stopping.grace = 120.0
    threading.Timer(0.2, run.rollout.go.set).start()
    assert [record["id"] for record in rollouts.state(1)] == ["a", "b"]


def test_what_samples_cannot_take_the_request_for_a_fault_of_its_own(stopping):
    def reads_a_clip():
        try:
            signal.raise_signal(signal.SIGUSR1)
        except Exception:
            return "unreadable"

    with pytest.raises(RolloutError, match="SIGUSR1: no longer waiting"), stopping.waiting(RolloutError):
        reads_a_clip()
    with pytest.raises(RolloutError, match="SIGUSR1"), stopping.waiting(RolloutError):
        pytest.fail("it is asked to stop")


def test_the_time_for_what_is_on_its_way_is_agreed_between_the_ranks(run):
    """This one was not told, and waits no longer than the one that was."""
    run.rollout.hold = {1}
    rollouts = Rollouts(run, 1)
    rollouts.take(0)
    run.engine.reduce = lambda values, how: {"left": min(values["left"], 0.1)} if how == "min" else None
    assert rollouts.state(1) is None
    run.rollout.go.set()


def test_what_waits_for_a_clip_that_is_gone_is_sampled_anew(run):
    whole = Rollouts(run, 1)
    train(run, whole, 0, 1)
    saved = whole.state(1)
    saved[0]["id"] = "c"
    said, again = [], Rollouts(run, 1)
    run.display = SimpleNamespace(say=said.append)
    again.load_state(1, saved)
    assert again.asked is None and "step 2 are left" in said[0] and "the clip of c cannot be read" in said[0]
    assert train(run, again, 1, 2) == [(1, {run.version - 1})]


def test_a_failed_rollout_shows_where_its_groups_are_wanted(run):
    run.rollout.fails = {2}
    rollouts = Rollouts(run, 1)
    train(run, rollouts, 0, 2)  # step 2 failed in the background: training of step 1 went on
    assert rollouts.state(2) is None
    with pytest.raises(RolloutError, match="gone"):
        rollouts.take(2)
    run.rollout.fails = set()
    assert rollouts.take(2)[0].group.completions[0].version == 2  # asked again, with the weights of now


def test_engines_that_cannot_are_refused(run):
    run.rollout = SimpleNamespace()
    with pytest.raises(ConfigError, match="rollout=vllm, vllm_server"):
        Rollouts(run, 1)
    run.rollout = SimpleNamespace(every_rank=True, sleeps=True)
    with pytest.raises(ConfigError, match=r"rollout\.sleep=false"):
        Rollouts(run, 1)
    run.rollout = SimpleNamespace(every_rank=True, sleeps=False)
    run.cfg = SimpleNamespace(model=SimpleNamespace(lora={"dropout": 0.1}))
    with pytest.raises(ConfigError, match=r"model\.lora\.dropout=0"):
        Rollouts(run, 1)
