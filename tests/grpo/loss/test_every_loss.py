"""Every conf/loss/*.yaml, found by listing: against the oracle, through losscheck, and with an up-to-date page."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.losscheck import CHECKS, NotAsked, gradient, made_up
from grpo.lossdocs import ROOT, built, comments, pages
from tests.grpo import oracle

PATHS = {p.stem: p for p in sorted((ROOT / "conf" / "loss").glob("*.yaml"))}
OBJECTIVES = {name: built(path) for name, path in PATHS.items()}
made = cache(pages)
every_loss = pytest.mark.parametrize("name", PATHS)


def oracle_step(x, rows):
    """The rows of x as the oracle reads them."""
    names = ("logp_NT", "old_logp_NT", "sampler_logp_NT", "ref_logp_NT", "entropy_NT", "advantage_N", "mask_NT")
    lists = [getattr(x, name)[rows].tolist() for name in names]
    return oracle.Step.of(*lists, x.group_size, x.entropy_cut)


def oracle_loss(name, x, parts):
    """Value and gradients by logp_NT and entropy_NT, as nested floats."""
    whole = {"sequences": x.n_sequences, "tokens": x.n_tokens, "micro_batches": len(parts)}
    value = 0.0
    grads = {kind: torch.zeros_like(x.logp_NT) for kind in ("logp", "entropy")}
    for rows in parts:
        share = oracle.LOSSES[name](oracle_step(x, rows), whole)
        value += float(share)
        for (kind, i, t), g in share.grad.items():
            grads[kind][rows[i], t] += g
    return value, grads["logp"]


@every_loss
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), questions=st.integers(1, 3), group=st.integers(1, 4), width=st.integers(1, 5),
    spread=st.sampled_from([0.0, 1e-3, 0.3, 3.0, 60.0]), split=st.booleans(), nothing=st.booleans(),
)  # fmt: skip
def test_value_and_gradient_equal_the_oracle(name, seed, questions, group, width, spread, split, nothing):
    """Random shapes, masks, empty completions, micro-batches, ratios of up to e^±20, advantages that are all 0."""
    loss = OBJECTIVES[name]
    x = made_up(loss, seed, questions=questions, group=group, width=width, spread=spread, on_policy=spread == 0)
    if nothing:
        x = replace(x, advantage_N=torch.where(torch.arange(len(x.advantage_N)) < group, 0.0, x.advantage_N))
    rows = [[*range(b * group, (b + 1) * group)] for b in range(questions)]
    parts = rows if split else [[i for part in rows for i in part]]
    got, value = gradient(loss, x, parts)
    expected_value, expected = oracle_loss(name, x, parts)
    # e^20 leaves ten digits of a float64: the bound is on the error relative to what is added up.
    assert value == pytest.approx(expected_value, rel=1e-6, abs=1e-6)
    assert (got - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())


@every_loss
def test_values_are_exact_to_1e_6_where_numbers_are_ordinary(name):
    loss = OBJECTIVES[name]
    for seed in range(5):
        x = made_up(loss, seed, spread=0.3)
        parts = [[*range(12)]]
        got, value = gradient(loss, x, parts)
        expected_value, expected = oracle_loss(name, x, parts)
        assert abs(value - expected_value) <= 1e-9 and (got - expected).abs().max() <= 1e-9


def test_every_loss_has_an_oracle_and_every_oracle_a_loss():
    missing = PATHS.keys() ^ oracle.LOSSES.keys()
    assert not missing, f"conf/loss and LOSSES in tests/grpo/oracle.py differ by {sorted(missing)}"


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


@every_loss
def test_nan_outside_the_mask_is_never_seen(name):
    x = made_up(OBJECTIVES[name], 2)
    expected, value = gradient(OBJECTIVES[name], x)
    names = ("logp_NT", "old_logp_NT", "sampler_logp_NT", "ref_logp_NT", "entropy_NT")
    spoiled = replace(x, **{k: getattr(x, k).masked_fill(~x.mask_NT, float("nan")) for k in names})
    got, other = gradient(OBJECTIVES[name], spoiled)
    assert other == value and torch.equal(got, expected)
    assert all(v.isfinite().all() for v in OBJECTIVES[name](spoiled).metrics.values())


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
