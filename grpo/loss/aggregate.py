"""From per-token losses [N, T] to this micro-batch's share of the step's loss.

Each denominator belongs to the WHOLE optimizer step (all micro-batches, all ranks): shares add up to the same loss and
gradient however the step is split. N counts every completion of the step, also those whose tokens are all masked; T_i
counts unmasked tokens. Weights that are 0 (masks of grpo/loss/weight.py) do not shrink a denominator.
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

    A token of a long completion weighs less than one of a short completion.
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


@formula("mean over completions of the sum over their tokens")
def sequence_sum(loss_NT: Tensor, x: LossInputs) -> Tensor:
    """(1/N) Σ_i Σ_t L_{i,t}: a whole completion is one action. RLOO (arXiv 2402.14740)."""
    return _masked(loss_NT, x).sum() / x.n_sequences


@formula("mean over questions of the mean over all tokens of their completions")
def group_mean(loss_NT: Tensor, x: LossInputs) -> Tensor:
    """(1/B) Σ_b Σ_{i∈b,t} L_{i,t} / Σ_{i∈b} T_i. ScaleRL (arXiv 2510.13786), "prompt average"."""
    if x.group_size is None:
        raise ValueError("aggregate.group_mean needs LossInputs.group_size, the number of completions per question")
    sums_B = _masked(loss_NT, x).sum(-1).view(-1, x.group_size).sum(-1)
    tokens_B = x.mask_NT.sum(-1).view(-1, x.group_size).sum(-1).clamp_min(1)
    return (sums_B / tokens_B).sum() / (x.n_sequences / x.group_size)


@formula("mean over micro-batches of the mean over their tokens")
def bnpo(loss_NT: Tensor, x: LossInputs) -> Tensor:
    """(1/M) Σ_m (Σ_{i,t ∈ m} L_{i,t} / Σ_{i ∈ m} T_i) over M micro-batches: what TRL calls `bnpo`.

    NOT invariant: the loss depends on how the step is cut into micro-batches and ranks. Here to reproduce others' runs.
    """
    if x.n_micro_batches is None:
        raise ValueError("aggregate.bnpo needs LossInputs.n_micro_batches, counted over the whole step")
    return _masked(loss_NT, x).sum() / x.mask_NT.sum().clamp_min(1) / x.n_micro_batches


bnpo.invariant = False  # to the split of a step: checks of that kind leave it out
