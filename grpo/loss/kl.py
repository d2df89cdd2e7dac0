"""Estimators of KL(π_θ ‖ π_ref) from the sampled token alone, per token [N, T] (Schulman 2020, "Approximating KL").

With d = log π_θ - log π_ref. They agree on average as VALUES; as losses their gradients differ (derivation: take
E_π[∇k]): k1's is 0 on average, k2's is ∇KL(π_θ ‖ π_ref), k3's is ∇KL(π_ref ‖ π_θ), ρ·k3's is ∇KL(π_θ ‖ π_ref).
d is held within ±limit where it stands in an exponential (verl's 20): finite, with gradient 0 beyond.
"""

from __future__ import annotations

from torch import Tensor

from grpo.batch import LossInputs
from grpo.loss.formula import formula
from grpo.loss.ratio import token


def _gap(x: LossInputs) -> Tensor:
    return x.logp_NT - x.ref_logp_NT


@formula("log(π/π_ref)")
def k1(x: LossInputs, ratio_NT: Tensor) -> Tensor:
    """k1 = d. Unbiased, noisy, may be negative. Made for the reward (`kl_in: reward`).

    In the loss its gradient is ∇log π for every token, right or wrong: 0 on average, noise in a sample.
    """
    return _gap(x)


k1.zero_only_on_average = True  # its gradient does not vanish at π = π_ref: checks of that kind leave it out


@formula("log²(π/π_ref)/2")
def k2(x: LossInputs, ratio_NT: Tensor) -> Tensor:
    """k2 = d²/2. As a loss its gradient is that of KL(π_θ ‖ π_ref) on average, on-policy."""
    return _gap(x).square() / 2


@formula("(π_ref/π - log(π_ref/π) - 1)")
def k3(x: LossInputs, ratio_NT: Tensor, *, limit: float = 20.0) -> Tensor:
    """k3 = exp(-d) + d - 1, never negative. DeepSeekMath (arXiv 2402.03300) eq. 4.

    As a loss its gradient is that of KL(π_ref ‖ π_θ) on average, not of KL(π_θ ‖ π_ref): the published choice.
    """
    d_NT = _gap(x).clamp(-limit, limit)
    return (-d_NT).exp() + d_NT - 1


@formula("(π/π_old)·(π_ref/π - log(π_ref/π) - 1)")
def k3_unbiased(x: LossInputs, ratio_NT: Tensor, *, limit: float = 20.0) -> Tensor:
    """(π_θ/π_old) k3, with gradient through both factors. DeepSeek-V3.2 (arXiv 2512.02556), "unbiased KL estimate".

    Gradient that of KL(π_θ ‖ π_ref) on average, also off-policy. Always the token's ratio, whatever the surrogate uses.
    """
    return token(x, limit=limit) * k3(x, ratio_NT, limit=limit)


@formula("k3 = (π_ref/π - log(π_ref/π) - 1), with the gradient of k2 = log²(π/π_ref)/2")
def k3_plus(x: LossInputs, ratio_NT: Tensor, *, limit: float = 20.0) -> Tensor:
    """k3's value with k2's gradient (straight-through); verl calls it "k3+"."""
    return _straight_through(k3(x, ratio_NT, limit=limit), k2(x, ratio_NT))


@formula("k1 = log(π/π_ref), with the gradient of k2 = log²(π/π_ref)/2")
def k1_plus(x: LossInputs, ratio_NT: Tensor) -> Tensor:
    """k1's value with k2's gradient (straight-through); verl calls it "k1+"."""
    return _straight_through(k1(x, ratio_NT), k2(x, ratio_NT))


def _straight_through(value_NT: Tensor, gradient_NT: Tensor) -> Tensor:
    return value_NT.detach() + gradient_NT - gradient_NT.detach()
