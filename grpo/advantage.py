"""Advantages: rewards [B, G] of B questions with G completions each -> advantages [B, G]. Pure functions."""

from __future__ import annotations

from torch import Tensor

from grpo.loss.formula import formula


@formula("A = (r - mean(r)) / (std(r) + {eps:g}), per group, std over G-{ddof}")
def group_std(reward_BG: Tensor, *, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """A_{b,g} = (r_{b,g} - mean_g r) / (std_g r + ε). DeepSeekMath (arXiv 2402.03300) section 4.1.2.

    The paper gives neither ε nor the std's convention; the published code uses the sample std (ddof 1) and ε = 1e-4.
    A group of equal rewards, or of one completion, gives exactly 0.
    """
    centred_BG = _centred(reward_BG)
    n = reward_BG.shape[1]
    if n <= ddof:
        return centred_BG * 0.0
    std_B1 = (centred_BG.square().sum(1, keepdim=True) / (n - ddof)).sqrt()
    return centred_BG / (std_B1 + eps)


@formula("A = r - mean(r), per group")
def group_mean(reward_BG: Tensor) -> Tensor:
    """A_{b,g} = r_{b,g} - mean_g r, without the std's difficulty bias. Dr. GRPO (arXiv 2503.20783)."""
    return _centred(reward_BG)


def _centred(reward_BG: Tensor) -> Tensor:
    # Rewards that are all equal centre to exactly 0, not to the rounding error of their mean.
    equal_B1 = (reward_BG == reward_BG[:, :1]).all(1, keepdim=True)
    return (reward_BG - reward_BG.mean(1, keepdim=True)).masked_fill(equal_B1, 0.0)
