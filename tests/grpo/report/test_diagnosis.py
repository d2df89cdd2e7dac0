"""Every sickness on a synthetic curve that has it, and none of them on a healthy run, at any length of it."""

import dataclasses

import pytest

from grpo.report import Limits, diagnose
from grpo.report.diagnosis import CHECKS
from tests.grpo.report.factory import healthy_rows

N = 100


def changed(**curves):
    """Healthy rows with metrics replaced: name -> function of the share of the run done, in (0, 1]."""
    rows = healthy_rows(N)
    names = {"length": "completions/mean_length", "right": "rewards/accuracy/mean", "cut": "completions/clipped_ratio",
             "dead": "frac_reward_zero_std", "gap": "sampling/sampling_logp_difference/mean",
             "is_ratio": "sampling/importance_sampling_ratio/mean", "heldout": "accuracy/heldout"}  # fmt: skip
    for row in rows[1:]:
        for name, curve in curves.items():
            key = names.get(name, name.replace("__", "/"))
            if key != "accuracy/heldout" or key in row:
                row[key] = curve(row["step"] / N)
    return rows


def names(rows, **limits):
    return {f.name for f in diagnose(rows, Limits(**limits))}


def flat(value):
    return lambda t: value


SICK = {
    "letter_collapse": {"answers__A": flat(0.9), "answers__B": flat(0.1), "gold__A": flat(0.25), "gold__B": flat(0.25)},
    "no_option": {"answers__none": flat(0.9), "answers__A": flat(0.1), "gold__A": flat(0.25)},
    "length_hacking": {
        "length": lambda t: 25 + 60 * t,
        "right": flat(0.3),
        "reward": lambda t: 1 + t,
        "dead": flat(0.2),
        "entropy": flat(0.07),
    },
    "dead_groups": {"dead": flat(0.9), "right": flat(0.2), "entropy": flat(0.07)},
    "kl_blowup": {"kl": lambda t: 3 * t**2},
    "sampler_mismatch": {"gap": flat(0.2)},
    "entropy_collapse": {"entropy": lambda t: 0.07 * max(0.02, 1 - 2 * t), "right": flat(0.3), "dead": flat(0.2)},
    "truncation": {"cut": lambda t: t},
    "accuracy_drop": {"heldout": lambda t: 0.8 if t < 0.6 else 0.3},
    "not_a_number": {"loss": lambda t: None if t > 0.5 else 0.0},
}


def test_every_check_has_a_sick_curve():
    assert set(SICK) == {check.__name__ for check in CHECKS}


@pytest.mark.parametrize("name", SICK)
def test_a_sickness_is_seen_and_only_that_one(name):
    found = diagnose(changed(**SICK[name]))
    assert [f.name for f in found] == [name]
    assert any(c.isdigit() for c in found[0].text) and found[0].advice and len(found[0].text) < 250


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_nothing_at_any_step(seed):
    rows = healthy_rows(500, seed)
    for end in (*range(1, 60), *range(60, 502, 20)):
        assert diagnose(rows[:end]) == [], end


def test_nothing_to_say_about_nothing():
    assert diagnose([]) == [] and diagnose([{"step": 0, "accuracy/heldout": 0.2}]) == []
    assert diagnose([{"step": s, "reward": 1.0} for s in range(100)]) == []
    assert diagnose([{"step": s, "reward": None, "completions/mean_length": 0.0, "rewards/accuracy/mean": 0.0,
                      "entropy": 0.0} for s in range(100)]) == []  # fmt: skip


def test_shrinking_is_length_hacking_too():
    assert "length_hacking" in names(changed(length=lambda t: 60 - 50 * t, right=flat(0.3)))


def test_longer_answers_that_are_better_are_no_hack():
    assert names(changed(length=lambda t: 25 + 60 * t)) == set()


def test_a_dead_group_that_is_right_is_not_dead():
    assert names(changed(dead=flat(0.9), right=flat(0.92))) == set()
    (solved,) = diagnose(changed(dead=flat(0.98), right=flat(0.99)))
    assert solved.name == "dead_groups" and "nothing left to learn" in solved.text


def test_low_entropy_of_a_policy_that_became_right_is_no_collapse():
    assert names(changed(entropy=lambda t: 0.07 * max(0.02, 1 - t))) == set()


def test_the_mean_ratio_alone_shows_a_mismatch():
    assert names(changed(is_ratio=flat(1.3))) == {"sampler_mismatch"}


def test_a_letter_without_its_gold_share_is_judged_by_the_number_of_letters():
    assert names(changed(answers__A=flat(0.95), answers__B=flat(0.05))) == {"letter_collapse"}
    assert names(changed(answers__A=flat(0.65), gold__A=flat(0.6))) == set()


def test_answers_cut_by_the_limit_are_truncation_and_no_option_is_no_letter():
    assert names(changed(answers__none=flat(0.9), cut=flat(0.85))) == {"truncation"}
    (found,) = diagnose(changed(answers__none=flat(0.9), answers__A=flat(0.1), gold__A=flat(0.2)))
    assert found.text.startswith("90% of the completions name no option") and "option none" not in found.text


def test_one_spike_is_no_blowup():
    rows = healthy_rows(N)
    rows[50]["kl"] = 40.0
    assert diagnose(rows) == []


def test_every_limit_is_used():
    """Each limit, moved far to the strict or the lax side, changes some verdict."""
    curves = [changed(**c) for c in SICK.values()] + [changed(dead=flat(0.98), right=flat(0.99)), healthy_rows(N),
              changed(entropy=lambda t: 0.07 * max(0.02, 1 - t), right=lambda t: 0.92 + 0.05 * t)]  # fmt: skip
    base = [[(f.name, f.text) for f in diagnose(c)] for c in curves]
    for field in dataclasses.fields(Limits):
        for value in (-1.0, 0.0, 1e9):
            limits = Limits(**{field.name: value})
            if [[(f.name, f.text) for f in diagnose(c, limits)] for c in curves] != base:
                break
        else:
            pytest.fail(f"{field.name} changes nothing")


def test_rows_are_not_written_to():
    rows = changed(**SICK["kl_blowup"])
    before = [dict(r) for r in rows]
    diagnose(rows)
    assert rows == before
