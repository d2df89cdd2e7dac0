"""How an objective is put together: terms, weights, where KL goes, entropy, marks, what it says of itself."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from grpo.batch import LossInputs
from grpo.config import ConfigError, build
from grpo.loss import aggregate, entropy, kl, ratio, surrogate, weight
from grpo.loss.objective import Objective
from grpo.losscheck import gradient, made_up
from grpo.metrics import mismatch


def make(**changes):
    return Objective(**{"beta": 0.01, "ratio": ratio.token, "surrogate": surrogate.clipped, "kl": kl.k3,
                        "aggregate": aggregate.sequence_mean, **changes})  # fmt: skip


def test_first_step_identities():
    # old = detach(new), reference = policy: ratio 1, KL 0, no clipping; the loss is -mean A, its gradient not 0
    loss = make()
    x = made_up(loss, 8, on_policy=True)
    x = replace(x, mask_NT=torch.ones_like(x.mask_NT), n_tokens=float(x.mask_NT.numel()))
    out = loss(x)
    assert out.loss.item() == pytest.approx(-x.advantage_N.mean().item(), abs=1e-12)
    assert (out.metrics["ratio/mean"] == 1).all() and (out.metrics["kl"] == 0).all()
    assert (out.metrics["clip_ratio/region_mean"] == 0).all()
    assert gradient(loss, x)[0].abs().min() > 0


def test_beta_zero_needs_no_reference():
    loss = make(beta=0.0)
    assert not loss.needs_reference
    assert "kl" not in loss(replace(made_up(loss), ref_logp_NT=None)).metrics


def test_weights_multiply_the_policy_term_only():
    half = lambda x, ratio_NT: torch.full_like(ratio_NT, 0.5)  # noqa: E731
    third = lambda x, ratio_NT: torch.full_like(ratio_NT, 1 / 3)  # noqa: E731
    x = made_up(make())
    policy, both = make(beta=0.0)(x).loss.item(), make()(x).loss.item()
    weighted = make(weights={"a": half, "b": third})(x)
    assert weighted.loss.item() == pytest.approx(policy / 6 + (both - policy), abs=1e-12)
    assert (weighted.metrics["weights/a/mean"] == 0.5).all() and (weighted.metrics["weights/b/masked"] == 0).all()


def test_a_weight_carries_no_gradient():
    leaky = lambda x, ratio_NT: ratio_NT  # noqa: E731
    frozen = lambda x, ratio_NT: ratio_NT.detach()  # noqa: E731
    x = made_up(make())
    assert torch.equal(gradient(make(weights={"w": leaky}), x)[0], gradient(make(weights={"w": frozen}), x)[0])


def test_a_weight_with_a_wrong_signature_is_named_at_the_start():
    with pytest.raises(
        ValueError, match=r"weights\.mine: broken\(x, ratio_NT\): missing a required argument: 'threshold'"
    ):

        def broken(x, ratio_NT, *, threshold):
            return ratio_NT

        make(weights={"mine": broken})
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("train", ["loss=tis", "+loss.weights.bad={_target_: grpo.loss.ratio.token, _partial_: true}"])
    with pytest.raises(ConfigError, match=r"loss: weights\.bad: token\(x, ratio_NT\): too many positional"):
        build(cfg.loss, "loss")


def test_mistakes_in_plain_values():
    with pytest.raises(ValueError, match=r"loss\.beta must be at least 0"):
        make(beta=-1.0)
    with pytest.raises(ValueError, match=r"loss\.kl_in must be loss or reward, got 'both'"):
        make(kl_in="both")


# ---------------------------------------------------------------- KL in the reward


def test_kl_in_the_reward_leaves_the_loss_and_enters_the_penalty():
    inside, outside = make(kl=kl.k1, beta=0.1), make(kl=kl.k1, beta=0.1, kl_in="reward")
    x = made_up(outside)
    assert outside.needs_reference
    assert outside(x).loss.item() == make(beta=0.0)(x).loss.item() != inside(x).loss.item()
    assert torch.equal(outside(x).metrics["kl"], inside(x).metrics["kl"])


def test_kl_penalty_by_hand():
    # d = 0.5, -0.25 inside the mask, garbage outside: 0.1 * (0.5 - 0.25) = 0.025; the second row is empty
    logp = torch.tensor([[-1.0, -2.0, -9.0], [0.0, 0.0, 0.0]])
    ref = torch.tensor([[-1.5, -1.75, float("nan")], [float("nan")] * 3])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    penalty = make(kl=kl.k1, beta=0.1, kl_in="reward").kl_penalty(logp.requires_grad_(), ref, mask)
    assert penalty.tolist() == pytest.approx([0.025, 0.0]) and not penalty.requires_grad


# ---------------------------------------------------------------- entropy


def test_the_bonus_raises_entropy_and_needs_its_gradient():
    loss = make(entropy=entropy.Fixed(coefficient=0.1), beta=0.0)
    x = made_up(loss)
    assert loss.needs_entropy_gradient
    leaf = x.entropy_NT.clone().requires_grad_()
    loss(replace(x, entropy_NT=leaf)).loss.backward()
    assert (leaf.grad[x.mask_NT] < 0).all() and (leaf.grad[~x.mask_NT] == 0).all()  # descending raises H
    with pytest.raises(ValueError, match="needs entropy_NT with its gradient"):
        loss(replace(x, logp_NT=x.logp_NT.clone().requires_grad_()))
    assert not make(entropy=entropy.Fixed(coefficient=0.0)).needs_entropy_gradient


def test_adaptive_entropy_by_hand():
    # target 0.2, steps of 0.1: 0.5 is above (the level stays at its floor 0), 0.1 and 0.2 raise it to 0.1 and 0.2 and
    # switch it on, 0.3 lowers it to 0.1 and switches it off, 0.1 raises it to 0.2 and on again; the ceiling is 0.25
    bonus = entropy.Adaptive(target=0.2, delta=0.1, high=0.25)
    seen = [bonus.coefficient]
    for mean in (0.5, 0.1, 0.2, 0.3, 0.1, 0.1):
        bonus.update(mean)
        seen.append(bonus.coefficient)
    assert seen == pytest.approx([0, 0, 0.1, 0.2, 0, 0.2, 0.25])


def test_adaptive_entropy_resumes_exactly():
    bonus = entropy.Adaptive(target=0.2, delta=0.1)
    assert bonus.state() == {"level": 0.0}
    bonus.update(0.1)
    other = entropy.Adaptive(target=0.2, delta=0.1)
    other.load_state(bonus.state())
    assert other.coefficient == bonus.coefficient == pytest.approx(0.1) and other.state() == bonus.state()
    with pytest.raises(ValueError, match="low <= start <= high"):
        entropy.Adaptive(start=2.0)


def test_adaptive_bonus_enters_the_loss_when_it_is_on():
    loss = make(beta=0.0, entropy=entropy.Adaptive(target=0.2, delta=0.5))
    x = made_up(loss)
    plain = make(beta=0.0)(x).loss.item()
    assert loss(x).loss.item() == plain and not loss.needs_entropy_gradient
    loss.entropy.update(0.1)
    mean = (x.entropy_NT.sum(-1) / x.mask_NT.sum(-1).clamp_min(1)).sum().item() / x.n_sequences
    assert loss.needs_entropy_gradient
    assert loss(x).loss.item() == pytest.approx(plain - 0.5 * mean, abs=1e-12)


# ---------------------------------------------------------------- what the loop is told


def test_marks_that_the_loop_reads():
    assert make().entropy_quantile is None and make().invariant
    assert make(weights={"h": partial(weight.high_entropy, share=0.25)}).entropy_quantile == 0.75
    assert make(weights={"h": weight.high_entropy}).entropy_quantile == 0.8
    assert not make(aggregate=aggregate.bnpo).invariant


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aggregate": aggregate.bnpo}, "n_micro_batches"),
        ({"aggregate": aggregate.group_mean}, "group_size"),
        ({"weights": {"h": weight.high_entropy}}, "entropy_cut"),
    ],
)
def test_a_field_that_nobody_filled_is_named(changes, message):
    loss = make(**changes)
    x = replace(made_up(loss), n_micro_batches=None, group_size=None, entropy_cut=None)
    with pytest.raises(ValueError, match=message):
        loss(x)


# ---------------------------------------------------------------- metrics and text


def test_mismatch_metrics_by_hand():
    # old - sampler = log 2, log 1/2: differences 0.693147, ratios 2, 0.5, k3 = r - 1 - log r = 0.306853, 0.193147
    log2 = torch.tensor(2.0, dtype=torch.float64).log().item()
    x = made_up(make(), questions=1, group=1, width=2)
    x = replace(x, mask_NT=torch.ones(1, 2, dtype=torch.bool),
                old_logp_NT=torch.full((1, 2), -1.0, dtype=torch.float64),
                sampler_logp_NT=torch.tensor([[-1 - log2, -1 + log2]], dtype=torch.float64))  # fmt: skip
    x = replace(x, logp_NT=x.old_logp_NT)
    m = mismatch(x)
    assert m["sampling/sampling_logp_difference/mean"][0].tolist() == pytest.approx([log2, log2])
    assert m["sampling/importance_sampling_ratio/max"][0].tolist() == pytest.approx([2.0, 0.5])
    assert m["sampling/kl_k3"][0].tolist() == pytest.approx([1 - log2, -0.5 + log2])
    # w = 2, 0.5: mean² / mean of squares = 1.5625 / 2.125: 74 % of the tokens effectively count
    w, w2 = m["sampling/weight_mean"].mean(), m["sampling/weight_square_mean"].mean()
    assert (w**2 / w2).item() == pytest.approx(1.5625 / 2.125)


def test_a_users_surrogate_with_our_clip_keywords_gets_our_clip_metrics():
    def mine(x, ratio_NT, *, clip_low=0.1, clip_high=0.1):
        return ratio_NT * x.advantage_N[:, None]

    assert "clip_ratio/high_mean" in make(surrogate=mine)(made_up(make())).metrics


def test_describe_prints_every_term_with_its_number():
    loss = make(beta=0.04, surrogate=partial(surrogate.clipped, clip_high=0.28), mask_truncated=True,
                weights={"tis": partial(weight.token_tis, cap=3.0)},
                entropy=entropy.Fixed(coefficient=0.002))  # fmt: skip
    assert loss.describe() == (
        "minimise  mean over completions of the mean over their tokens of  "
        "[ -w_tis·(min(ρ·A, clip(ρ, 1-0.2, 1+0.28)·A)) + 0.04·(π_ref/π - log(π_ref/π) - 1) - 0.002·H ]\n"
        "with      ρ = π(o_t) / π_old(o_t); completions cut by the length limit are masked\n"
        "          w_tis = min(π_old/π_sampler, 3)"
    )
    reward = make(beta=0.04, kl=kl.k1, kl_in="reward").describe()
    assert "0.04·Σ_t log(π/π_ref) taken off each completion's reward" in reward


def test_describe_falls_back_on_the_name_of_a_function_without_an_equation():
    def mine(x, ratio_NT, *, tau=2.0):
        return ratio_NT

    assert "test_objective" in make(surrogate=mine).describe() and "tau=2.0" in make(surrogate=mine).describe()


def test_composed_by_hydra_equals_composed_by_hand():
    with initialize_config_module("conf", version_base="1.3"):
        composed = instantiate(compose("train", ["loss=dapo", "loss.beta=0.1"]).loss)
    by_hand = make(beta=0.1, surrogate=partial(surrogate.clipped, clip_high=0.28), aggregate=aggregate.token_mean)
    x = made_up(by_hand)
    assert composed(x).loss.item() == by_hand(x).loss.item()


def test_clip_fractions_are_counted_at_the_objectives_own_bounds():
    # ρ = 1.25 with A > 0 lies inside 1 + 0.28, and ρ = 0.75 with A < 0 outside 1 - 0.2
    loss = make(surrogate=partial(surrogate.clipped, clip_low=0.2, clip_high=0.28), beta=0.0)
    logp = torch.zeros(2, 1, dtype=torch.float64)
    old = logp - torch.tensor([[1.25], [0.75]], dtype=torch.float64).log()
    x = LossInputs(logp, old, old, None, logp, torch.tensor([1.0, -1.0]).double(), torch.ones(2, 1).bool(), 2.0, 2.0)
    metrics = loss(x).metrics
    assert metrics["clip_ratio/high_mean"].sum() == 0 and metrics["clip_ratio/low_mean"].tolist() == [[0], [1]]
