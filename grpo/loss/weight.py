"""Weights on the policy term [N, T]: detached factors that correct for the sampler.

    L = aggregate[ - w · surrogate + β · kl ]      several weights multiply; the KL term is not weighted

δ = log π_old - log π_sampler, per token: what separates the trainer from the rollout engine (rounding, stale weights,
`rollout.lag`). Sums of δ in an exponential are held within ±20. A weight of 0 leaves a token out of the numerator; the
aggregate's denominator stays that of all tokens (TRL; verl shrinks it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.batch import LossInputs
from grpo.loss.formula import formula


def _distance(x: LossInputs) -> Tensor:
    """δ [N, T], 0 outside the mask."""
    return torch.where(x.mask_NT, x.old_logp_NT - x.sampler_logp_NT, 0.0).detach()


def _sequence_ratio(x: LossInputs) -> Tensor:
    """e^{Σ_t δ} of each completion, for all its tokens [N, T]."""
    delta_NT = _distance(x)
    return delta_NT.sum(-1, keepdim=True).clamp(-20, 20).exp().expand_as(delta_NT)


def _within(weight_NT: Tensor, cap: float) -> Tensor:
    return torch.where((weight_NT >= 1 / cap) & (weight_NT <= cap), weight_NT, 0.0)


@formula("min(π_old/π_sampler, {cap:g})")
def token_truncate(x: LossInputs, ratio_NT: Tensor, *, cap: float = 2.0) -> Tensor:
    """w = min(e^δ, C) per token: truncated importance sampling. Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"; C = 2 as in verl and SkyRL (TRL: 3)."""
    return _distance(x).clamp(-20, 20).exp().clamp(max=cap)


@formula("min(Π_t π_old/π_sampler, {cap:g})")
def sequence_truncate(x: LossInputs, ratio_NT: Tensor, *, cap: float = 2.0) -> Tensor:
    """w = min(e^{Σ_t δ}, C) for all tokens of a completion (TRL `sequence_truncate`). Grows with the length."""
    return _sequence_ratio(x).clamp(max=cap)


@formula("π_old/π_sampler where within [1/{cap:g}, {cap:g}], else 0")
def token_mask(x: LossInputs, ratio_NT: Tensor, *, cap: float = 2.0) -> Tensor:
    """w = e^δ · 1[1/C ≤ e^δ ≤ C]: tokens on which the two disagree are left out. IcePop (arXiv 2510.18855) with
    symmetric bounds, as verl's default; TRL's `token_mask` has the upper bound only."""
    return _within(_distance(x).clamp(-20, 20).exp(), cap)


@formula("Π_t π_old/π_sampler where within [1/{cap:g}, {cap:g}], else 0")
def sequence_mask(x: LossInputs, ratio_NT: Tensor, *, cap: float = 2.0) -> Tensor:
    """The same for whole completions, by w = e^{Σ_t δ} (TRL `sequence_mask` has the upper bound only)."""
    return _within(_sequence_ratio(x), cap)


# (rollout.correction, rollout.correction_level) -> weight
CORRECTIONS = {
    ("truncate", "token"): token_truncate,
    ("truncate", "sequence"): sequence_truncate,
    ("mask", "token"): token_mask,
    ("mask", "sequence"): sequence_mask,
}
