"""The typed objects on the arrows of the training loop.

Axes (docs/notation.md): B questions, G completions per question, N = B*G, P prompt tokens, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """One question as the model sees it: made once, used by rollout, policy and reference alike."""

    id: str  # the question's id
    prompt_ids: Tensor  # int64 [P], audio placeholders expanded
    mel: Tensor | None  # float32 [mel bins, frames], log-mel spectrogram without padding; None: a prompt without audio
    clip_sha256: str  # of the waveform: the rows of a group must agree on it
    samples: np.ndarray | None = None  # float32 [S], mono at the model's rate: for engines that make their own features


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `token_ids` ends with the stop token unless the length limit cut it (`truncated`)."""

    token_ids: tuple[int, ...]
    sampler_logp: tuple[float, ...]  # of each token, under the sampler's tempered, banned-id distribution
    text: str  # without the stop token
    truncated: bool
    version: int  # of the weights it was sampled with


@dataclass(frozen=True)
class Group:
    """One prompt and its G completions: everything in it shares one question and one clip."""

    prompt: Encoded
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class LossInputs:
    """All that a loss may see, for one micro-batch.

    Entries where `mask_NT` is False must not matter (`Objective` sets them to zero first). `n_tokens` and `n_sequences`
    are counted once per optimizer step, over all micro-batches and ranks, so that splitting a step changes nothing.
    Rows come question by question, `group_size` completions each, and a question is never split.

    The fields with a default are read by few losses; one that needs a field nobody filled says so.
    """

    logp_NT: Tensor  # current policy, with gradient
    old_logp_NT: Tensor  # policy at the first update of this rollout
    sampler_logp_NT: Tensor  # what the rollout engine sampled from
    ref_logp_NT: Tensor | None  # reference policy; None when no term needs it
    entropy_NT: Tensor  # of the current policy's next-token distribution, nats; with gradient only when asked for
    advantage_N: Tensor
    mask_NT: Tensor  # bool; includes the stop token, excludes all after it
    n_tokens: float
    n_sequences: float
    group_size: int | None = None  # G, for aggregate.group_mean
    n_micro_batches: float | None = None  # of the whole step over all ranks, for aggregate.bnpo only
    entropy_cut: float | None = None  # nats: quantile of the step's entropies, for weight.high_entropy only


@dataclass(frozen=True)
class LossOutputs:
    """`loss` is this micro-batch's share of the step's loss: shares are summed, never averaged.

    `metrics` are per-token values [N, T]. The loop reduces each over the mask of the whole optimizer step: by mean, or
    by the extremum when the name ends in `/max` or `/min`.
    """

    loss: Tensor  # scalar, to be minimised
    per_token_NT: Tensor  # detached
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What a loss asks the loop for in the coming step."""

    reference: bool  # ref_logp_NT
    entropy_gradient: bool  # entropy_NT with its gradient
    entropy_quantile: float | None  # entropy_cut: this quantile of the step's entropies
    kl_in_reward: bool  # `loss.kl_penalty` taken off the rewards before the advantages
    mask_truncated: bool  # no token of a completion that the length limit cut


def needs(loss) -> Needs:
    """What `loss` asks for; ask anew at every step. A plain function from LossInputs to LossOutputs gets the reference
    and nothing else."""
    reference = getattr(loss, "needs_reference", True)
    return Needs(
        reference,
        getattr(loss, "needs_entropy_gradient", False),
        getattr(loss, "entropy_quantile", None),
        reference and getattr(loss, "kl_in", "loss") == "reward",
        getattr(loss, "mask_truncated", False),
    )


def moves_without_advantage(loss) -> bool:
    """Whether groups of advantage 0 may change the policy or the denominators: then none may be left out of a step.

    Tried out, not declared: a user's surrogate need not know of the question. An entropy bonus may be off just now.
    """
    if not getattr(loss, "invariant", False) or getattr(loss, "entropy", None) is not None:
        return True
    generator = torch.Generator().manual_seed(0)
    rows = [-3 * torch.rand(4, 6, generator=generator) for _ in range(5)]
    logp_NT, entropy_NT = rows[0].requires_grad_(), rows[4].neg().requires_grad_()
    x = LossInputs(logp_NT, *rows[1:4], entropy_NT, torch.zeros(4), torch.ones(4, 6, dtype=torch.bool), 24.0, 4.0,
                   group_size=2, n_micro_batches=1.0, entropy_cut=1.0)  # fmt: skip
    total = loss(x).loss
    if not total.requires_grad:
        return False
    moved = torch.autograd.grad(total, [logp_NT, entropy_NT], allow_unused=True)
    return any(bool((m != 0).any()) for m in moved if m is not None)


def quantile(entropies: Sequence[Tensor], share: float) -> float:
    """The `share` quantile (linear between neighbours) of all tokens' entropies: `LossInputs.entropy_cut`.

    `entropies` are 1-D parts, those of all micro-batches and ranks, masked tokens left out. Without a token: 0.
    Sorts instead of torch.quantile, which takes no more than 2^24 values.
    """
    values = torch.cat([e.detach().double().cpu() for e in entropies]).sort().values if entropies else []
    if not len(values):
        return 0.0
    place = share * (len(values) - 1)
    low = values[int(place)].item()
    return low + (values[min(int(place) + 1, len(values) - 1)].item() - low) * (place - int(place))


def pad_rows(rows: Sequence[Sequence[float] | Tensor], width: int | None = None, dtype=torch.float32) -> Tensor:
    """Stack rows of unequal length into [N, T], zeros on the right."""
    width = max((len(row) for row in rows), default=0) if width is None else width
    out = torch.zeros(len(rows), width, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=dtype)
    return out
