"""Pictures of losses: the objective of one token and its pull on log π, against the ratio, for A = +1 and A = -1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grpo.batch import LossInputs
from grpo.loss.formula import arguments

COLOURS = {1.0: "#0b6e99", -1.0: "#b3471d"}  # told apart by colour-blind readers too; lines differ in style as well


@dataclass(frozen=True)
class Curve:
    """What one token contributes, at each ratio of the grid: objective (to be maximised) and d objective / d log π."""

    ratio: np.ndarray
    objective: np.ndarray
    pull: np.ndarray


def one_token_each(n: int, **given: Tensor) -> LossInputs:
    """n completions of one token, all log-probs 0 but those given: the sum over rows is the loss."""
    zero_NT = torch.zeros(n, 1, dtype=torch.float64)
    x = LossInputs(zero_NT, zero_NT, zero_NT, zero_NT, zero_NT, torch.ones(n, dtype=torch.float64),
                   torch.ones(n, 1, dtype=torch.bool), 1.0, 1.0, 1, 1.0, 0.0)  # fmt: skip
    return replace(x, **given)


def curve(loss, advantage: float, ratio: np.ndarray) -> Curve:
    """Curve of one loss, without its KL and entropy terms; log π_old = 0. A completion has one token here.

    A whole objective of a user's own is drawn with its reference at the policy.
    """
    logp_NT = torch.from_numpy(np.log(ratio))[:, None].requires_grad_()
    x = one_token_each(len(ratio), logp_NT=logp_NT, ref_logp_NT=logp_NT.detach(),
                       advantage_N=torch.full((len(ratio),), advantage, dtype=torch.float64))  # fmt: skip
    if hasattr(loss, "surrogate"):
        ratio_NT = loss.ratio(x)
        objective_NT = loss.surrogate(x, ratio_NT)
        for weight in loss.weights.values():
            objective_NT = weight(x, ratio_NT).detach() * objective_NT
        (pull_NT,) = torch.autograd.grad(objective_NT.sum(), logp_NT)
    else:
        out = loss(x)
        objective_NT = -out.per_token_NT
        pull_NT = -torch.autograd.grad(out.loss, logp_NT)[0]
    return Curve(ratio, objective_NT.detach()[:, 0].numpy(), pull_NT[:, 0].numpy())


def grid(loss, points: int = 161) -> np.ndarray:
    """Ratios worth drawing: a little beyond the widest bound that the surrogate has, or around a very narrow clip."""
    values = arguments(loss.surrogate) if hasattr(loss, "surrogate") else {}
    if values.get("clip_high", 1.0) < 0.01:
        width = 3 * max(values["clip_low"], values["clip_high"])
        return np.linspace(1 - width, 1 + width, points)
    bounds = [values[name] for name in ("cap", "delta", "bound_high") if name in values]
    return np.linspace(0.02, 1.25 * max([2.0, *bounds]), points)


def draw(loss, path: Path) -> None:
    """Two panels for the policy term; a third for weights or the KL term, if there are any. SVG or PNG by the name."""
    third = _third_panel(loss)
    figure, panels = _figure(3 if third else 2)
    x = grid(loss)
    for a, style in ((1.0, "-"), (-1.0, "--")):
        c = curve(loss, a, x)
        panels[0].plot(c.ratio, c.objective, style, color=COLOURS[a], label=f"A = {a:+.0f}")
        panels[1].plot(c.ratio, c.pull, style, color=COLOURS[a], label=f"A = {a:+.0f}")
    _dress(panels[0], "objective of a token", "ratio π/π_old")
    _dress(panels[1], "its gradient by log π", "ratio π/π_old")
    if third:
        third(panels[2])
    _save(figure, path)


def side_by_side(losses: Mapping[str, object], path: Path) -> None:
    """One row of two panels per loss, on the first one's grid and with shared axes."""
    x = grid(next(iter(losses.values())))
    figure, panels = _figure(2, len(losses))
    for row, (name, loss) in zip(np.atleast_2d(panels), losses.items(), strict=True):
        for a, style in ((1.0, "-"), (-1.0, "--")):
            c = curve(loss, a, x)
            row[0].plot(c.ratio, c.objective, style, color=COLOURS[a], label=f"A = {a:+.0f}")
            row[1].plot(c.ratio, c.pull, style, color=COLOURS[a], label=f"A = {a:+.0f}")
        _dress(row[0], f"{name}: objective of a token", "ratio π/π_old")
        _dress(row[1], f"{name}: its gradient by log π", "ratio π/π_old")
    _save(figure, path)


def _third_panel(loss):
    if getattr(loss, "weights", None):
        sampled = {"entropy": "token's entropy minus the step's cut (nats)"}

        def weights(panel):
            x = np.linspace(-2.2, 2.2, 161)
            shift_NT = torch.from_numpy(x)[:, None]
            for name, weight in loss.weights.items():
                for a, style in ((1.0, "-"), (-1.0, "--")):
                    inputs = one_token_each(len(x), advantage_N=torch.full((len(x),), a, dtype=torch.float64),
                                            sampler_logp_NT=-shift_NT, entropy_NT=shift_NT)  # fmt: skip
                    panel.plot(x, weight(inputs, torch.ones_like(shift_NT))[:, 0], style, color=COLOURS[a],
                               label=f"A = {a:+.0f}")  # fmt: skip
                _dress(panel, "weight of a token", sampled.get(name, "log(π_old/π_sampler)"), one=0.0)

        return weights
    if getattr(loss, "needs_reference", False):

        def kl(panel):
            d_NT = torch.linspace(-1.5, 1.5, 161, dtype=torch.float64)[:, None].requires_grad_()
            x = one_token_each(len(d_NT), logp_NT=d_NT, old_logp_NT=d_NT.detach())
            kl_NT = loss.kl(x, loss.ratio(x))
            (slope_NT,) = torch.autograd.grad(kl_NT.sum(), d_NT)
            d = d_NT.detach()[:, 0]
            panel.plot(d, kl_NT.detach()[:, 0], "-", color="#555555", label="value")
            panel.plot(d, slope_NT[:, 0], ":", color="#7a2d8c", label="gradient by log π")
            _dress(panel, "KL term, before β", "log(π/π_ref)", one=0.0)

        return kl
    return None


def _figure(columns: int, rows: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text and ids do not change: small files, and the same file every time.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "loss", "font.size": 8})
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(3.1 * columns, 2.3 * rows), layout="constrained", squeeze=rows == 1)


def _dress(panel, title: str, label: str, one: float = 1.0) -> None:
    panel.axvline(one, color="#bbbbbb", linewidth=0.7, zorder=0)
    panel.axhline(0, color="#bbbbbb", linewidth=0.7, zorder=0)
    panel.set_title(title, fontsize=8)
    panel.set_xlabel(label)
    panel.ticklabel_format(useOffset=False)
    panel.locator_params(axis="x", nbins=5)
    panel.legend(frameon=False, fontsize=7)


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110, metadata={"Date": None} if str(path).endswith(".svg") else None)
    pyplot.close(figure)
