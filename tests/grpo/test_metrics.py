"""Metrics are exact over micro-batches, and every one of them is documented."""

from pathlib import Path

import pytest
import torch

from grpo.batch import Completion, Encoded, Group
from grpo.metrics import MEANING, Accumulator, as_markdown, group_metrics


class OneRank:
    """Stands for an engine of a single rank: reductions are the identity."""

    def reduce(self, values, how="sum"):
        return dict(values)


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
    got = group_metrics(groups, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), component, ["accuracy"], 1, OneRank())
    assert got["reward"] == 0.25 and got["frac_reward_zero_std"] == 0.5 and got["rewards/failed"] == 1
    assert got["reward_std"] == pytest.approx(0.5**0.5 / 2, abs=1e-7)  # sample stds sqrt(1/2) and 0
    assert got["rewards/accuracy/mean"] == pytest.approx(2 / 3)  # of the three that are known
    assert (got["completions/mean_length"], got["completions/min_length"], got["completions/max_length"]) == (5, 2, 8)
    assert got["completions/clipped_ratio"] == 0.25


def test_the_documentation_is_the_table():
    assert (Path(__file__).parents[2] / "docs" / "metrics.md").read_text() == as_markdown() + "\n"


def test_every_metric_has_a_meaning():
    families = ("rewards/", "completions/", "ratio/", "clip_ratio/", "sampling/", "time/")
    known = set(MEANING) | {"step"}
    for name in ("reward", "kl", "entropy", "grad_norm", "loss", "num_tokens", "epoch", "quarantined", "step_time"):
        assert name in known
    assert all(any(name.startswith(f) for name in MEANING) or f == "time/" for f in families)
