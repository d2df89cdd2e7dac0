"""Importance ratios [N, T] between the current policy and the policy that started the rollout's updates.

With one update per rollout old = detach(new): every ratio is 1, its gradient is not 0. Log-ratios are held within
±limit (verl's 20; e^20 = 5e8), so that no ratio overflows; beyond it the gradient is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.batch import LossInputs
from grpo.loss.formula import formula


@formula("ρ = π(o_t) / π_old(o_t)")
def token(x: LossInputs, *, limit: float = 20.0) -> Tensor:
    """Token-level ratio:  ρ_{i,t} = π_θ(o_{i,t}) / π_old(o_{i,t}). DeepSeekMath (arXiv 2402.03300) eq. 3."""
    return (x.logp_NT - x.old_logp_NT).clamp(-limit, limit).exp()


@formula("ρ = s_i = (π(o) / π_old(o))^(1/T_i), one ratio for the whole completion")
def sequence(x: LossInputs, *, limit: float = 20.0) -> Tensor:
    """Length-normalised sequence ratio:  s_i = exp( (1/T_i) Σ_t log π_θ/π_old ). GSPO (arXiv 2507.18071) eq. 7.

    The same value at each of a completion's tokens, and each carries the gradient of all of them. Empty: 1.
    """
    return mean_log_ratio(x).clamp(-limit, limit).exp()[:, None].expand_as(x.logp_NT)


@formula("ρ = sg[s_i] · π(o_t) / sg[π(o_t)],  s_i = (π(o) / π_old(o))^(1/T_i)")
def sequence_token(x: LossInputs, *, limit: float = 20.0) -> Tensor:
    """GSPO-token:  s_{i,t} = sg[s_i] · π_θ(o_{i,t}) / sg[π_θ(o_{i,t})]. GSPO (arXiv 2507.18071) eq. 14.

    The value of `sequence`, but each token carries its own gradient only: per-token advantages become possible.
    With one advantage per completion and `sequence_mean` the gradient is that of GSPO.
    """
    return sequence(x, limit=limit).detach() * (x.logp_NT - x.logp_NT.detach()).exp()


def mean_log_ratio(x: LossInputs) -> Tensor:
    """[N]: mean over a completion's tokens of log π_θ/π_old; 0 for a completion without tokens."""
    gap_NT = torch.where(x.mask_NT, x.logp_NT - x.old_logp_NT, 0.0)
    return gap_NT.sum(-1) / x.mask_NT.sum(-1).clamp_min(1)
