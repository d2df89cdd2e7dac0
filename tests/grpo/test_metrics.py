"""Metrics are exact over micro-batches, and every one of them is documented."""

import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo import loop
from grpo.batch import Completion, Encoded, Group
from grpo.collect import Earned
from grpo.metrics import MEANING, Accumulator, answer_metrics, group_metrics
from tests.conftest import OneRank, make_question
from tests.grpo.test_loop import make_run


def test_token_metrics_do_not_depend_on_the_split():
    values, mask = torch.tensor([[1.0, 9, 9], [2, 3, 4]]), torch.tensor([[True, False, False], [True, True, True]])
    whole, split = Accumulator(), Accumulator()
    whole.add({"kl": values, "ratio/max": values, "ratio/min": values}, mask)
    for i in range(2):
        split.add(dict.fromkeys(("kl", "ratio/max", "ratio/min"), values[i : i + 1]), mask[i : i + 1])
    # (1 + 2 + 3 + 4) / 4 = 2.5, not the mean 2 of the two rows' means; the masked 9 is in neither extremum
    assert whole.result(OneRank()) == split.result(OneRank()) == {"kl": 2.5, "ratio/max": 4.0, "ratio/min": 1.0}


def test_group_metrics_by_hand():
    prompt = Encoded("q", torch.zeros(3, dtype=torch.long), torch.zeros(1, 1), "sha")
    lengths, cut = [[2, 4], [6, 8]], [[False, True], [False, False]]
    groups = [
        Group(prompt, tuple(Completion((1,) * n, (0.0,) * n, "", c, 0) for n, c in zip(ns, cs, strict=True)))
        for ns, cs in zip(lengths, cut, strict=True)
    ]
    component = torch.tensor([[1.0], [0.0], [1.0], [float("nan")]])  # the last reward raised
    got = group_metrics(groups, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), component, ["accuracy"], OneRank())
    assert got["reward"] == 0.25 and got["frac_reward_zero_std"] == 0.5 and got["rewards/failed"] == 1
    assert got["reward_std"] == pytest.approx(0.5**0.5 / 2, abs=1e-7)  # sample stds sqrt(1/2) and 0
    assert got["rewards/accuracy/mean"] == pytest.approx(2 / 3)  # of the three that are known
    assert (got["completions/mean_length"], got["completions/min_length"], got["completions/max_length"]) == (5, 2, 8)
    assert got["completions/clipped_ratio"] == 0.25
    ended = [got[f"completions/{which}_terminated_length"] for which in ("mean", "min", "max")]
    assert ended == [pytest.approx(16 / 3), 2, 8]  # of 2, 6 and 8 tokens; the one of 4 was cut
    assert (got["frac_all_right"], got["frac_all_wrong"]) == (0, 0)
    cut = [Group(prompt, tuple(replace(c, truncated=True) for c in g.completions)) for g in groups]
    got = group_metrics(cut, torch.ones(2, 2), torch.ones(4, 1), ["accuracy"], OneRank())
    assert got["completions/clipped_ratio"] == 1 and not any("terminated" in name for name in got)
    assert (got["frac_all_right"], got["frac_all_wrong"], got["frac_reward_zero_std"]) == (1, 0, 1)


def test_answers_by_letter():
    def one(answer, *texts):
        completions = tuple(Completion((1,), (0.0,), text, False, 0) for text in texts)
        group = Group(Encoded("q", torch.zeros(1, dtype=torch.long), torch.zeros(1, 1), "sha"), completions)
        return Earned(make_question("q", answer=answer), group, [[0.0]] * len(texts), [0.0] * len(texts))

    said = [f"<think>x</think><answer>{text}</answer>" for text in ("B", "b", "A", "no idea")]
    got = answer_metrics([one(1, *said[:2]), one(1, *said[2:])], OneRank())
    assert (got["answers/A"], got["answers/B"], got["answers/C"], got["answers/none"]) == (0.25, 0.5, 0, 0.25)
    assert (got["gold/A"], got["gold/B"]) == (0, 1)


class TwoRanks:
    """Runs `measure` as each of two ranks; a reduction sees what both gave to the same call."""

    def __init__(self, measure):
        self.given = [[], []]
        for self.rank in range(2):
            self.merge = False
            measure(self, self.rank)
        self.merge, self.call = True, 0
        self.result = measure(self, 0)

    def reduce(self, values, how="sum"):
        if not self.merge:
            self.given[self.rank].append(dict(values))
            return dict(values)
        a, b = (given[self.call] for given in self.given)
        self.call += 1
        return {k: {"sum": a[k] + b[k], "max": max(a[k], b[k])}[how] for k in a}


def test_metrics_do_not_depend_on_the_ranks():
    prompt = Encoded("q", torch.zeros(3, dtype=torch.long), torch.zeros(1, 1), "sha")
    groups = [
        Group(prompt, tuple(Completion((1,) * n, (0.0,) * n, "", False, 0) for n in lengths))
        for lengths in [(2, 3), (9, 4)]
    ]
    reward, component = torch.tensor([[1.0, 0.0], [2.0, 6.0]]), torch.tensor([[1.0], [0.0], [2.0], [6.0]])
    # ranks with means 3 and 4.5 of one and of two tokens: 4 over all, both extremes on the second rank
    value, mask = torch.tensor([[3.0, 9.0], [1.0, 8.0]]), torch.tensor([[True, False], [True, True]])

    def measure(engine, rows):
        tokens = Accumulator()
        tokens.add(dict.fromkeys(("kl", "ratio/max", "ratio/min"), value[rows]), mask[rows])
        n = torch.arange(4).view(2, 2)[rows].flatten()
        return tokens.result(engine) | group_metrics(groups[rows], reward[rows], component[n], ["x"], engine)

    whole = measure(OneRank(), slice(0, 2))
    assert TwoRanks(lambda engine, rank: measure(engine, slice(rank, rank + 1))).result == pytest.approx(whole)
    assert (whole["kl"], whole["ratio/min"], whole["ratio/max"]) == (4, 1, 8)
    assert whole["rewards/x/mean"] == 2.25  # population variance (1 + 0 + 4 + 36) / 4 - 2.25² = 5.1875
    assert whole["rewards/x/std"] == pytest.approx(5.1875**0.5)


def test_the_documentation_is_the_table(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "grpo.metrics")  # runpy warns of a module that is there already
    runpy.run_module("grpo.metrics", run_name="__main__")
    assert (Path(__file__).parents[2] / "docs" / "metrics.md").read_text() == capsys.readouterr().out
    assert not any("|" in meaning for meaning in MEANING.values())  # it would end the table's cell


def documented(key: str) -> bool:
    """Whether the table has `key`: as a name, under a family such as `time/<stage>`, or after 'also' in a family."""
    for name, meaning in MEANING.items():
        also = [n for part in re.findall(r"\(also ([^)]*)\)", meaning) for n in part.split(", ")]
        family = name.rpartition("/")[0]
        known = [name, *re.findall(r"[\w<>]+/[\w<>/]+", meaning), *(n if "/" in n else f"{family}/{n}" for n in also)]
        if any(re.fullmatch(re.sub("<[a-z]+>", "[^/]+", k), key) for k in known):
            return True
    return False


def test_every_metric_of_a_step_has_a_meaning():
    metrics, *_ = loop.step(make_run(), 0)
    assert len(metrics) > 20 and [key for key in metrics if not documented(key)] == []
    assert documented("time/rollout") and not any(
        map(documented, ("reward_max", "completions/tokens", "time", "kl/max"))
    )
