"""Weights on the policy term [N, T]: detached factors that correct for the sampler or leave tokens out.

    L = aggregate[ - w · surrogate + β · kl ]      several weights multiply; the KL term is not weighted

Log-ratios in exponentials are held within ±limit. A weight of 0 leaves a token out of the numerator; the aggregate's
denominator stays that of all tokens (the choice of TRL and of the papers below; verl shrinks it).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from grpo.batch import LossInputs
from grpo.loss.formula import formula


def _mismatch(x: LossInputs) -> Tensor:
    """δ = log π_old - log π_sampler [N, T], 0 outside the mask: how far the rollout engine is from the trainer."""
    return torch.where(x.mask_NT, x.old_logp_NT - x.sampler_logp_NT, 0.0).detach()


@formula("min(π_old/π_sampler, {cap:g})")
def token_tis(x: LossInputs, ratio_NT: Tensor, *, cap: float = 2.0, limit: float = 20.0) -> Tensor:
    """w = min(e^δ, C) per token: truncated importance sampling. Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"; C = 2 as in verl and SkyRL (TRL: 3)."""
    return _mismatch(x).clamp(-limit, limit).exp().clamp(max=cap)


def _sequence_tis_formula(*, cap: float, geometric: bool, **_) -> str:
    return f"min({'(Π_t π_old/π_sampler)^(1/T_i)' if geometric else 'Π_t π_old/π_sampler'}, {cap:g})"


@formula(_sequence_tis_formula)
def sequence_tis(x: LossInputs, ratio_NT: Tensor, *, cap: float = 3.0, geometric: bool = False,
                 limit: float = 20.0) -> Tensor:  # fmt: skip
    """w = min(e^{Σ_t δ}, C) for all tokens of a completion (TRL `sequence_truncate`, C = 3).

    `geometric=True` takes the mean over tokens instead of the sum (OpenRLHF, NeMo-RL): the same name elsewhere, another
    number. The sum grows with the length: 0.012 a token over 100 tokens is already e^1.2.
    """
    total_N1 = _mismatch(x).sum(-1, keepdim=True)
    if geometric:
        total_N1 = total_N1 / x.mask_NT.sum(-1, keepdim=True).clamp_min(1)
    return total_N1.clamp(-limit, limit).exp().clamp(max=cap).expand_as(ratio_NT)


@formula("π_old/π_sampler where it is within [{low:g}, {high:g}], else 0")
def icepop(x: LossInputs, ratio_NT: Tensor, *, low: float = 0.5, high: float = 5.0, limit: float = 20.0) -> Tensor:
    """w = e^δ · 1[low ≤ e^δ ≤ high]: tokens on which the engines disagree are left out. IcePop (arXiv 2510.18855)."""
    weight_NT = _mismatch(x).clamp(-limit, limit).exp()
    return torch.where((weight_NT >= low) & (weight_NT <= high), weight_NT, 0.0)


@formula("Π_t π_old/π_sampler where it is within [{low:g}, {high:g}], else 0")
def sequence_icepop(x: LossInputs, ratio_NT: Tensor, *, low: float = 0.5, high: float = 5.0,
                    limit: float = 20.0) -> Tensor:  # fmt: skip
    """The same for whole completions, by w = e^{Σ_t δ} (TRL's `sequence_mask` has the upper bound only)."""
    weight_N1 = _mismatch(x).sum(-1, keepdim=True).clamp(-limit, limit).exp()
    return torch.where((weight_N1 >= low) & (weight_N1 <= high), weight_N1, 0.0).expand_as(ratio_NT)


@formula("0 where A < 0 and mean_t log(π_sampler/π) > {delta:g}, else 1")
def sequence_mask(x: LossInputs, ratio_NT: Tensor, *, delta: float = 0.5) -> Tensor:
    """Off-policy sequence masking: a bad completion that the policy has moved away from is left out.

    M_i = 0 if A_i < 0 and (1/T_i) Σ_t log π_sampler/π_θ > δ, else 1. DeepSeek-V3.2 (arXiv 2512.02556), whose π_old
    is the inference engine's. The paper gives no δ; 0.5 is TRL's suggestion.
    """
    gap_NT = torch.where(x.mask_NT, x.sampler_logp_NT - x.logp_NT, 0.0).detach()
    mean_N1 = gap_NT.sum(-1, keepdim=True) / x.mask_NT.sum(-1, keepdim=True).clamp_min(1)
    drop_N1 = (x.advantage_N[:, None] < 0) & (mean_N1 > delta)
    return (~drop_N1).to(x.logp_NT.dtype).expand_as(ratio_NT)


@formula("1 for the {share:.0%} of the step's tokens with the highest entropy, else 0")
def high_entropy(x: LossInputs, ratio_NT: Tensor, *, share: float = 0.2) -> Tensor:
    """1[H_{i,t} ≥ τ], τ the (1-share) quantile over the step's tokens of all ranks. Beyond the 80/20 Rule
    (arXiv 2506.01939); the paper's share is 0.2. `x.entropy_cut` holds τ: the loop finds it before the update.
    """
    if x.entropy_cut is None:
        raise ValueError("weight.high_entropy needs LossInputs.entropy_cut, the quantile over the whole step's tokens")
    return (x.entropy_NT.detach() >= x.entropy_cut).to(x.logp_NT.dtype)


high_entropy.needs_entropy_cut = True  # `Objective.entropy_quantile` reads this mark and the keyword `share`


CORRECTIONS = (token_tis, sequence_tis, icepop, sequence_icepop)


def correction(kind: str, level: str, cap: float) -> Callable:
    """The weight that `rollout.correction=kind` (truncate, mask) asks for at `level` (token, sequence).

    A mask keeps what is within [1/cap, cap], as verl's default does.
    """
    if kind == "truncate":
        return partial(token_tis if level == "token" else sequence_tis, cap=cap)
    return partial(icepop if level == "token" else sequence_icepop, low=1 / cap, high=cap)
