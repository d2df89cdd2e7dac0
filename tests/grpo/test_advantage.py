"""Advantages: golden values by hand, every conf/advantage/*.yaml against the oracle, and what must not matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantage import advantages, declared
from grpo.loss.formula import describe
from grpo.lossdocs import ROOT, built, pages
from tests.grpo import oracle

PATHS = {p.stem: p for p in sorted((ROOT / "conf" / "advantage").glob("*.yaml"))}
FUNCTIONS = {name: built(path) for name, path in PATHS.items()}
every_advantage = pytest.mark.parametrize("name", PATHS)
REWARDS = torch.tensor([[1.0, 0, 0, 1, 0, 0]], dtype=torch.float64)


def call(name, reward_BG, component_BGR=None, weights_R=None, tokens_BG=None):
    """The advantage of one reward, unless components are given, on completions of one token."""
    component_BGR = reward_BG[..., None] if component_BGR is None else component_BGR
    weights_R = torch.ones(component_BGR.shape[-1], dtype=reward_BG.dtype) if weights_R is None else weights_R
    tokens_BG = torch.ones_like(reward_BG, dtype=torch.int64) if tokens_BG is None else tokens_BG
    return advantages(FUNCTIONS[name], reward_BG, component_BGR=component_BGR, weights_R=weights_R, tokens_BG=tokens_BG)


# mean 1/3; squared deviations 2·(4/9) + 4·(1/9) = 12/9; std: ddof 1 sqrt(12/9/5) = 0.516398, ddof 0 0.471405
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("group_std", 1.290744, -0.645372),  # (2/3) / 0.516498, (-1/3) / 0.516498
        ("trl_group_std", 1.290744, -0.645372),
        ("verl_group_std", 1.290992, -0.645496),  # eps 1e-6
        ("slime_group_std", 1.290992, -0.645496),
        ("openrlhf_group_std", 1.290994, -0.645497),  # eps 1e-9
        ("grpo_zero_group_std", 1.413914, -0.706957),  # (2/3) / 0.471505
        ("open_instruct_group_std", 1.414214, -0.707107),  # (2/3) / 0.471405
        ("areal_group_std", 1.290969, -0.645485),  # (2/3) / 0.516408
        ("group_mean", 2 / 3, -1 / 3),
        ("leave_one_out", 0.8, -0.4),  # 1 - 1/5, 0 - 2/5
        # others of a 1: mean 0.2, std sqrt((4·0.04 + 0.64)/4) = 0.447214: 0.8/0.447215; of a 0: -0.4/0.547724
        ("nemo_leave_one_out", 1.788850, -0.730295),
        ("maxrl", 2.0, -1.0),  # (2/3) / (1/3)
        ("gpg", 2 / 3, -1 / 3),  # the only group differs: α = 1
        ("opo", 2 / 3, -1 / 3),  # equal lengths: the mean
        ("batch_std", 1.290744, -0.645372),  # the step is this group
        # whitening over 6 tokens: the mean is 0 already, sample variance 0.266667: 0.666667/0.516398
        ("reinforce_pp", 1.290994, -0.645497),
        # c = 2 of 6, k = 4: pass@4 = 1 - C(4,4)/C(6,4) = 14/15, σ = sqrt(14)/15 = 0.249444; right (1/15)/σ = 0.267261;
        # wrong (1/15 - C(3,3)/C(5,3))/σ = (0.066667 - 0.1)/σ = -0.133630, each with 1e-6 beside σ
        ("pass_at_k", 0.267260, -0.133630),
    ],
)  # fmt: skip
def test_golden_values(name, right, wrong):
    a = call(name, REWARDS)[0]
    assert a.tolist() == pytest.approx([right, wrong, wrong, right, wrong, wrong], abs=1.1e-6)


def test_golden_gdpo():
    # rewards a = (1, 0), b = (0.1, 0): each normalises to ±0.707107 (eps aside), weights 1 and 0.5: ±1.06066; over the
    # step's two completions again: ±0.707107. The weighted sum of the raw rewards would have been ruled by a.
    component = torch.tensor([[[1.0, 0.1], [0.0, 0.0]]], dtype=torch.float64)
    a = call("gdpo", component.sum(-1), component, torch.tensor([1.0, 0.5], dtype=torch.float64))
    # with eps 1e-4: 0.5/0.707207 + 0.5·0.05/0.070811 = 0.707007 + 0.353054 = 1.060061; / (1.499152 + 1e-4) = 0.707060
    assert a[0].tolist() == pytest.approx([0.707060, -0.707060], abs=2e-6)


def test_golden_token_weighting():
    # r = 1 (3 tokens), 0 (1 token). OPO: baseline 3/4. REINFORCE++ plain: mean 0.75, sample variance
    # (3·0.0625 + 0.5625)/3 = 0.25: (1-0.75)/0.5 = 0.5, -1.5
    tokens = torch.tensor([[3, 1]])
    reward = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert call("opo", reward, tokens_BG=tokens)[0].tolist() == pytest.approx([0.25, -0.75])
    assert call("reinforce_pp_plain", reward, tokens_BG=tokens)[0].tolist() == pytest.approx([0.5, -1.5], abs=1e-6)


def test_golden_gpg_makes_up_for_dead_groups():
    # one group of two differs: α = 2
    assert call("gpg", torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist() == [[1.0, -1.0], [0.0, 0.0]]


steps = st.tuples(st.integers(1, 4), st.integers(4, 6), st.integers(1, 3), st.randoms(use_true_random=False))


@every_advantage
@settings(max_examples=60, deadline=None)
@given(steps, st.sampled_from(["any", "zero", "tokens"]))
def test_equals_the_oracle(name, drawn, kind):
    """Random steps of rewards on a coarse grid (groups of equal rewards are common), lengths from 0."""
    b, g, r, random = drawn
    component = [[[random.choice([0.0, 0.25, 1.0, 2.5, -1.0]) for _ in range(r)] for _ in range(g)] for _ in range(b)]
    if kind == "zero":
        component[0] = [component[0][0]] * g
    weights = [random.choice([0.5, 1.0, 2.0]) for _ in range(r)]
    reward = [[sum(w * c for w, c in zip(weights, row, strict=True)) for row in group] for group in component]
    tokens = [
        [0 if kind == "tokens" and random.random() < 0.5 else random.randint(0, 9) for _ in range(g)] for _ in range(b)
    ]
    got = call(
        name, *(torch.tensor(v, dtype=torch.float64) for v in (reward, component, weights)), torch.tensor(tokens)
    )
    expected = oracle.ADVANTAGES[name]({"reward": reward, "component": component, "weights": weights, "tokens": tokens})
    assert (got - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 1e-6


def test_every_advantage_has_an_oracle_and_a_place_in_the_docs():
    missing = PATHS.keys() ^ oracle.ADVANTAGES.keys()
    assert not missing, f"conf/advantage and ADVANTAGES in tests/grpo/oracle.py differ by {sorted(missing)}"
    page = ROOT / "docs" / "advantages.md"
    assert page.read_text(encoding="utf-8") == pages()[page], "out of date: python -m grpo.lossdocs"
    assert all(f"| `{name}` |" in page.read_text(encoding="utf-8") for name in PATHS)


# ---------------------------------------------------------------- what must hold for all

WHOLE_STEP = {"reinforce_pp", "reinforce_pp_plain", "gdpo", "verl_gdpo"}  # centred over the step
NOT_ZERO_SUM = WHOLE_STEP | {"nemo_leave_one_out", "opo"}
SHIFTED = {"maxrl", "pass_at_k"}  # the level of the reward means something


@every_advantage
def test_equal_rewards_give_exactly_zero(name):
    a = call(name, torch.full((3, 7), 0.1))  # the mean of seven 0.1 is not 0.1 in float32
    assert (a == 0).all()


@every_advantage
def test_one_completion_is_finite(name):
    if name == "pass_at_k":
        pytest.skip("k = 4 needs four completions")
    a = call(name, torch.tensor([[3.0]]))
    assert a.tolist() == [[pytest.approx(3.0, abs=1e-5) if name == "verl_group_std" else 0.0]]


@every_advantage
def test_shift_permutation_and_sum(name):
    generator = torch.Generator().manual_seed(0)
    r = torch.randint(0, 3, (3, 6), generator=generator).double() / 2
    order = torch.randperm(6, generator=generator)
    a = call(name, r)
    assert torch.allclose(call(name, r[:, order]), a[:, order], atol=1e-9)
    assert torch.allclose(call(name, r.flip(0)), a.flip(0), atol=1e-9)
    if name not in SHIFTED:
        assert torch.allclose(call(name, r + 5), a, atol=1e-6)
    if name not in NOT_ZERO_SUM:
        assert a.sum(1).abs().max() < 1e-9


@every_advantage
def test_a_better_reward_never_has_a_lower_advantage(name):
    r = torch.tensor([[0.0, 0.25, 0.5, 1.0, 1.0, 2.0]], dtype=torch.float64)
    a = call(name, r)[0]
    if name == "nemo_leave_one_out":
        pytest.skip("each completion has its own scale there")
    assert (a.diff() >= -1e-12).all()


@every_advantage
def test_a_failed_reward_leaves_its_question_out_of_every_statistic(name):
    r = torch.tensor([[1.0, 0, 0, 1], [9.0, float("nan"), 0, 0], [0.0, 0, 0, 1]], dtype=torch.float64)
    a = call(name, r)
    assert (a[1] == 0).all()
    assert torch.equal(a[[0, 2]], call(name, r[[0, 2]]))
    assert (call(name, torch.full((2, 4), float("nan"))) == 0).all()


@pytest.mark.parametrize("name", [n for n in PATHS if n.endswith("group_std") or n in ("group_mean", "leave_one_out")])
def test_groups_do_not_mix(name):
    r = torch.tensor([[0.0, 1.0], [5.0, 9.0]])
    assert torch.equal(call(name, r)[0], call(name, r[:1])[0])


def test_what_a_function_declares_is_what_it_gets():
    assert declared(FUNCTIONS["group_std"]) == ()
    assert declared(FUNCTIONS["gdpo"]) == ("component_BGR", "weights_R")
    assert declared(FUNCTIONS["verl_gdpo"]) == ("component_BGR", "weights_R", "tokens_BG")

    def mine(reward_BG, *, tokens_BG, scale=2.0):
        return reward_BG * tokens_BG * scale

    assert advantages(mine, torch.ones(1, 2), tokens_BG=torch.tensor([[3, 4]])).tolist() == [[6.0, 8.0]]


def test_mistakes_are_named():
    from grpo.advantage import group_std, pass_at_k

    with pytest.raises(ValueError, match="k=4 must be between 1 and generations=3"):
        pass_at_k(torch.ones(1, 3), component_BGR=torch.ones(1, 3, 1), k=4)
    with pytest.raises(ValueError, match="zero or raw, got 'nil'"):
        group_std(torch.ones(1, 3), single="nil")


@every_advantage
def test_the_equation_is_printed(name):
    assert describe(FUNCTIONS[name]).startswith("A = ")
