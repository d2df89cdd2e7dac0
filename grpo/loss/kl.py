"""Estimators of KL(π_θ ‖ π_ref) from the sampled token alone, per token [N, T] (Schulman 2020, "Approximating KL")."""

from __future__ import annotations

from torch import Tensor

from grpo.batch import LossInputs
from grpo.loss.formula import formula


@formula("(π_ref/π - log(π_ref/π) - 1)")
def k3(x: LossInputs, ratio_NT: Tensor) -> Tensor:
    """k3 = exp(-d) + d - 1 with d = log π_θ - log π_ref; never negative. DeepSeekMath (arXiv 2402.03300) eq. 4.

    As a loss its gradient is that of KL(π_ref ‖ π_θ) on average, not of KL(π_θ ‖ π_ref): the published choice.
    """
    d_NT = x.logp_NT - x.ref_logp_NT
    return (-d_NT).exp() + d_NT - 1
