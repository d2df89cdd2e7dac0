"""From per-token losses [N, T] to this micro-batch's share of the step's loss.

Each denominator belongs to the WHOLE optimizer step (all micro-batches, all ranks): shares add up to the same loss and
gradient however the step is split.
"""

from __future__ import annotations

from torch import Tensor

from grpo.batch import LossInputs
from grpo.loss.formula import formula


def _masked(loss_NT: Tensor, x: LossInputs) -> Tensor:
    return loss_NT.masked_fill(~x.mask_NT, 0.0)


@formula("mean over completions of the mean over their tokens")
def sequence_mean(loss_NT: Tensor, x: LossInputs) -> Tensor:
    """(1/N) Σ_i (1/T_i) Σ_t L_{i,t}. GRPO as published: DeepSeekMath (arXiv 2402.03300) eq. 3.

    N counts every completion of the step, also those whose tokens are all masked; T_i counts unmasked tokens.
    """
    tokens_N = x.mask_NT.sum(-1).clamp_min(1)
    return (_masked(loss_NT, x).sum(-1) / tokens_N).sum() / x.n_sequences


@formula("mean over all tokens of the step")
def token_mean(loss_NT: Tensor, x: LossInputs) -> Tensor:
    """Σ_{i,t} L_{i,t} / Σ_i T_i. DAPO (arXiv 2503.14476) eq. 8."""
    return _masked(loss_NT, x).sum() / max(x.n_tokens, 1)


@formula("sum over tokens / (completions · {length})")
def constant(loss_NT: Tensor, x: LossInputs, *, length: int) -> Tensor:
    """Σ_{i,t} L_{i,t} / (N · L_max) with a constant L_max in tokens. Dr. GRPO (arXiv 2503.20783)."""
    return _masked(loss_NT, x).sum() / (x.n_sequences * length)
