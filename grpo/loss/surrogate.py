"""Policy-gradient surrogates: per-token objectives [N, T], to be MAXIMISED.

A, one number per completion, multiplies all its tokens. `sg` is a stop-gradient. What a surrogate would like to have
logged it names in `surrogate.metrics`: (x, ratio_NT, **its keywords) -> {name: values [N, T]}.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo.batch import LossInputs
from grpo.loss.formula import formula


def logged_with(metrics):
    """Attach the function that computes a surrogate's own metrics."""

    def attach(function):
        function.metrics = metrics
        return function

    return attach


def clip_fractions(x: LossInputs, ratio_NT: Tensor, *, clip_low: float, clip_high: float, **_) -> dict[str, Tensor]:
    """Where the clip BINDS, that is where it stops the gradient: low for A < 0, high for A > 0 (indicator [N, T])."""
    advantage_N1 = x.advantage_N[:, None]
    low_NT = (ratio_NT < 1 - clip_low) & (advantage_N1 < 0)
    high_NT = (ratio_NT > 1 + clip_high) & (advantage_N1 > 0)
    return {"clip_ratio/low_mean": low_NT.float(), "clip_ratio/high_mean": high_NT.float(),
            "clip_ratio/region_mean": (low_NT | high_NT).float()}  # fmt: skip


def _with_cap(x: LossInputs, ratio_NT: Tensor, *, cap: float, **clips) -> dict[str, Tensor]:
    capped_NT = (ratio_NT > cap) & (x.advantage_N[:, None] < 0)
    return {**clip_fractions(x, ratio_NT, **clips), "clip_ratio/cap_mean": capped_NT.float()}


@logged_with(clip_fractions)
@formula("min(ρ·A, clip(ρ, 1-{clip_low:g}, 1+{clip_high:g})·A)")
def clipped(x: LossInputs, ratio_NT: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """PPO's clipped surrogate:  J = min(ρ·A, clip(ρ, 1-ε_low, 1+ε_high)·A).

    PPO (arXiv 1707.06347) eq. 7; DeepSeekMath (arXiv 2402.03300) eq. 3 with ε_low = ε_high; DAPO (arXiv 2503.14476)
    eq. 8 with ε_high > ε_low ("clip-higher").
    """
    advantage_N1 = x.advantage_N[:, None]
    bounded_NT = ratio_NT.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio_NT * advantage_N1, bounded_NT * advantage_N1)


@logged_with(_with_cap)
@formula("min(ρ·A, clip(ρ, 1-{clip_low:g}, 1+{clip_high:g})·A), for A < 0 no less than {cap:g}·A")
def dual_clip(x: LossInputs, ratio_NT: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2,
              cap: float = 3.0) -> Tensor:  # fmt: skip
    """J = max(min(ρA, clip(ρ)A), c·A) for A < 0, PPO's clip otherwise. Dual-clip PPO (arXiv 1912.09729), c = 3."""
    advantage_N1 = x.advantage_N[:, None]
    single_NT = clipped(x, ratio_NT, clip_low=clip_low, clip_high=clip_high)
    return torch.where(advantage_N1 < 0, torch.maximum(single_NT, cap * advantage_N1), single_NT)


@logged_with(lambda x, ratio_NT, *, delta, **clips: _with_cap(x, ratio_NT, cap=delta, **clips))
@formula("min(min(ρ, {delta:g})·A, clip(ρ, 1-{clip_low:g}, 1+{clip_high:g})·A)")
def two_sided(x: LossInputs, ratio_NT: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2,
              delta: float = 4.0) -> Tensor:  # fmt: skip
    """J = min(min(ρ, δ)·A, clip(ρ, 1-ε_low, 1+ε_high)·A), δ > 1+ε_high. INTELLECT-2 (arXiv 2505.07291).

    For A < 0 the same as `dual_clip` with c = δ; for A > 0 PPO's clip acts first.
    """
    if delta <= 1 + clip_high:
        raise ValueError(f"surrogate.two_sided: delta={delta} must be above 1 + clip_high = {1 + clip_high}")
    advantage_N1 = x.advantage_N[:, None]
    bounded_NT = ratio_NT.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio_NT.clamp(max=delta) * advantage_N1, bounded_NT * advantage_N1)


def _cispo_metrics(x: LossInputs, ratio_NT: Tensor, *, bound_low: float, bound_high: float) -> dict[str, Tensor]:
    clipped_NT = (ratio_NT < bound_low) | (ratio_NT > bound_high)
    return {"cispo_clip_ratio": clipped_NT.float()}


@logged_with(_cispo_metrics)
@formula("sg[clip(ρ, {bound_low:g}, {bound_high:g})]·A·log π")
def cispo(x: LossInputs, ratio_NT: Tensor, *, bound_low: float = 0.0, bound_high: float = 5.0) -> Tensor:
    """J = sg[clip(ρ, low, high)]·A·log π_θ: no token loses its gradient. MiniMax-M1 (arXiv 2506.13585) eq. 4-5.

    Convention: both numbers are the bounds themselves, as in TRL's `epsilon_high` and ScaleRL (arXiv 2510.13786),
    not 1±ε as the paper writes and verl takes: high = 1 + ε_high. low = 0 is the paper's "no lower bound".
    high = 5 is TRL's and ScaleRL's suggestion; the paper gives no number.
    """
    return ratio_NT.clamp(bound_low, bound_high).detach() * x.advantage_N[:, None] * x.logp_NT


@formula("(4/τ)·σ(τ·(ρ-1))·A,  τ = {tau_pos:g} if A > 0 else {tau_neg:g}")
def sapo(x: LossInputs, ratio_NT: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """J = (4/τ)·σ(τ(ρ-1))·A: a soft gate in place of the clip; its slope is 1 at ρ = 1. SAPO (arXiv 2511.20347)."""
    advantage_N1 = x.advantage_N[:, None]
    tau_N1 = _by_sign(advantage_N1 > 0, tau_pos, tau_neg, advantage_N1)
    return torch.sigmoid(tau_N1 * (ratio_NT - 1)) * 4 / tau_N1 * advantage_N1


def _by_sign(good_N1: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    # torch.where of two Python numbers would be float32, whatever the log-probs are.
    return torch.full_like(like, other).masked_fill(good_N1, one)


def vespo_weight(x: LossInputs, *, power_pos: float, decay_pos: float, power_neg: float, decay_neg: float,
                 limit: float) -> Tensor:  # fmt: skip
    """φ(W) = W^c1 · exp(c2·(1-W)) [N, 1], detached; W = Π_t π_θ/π_old of the whole completion."""
    gap_NT = torch.where(x.mask_NT, x.logp_NT - x.old_logp_NT, 0.0).detach().clamp(-limit, limit)
    log_w_N1 = gap_NT.sum(-1, keepdim=True).clamp(math.log(1e-8), limit)
    good_N1 = x.advantage_N[:, None] >= 0
    power_N1 = _by_sign(good_N1, power_pos, power_neg, log_w_N1)
    decay_N1 = _by_sign(good_N1, decay_pos, decay_neg, log_w_N1)
    return (power_N1 * log_w_N1 + decay_N1 * (1 - log_w_N1.exp())).exp()


@logged_with(lambda x, ratio_NT, **hyper: {"vespo/phi_seq_mean": vespo_weight(x, **hyper).expand_as(ratio_NT)})
@formula("sg[φ(W)]·A·log π,  W = π(o)/π_old(o),  φ(W) = W^{power_pos:g}·exp({decay_pos:g}·(1-W)) if A ≥ 0 else "
         "W^{power_neg:g}·exp({decay_neg:g}·(1-W))")  # fmt: skip
def vespo(x: LossInputs, ratio_NT: Tensor, *, power_pos: float = 2.0, decay_pos: float = 3.0, power_neg: float = 3.0,
          decay_neg: float = 2.0, limit: float = 20.0) -> Tensor:  # fmt: skip
    """J = sg[φ(W_i)]·A·log π_θ with φ(W) = W^c1 · exp(c2(1-W)), φ(1) = 1. VESPO (arXiv 2602.10693) appendix I.

    W is the full product over the completion's tokens, no length normalisation, held within [1e-8, e^20] as in the
    authors' code. `ratio_NT` is not used. Behaviour policy: π_old, as in that code; the paper's μ also holds the
    sampler's mismatch, for which add `weights: {tis: ...}`.
    """
    hyper = dict(power_pos=power_pos, decay_pos=decay_pos, power_neg=power_neg, decay_neg=decay_neg, limit=limit)
    return vespo_weight(x, **hyper) * x.advantage_N[:, None] * x.logp_NT


@formula("A·log π")
def reinforce(x: LossInputs, ratio_NT: Tensor) -> Tensor:
    """J = A·log π_θ: the policy gradient itself, no ratio, no clip. RLOO (arXiv 2402.14740), GPG (arXiv 2504.02546)."""
    return x.advantage_N[:, None] * x.logp_NT


def _gmpo_metrics(x: LossInputs, ratio_NT: Tensor, *, clip_low: float, clip_high: float) -> dict[str, Tensor]:
    return clip_fractions(x, ratio_NT, clip_low=1 - math.exp(-clip_low), clip_high=math.exp(clip_high) - 1)


@logged_with(_gmpo_metrics)
@formula("A·(Π_t ρ_t)^(1/T_i), each ρ_t clipped to [e^-{clip_low:g}, e^{clip_high:g}] where that lowers the objective")
def gmpo(x: LossInputs, ratio_NT: Tensor, *, clip_low: float = 0.4, clip_high: float = 0.4) -> Tensor:
    """J = A·exp( (1/T_i) Σ_t s·min(s·log ρ, s·clip(log ρ, -ε_low, ε_high)) ), s = sign A. GMPO (arXiv 2507.20673).

    Geometric instead of arithmetic mean of the token ratios; use with `ratio.token` and `aggregate.sequence_mean`.
    """
    advantage_N1 = x.advantage_N[:, None]
    sign_N1 = advantage_N1.sign()
    log_NT = ratio_NT.log()
    bounded_NT = torch.minimum(sign_N1 * log_NT, sign_N1 * log_NT.clamp(-clip_low, clip_high))
    mean_N1 = torch.where(x.mask_NT, sign_N1 * bounded_NT, 0.0).sum(-1, keepdim=True)
    mean_N1 = mean_N1 / x.mask_NT.sum(-1, keepdim=True).clamp_min(1)
    return (advantage_N1 * mean_N1.exp()).expand_as(ratio_NT)
