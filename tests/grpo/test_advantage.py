"""Advantages: golden values worked by hand, and what must not matter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.advantage import group_mean, group_std
from tests.grpo import slow_reference

REWARDS = torch.tensor([[1.0, 0, 0, 1, 0, 0]], dtype=torch.float64)


def test_golden_group_std():
    # mean 1/3; squared deviations 2*(4/9) + 4*(1/9) = 12/9; sample std sqrt(12/9/5) = 0.516398
    # A(1) = (2/3) / 0.516498 = 1.290744, A(0) = (-1/3) / 0.516498 = -0.645372
    a = group_std(REWARDS)[0]
    assert a[0].item() == pytest.approx(1.290744, abs=1e-6)
    assert a[1].item() == pytest.approx(-0.645372, abs=1e-6)


def test_golden_population_std():
    # population std sqrt(12/9/6) = 0.471405; A(1) = 0.666667 / 0.471505 = 1.413914
    a = group_std(REWARDS, ddof=0)[0]
    assert a[0].item() == pytest.approx(1.413914, abs=1e-6)
    assert a[1].item() == pytest.approx(-0.706957, abs=1e-6)


def test_golden_group_mean():
    assert group_mean(REWARDS)[0].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 2 / 3, -1 / 3, -1 / 3], abs=1e-12)


@pytest.mark.parametrize("advantage", [group_std, group_mean])
def test_equal_rewards_give_exactly_zero(advantage):
    a = advantage(torch.full((3, 7), 0.1))  # the mean of seven 0.1 is not 0.1 in float32
    assert (a == 0).all()


@pytest.mark.parametrize("advantage", [group_std, group_mean])
def test_group_of_one_is_zero_and_finite(advantage):
    assert advantage(torch.tensor([[3.0]])).tolist() == [[0.0]]


rows = st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=8)


@given(rows)
def test_equals_the_slow_reference(rewards):
    a = group_std(torch.tensor([rewards], dtype=torch.float64))[0].tolist()
    assert a == pytest.approx(slow_reference.group_std(rewards), abs=1e-6)


@given(rows, st.floats(-5, 5), st.randoms(use_true_random=False))
def test_shift_changes_nothing_and_permutation_permutes(rewards, shift, random):
    r = torch.tensor([rewards], dtype=torch.float64)
    order = list(range(len(rewards)))
    random.shuffle(order)
    a = group_std(r)
    assert torch.allclose(group_std(r + shift), a, atol=1e-6)
    assert torch.allclose(group_std(r[:, order]), a[:, order], atol=1e-9)
    assert abs(a.sum().item()) < 1e-6


def test_groups_do_not_mix():
    r = torch.tensor([[0.0, 1.0], [5.0, 9.0]])
    assert torch.equal(group_std(r)[0], group_std(r[:1])[0])
