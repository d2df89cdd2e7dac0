"""Every conf/loss/*.yaml, found by listing: against the oracle, through losscheck, and with an up-to-date page."""

from dataclasses import replace
from functools import cache, partial
from inspect import getmembers, isfunction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.loss import aggregate, kl, ratio, surrogate, weight
from grpo.loss.formula import plain
from grpo.losscheck import CHECKS, NotAsked, both_gradients, gradient, made_up
from grpo.lossdocs import ROOT, built, comments, pages
from tests.grpo import oracle

PATHS = {p.stem: p for p in sorted((ROOT / "conf" / "loss").glob("*.yaml"))}
OBJECTIVES = {name: built(path) for name, path in PATHS.items()}
made = cache(pages)
every_loss = pytest.mark.parametrize("name", PATHS)


def exchanged(**pieces):
    """GRPO as composed, with other pieces."""
    loss = built(PATHS["grpo"])
    vars(loss).update(pieces)
    return loss


PIECES = {
    "k1_plus": exchanged(kl=kl.k1_plus),
    "sequence_icepop": exchanged(weights={"mine": weight.sequence_icepop}),
    "sequence_tis_geometric": exchanged(weights={"mine": partial(weight.sequence_tis, geometric=True)}),
}
every_formula = pytest.mark.parametrize("name", OBJECTIVES | PIECES)
LOW = (0.15, 0.1, 0.3, 0.19, 0.2)  # mean entropies of steps that leave the adaptive bonus on: 3 of 0.005 more


def after(name, history):
    """The objective as it stands after steps of these mean entropies: restored at its start, then moved by each."""
    loss = (OBJECTIVES | PIECES)[name]
    if loss.entropy:
        loss.entropy.load_state({"level": 0.0})
        for mean_entropy in history:
            loss.entropy.update(mean_entropy)
    return loss


def oracle_step(x, rows, history):
    """The rows of x as the oracle reads them."""
    names = ("logp_NT", "old_logp_NT", "sampler_logp_NT", "ref_logp_NT", "entropy_NT", "advantage_N", "mask_NT")
    lists = [getattr(x, name)[rows].tolist() for name in names]
    return oracle.Step.of(*lists, x.group_size, x.entropy_cut, history)


def oracle_loss(name, x, parts, history):
    """Gradients by logp_NT and entropy_NT, and value."""
    whole = {"sequences": x.n_sequences, "tokens": x.n_tokens, "micro_batches": len(parts)}
    value = 0.0
    grads = {kind: torch.zeros_like(x.logp_NT) for kind in ("logp", "entropy")}
    for rows in parts:
        share = (oracle.LOSSES | oracle.PIECES)[name](oracle_step(x, rows, history), whole)
        value += float(share)
        for (kind, i, t), g in share.grad.items():
            grads[kind][rows[i], t] += g
    return grads["logp"], grads["entropy"], value


@every_formula
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), questions=st.integers(1, 3), group=st.integers(1, 4), width=st.integers(1, 5),
    spread=st.sampled_from([0.0, 1e-3, 0.3, 3.0, 60.0]), split=st.booleans(), nothing=st.booleans(),
    history=st.lists(st.floats(0.0, 0.3), max_size=6) | st.just(LOW),
)  # fmt: skip
def test_value_and_gradients_equal_the_oracle(name, seed, questions, group, width, spread, split, nothing, history):
    """Random shapes, masks, empty completions, micro-batches, ratios of up to e^±20, advantages that are all 0."""
    loss = after(name, history)
    x = made_up(loss, seed, questions=questions, group=group, width=width, spread=spread, on_policy=spread == 0)
    if nothing:
        x = replace(x, advantage_N=torch.where(torch.arange(len(x.advantage_N)) < group, 0.0, x.advantage_N))
    rows = [[*range(b * group, (b + 1) * group)] for b in range(questions)]
    parts = rows if split else [[i for part in rows for i in part]]
    *got, value = both_gradients(loss, x, parts)
    *expected, expected_value = oracle_loss(name, x, parts, history)
    # e^20 leaves ten digits of a float64: the bound is on the error relative to what is added up.
    assert value == pytest.approx(expected_value, rel=1e-6, abs=1e-6)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * max(1.0, theirs.abs().max().item())


@every_formula
def test_values_are_exact_to_1e_9_where_numbers_are_ordinary(name):
    loss = after(name, LOW)
    for seed in range(5):
        x = made_up(loss, seed, spread=0.3)
        parts = [[*range(12)]]
        *got, value = both_gradients(loss, x, parts)
        *expected, expected_value = oracle_loss(name, x, parts, LOW)
        assert abs(value - expected_value) <= 1e-9
        assert all((ours - theirs).abs().max() <= 1e-9 for ours, theirs in zip(got, expected, strict=True))
        assert got[1].any() == (name in ("entropy_bonus", "entropy_adaptive"))


def test_the_adaptive_bonus_is_on_where_it_is_compared():
    assert after("entropy_adaptive", LOW).entropy.coefficient == pytest.approx(0.015)  # +, +, -, +, + of 0.005
    assert after("entropy_adaptive", [*LOW, 0.25]).entropy.coefficient == 0.0


def test_every_loss_has_an_oracle_and_every_oracle_a_loss():
    missing = PATHS.keys() ^ oracle.LOSSES.keys()
    assert not missing, f"conf/loss and LOSSES in tests/grpo/oracle.py differ by {sorted(missing)}"
    assert PIECES.keys() == oracle.PIECES.keys()


@pytest.mark.parametrize("module", [ratio, surrogate, kl, weight, aggregate], ids=lambda module: module.__name__)
def test_every_piece_is_compared_with_the_oracle(module):
    compared = set()
    for loss in (OBJECTIVES | PIECES).values():
        compared |= {plain(piece) for piece in (loss.ratio, loss.surrogate, loss.aggregate, *loss.weights.values())}
        compared |= {plain(loss.kl)} if loss.beta and loss.kl_in == "loss" else set()
    there = {f for _, f in getmembers(module, isfunction) if f.__module__ == module.__name__ and hasattr(f, "formula")}
    assert there and not there - compared, f"in no loss of the oracle: {sorted(f.__name__ for f in there - compared)}"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
@every_loss
def test_losscheck_passes(name, check):
    try:
        check.run(built(PATHS[name]))
    except NotAsked as reason:
        pytest.skip(str(reason))


def test_only_bnpo_depends_on_the_split():
    assert [name for name, loss in OBJECTIVES.items() if not loss.invariant] == ["bnpo"]
    x = made_up(OBJECTIVES["bnpo"], 7)
    _, one = gradient(OBJECTIVES["bnpo"], x)
    _, two = gradient(OBJECTIVES["bnpo"], x, [[*range(3)], [*range(3, 12)]])
    assert abs(one - two) > 1e-3


@every_formula
def test_nan_outside_the_mask_is_never_seen(name):
    loss = after(name, LOW)
    x = made_up(loss, 2)
    *expected, value = both_gradients(loss, x)
    names = ("logp_NT", "old_logp_NT", "sampler_logp_NT", "ref_logp_NT", "entropy_NT")
    spoiled = replace(x, **{k: getattr(x, k).masked_fill(~x.mask_NT, float("nan")) for k in names})
    *got, other = both_gradients(loss, spoiled)
    assert other == value and all(map(torch.equal, got, expected))
    assert all(v.isfinite().all() for v in loss(spoiled).metrics.values())


@every_loss
def test_a_page_exists_and_is_up_to_date(name):
    said = comments(PATHS[name])
    assert said["head"] and said["paper"] and said["differs"], f"{name}.yaml lacks a labelled comment"
    page = ROOT / "docs" / "losses" / f"{name}.md"
    assert page.exists(), f"no {page}: python -m grpo.lossdocs"
    assert page.read_text(encoding="utf-8") == made()[page], f"{page} is out of date: python -m grpo.lossdocs"
    picture = page.with_suffix(".svg")
    assert picture.exists() and picture.stat().st_size < 40_000


def test_no_page_is_left_over_and_the_lists_are_up_to_date():
    for path, text in made().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of date: python -m grpo.lossdocs"
    found = {p for p in (ROOT / "docs" / "losses").glob("*.md")}
    assert found <= made().keys()


@every_loss
def test_describe_names_its_numbers(name):
    loss = OBJECTIVES[name]
    text = loss.describe()
    assert "grpo.loss" not in text  # every shipped piece has an equation
    assert (f"{loss.beta:g}·" in text) == (loss.beta > 0)
    for values in [getattr(loss.surrogate, "keywords", {}), *(w.keywords for w in loss.weights.values())]:
        assert all(f"{v:g}" in text or f"{v:.0%}" in text for v in values.values() if isinstance(v, float) and v)
