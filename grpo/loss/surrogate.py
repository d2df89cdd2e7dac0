"""Policy-gradient surrogates: per-token objectives [N, T], to be MAXIMISED."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.batch import LossInputs
from grpo.loss.formula import formula


@formula("min(ρ·A, clip(ρ, 1-{clip_low}, 1+{clip_high})·A)")
def clipped(x: LossInputs, ratio_NT: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """PPO's clipped surrogate [N, T]:  J = min(ρ·A, clip(ρ, 1-ε_low, 1+ε_high)·A).

    PPO (arXiv 1707.06347) eq. 7; DeepSeekMath (arXiv 2402.03300) eq. 3 with ε_low = ε_high.
    """
    advantage_N1 = x.advantage_N[:, None]
    bounded_NT = ratio_NT.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio_NT * advantage_N1, bounded_NT * advantage_N1)


def clip_fractions(x: LossInputs, ratio_NT: Tensor, *, clip_low: float, clip_high: float) -> dict[str, Tensor]:
    """Where the clip BINDS, that is where it stops the gradient: low for A < 0, high for A > 0 (indicator [N, T])."""
    advantage_N1 = x.advantage_N[:, None]
    low_NT = (ratio_NT < 1 - clip_low) & (advantage_N1 < 0)
    high_NT = (ratio_NT > 1 + clip_high) & (advantage_N1 > 0)
    return {"clip_ratio/low_mean": low_NT.float(), "clip_ratio/high_mean": high_NT.float()}
