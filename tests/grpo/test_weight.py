"""Weights for the sampler's distance, by hand."""

import math

import pytest
import torch

from grpo.batch import LossInputs
from grpo.loss.weight import correction

# π_old/π_sampler of two completions, the second one token long; products 3 and 0.25
RATIO = [[1.5, 4.0, 0.5], [0.25, 99.0, 99.0]]
MASK = torch.tensor([[True, True, True], [True, False, False]])


def inputs():
    sampler = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
    old = sampler + torch.tensor(RATIO).log()
    return LossInputs(old.clone().requires_grad_(), old, sampler, None, old, torch.ones(2), MASK, 4.0, 2.0)


@pytest.mark.parametrize(
    ("kind", "level", "cap", "expected"),
    [
        ("truncate", "token", 2.0, [[1.5, 2.0, 0.5], [0.25]]),
        ("truncate", "sequence", 2.0, [[2.0, 2.0, 2.0], [0.25]]),
        ("truncate", "sequence", 5.0, [[3.0, 3.0, 3.0], [0.25]]),
        ("mask", "token", 2.0, [[1.5, 0.0, 0.5], [0.0]]),
        ("mask", "token", 4.0, [[1.5, 4.0, 0.5], [0.25]]),
        ("mask", "sequence", 2.0, [[0.0, 0.0, 0.0], [0.0]]),
        ("mask", "sequence", 3.5, [[3.0, 3.0, 3.0], [0.0]]),
    ],
)
def test_by_hand(kind, level, cap, expected):
    weight = correction(kind, level, cap)(inputs(), torch.ones(2, 3))
    for row, want in zip(weight, expected, strict=True):
        assert row[: len(want)].tolist() == pytest.approx(want)
    assert not weight.requires_grad


@pytest.mark.parametrize("choice", [(k, v) for k in ("truncate", "mask") for v in ("token", "sequence")])
def test_equal_engines_weigh_one_and_far_ones_stay_finite(choice):
    x = inputs()
    same = LossInputs(x.logp_NT, x.old_logp_NT, x.old_logp_NT, None, x.entropy_NT, x.advantage_N, MASK, 4.0, 2.0)
    assert correction(*choice, 2.0)(same, torch.ones(2, 3))[MASK].tolist() == [1.0] * 4
    far = LossInputs(x.logp_NT, x.old_logp_NT + 1e4, x.old_logp_NT, None, x.entropy_NT, x.advantage_N, MASK, 4.0, 2.0)
    assert all(map(math.isfinite, correction(*choice, 2.0)(far, torch.ones(2, 3))[MASK].tolist()))
