"""Log-probabilities of chosen tokens, exactly as the sampler defines them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tempered(logits: Tensor, temperature: float, banned_ids: Sequence[int]) -> Tensor:
    """float32 log-probabilities [..., V] of softmax(logits / temperature) with `banned_ids` at probability zero.

    The upcast comes before the softmax: in bfloat16 a log-softmax is off by 1e-2. Sampler and trainer both call this
    function, so that the importance ratio is 1 where the weights are equal.
    """
    logits = logits.float() / temperature
    if len(banned_ids):
        index = torch.as_tensor(banned_ids, device=logits.device)
        logits = logits.index_fill(-1, index, float("-inf"))
    return torch.log_softmax(logits, dim=-1)


def chosen_and_entropy(logits: Tensor, ids: Tensor, temperature: float, banned_ids: Sequence[int],
                       entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability of `ids` [M] under `logits` [M, V], and the distribution's entropy in nats [M].

    The entropy carries a gradient only with `entropy_gradient`: it keeps two more [M, V] in memory until backward.
    """
    logp = tempered(logits, temperature, banned_ids)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1)  # 0 * log 0 = 0
    return logp.gather(-1, ids[:, None])[:, 0], entropy
