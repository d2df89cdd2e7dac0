"""Golden values of each small function, worked by hand; the arithmetic stands above the assertion."""

from dataclasses import replace
from math import exp, log

import pytest
import torch

from grpo.batch import LossInputs, Needs, needs, quantile
from grpo.loss import aggregate, kl, ratio, surrogate, weight
from grpo.losscheck import made_up
from grpo.lossdocs import ROOT, built

F = torch.float64


def inputs(rho=(1.0,), advantage=1.0, d=0.0, mismatch=0.0):
    """One completion whose tokens have importance ratios `rho`, log-ratio d to the reference, old/sampler e^m."""
    logp = torch.tensor([rho], dtype=F).log()
    zeros = torch.zeros_like(logp)
    return LossInputs(logp, zeros, zeros - mismatch, logp - d, zeros, torch.tensor([advantage], dtype=F),
                      torch.ones_like(logp, dtype=torch.bool), float(len(rho)), 1.0, 1, 1.0)  # fmt: skip


def values(function, x, **hyper):
    return function(x, ratio.token(x), **hyper)[0].tolist()


def slope(function, x, **hyper):
    """d objective / d log π of each token, by backward."""
    leaf = x.logp_NT.clone().requires_grad_()
    x = replace(x, logp_NT=leaf)
    function(x, ratio.token(x), **hyper).sum().backward()
    return leaf.grad[0].tolist()


# ---------------------------------------------------------------- ratios


def test_ratios():
    # log-ratios 0.3, 0.1 and, outside the mask, 5: tokens e^0.3, e^0.1; sequence e^0.2 at both
    x = replace(inputs([exp(0.3), exp(0.1), exp(5.0)]), mask_NT=torch.tensor([[True, True, False]]))
    assert ratio.token(x)[0, :2].tolist() == pytest.approx([exp(0.3), exp(0.1)])
    assert ratio.sequence(x)[0, :2].tolist() == pytest.approx([exp(0.2), exp(0.2)])
    assert ratio.sequence_token(x)[0, :2].tolist() == pytest.approx([exp(0.2), exp(0.2)])


def test_a_sequence_ratio_shares_its_gradient_and_gspo_token_does_not():
    # ∂ e^{(a+b)/2} / ∂a = e^{0.2} / 2 for each token of `sequence`; of `sequence_token` token 0 has e^0.2, 1 nothing
    for function, expected in [(ratio.sequence, [exp(0.2) / 2] * 2), (ratio.sequence_token, [exp(0.2), 0.0])]:
        leaf = torch.tensor([[0.3, 0.1]], dtype=F, requires_grad=True)
        function(replace(inputs([1.0, 1.0]), logp_NT=leaf))[0, 0].backward()
        assert leaf.grad[0].tolist() == pytest.approx(expected)


def test_log_ratios_are_held_within_20():
    x = replace(inputs([1.0, 1.0]), logp_NT=torch.tensor([[500.0, -500.0]], dtype=torch.float32))
    assert ratio.token(x)[0].tolist() == pytest.approx([exp(20), exp(-20)], rel=1e-5)


# ---------------------------------------------------------------- surrogates


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
def test_clipped(rho, a, high, expected):
    assert values(surrogate.clipped, inputs([rho], a), clip_high=high) == pytest.approx([expected], abs=1e-12)


def test_dual_clip_and_two_sided():
    # ρ = 5: A = -1: min(-5, -1.2) = -5, held at c·A = -3; two-sided: min(3, ρ)·A = -3. A = +1: 1.2 for both.
    for name, hyper in [("dual_clip", {"cap": 3.0}), ("two_sided", {"delta": 3.0})]:
        function = getattr(surrogate, name)
        assert values(function, inputs([5.0, 2.0], -1.0), **hyper) == pytest.approx([-3.0, -2.0])
        assert values(function, inputs([5.0], 1.0), **hyper) == pytest.approx([1.2])
        assert slope(function, inputs([5.0, 2.0], -1.0), **hyper) == pytest.approx([0.0, -2.0])
    with pytest.raises(ValueError, match="must be above 1"):
        surrogate.two_sided(inputs(), torch.ones(1, 1), delta=1.1)


def test_cispo():
    # ρ = 8 weighs 5: J = 5·A·log 8 with gradient 5·A, not 0; ρ = 0.5 keeps its 0.5
    x = inputs([8.0, 0.5], -2.0)
    assert values(surrogate.cispo, x) == pytest.approx([5 * -2 * log(8), 0.5 * -2 * log(0.5)])
    assert slope(surrogate.cispo, x) == pytest.approx([-10.0, -1.0])
    assert slope(surrogate.cispo, x, bound_low=0.8, bound_high=1.28) == pytest.approx([-2.56, -1.6])


def test_sapo():
    # at ρ = 1: (4/τ)·σ(0) = 2/τ, slope 4σ'(0) = 1. At ρ = 2, τ = 1: 4σ(1) = 2.924234; slope by log π: 2·4·σ(1)(1-σ(1))
    assert values(surrogate.sapo, inputs([1.0], 1.0)) == pytest.approx([2.0])
    assert values(surrogate.sapo, inputs([1.0], -1.0)) == pytest.approx([-2 / 1.05])
    assert (
        slope(surrogate.sapo, inputs([1.0], 1.0)) == slope(surrogate.sapo, inputs([1.0], 1.0)) == pytest.approx([1.0])
    )
    assert values(surrogate.sapo, inputs([2.0], 1.0)) == pytest.approx([2.924234], abs=1e-6)
    assert slope(surrogate.sapo, inputs([2.0], 1.0)) == pytest.approx([2 * 4 * 0.731059 * 0.268941], abs=1e-5)


def test_vespo():
    # W = 1.25·1.6 = 2. A > 0: 2²·e^{3(1-2)} = 4 e^-3 = 0.199148; A < 0: 2³·e^{2(1-2)} = 8 e^-2 = 1.082682. φ(1) = 1.
    rho = [1.25, 1.6]
    assert slope(surrogate.vespo, inputs(rho, 1.0)) == pytest.approx([0.199148] * 2, abs=1e-6)
    assert slope(surrogate.vespo, inputs(rho, -1.0)) == pytest.approx([-1.082682] * 2, abs=1e-6)
    assert slope(surrogate.vespo, inputs([1.0], 1.0)) == pytest.approx([1.0])


def test_reinforce():
    assert slope(surrogate.reinforce, inputs([0.3, 7.0], -1.5)) == [-1.5, -1.5]


def test_gmpo():
    # A = 2, ρ = 2, 0.5: log-ratios 0.6931 (clipped to 0.4), -0.6931 (not: the minimum takes the lower): mean -0.1466
    # J = 2·e^-0.146574 = 1.727324 at both tokens
    x = inputs([2.0, 0.5], 2.0)
    assert values(surrogate.gmpo, x) == pytest.approx([2 * exp((0.4 - log(2)) / 2)] * 2)
    assert values(surrogate.gmpo, x)[0] == pytest.approx(1.727324, abs=1e-6)


def test_on_policy_all_pull_alike():
    # at ρ = 1 the pull on log π is A for every surrogate: with one update per rollout they are the same policy gradient
    for name in ("clipped", "dual_clip", "two_sided", "cispo", "sapo", "vespo", "reinforce", "gmpo"):
        for a in (1.5, -0.5):
            assert slope(getattr(surrogate, name), inputs([1.0], a)) == pytest.approx([a]), name


def test_clip_fraction_counts_only_where_the_clip_binds():
    # ρ: below, inside, above. With A > 0 only the upper clip stops the gradient, with A < 0 only the lower one.
    for a, low, high in [(1.0, [0, 0, 0], [0, 0, 1]), (-1.0, [1, 0, 0], [0, 0, 0])]:
        x = inputs([0.5, 1.0, 1.5], a)
        got = surrogate.clip_fractions(x, ratio.token(x), clip_low=0.2, clip_high=0.2)
        assert got["clip_ratio/low_mean"][0].tolist() == low
        assert got["clip_ratio/high_mean"][0].tolist() == high
        stopped = [g == 0 for g in slope(surrogate.clipped, x)]
        assert got["clip_ratio/region_mean"][0].tolist() == stopped


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("dual_clip", "clip_ratio/cap_mean", [0, 0, 1]),  # above 3 with A < 0
        ("two_sided", "clip_ratio/cap_mean", [0, 0, 1]),  # above 4 with A < 0
        ("cispo", "cispo_clip_ratio", [0, 0, 1]),  # above 5
        ("gmpo", "clip_ratio/low_mean", [1, 0, 0]),  # below e^-0.4 with A < 0
        ("vespo", "vespo/phi_seq_mean", [0, 0, 0]),  # W = 6: 6³ e^-10 = 0.0098, to the nearest integer
    ],
)
def test_metrics_of_surrogates(name, key, expected):
    from grpo.loss.formula import arguments

    function, x = getattr(surrogate, name), inputs([0.5, 2.0, 6.0], -1.0)
    got = function.metrics(x, ratio.token(x), **arguments(function))[key]
    assert [round(v) for v in got[0].tolist()] == expected


# ---------------------------------------------------------------- KL


@pytest.mark.parametrize(
    ("d", "k1", "k2", "k3"),
    [
        (0.2, 0.2, 0.02, 0.0187308),  # exp(-0.2) + 0.2 - 1 = 0.8187308 - 0.8
        (-0.2, -0.2, 0.02, 0.0214028),  # exp(0.2) - 0.2 - 1 = 1.2214028 - 1.2
        (0.0, 0.0, 0.0, 0.0),
    ],
)
def test_kl_estimators(d, k1, k2, k3):
    x = inputs([1.0], d=d)
    got = {name: values(getattr(kl, name), x)[0] for name in ("k1", "k2", "k3", "k1_plus", "k3_plus", "k3_unbiased")}
    expected = {"k1": k1, "k2": k2, "k3": k3, "k1_plus": k1, "k3_plus": k3, "k3_unbiased": k3}
    assert got == pytest.approx(expected, abs=1e-7)


def test_kl_gradients_by_hand():
    # by log π at d = 0.2, ρ = 1: k1 1; k2 d = 0.2; k3 1 - e^-0.2 = 0.181269; straight-through kinds have k2's;
    # ρ·k3: k3 + (1 - e^-0.2) = 0.0187308 + 0.181269 = 0.2
    expected = {"k1": 1, "k2": 0.2, "k3": 0.181269, "k1_plus": 0.2, "k3_plus": 0.2, "k3_unbiased": 0.2}
    got = {name: slope(getattr(kl, name), inputs([1.0], d=0.2))[0] for name in expected}
    assert got == pytest.approx(expected, abs=1e-6)


def test_what_each_estimator_minimises_on_average():
    """E over tokens drawn from π of the gradient of k equals the gradient that kl.py states, on a softmax over 4."""
    z = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=F, requires_grad=True)
    reference = torch.tensor([0.1, 0.6, -0.4, 0.2], dtype=F).log_softmax(-1)
    logp = z.log_softmax(-1)
    p = logp.detach().exp()
    reverse = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), z, retain_graph=True)[0]  # KL(π ‖ π_ref)
    forward = torch.autograd.grad((reference.exp() * (reference - logp)).sum(), z, retain_graph=True)[0]
    x = LossInputs(logp[:, None], logp.detach()[:, None], logp.detach()[:, None], reference[:, None],
                   torch.zeros(4, 1, dtype=F), torch.zeros(4, dtype=F), torch.ones(4, 1, dtype=torch.bool),
                   4.0, 4.0)  # fmt: skip
    expected = {"k1": 0 * reverse, "k2": reverse, "k3": forward, "k3_unbiased": reverse, "k1_plus": reverse,
                "k3_plus": reverse}  # fmt: skip
    for name, wanted in expected.items():
        estimate = getattr(kl, name)(x, ratio.token(x))[:, 0]
        got = torch.autograd.grad((p * estimate).sum(), z, retain_graph=True)[0]
        assert torch.allclose(got, wanted, atol=1e-12), name


# ---------------------------------------------------------------- weights


def test_sampler_weights():
    # π_old/π_sampler = e^1 = 2.718 per token, three tokens: token TIS min(2.718, 2) = 2; sequence e^3 -> 3, geometric
    # 2.718; IcePop keeps 2.718 within [0.5, 5] and drops e^-1 = 0.368
    x = inputs([1.0, 1.0, 1.0], mismatch=1.0)
    assert values(weight.token_tis, x) == [2.0] * 3
    assert values(weight.sequence_tis, x) == pytest.approx([3.0] * 3)
    assert values(weight.sequence_tis, x, cap=100.0) == pytest.approx([exp(3)] * 3)
    assert values(weight.sequence_tis, x, geometric=True) == pytest.approx([exp(1)] * 3)
    assert values(weight.icepop, x) == pytest.approx([exp(1)] * 3)
    assert values(weight.icepop, inputs([1.0], mismatch=-1.0)) == [0.0]


def test_sequence_mask():
    # log π_sampler/π_θ = -log ρ: for ρ = 0.5 it is 0.693 > 0.5, dropped if bad; for ρ = 0.7 0.357, kept
    for rho, a, expected in [(0.5, -1.0, 0), (0.5, 1.0, 1), (0.5, 0.0, 1), (0.7, -1.0, 1)]:
        assert values(weight.sequence_mask, inputs([rho, rho], a)) == [expected] * 2


def test_high_entropy():
    x = replace(inputs([1.0] * 3), entropy_NT=torch.tensor([[0.1, 1.0, 2.0]], dtype=F), entropy_cut=1.0)
    assert values(weight.high_entropy, x) == [0.0, 1.0, 1.0]


# ---------------------------------------------------------------- aggregation

# Three completions of 2, 4 and 6 tokens with per-token losses 1, -1 and 0.5.
LOSS = torch.zeros(3, 6, dtype=F)
MASK = torch.zeros(3, 6, dtype=torch.bool)
for i, (n, value) in enumerate([(2, 1.0), (4, -1.0), (6, 0.5)]):
    LOSS[i, :n] = value
    MASK[i, :n] = True
THREE = replace(inputs(), mask_NT=MASK, n_tokens=12.0, n_sequences=3.0, group_size=3)
HYPER = {"constant": {"length": 8}}
NAMES = ["sequence_mean", "token_mean", "constant", "sequence_sum", "group_mean", "bnpo"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sequence_mean", 1 / 6),  # means 1, -1, 0.5 -> 0.5/3
        ("token_mean", 1 / 12),  # sum 2 - 4 + 3 = 1 over 12 tokens
        ("constant", 1 / 24),  # 1 / (3·8)
        ("sequence_sum", 1 / 3),  # 1 / 3 completions
        ("group_mean", 1 / 12),  # one question: the token mean
        ("bnpo", 1 / 12),  # one micro-batch: the token mean
    ],
)
def test_aggregates(name, expected):
    assert getattr(aggregate, name)(LOSS, THREE, **HYPER.get(name, {})).item() == pytest.approx(expected, abs=1e-12)


def test_group_mean_of_unequal_questions():
    # two questions of one completion each: (2·1)/2 = 1 and -4/4 = -1, mean 0; the token mean would be -2/6
    x = replace(THREE, mask_NT=MASK[:2], n_tokens=6.0, n_sequences=2.0, group_size=1)
    assert aggregate.group_mean(LOSS[:2], x).item() == 0


def test_bnpo_depends_on_the_split():
    # {1}, {2, 3}: (2/2 + (-4 + 3)/10) / 2 = (1 - 0.1) / 2 = 0.45, where the whole step gives 1/12
    x = replace(THREE, n_micro_batches=2.0)
    parts = [aggregate.bnpo(LOSS[rows], replace(x, mask_NT=MASK[rows])).item() for rows in ([0], [1, 2])]
    assert sum(parts) == pytest.approx(0.45)


@pytest.mark.parametrize("name", NAMES)
def test_masked_positions_have_no_influence_even_when_not_finite(name):
    poisoned = LOSS.masked_fill(~MASK, float("nan"))
    function, hyper = getattr(aggregate, name), HYPER.get(name, {})
    assert function(poisoned, THREE, **hyper).item() == function(LOSS, THREE, **hyper).item()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_masked_tokens_is_zero_with_zero_gradient(name):
    loss = LOSS.clone().requires_grad_()
    x = replace(THREE, mask_NT=torch.zeros_like(MASK), n_tokens=0.0)
    out = getattr(aggregate, name)(loss, x, **HYPER.get(name, {}))
    out.backward()
    assert out.item() == 0.0 and (loss.grad == 0).all()


# ---------------------------------------------------------------- reductions: the general form equals the simple one


def test_reductions():
    x = made_up(None, 3)
    rho = ratio.token(x)
    plain = rho * x.advantage_N[:, None]
    assert torch.equal(surrogate.clipped(x, rho, clip_low=1.0, clip_high=1e9), plain)  # no clip
    clipped = surrogate.clipped(x, rho)
    assert torch.equal(surrogate.dual_clip(x, rho, cap=1e9), clipped)  # no cap
    assert torch.equal(surrogate.two_sided(x, rho, delta=1e9), clipped)
    assert torch.equal(surrogate.two_sided(x, rho, delta=3.0), surrogate.dual_clip(x, rho, cap=3.0))
    one = replace(x, mask_NT=x.mask_NT & (torch.arange(7) == 0))  # completions of one token
    first = one.mask_NT
    assert torch.allclose(ratio.sequence(one)[first], rho[first])
    sums, means = (f(rho, one) for f in (aggregate.sequence_sum, aggregate.sequence_mean))
    assert torch.allclose(sums, means)


def test_quantile_equals_torchs_over_parts():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(n, generator=generator) for n in (5, 0, 1, 8)]
    for share in (0.0, 0.25, 0.8, 1.0):
        expected = torch.quantile(torch.cat(parts).double(), share).item()
        assert quantile(parts, share) == pytest.approx(expected, abs=1e-12)
    assert quantile([], 0.8) == quantile([torch.empty(0)], 0.8) == 0.0


def test_what_a_loss_asks_for():
    def of(name):
        return needs(built(ROOT / "conf" / "loss" / f"{name}.yaml"))

    assert needs(lambda x: None) == Needs(True, False, None, False, False)
    assert of("grpo") == Needs(True, False, None, False, False) and not of("dapo").reference
    assert of("entropy_bonus").entropy_gradient and not of("entropy_adaptive").entropy_gradient
    assert of("high_entropy").entropy_quantile == pytest.approx(0.8)
    assert of("kl_in_reward").kl_in_reward and not of("rloo").kl_in_reward  # beta is 0 there
