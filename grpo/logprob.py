"""Log-probabilities of chosen tokens, exactly as the sampler defines them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

# Logits that exist at a time: 256 MiB of float32, whatever the vocabulary; some 440 tokens at 152,064.
LOGITS_AT_ONCE = 2**26


def logits_of(hidden: Tensor, weight_VD: Tensor) -> Tensor:
    """Logits [..., V] in float32 whatever the weights' dtype: rounded to bfloat16 they alone move a log-probability by
    0.03. The rollout engines do the same (MiniMax-M1, arXiv 2506.13585, section 3.2)."""
    if hidden.is_cuda and hidden.dtype == weight_VD.dtype == torch.bfloat16:
        # Products of bfloat16 numbers are exact in float32: the tensor cores lose nothing by taking them as they are.
        return torch.mm(hidden.flatten(0, -2), weight_VD.T, out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
    return linear(hidden.float(), weight_VD.float())


def tempered(logits: Tensor, temperature: float, banned_ids: Sequence[int] | Tensor) -> Tensor:
    """float32 log-probabilities [..., V] of softmax(logits / temperature) with `banned_ids` at probability zero.

    The upcast comes before the softmax: in bfloat16 a log-softmax is off by 1e-2. Sampler and trainer both call this
    function, so that the importance ratio is 1 where the weights are equal.
    """
    logits = logits.float() / temperature
    if len(banned_ids):
        index = torch.as_tensor(banned_ids, device=logits.device)
        logits = logits.index_fill(-1, index, float("-inf"))
    return torch.log_softmax(logits, dim=-1)


def chosen_and_entropy(hidden_MD: Tensor, weight_VD: Tensor, ids_M: Tensor, temperature: float,
                       banned_ids: Sequence[int], entropy_gradient: bool = False,
                       chunk: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability of `ids` [M] under the logits of `hidden` [M, D], and the distribution's entropy in nats [M].

    `chunk` tokens have logits at a time, by default LOGITS_AT_ONCE / V; no [M, V] is kept for the backward pass.
    The entropy carries a gradient only with `entropy_gradient`.
    """
    chunk = chunk or max(1, LOGITS_AT_ONCE // len(weight_VD))
    logp_M, entropy_M = _Chosen.apply(hidden_MD, weight_VD, ids_M, temperature, banned_ids, entropy_gradient, chunk)
    return logp_M, entropy_M if entropy_gradient else entropy_M.detach()


class _Chosen(torch.autograd.Function):
    """A token's log-probability depends on its own hidden state only. So its gradient is one row [D], which the forward
    pass makes while the logits are there; the backward pass scales rows. As many products as with all logits in memory.

        log p_y = z_y - log Σ_v e^{z_v}      ∂/∂z_v = 1[v = y] - p_v
        H       = -Σ_v p_v log p_v           ∂/∂z_v = -p_v (log p_v + H)            z = W h / temperature
    """

    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, ids_M, temperature, banned_ids, entropy_gradient, chunk):
        banned = torch.as_tensor(banned_ids, device=hidden_MD.device, dtype=torch.long)
        ctx.settings = temperature, banned, entropy_gradient, chunk, hidden_MD.dtype
        logp, entropy, rows, entropy_rows = [], [], [], []
        for hidden, ids in zip(hidden_MD.split(chunk), ids_M.split(chunk), strict=True):
            logp_CV = tempered(logits_of(hidden, weight_VD), temperature, banned)
            p_CV = logp_CV.exp()
            logp.append(logp_CV.gather(-1, ids[:, None])[:, 0])
            entropy.append(_entropy(logp_CV, p_CV))
            if ctx.needs_input_grad[0] and entropy_gradient:
                entropy_rows.append(_rows(_by_logit(logp_CV, p_CV, entropy[-1]), weight_VD) / temperature)
            if ctx.needs_input_grad[0]:
                rows.append((weight_VD[ids].float() - _rows(p_CV, weight_VD)) / temperature)
        ctx.save_for_backward(
            hidden_MD if ctx.needs_input_grad[1] else None, weight_VD, ids_M, torch.cat(rows) if rows else None,
            torch.cat(entropy_rows) if entropy_rows else None,
        )  # fmt: skip
        return torch.cat(logp), torch.cat(entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logp_M, by_entropy_M):
        hidden_MD, weight_VD, ids_M, rows_MD, entropy_rows_MD = ctx.saved_tensors
        temperature, banned, entropy_gradient, chunk, dtype = ctx.settings
        by_hidden = by_weight = None
        if ctx.needs_input_grad[0]:
            by_hidden = by_logp_M[:, None] * rows_MD
            if entropy_gradient:
                by_hidden = by_hidden + by_entropy_M[:, None] * entropy_rows_MD
            by_hidden = by_hidden.to(dtype)
        if ctx.needs_input_grad[1]:  # a trained projection: its gradient needs the logits once more
            by_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
            parts = [t.split(chunk) for t in (hidden_MD, ids_M, by_logp_M, by_entropy_M)]
            for hidden, ids, by_logp, by_entropy in zip(*parts, strict=True):
                logp_CV = tempered(logits_of(hidden, weight_VD), temperature, banned)
                p_CV = logp_CV.exp()
                by_logit_CV = (-by_logp[:, None] * p_CV).scatter_add_(-1, ids[:, None], by_logp[:, None])
                if entropy_gradient:
                    by_logit_CV += by_entropy[:, None] * _by_logit(logp_CV, p_CV, _entropy(logp_CV, p_CV))
                by_weight += by_logit_CV.T @ (hidden.float() / temperature)
            by_weight = by_weight.to(weight_VD.dtype)
        return by_hidden, by_weight, None, None, None, None, None


def _entropy(logp_CV: Tensor, p_CV: Tensor) -> Tensor:
    return -(p_CV * logp_CV.clamp_min(torch.finfo(logp_CV.dtype).min)).sum(-1)  # 0 * log 0 = 0


def _by_logit(logp_CV: Tensor, p_CV: Tensor, entropy_C: Tensor) -> Tensor:
    """Gradient of the entropy by the logits, [C, V]."""
    return -p_CV * (logp_CV.clamp_min(torch.finfo(logp_CV.dtype).min) + entropy_C[:, None])


def _rows(of_CV: Tensor, weight_VD: Tensor) -> Tensor:
    """of_CV W in float32; on a GPU by its matrix units, in the weights' dtype as any backward pass would."""
    if of_CV.is_cuda and weight_VD.dtype == torch.bfloat16:
        return (of_CV.to(weight_VD.dtype) @ weight_VD).float()
    return of_CV @ weight_VD.float()
