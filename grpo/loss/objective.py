"""What is optimised. GRPO, DeepSeekMath (arXiv 2402.03300) eq. 3, to be minimised:

    L = aggregate_{i,t} [ - w_{i,t} min(ρ_{i,t} A_i, clip(ρ_{i,t}, 1-ε, 1+ε) A_i) + β k3_{i,t} ]

    ρ_{i,t} = π_θ / π_old  token ratio            A_i     advantage of completion i in its group
    k3      KL estimator against the reference    β       weight of the KL term
    w       detached weights, 1 unless asked for (grpo/loss/weight.py: corrections for the sampler)

Departures from the paper: (1) old = detach(new) when there is one update per rollout, the same gradient without a
second forward pass; (2) the aggregate's denominator is that of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from grpo.batch import LossInputs, LossOutputs
from grpo.loss.formula import describe
from grpo.loss.surrogate import clip_fractions


class Objective:
    """ratio -> surrogate -> · weights -> + beta KL -> aggregate: pure functions chosen in `conf/loss/NAME.yaml`.

    Args:
        beta: weight of the KL term; 0 leaves the reference pass out altogether.
        ratio: (LossInputs) -> ratio_NT
        surrogate: (LossInputs, ratio_NT) -> objective_NT, to be maximised
        kl: (LossInputs, ratio_NT) -> kl_NT
        aggregate: (loss_NT, LossInputs) -> scalar share of the step's loss
        weights: name -> (LossInputs, ratio_NT) -> weight_NT; detached, multiplied, on the policy term only
        mask_truncated: leave completions that the length limit cut out of the loss (they still count as sequences).
    """

    # What each piece is called with: the start-up check binds these against the user's functions.
    calls: ClassVar = {
        "ratio": ("x",),
        "surrogate": ("x", "ratio_NT"),
        "kl": ("x", "ratio_NT"),
        "aggregate": ("loss_NT", "x"),
    }

    def __init__(self, *, beta: float, ratio: Callable, surrogate: Callable, kl: Callable, aggregate: Callable,
                 weights: Mapping[str, Callable] | None = None, mask_truncated: bool = False):  # fmt: skip
        if beta < 0:
            raise ValueError(f"loss.beta must be at least 0, got {beta}")
        self.beta, self.ratio, self.surrogate, self.kl, self.aggregate = beta, ratio, surrogate, kl, aggregate
        self.weights, self.mask_truncated = dict(weights or {}), mask_truncated

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    def __call__(self, x: LossInputs) -> LossOutputs:
        ratio_NT = self.ratio(x)
        loss_NT = -self.surrogate(x, ratio_NT)
        metrics = self._diagnose(x, ratio_NT)
        for name, weight in self.weights.items():
            weight_NT = weight(x, ratio_NT).detach()
            loss_NT = weight_NT * loss_NT
            metrics |= {f"weights/{name}/mean": weight_NT, f"weights/{name}/masked": (weight_NT == 0).float()}
        if self.needs_reference:
            kl_NT = self.kl(x, ratio_NT)
            loss_NT = loss_NT + self.beta * kl_NT
            metrics["kl"] = kl_NT.detach()
        return LossOutputs(self.aggregate(loss_NT, x), loss_NT.detach(), metrics)

    @torch.no_grad()
    def _diagnose(self, x: LossInputs, ratio_NT: Tensor) -> dict[str, Tensor]:
        metrics = {"entropy": x.entropy_NT, "ratio/mean": ratio_NT, "ratio/max": ratio_NT, "ratio/min": ratio_NT}
        clips = getattr(self.surrogate, "keywords", {})
        if {"clip_low", "clip_high"} <= clips.keys():
            metrics |= clip_fractions(x, ratio_NT, clip_low=clips["clip_low"], clip_high=clips["clip_high"])
        return {name: value.detach() for name, value in metrics.items()}

    def describe(self) -> str:
        """The objective as an equation with its numbers, for the first lines of a run."""
        kl = f" + {self.beta:g}·{describe(self.kl)}" if self.needs_reference else ""
        cut = "; completions cut by the length limit are masked" if self.mask_truncated else ""
        policy = "·".join([*(f"w_{name}" for name in self.weights), describe(self.surrogate)])
        lines = [
            f"minimise  {describe(self.aggregate)} of  [ -{policy}{kl} ]",
            f"with      {describe(self.ratio)}{cut}",
            *(f"          w_{name} = {describe(weight)}" for name, weight in self.weights.items()),
        ]
        return "\n".join(lines)
