"""losscheck: every check passes a good loss and catches its own sickness; the command, its picture, its exit code."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo.batch import LossOutputs
from grpo.loss import aggregate, kl, ratio, surrogate
from grpo.loss.objective import Objective
from grpo.losscheck import CHECKS, made_up, run_checks, table

ROOT = Path(__file__).parents[2]


def make(**changes):
    return Objective(**{"beta": 0.01, "ratio": ratio.token, "surrogate": surrogate.clipped, "kl": kl.k3,
                        "aggregate": aggregate.sequence_mean, **changes})  # fmt: skip


def pull(x, ratio_NT):
    return ratio_NT * x.advantage_N[:, None]


class TwiceTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return 2 * gradient


def wrong_shape(x):
    out = make()(x)
    return replace(out, metrics={"per_sequence": x.advantage_N})


def leaking_metric(x):
    out = make()(x)
    return replace(out, metrics={"logp": x.logp_NT * 1.0})


def not_a_scalar(x):
    out = make()(x)
    return replace(out, loss=out.loss[None])


def writes(x, ratio_NT):
    x.advantage_N.mul_(0.9)
    return pull(x, ratio_NT)


def draws(x, ratio_NT):
    return pull(x, ratio_NT) * torch.rand_like(ratio_NT)


def forgets_the_mask(x):
    loss_NT = -pull(x, ratio.token(x))
    return LossOutputs(loss_NT.sum() / x.n_tokens, loss_NT.detach())


def neighbour(x, ratio_NT):
    return ratio_NT * (x.advantage_N - 0.1 * torch.arange(len(x.advantage_N)))[:, None]


SICK = {
    "shapes": [wrong_shape, leaking_metric, not_a_scalar, lambda x: make()(x).loss],
    "purity": [make(surrogate=writes), make(surrogate=draws)],
    "masks": [forgets_the_mask],
    "padding": [make(aggregate=lambda loss_NT, x: loss_NT.mean())],
    "extremes": [make(ratio=lambda x: (x.logp_NT - x.old_logp_NT).exp())],
    "gradients": [make(surrogate=lambda x, ratio_NT: TwiceTheGradient.apply(pull(x, ratio_NT)))],
    "micro-batches": [make(aggregate=lambda loss_NT, x: (loss_NT * x.mask_NT).sum() / x.mask_NT.sum().clamp_min(1))],
    "order": [make(surrogate=neighbour)],
    "direction": [make(surrogate=lambda x, ratio_NT: -pull(x, ratio_NT)),
                  make(surrogate=lambda x, ratio_NT: pull(x, ratio_NT.detach()), beta=0.0),
                  make(surrogate=lambda x, ratio_NT: pull(x, ratio_NT) * (x.advantage_N[:, None] > 0))],
    "stillness": [make(surrogate=lambda x, ratio_NT: pull(x, ratio_NT) + 0.1 * x.logp_NT),
                  make(aggregate=lambda loss_NT, x: aggregate.sequence_mean(loss_NT, x) + 1)],
    "reference": [make(kl=lambda x, ratio_NT: -kl.k3(x, ratio_NT)), make(kl=lambda x, r: kl.k3(x, r).detach())],
    "bandit": [make(beta=300.0, kl=kl.k2)],
}  # fmt: skip


@pytest.mark.parametrize(("name", "loss"), [(name, loss) for name, losses in SICK.items() for loss in losses])
def test_each_check_catches_its_own_sickness(name, loss):
    outcomes = {o.check.name: o for o in run_checks(loss)}
    assert outcomes[name].status == "FAIL", table(outcomes.values())
    assert f"means: {outcomes[name].check.meaning}" in table(outcomes.values())


def test_every_check_has_a_sickness_and_a_good_loss_passes_all():
    assert SICK.keys() == {check.name for check in CHECKS}
    outcomes = run_checks(make())
    assert {o.status for o in outcomes} == {"pass"}, table(outcomes)


def test_a_whole_objective_of_ones_own_passes():
    def mine(x):
        loss_NT = -surrogate.clipped(x, ratio.token(x)) + 0.01 * kl.k3(x, None)
        return LossOutputs(aggregate.token_mean(loss_NT, x), loss_NT.detach())

    outcomes = run_checks(mine)
    assert {o.status for o in outcomes} == {"pass"}, table(outcomes)


def test_an_exception_in_the_loss_is_reported_with_its_place():
    def broken(x, ratio_NT):
        return x.no_such_field

    text = table(run_checks(make(surrogate=broken)))
    assert "AttributeError" in text and "test_losscheck.py, line" in text


def test_differences_hold_detached_factors():
    # CISPO's forward moves with its detached weight, its backward must not: plain differences would call that wrong
    outcomes = {o.check.name: o for o in run_checks(make(surrogate=surrogate.cispo))}
    assert outcomes["gradients"].status == "pass"


def test_made_up_steps_have_empty_and_full_completions():
    x = made_up(make())
    lengths = x.mask_NT.sum(-1).tolist()
    assert 7 in lengths and 0 in lengths and x.n_tokens == sum(lengths)


# ---------------------------------------------------------------- the command


def losscheck(folder, *words):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "grpo.losscheck", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


YAML = """# mine
_target_: grpo.loss.objective.Objective
beta: 0.0
ratio: {_target_: grpo.loss.ratio.token, _partial_: true}
surrogate: {_target_: mine.surrogate, _partial_: true}
kl: {_target_: grpo.loss.kl.k3, _partial_: true}
aggregate: {_target_: grpo.loss.aggregate.token_mean, _partial_: true}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text(YAML)
    return tmp_path


def test_the_command_fails_on_a_sick_loss_and_says_why(folder):
    (folder / "mine.py").write_text("def surrogate(x, ratio_NT):\n    return -ratio_NT * x.advantage_N[:, None]\n")
    done = losscheck(folder, "loss=mine", "--config-dir", ".", "baseline=dapo", "picture=out.png")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "direction      FAIL" in done.stdout and "means:" in done.stdout and "mine.surrogate" in done.stdout
    assert "with loss=dapo" in done.stdout
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == {
        "loss",
        "mine.py",
        "out.png",
    }  # nothing else is left


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.surrogate.clip_hi=1"], "clip_hi"),
        (["+loss.surrogate.clip_hi=1"], "did you mean 'clip_high'?"),
        (["loss=mien"], "mien"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, words, message):
    done = losscheck(tmp_path, *words)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_partial_that_cannot_be_called_is_named(folder):
    (folder / "mine.py").write_text("def surrogate(x, ratio_NT, *, tau):\n    return tau * ratio_NT\n")
    done = losscheck(folder, "loss=mine", "--config-dir", ".")
    assert done.returncode == 1 and "error: loss.surrogate: surrogate(x, ratio_NT): missing" in done.stderr
