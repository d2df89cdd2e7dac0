"""Whole objectives: against the slow reference, and invariances that every conf/loss/*.yaml must keep."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.batch import LossInputs
from tests.grpo import slow_reference

LOSSES = sorted(p.stem for p in (Path(__file__).parents[3] / "conf" / "loss").glob("*.yaml"))


def objective(name, **overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return instantiate(compose("train", [f"loss={name}", *(f"{k}={v}" for k, v in overrides.items())]).loss)


def random_step(seed=0, n=6, t=7, spread=0.5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, t + 1, (n,), generator=g)
    lengths[0] = t
    mask = torch.arange(t)[None] < lengths[:, None]
    logp, old, sampler, ref = (-2 + spread * torch.randn(n, t, generator=g, dtype=dtype) for _ in range(4))
    entropy = torch.rand(n, t, generator=g, dtype=dtype)
    x = LossInputs(logp, old, sampler, ref, entropy, torch.randn(n, generator=g, dtype=dtype), mask,
                   float(mask.sum()), float(n))  # fmt: skip
    zero = {
        k: getattr(x, k).masked_fill(~mask, 0.0)
        for k in ("logp_NT", "old_logp_NT", "sampler_logp_NT", "ref_logp_NT", "entropy_NT")
    }
    return replace(x, **zero)


def gradient(loss, x, parts=None):
    """Gradient of the summed loss of `parts` (row index lists) with respect to logp_NT, and the loss value."""
    leaf = x.logp_NT.clone().requires_grad_()
    total = 0.0
    for rows in parts or [list(range(len(leaf)))]:
        take = {k: v[rows] for k, v in vars(x).items() if torch.is_tensor(v)}
        total = total + loss(replace(x, **take | {"logp_NT": leaf[rows]})).loss
    total.backward()
    return leaf.grad, total.item()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.5, 3.0]))
def test_grpo_equals_the_slow_reference(seed, spread):
    for name, aggregate, length in [
        ("grpo", "sequence_mean", None),
        ("token_mean", "token_mean", None),
        ("constant", "constant", 40),
    ]:
        x = random_step(seed, spread=spread)
        lists = [v.tolist() for v in (x.logp_NT, x.old_logp_NT, x.ref_logp_NT, x.advantage_N, x.mask_NT)]
        expected = slow_reference.loss(*lists, beta=OBJECTIVES[name].beta, aggregate=aggregate, length=length)
        assert OBJECTIVES[name](x).loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


OBJECTIVES = {name: objective(name) for name in LOSSES}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_matches_finite_differences(name):
    x = random_step(3, n=3, t=3, spread=0.02)  # inside the clip range, where the loss is smooth
    loss = OBJECTIVES[name]
    got, _ = gradient(loss, x)
    for i, t in [(0, 0), (0, 2), (1, 0)]:
        step = torch.zeros_like(x.logp_NT)
        step[i, t] = 1e-6
        up, down = (loss(replace(x, logp_NT=x.logp_NT + s * step)).loss.item() for s in (1, -1))
        assert got[i, t].item() == pytest.approx((up - down) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5]], [[i] for i in range(6)], [[5, 0], [1], [2, 4, 3]]])
def test_splitting_the_step_changes_nothing(name, parts):
    x = random_step(1)
    whole, value = gradient(OBJECTIVES[name], x)
    split, sum_of_shares = gradient(OBJECTIVES[name], x, parts)
    assert torch.allclose(whole, split, atol=1e-12) and value == pytest.approx(sum_of_shares, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name):
    x = random_step(2)
    wide = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in vars(x).items() if torch.is_tensor(v) and v.dim() == 2}
    narrow, value = gradient(OBJECTIVES[name], x)
    padded, same = gradient(OBJECTIVES[name], replace(x, **wide))
    assert torch.equal(padded[:, :7], narrow) and (padded[:, 7:] == 0).all()
    assert value == pytest.approx(same, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_better_completions_become_likelier(name):
    x = replace(random_step(4), advantage_N=torch.tensor([1.0, -1, 1, -1, 1, -1], dtype=torch.float64))
    x = replace(x, old_logp_NT=x.logp_NT, ref_logp_NT=x.logp_NT)
    grad, _ = gradient(OBJECTIVES[name], x)
    for i, sign in enumerate(x.advantage_N.tolist()):
        assert (grad[i][x.mask_NT[i]] * sign < 0).all()  # descending the loss raises log p where A > 0


@pytest.mark.parametrize("name", LOSSES)
def test_zero_advantage_leaves_the_kl_gradient_only(name):
    x = replace(random_step(5), advantage_N=torch.zeros(6, dtype=torch.float64))
    assert gradient(OBJECTIVES[name], x)[0].abs().sum() > 0
    on_reference = replace(x, ref_logp_NT=x.logp_NT)
    assert (gradient(OBJECTIVES[name], on_reference)[0] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_inputs_are_not_written_to(name):
    x = random_step(6)
    before = {k: v.clone() for k, v in vars(x).items() if torch.is_tensor(v)}
    OBJECTIVES[name](x)
    assert all(torch.equal(before[k], getattr(x, k)) for k in before)


@pytest.mark.parametrize("name", LOSSES)
def test_finite_at_extreme_ratios(name):
    x = random_step(7)
    x = replace(x, old_logp_NT=x.old_logp_NT - 60 * x.mask_NT)
    grad, value = gradient(OBJECTIVES[name], x)
    assert torch.isfinite(grad).all() and torch.isfinite(torch.tensor(value))


def test_beta_zero_needs_no_reference():
    loss = objective("grpo", **{"loss.beta": 0})
    assert not loss.needs_reference
    assert "kl" not in loss(replace(random_step(), ref_logp_NT=None)).metrics


def test_first_step_identities():
    # old = detach(new), reference = policy: ratio 1, KL 0, no clipping; the loss is -mean A, its gradient not 0
    x = random_step(8)
    x = replace(x, old_logp_NT=x.logp_NT, ref_logp_NT=x.logp_NT, mask_NT=torch.ones_like(x.mask_NT), n_tokens=42.0)
    out = objective("grpo")(x)
    assert out.loss.item() == pytest.approx(-x.advantage_N.mean().item(), abs=1e-12)
    assert (out.metrics["ratio/mean"] == 1).all() and (out.metrics["kl"] == 0).all()
    assert (out.metrics["clip_ratio/low_mean"] + out.metrics["clip_ratio/high_mean"] == 0).all()
    assert gradient(objective("grpo"), x)[0].abs().min() > 0


def test_describe_prints_the_objective_with_its_numbers():
    text = objective("grpo", **{"loss.beta": 0.04, "loss.surrogate.clip_high": 0.28}).describe()
    assert "0.04" in text and "1+0.28" in text and "mean over completions" in text
    assert "masked" not in text and "masked" in objective("grpo", **{"loss.mask_truncated": True}).describe()


def test_clip_fractions_are_counted_at_the_objectives_own_bounds():
    # ρ = 1.25 with A > 0 lies inside 1 + 0.28, and ρ = 0.75 with A < 0 outside 1 - 0.2
    x = random_step(9, n=2, t=1)
    mask = torch.ones(2, 1, dtype=torch.bool)
    x = replace(x, old_logp_NT=x.logp_NT - torch.tensor([[1.25], [0.75]]).double().log(), mask_NT=mask,
                advantage_N=torch.tensor([1.0, -1.0], dtype=torch.float64))  # fmt: skip
    metrics = objective("grpo", **{"loss.surrogate.clip_high": 0.28})(x).metrics
    assert metrics["clip_ratio/high_mean"].sum() == 0 and metrics["clip_ratio/low_mean"].tolist() == [[0], [1]]


def test_a_negative_beta_is_refused():
    with pytest.raises(Exception, match=r"loss\.beta must be at least 0"):
        objective("grpo", **{"loss.beta": -0.1})
