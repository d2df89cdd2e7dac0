"""Importance ratio between the current policy and the policy that started the rollout's updates."""

from __future__ import annotations

from torch import Tensor

from grpo.batch import LossInputs
from grpo.loss.formula import formula


@formula("ρ = π(o_t) / π_old(o_t)")
def token(x: LossInputs) -> Tensor:
    """Token-level ratio [N, T]:  ρ_{i,t} = π_θ(o_{i,t}) / π_old(o_{i,t}).

    DeepSeekMath (arXiv 2402.03300) eq. 3. With one update per rollout old = detach(new): ρ is 1, its gradient is not 0.
    """
    return (x.logp_NT - x.old_logp_NT).exp()
