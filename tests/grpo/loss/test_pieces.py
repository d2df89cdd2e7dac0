"""Golden values of each small function, worked by hand."""

from dataclasses import replace

import pytest
import torch

from grpo.batch import LossInputs
from grpo.loss import aggregate, kl, ratio, surrogate


def inputs(rho=(1.0,), advantage=1.0, d=0.0, mask=None, n_tokens=None, n_sequences=1.0):
    """One completion whose tokens have importance ratios `rho` and log-ratio d to the reference."""
    logp = torch.tensor([rho], dtype=torch.float64).log()
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else torch.tensor([mask])
    zeros = torch.zeros_like(logp)
    return LossInputs(logp, zeros, zeros, logp - d, zeros, torch.tensor([advantage], dtype=torch.float64), mask,
                      float(mask.sum()) if n_tokens is None else n_tokens, n_sequences)  # fmt: skip


@pytest.mark.parametrize(
    ("rho", "a", "high", "expected"),
    [
        (0.5, 1, 0.2, 0.5),  # min(0.5, 0.8) = 0.5
        (0.5, -1, 0.2, -0.8),  # min(-0.5, -0.8) = -0.8
        (1.5, 1, 0.2, 1.2),  # min(1.5, 1.2) = 1.2
        (1.5, -1, 0.2, -1.5),  # min(-1.5, -1.2) = -1.5
        (1.5, 1, 0.28, 1.28),  # clip-higher
    ],
)
def test_clipped_surrogate(rho, a, high, expected):
    x = inputs([rho], a)
    assert surrogate.clipped(x, ratio.token(x), clip_low=0.2, clip_high=high).item() == pytest.approx(
        expected, abs=1e-12
    )


def test_clip_fraction_counts_only_where_the_clip_binds():
    # ρ: below, inside, above. With A > 0 only the upper clip stops the gradient, with A < 0 only the lower one.
    for a, low, high in [(1.0, [0, 0, 0], [0, 0, 1]), (-1.0, [1, 0, 0], [0, 0, 0])]:
        x = inputs([0.5, 1.0, 1.5], a)
        got = surrogate.clip_fractions(x, ratio.token(x), clip_low=0.2, clip_high=0.2)
        assert got["clip_ratio/low_mean"][0].tolist() == low
        assert got["clip_ratio/high_mean"][0].tolist() == high


@pytest.mark.parametrize(("d", "expected"), [(0.2, 0.0187308), (-0.2, 0.0214028), (0.0, 0.0)])
def test_k3(d, expected):
    # exp(-0.2) + 0.2 - 1 = 0.8187308 - 0.8;  exp(0.2) - 0.2 - 1 = 1.2214028 - 1.2
    x = inputs([1.0], d=d)
    assert kl.k3(x, ratio.token(x)).item() == pytest.approx(expected, abs=1e-7)


# Three completions of 2, 4 and 6 tokens with per-token losses 1, -1 and 0.5.
LOSS = torch.zeros(3, 6, dtype=torch.float64)
MASK = torch.zeros(3, 6, dtype=torch.bool)
for i, (n, value) in enumerate([(2, 1.0), (4, -1.0), (6, 0.5)]):
    LOSS[i, :n] = value
    MASK[i, :n] = True
THREE = replace(inputs(), mask_NT=MASK, n_tokens=12.0, n_sequences=3.0)


def test_aggregates():
    # sequence means 1, -1, 0.5 -> 0.5/3 = 1/6; token sum 2 - 4 + 3 = 1 -> 1/12; constant 8: 1/(3*8) = 1/24
    assert aggregate.sequence_mean(LOSS, THREE).item() == pytest.approx(1 / 6, abs=1e-12)
    assert aggregate.token_mean(LOSS, THREE).item() == pytest.approx(1 / 12, abs=1e-12)
    assert aggregate.constant(LOSS, THREE, length=8).item() == pytest.approx(1 / 24, abs=1e-12)


@pytest.mark.parametrize("name", ["sequence_mean", "token_mean", "constant"])
def test_masked_positions_have_no_influence_even_when_not_finite(name):
    poisoned = LOSS.masked_fill(~MASK, float("nan"))
    extra = {"length": 8} if name == "constant" else {}
    function = getattr(aggregate, name)
    assert function(poisoned, THREE, **extra).item() == function(LOSS, THREE, **extra).item()


@pytest.mark.parametrize("name", ["sequence_mean", "token_mean", "constant"])
def test_nothing_but_masked_tokens_is_zero_with_zero_gradient(name):
    loss = LOSS.clone().requires_grad_()
    x = replace(THREE, mask_NT=torch.zeros_like(MASK), n_tokens=0.0)
    extra = {"length": 8} if name == "constant" else {}
    out = getattr(aggregate, name)(loss, x, **extra)
    out.backward()
    assert out.item() == 0.0 and (loss.grad == 0).all()
