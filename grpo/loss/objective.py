"""What is optimised: one expression, to be minimised, whose pieces are chosen in `conf/loss/NAME.yaml`.

    L = aggregate_{i,t} [ - w_{i,t} · surrogate(ρ_{i,t}, A_i) + β · kl_{i,t} - α · H_{i,t} ]

    ρ   ratio of the policy to the one before this rollout's updates   grpo/loss/ratio.py
    A   advantage of completion i in its group                         grpo/advantage.py
    surrogate   objective of one token, to be maximised                grpo/loss/surrogate.py
    w   detached weights: sampler mismatch, masks; 1 by default        grpo/loss/weight.py
    kl  estimator against the reference, with weight β                 grpo/loss/kl.py
    H   entropy of the next-token distribution, with weight α          grpo/loss/entropy.py
    aggregate   from tokens to one number                              grpo/loss/aggregate.py

GRPO, DeepSeekMath (arXiv 2402.03300) eq. 3, is  mean_i mean_t [ -min(ρ A, clip(ρ, 1-ε, 1+ε) A) + β k3 ].

Departures from the papers, for all variants: (1) old = detach(new) when there is one update per rollout, the same
gradient without a second forward pass; (2) an aggregate's denominator is that of the whole optimizer step;
(3) log-ratios inside exponentials are held within ±20.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from grpo.batch import LossInputs, LossOutputs
from grpo.loss.formula import arguments, describe, plain
from grpo.loss.surrogate import clip_fractions


class Objective:
    """ratio -> surrogate -> · weights -> + beta KL -> - entropy bonus -> aggregate. Each piece is a pure function.

    Args:
        beta: weight of the KL term; 0 leaves the reference pass out altogether.
        ratio: (LossInputs) -> ratio_NT
        surrogate: (LossInputs, ratio_NT) -> objective_NT, to be maximised
        kl: (LossInputs, ratio_NT) -> kl_NT
        aggregate: (loss_NT, LossInputs) -> scalar share of the step's loss
        weights: name -> (LossInputs, ratio_NT) -> weight_NT; detached, multiplied, on the policy term only
        kl_in: "loss", or "reward": then the loop takes `kl_penalty` off each completion's reward instead
        entropy: bonus of grpo/loss/entropy.py, or None
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
                 weights: Mapping[str, Callable] | None = None, kl_in: str = "loss", entropy=None,
                 mask_truncated: bool = False):  # fmt: skip
        if beta < 0:
            raise ValueError(f"loss.beta must be at least 0, got {beta}")
        if kl_in not in ("loss", "reward"):
            raise ValueError(f"loss.kl_in must be loss or reward, got {kl_in!r}")
        self.beta, self.ratio, self.surrogate, self.kl, self.aggregate = beta, ratio, surrogate, kl, aggregate
        self.weights, self.kl_in, self.entropy = dict(weights or {}), kl_in, entropy
        self.mask_truncated = mask_truncated
        for name, weight in self.weights.items():
            try:
                inspect.signature(weight).bind("x", "ratio_NT")
            except TypeError as error:
                raise ValueError(f"weights.{name}: {plain(weight).__name__}(x, ratio_NT): {error}") from error

    # ---------------------------------------------------------------- what the loop has to provide

    @property
    def needs_reference(self) -> bool:
        """Whether `ref_logp_NT` is read."""
        return self.beta > 0

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether `entropy_NT` must carry a gradient in this step (an adaptive bonus may be off for a while)."""
        return self.entropy is not None and self.entropy.coefficient > 0

    @property
    def entropy_quantile(self) -> float | None:
        """Quantile of the step's token entropies that `x.entropy_cut` must hold; None when no weight reads it."""
        shares = [arguments(w)["share"] for w in self.weights.values() if hasattr(plain(w), "needs_entropy_cut")]
        return 1 - max(shares) if shares else None

    @property
    def invariant(self) -> bool:
        """Whether splitting a step into micro-batches leaves loss and gradient unchanged; all but BNPO are."""
        return getattr(plain(self.aggregate), "invariant", True)

    # ---------------------------------------------------------------- the loss

    def __call__(self, x: LossInputs) -> LossOutputs:
        x = _without_masked(x)
        ratio_NT = self.ratio(x)
        weights = {name: weight(x, ratio_NT).detach() for name, weight in self.weights.items()}
        loss_NT = -self.surrogate(x, ratio_NT)
        for weight_NT in weights.values():
            loss_NT = weight_NT * loss_NT
        metrics = self._diagnose(x, ratio_NT, weights)
        if self.needs_reference:
            kl_NT = self.kl(x, ratio_NT)
            metrics["kl"] = kl_NT.detach()
            if self.kl_in == "loss":
                loss_NT = loss_NT + self.beta * kl_NT
        if self.needs_entropy_gradient:
            if x.logp_NT.requires_grad and not x.entropy_NT.requires_grad:
                raise ValueError("the entropy bonus needs entropy_NT with its gradient, and got it without")
            loss_NT = loss_NT - self.entropy.coefficient * x.entropy_NT
        return LossOutputs(self.aggregate(loss_NT, x), loss_NT.detach(), metrics)

    @torch.no_grad()
    def kl_penalty(self, logp_NT: Tensor, ref_logp_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """β Σ_t kl_{i,t} [N], to be taken off each completion's reward before advantages when `kl_in` is "reward".

        `logp_NT` is that of the policy which sampled: with k1 this is r - β log π_old(o)/π_ref(o), as in RLHF.
        """
        zeros_NT = torch.zeros_like(logp_NT)
        x = LossInputs(logp_NT, logp_NT, logp_NT, ref_logp_NT, zeros_NT, zeros_NT.sum(-1), mask_NT,
                       float(mask_NT.sum()), float(len(logp_NT)))  # fmt: skip
        x = _without_masked(x)
        return self.beta * self.kl(x, self.ratio(x)).masked_fill(~mask_NT, 0.0).sum(-1)

    # ---------------------------------------------------------------- what is logged

    @torch.no_grad()
    def _diagnose(self, x: LossInputs, ratio_NT: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ratio_NT = ratio_NT.detach()
        metrics = {"entropy": x.entropy_NT.detach(), "ratio/mean": ratio_NT, "ratio/max": ratio_NT,
                   "ratio/min": ratio_NT}  # fmt: skip
        for name, weight_NT in weights.items():
            metrics[f"weights/{name}/mean"] = weight_NT
            metrics[f"weights/{name}/masked"] = (weight_NT == 0).float()
        values = arguments(self.surrogate)
        if hasattr(plain(self.surrogate), "metrics"):
            metrics |= plain(self.surrogate).metrics(x, ratio_NT, **values)
        elif {"clip_low", "clip_high"} <= values.keys():  # a user's surrogate that clips as ours do
            metrics |= clip_fractions(x, ratio_NT, clip_low=values["clip_low"], clip_high=values["clip_high"])
        return metrics

    def describe(self) -> str:
        """The objective as an equation with its numbers, for the first lines of a run."""
        weights = "·".join(f"w_{name}" for name in self.weights)
        kl = f" + {self.beta:g}·{describe(self.kl)}" if self.needs_reference and self.kl_in == "loss" else ""
        bonus = f" - {self.entropy.describe()}" if self.entropy else ""
        policy = describe(self.surrogate)
        lines = [
            f"minimise  {describe(self.aggregate)} of  [ -{f'{weights}·({policy})' if weights else policy}{kl}{bonus} ]"
        ]
        cut = "; completions cut by the length limit are masked" if self.mask_truncated else ""
        lines.append(f"with      {describe(self.ratio)}{cut}")
        lines += [f"          w_{name} = {describe(weight)}" for name, weight in self.weights.items()]
        if self.needs_reference and self.kl_in == "reward":
            lines.append(f"          {self.beta:g}·Σ_t {describe(self.kl)} taken off each completion's reward")
        return "\n".join(lines)


def _without_masked(x: LossInputs) -> LossInputs:
    """Zeros where the mask is False: whatever stood there, it reaches neither a value nor a gradient."""
    names = ("logp_NT", "old_logp_NT", "sampler_logp_NT", "ref_logp_NT", "entropy_NT")
    return replace(x, **{name: torch.where(x.mask_NT, getattr(x, name), 0.0) for name in names
                         if getattr(x, name) is not None})  # fmt: skip
