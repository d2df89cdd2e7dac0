"""Dynamic sampling: which groups a step is made of, what they cost, and that nobody is asked twice."""

import pytest
import torch

from data.sampler import Sampler
from grpo import loop
from grpo.batch import Completion, Group
from grpo.collect import Earned, collect
from grpo.rollout.lag import Rollouts
from tests.conftest import OneRank, make_question
from tests.grpo.test_loop import make_run


class Rollout:
    """The second completion of a group says its question's number, the first says 0."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, copies, sampling, done):
        self.asked.append([p.id for p in prompts])
        groups = [Group(p, tuple(Completion((1, 2), (0.0, 0.0), p.id if g else "0", False, 0) for g in range(copies)))
                  for p in prompts]  # fmt: skip
        for place, group in enumerate(groups):
            done(place, group)
        return groups


def sampling_run(rounds, teach, by="reward", rank=None):
    """A run of 4 questions a step, of 16 in their own order. A group's rewards differ if its number is in `teach`."""
    run = make_run()
    run.settings.questions, run.settings.dynamic_sampling_rounds, run.settings.dynamic_sampling_by = 4, rounds, by
    run.sampler = Sampler([make_question(str(i)) for i in range(16)], 4, seed=0)
    run.sampler._order = lambda epoch: range(16)
    run.engine, run.rollout, run.rollouts = OneRank(), Rollout(), Rollouts(run, lag=0)

    def score(texts, contexts):
        rows = [[float(int(t) in teach), float(i % 2)] for i, t in enumerate(texts)]
        return type("Scores", (), {"components": rows, "total": [a + b * (by != "reward") for a, b in rows]})

    run.rewards = type("Rewards", (), {"names": ("right", "other"), "score": staticmethod(score)})
    return run


def test_off_it_takes_what_comes():
    run = sampling_run(1, teach={9})
    earned, metrics = collect(run, 0)
    assert [e.question.id for e in earned] == ["0", "1", "2", "3"] and metrics == {} and len(run.rollout.asked) == 1


def test_groups_that_teach_nothing_are_replaced():
    run = sampling_run(4, teach={1, 3, 5, 6, 7})
    earned, metrics = collect(run, 0)
    assert [e.question.id for e in earned] == ["1", "3", "5", "6"]
    assert run.rollout.asked == [["0", "1", "2", "3"], ["4", "5", "6", "7"]]
    assert metrics == {"dynamic_sampling/rounds": 2, "dynamic_sampling/kept": 5 / 8,
                       "dynamic_sampling/reward": 5 / 16}  # fmt: skip
    assert run.tokens == 8 * (7 + 4)  # also of those that were put aside


def test_when_the_rounds_run_out_the_rest_fills_the_step():
    run = sampling_run(2, teach={6})
    earned, metrics = collect(run, 0)
    assert [e.question.id for e in earned] == ["6", "0", "1", "2"] and metrics["dynamic_sampling/rounds"] == 2


def test_what_must_differ_can_be_one_reward():
    # the other component differs in every group, and with it the total
    run = sampling_run(3, teach={2, 8, 9, 10, 11}, by="right")
    assert [e.question.id for e in collect(run, 0)[0]] == ["2", "8", "9", "10"]
    assert len(collect(sampling_run(3, teach={2}, by="other"), 0)[0]) == 4


def test_a_group_with_a_failed_reward_does_not_teach():
    question, group = make_question("q"), None
    assert Earned(question, group, [[1.0], [0.0]], [1.0, 0.0]).differs(None)
    assert not Earned(question, group, [[1.0], [float("nan")]], [1.0, float("nan")]).differs(0)
    assert not Earned(question, group, [[1.0], [1.0]], [1.0, 1.0]).differs(None)


def test_too_few_questions_for_a_round_is_an_error():
    with pytest.raises(ValueError, match="good ones"):
        collect(sampling_run(5, teach=set()), 0)


def test_the_step_trains_on_the_chosen_groups():
    run = make_run()
    run.settings.dynamic_sampling_rounds = 2
    metrics, rows, groups = loop.step(run, 0)  # every group differs at once
    assert metrics["dynamic_sampling/rounds"] == 1 and metrics["dynamic_sampling/kept"] == 1
    assert [g.prompt.id for g in groups] == ["0", "1", "2", "3"]
    assert torch.cat([x.advantage_N for x in run.objective.seen]).tolist() == [r["advantage"] for r in rows]
