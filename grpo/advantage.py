"""Advantages: rewards [B, G] of ALL questions of a step, G completions each -> advantages [B, G]. Pure functions.

    A = f(reward_BG, **declared)

A function gets what it names among its keywords, over all ranks:

    component_BGR   each reward before its weight          weights_R   weights of the rewards
    tokens_BG       tokens of each completion in the loss

All other keywords are hyper-parameters from `conf/advantage/NAME.yaml`. Groups of equal rewards give exactly 0, except
where the docstring says otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from math import comb

import torch
from torch import Tensor

from grpo.loss.formula import formula

INPUTS = ("component_BGR", "weights_R", "tokens_BG")  # what a function may declare besides reward_BG


def declared(function: Callable) -> tuple[str, ...]:
    """Which of the step's other inputs an advantage function takes."""
    return tuple(name for name in INPUTS if name in inspect.signature(function).parameters)


def advantages(function: Callable, reward_BG: Tensor, **inputs: Tensor) -> Tensor:
    """A_BG of a whole step: calls `function` with what it declares, on the questions whose rewards are all finite.

    A question with a reward that failed (not a number) is left out of every statistic and gets advantage 0.

    Args:
        inputs: any of component_BGR, weights_R, tokens_BG; all that the function declares must be there.
    """
    kept_B = reward_BG.isfinite().all(1)
    given = {name: inputs[name] if name == "weights_R" else inputs[name][kept_B] for name in declared(function)}
    advantage_BG = torch.zeros_like(reward_BG)
    if kept_B.any():
        advantage_BG[kept_B] = function(reward_BG[kept_B], **given).to(reward_BG.dtype)
    return advantage_BG


# ---------------------------------------------------------------- within a group


@formula("A = (r - mean(r)) / (std(r) + {eps:g}), per group, std over G-{ddof}")
def group_std(reward_BG: Tensor, *, eps: float = 1e-4, ddof: int = 1, single: str = "zero") -> Tensor:
    """A_{b,g} = (r_{b,g} - mean_g r) / (std_g r + ε). DeepSeekMath (arXiv 2402.03300) section 4.1.2.

    The paper gives neither ε nor the std's convention; the published code uses the sample std (ddof 1) and ε = 1e-4.
    A group of one completion gives 0, or r / (1 + ε) with `single="raw"` (verl: mean 0, std 1).
    """
    if single not in ("zero", "raw"):
        raise ValueError(f"advantage.single must be zero or raw, got {single!r}")
    if reward_BG.shape[1] <= ddof:
        return reward_BG / (1 + eps) if single == "raw" else torch.zeros_like(reward_BG)
    centred_BG = _centred(reward_BG)
    return centred_BG / (_std(centred_BG, ddof) + eps)


@formula("A = r - mean(r), per group")
def group_mean(reward_BG: Tensor) -> Tensor:
    """A_{b,g} = r_{b,g} - mean_g r, without the std's difficulty bias. Dr. GRPO (arXiv 2503.20783)."""
    return _centred(reward_BG)


@formula("A = r - mean of the others' r, per group")
def leave_one_out(reward_BG: Tensor) -> Tensor:
    """A_i = r_i - (Σ_{j≠i} r_j)/(G-1) = G/(G-1)·(r_i - mean r). RLOO (arXiv 2402.14740). One completion: 0."""
    n = reward_BG.shape[1]
    return _centred(reward_BG) * (n / max(n - 1, 1))


@formula("A = (r - mean of the others' r) / (std of the others' r + {eps:g}), unscaled where that std is 0")
def leave_one_out_std(reward_BG: Tensor, *, eps: float = 1e-6) -> Tensor:
    """A_i = (r_i - mean_{j≠i} r) / (std_{j≠i} r + ε): mean and sample std of the others only. NeMo-RL's default.

    They do not add up to 0. ε only where the std is above 0; elsewhere (and in groups under 3) the plain difference.
    """
    n = reward_BG.shape[1]
    difference_BG = leave_one_out(reward_BG)
    if n < 3:
        return difference_BG
    others_BGG = reward_BG[:, None, :].expand(-1, n, -1)[:, ~torch.eye(n, dtype=torch.bool)].view(-1, n, n - 1)
    equal_BG = (others_BGG == others_BGG[..., :1]).all(-1)
    std_BG = others_BGG.std(-1, correction=1)
    return torch.where(equal_BG, difference_BG, difference_BG / (std_BG + eps))


@formula("A = (r - mean(r)) / mean(r), per group; 0 where mean(r) is not above 0")
def maxrl(reward_BG: Tensor) -> Tensor:
    """A_i = (r_i - mean r) / mean r. MaxRL (arXiv 2602.02710) algorithm 1, without its 1/N, which the aggregate holds.

    Derived for rewards of 0 and 1: pair it with `rewards=accuracy_only`. A mean of 0 or below gives 0.
    """
    mean_B1 = reward_BG.mean(1, keepdim=True)
    return torch.where(mean_B1 > 0, _centred(reward_BG) / mean_B1.clamp_min(torch.finfo(mean_B1.dtype).tiny), 0.0)


@formula("A = r - Σ T·r / Σ T, per group, T tokens of each completion")
def opo(reward_BG: Tensor, *, tokens_BG: Tensor) -> Tensor:
    """A_i = r_i - Σ_j T_j r_j / Σ_j T_j: the baseline of least variance, if gradients grow with length.

    OPO (arXiv 2505.23585). A group without a token in the loss gets 0.
    """
    tokens_BG = tokens_BG.to(reward_BG.dtype)
    total_B1 = tokens_BG.sum(1, keepdim=True)
    baseline_B1 = (tokens_BG * reward_BG).sum(1, keepdim=True) / total_B1.clamp_min(1)
    return (reward_BG - baseline_B1).masked_fill(_equal(reward_BG) | (total_B1 == 0), 0.0)


def _pass_at_k_formula(*, k: int, **_) -> str:
    alone = f"C(G-c-1,{k - 1})/C(G-1,{k - 1})"
    return f"A = (1 - pass@{k}) / σ if right, (1 - pass@{k} - {alone}) / σ if wrong; c right of G"


@formula(_pass_at_k_formula)
def pass_at_k(reward_BG: Tensor, *, component_BGR: Tensor, k: int = 4, component: int | None = 0,
              threshold: float = 0.5, eps: float = 1e-6) -> Tensor:  # fmt: skip
    """Advantage when every k of the G completions are scored by their best. Pass@k Training (arXiv 2508.10751).

        pass@k = 1 - C(G-c, k)/C(G, k),  σ = sqrt(pass@k (1 - pass@k)) + ε,  c completions of the group are right
        A_right = (1 - pass@k)/σ         A_wrong = (1 - pass@k - C(G-c-1, k-1)/C(G-1, k-1))/σ

    Right: reward component number `component` (the first: accuracy) is above `threshold`; with null, the total is.
    """
    n = reward_BG.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"advantage.pass_at_k: k={k} must be between 1 and generations={n}")
    right_BG = (reward_BG if component is None else component_BGR[..., component]) > threshold
    table = []  # by number of right completions: advantage of a right and of a wrong one
    for c in range(n + 1):
        miss = comb(n - c, k) / comb(n, k)  # 1 - pass@k
        sigma = (miss * (1 - miss)) ** 0.5 + eps
        alone = comb(n - c - 1, k - 1) / comb(n - 1, k - 1) if c < n else 0.0
        table.append((miss / sigma, (miss - alone) / sigma))
    right_B2 = reward_BG.new_tensor(table)[right_BG.sum(1)]
    return torch.where(right_BG, right_B2[:, :1], right_B2[:, 1:])


# ---------------------------------------------------------------- over the whole step


@formula("A = (r - mean(r) per group) / (std(r) over the step + {eps:g}), std over BG-{ddof}")
def batch_std(reward_BG: Tensor, *, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """A = (r - mean_g r) / (std of all rewards + ε). Lite PPO (arXiv 2508.08221); TRL's `scale_rewards="batch"`.

    The std is that of the rewards themselves, not of the centred ones.
    """
    all_1N = reward_BG.reshape(1, -1)
    if all_1N.shape[1] <= ddof:
        return torch.zeros_like(reward_BG)
    return _centred(reward_BG) / (_std(_centred(all_1N), ddof) + eps)


@formula("A = α·(r - mean(r)) per group, α = groups / groups whose rewards differ")
def gpg(reward_BG: Tensor) -> Tensor:
    """A = α (r - mean_g r), α = B / (B - M), M groups all right or all wrong. GPG (arXiv 2504.02546), F_norm = 1.

    α keeps the size of the gradient when many groups teach nothing. (verl's α counts rewards that are not 0 instead.)
    """
    differing = (~_equal(reward_BG)).sum()
    return _centred(reward_BG) * (len(reward_BG) / differing.clamp_min(1))


def _reinforce_pp_formula(*, baseline: bool, eps: float, ddof: int) -> str:
    first = "r - mean(r) per group" if baseline else "r"
    return f"A = {first}, then (A - mean(A)) / sqrt(var(A) + {eps:g}) over all tokens of the step, var over n-{ddof}"


@formula(_reinforce_pp_formula)
def reinforce_pp(reward_BG: Tensor, *, tokens_BG: Tensor, baseline: bool = True, eps: float = 1e-8,
                 ddof: int = 1) -> Tensor:  # fmt: skip
    """Group baseline, then whitening over all TOKENS of the step: a long completion weighs more in mean and variance.

    REINFORCE++ (arXiv 2501.03262), the "w/ baseline" variant; `baseline=False` is the plain one. verl's convention:
    sample variance, ε inside the root. A group of equal rewards gets the common offset, not 0; all rewards equal: 0.
    """
    centred_BG = _centred(reward_BG) if baseline else reward_BG
    return _whiten(centred_BG, tokens_BG.to(reward_BG.dtype), eps, ddof)


@formula("A = Σ_r w_r·(r - mean(r)) / (std(r) + {eps:g}) per group and reward, then (A - mean(A)) / (std(A) + {eps:g}) "
         "over the step, std over n-{ddof}")  # fmt: skip
def gdpo(reward_BG: Tensor, *, component_BGR: Tensor, weights_R: Tensor, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """Each reward normalised in its group, weighted, added, and normalised over the step. GDPO (arXiv 2601.05242).

    ε and ddof as in TRL, at both stages. Differs from `group_std` of the weighted sum: a reward with a small spread
    counts as much as one with a large spread. Equal groups: 0 up to rounding.
    """
    return _per_reward_then(component_BGR, weights_R, eps, ddof, None)


@formula("A = Σ_r w_r·(r - mean(r)) / (std(r) + {eps:g}) per group and reward, "
         "then (A - mean(A)) / sqrt(var(A) + 1e-08) over all tokens of the step")  # fmt: skip
def gdpo_tokens(reward_BG: Tensor, *, component_BGR: Tensor, weights_R: Tensor, tokens_BG: Tensor,
                eps: float = 1e-6) -> Tensor:  # fmt: skip
    """GDPO (arXiv 2601.05242) as verl computes it: the second normalisation runs over tokens, not completions."""
    return _per_reward_then(component_BGR, weights_R, eps, 1, tokens_BG)


def _per_reward_then(
    component_BGR: Tensor, weights_R: Tensor, eps: float, ddof: int, tokens_BG: Tensor | None
) -> Tensor:
    parts = [group_std(r_BG, eps=eps, ddof=ddof) for r_BG in component_BGR.unbind(-1)]
    total_BG = (torch.stack(parts, -1) * weights_R.to(component_BGR.dtype)).sum(-1)
    if tokens_BG is not None:
        return _whiten(total_BG, tokens_BG.to(total_BG.dtype), 1e-8, 1)
    if total_BG.numel() <= ddof:
        return torch.zeros_like(total_BG)
    centred_BG = _centred(total_BG.reshape(1, -1)).view_as(total_BG)
    return centred_BG / (_std(centred_BG.reshape(1, -1), ddof) + eps)


def _equal(reward_BG: Tensor) -> Tensor:
    return (reward_BG == reward_BG[:, :1]).all(1, keepdim=True)


def _centred(reward_BG: Tensor) -> Tensor:
    # Rewards that are all equal centre to exactly 0, not to the rounding error of their mean.
    return (reward_BG - reward_BG.mean(1, keepdim=True)).masked_fill(_equal(reward_BG), 0.0)


def _std(centred_BG: Tensor, ddof: int) -> Tensor:
    return (centred_BG.square().sum(1, keepdim=True) / (centred_BG.shape[1] - ddof)).sqrt()


def _whiten(value_BG: Tensor, tokens_BG: Tensor, eps: float, ddof: int) -> Tensor:
    """(v - mean) / sqrt(var + ε), each completion counted once per token."""
    total = tokens_BG.sum()
    if total <= ddof or (value_BG == value_BG.flatten()[0]).all():
        return torch.zeros_like(value_BG)
    centred_BG = value_BG - (value_BG * tokens_BG).sum() / total
    variance = (centred_BG.square() * tokens_BG).sum() / (total - ddof)
    return centred_BG / (variance + eps).sqrt()
