"""A new loss, advantage, KL estimator or reward is one Python file and one YAML, in a folder outside the repository.

docs/change-the-loss.md and docs/add-a-reward.md are performed: their files, their commands.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from grpo.config import build
from grpo.losscheck import gradient, made_up, reference

ROOT = Path(__file__).parents[1]


def page(name):
    """The files that a page of docs/ shows under their names, and its commands."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    files = dict(re.findall(r"^`(\S+)`\n\n```(?:python|yaml)\n(.*?)```", text, re.DOTALL | re.MULTILINE))
    return files, re.findall(r"^(?:PYTHONPATH=\. )?python -m (.+)$", text, re.MULTILINE)


FILES, COMMANDS = page("change-the-loss.md")
REWARD, REWARD_COMMANDS = page("add-a-reward.md")
ADVANTAGE = {
    "by_rank.py": '''"""Each completion by how many of its group it beats, less how many beat it."""

from grpo.loss.formula import formula


@formula("A = {scale:g}·mean over the group of sign(r - r')")
def advantage(reward_BG, *, scale=1.0):
    return scale * (reward_BG[:, :, None] - reward_BG[:, None, :]).sign().mean(2)
''',
    "advantage/mine.yaml": """# By rank within the group.
_target_: by_rank.advantage
_partial_: true
scale: 2.0
""",
}
KL = {
    "hellinger.py": '''"""2(1 - e^(-d/2))², d = log π - log π_ref: at most 2 where the policy is above the reference."""

from grpo.loss.formula import formula


@formula("2·(1 - √(π_ref/π))²")
def kl(x, ratio_NT, *, limit=20.0):
    return 2 * (1 - ((x.ref_logp_NT - x.logp_NT).clamp(-limit, limit) / 2).exp()) ** 2
''',
    "loss/mine_kl.yaml": """# GRPO with another estimator of the KL term.
_target_: grpo.loss.objective.Objective
beta: ${beta}
ratio: {_target_: grpo.loss.ratio.token, _partial_: true}
surrogate: {_target_: grpo.loss.surrogate.clipped, _partial_: true, clip_low: 0.2, clip_high: 0.2}
kl: {_target_: hellinger.kl, _partial_: true}
aggregate: {_target_: grpo.loss.aggregate.token_mean, _partial_: true}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    for name, text in (FILES | REWARD | ADVANTAGE | KL).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(folder, *words):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}.", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("files", [FILES, ADVANTAGE, KL, REWARD], ids=["loss", "advantage", "kl", "reward"])
def test_one_python_file_and_one_yaml_in_under_30_lines(files):
    assert sorted(Path(name).suffix for name in files) == [".py", ".yaml"]
    assert sum(len(text.splitlines()) for text in files.values()) < 30


def test_losscheck_passes_it_as_the_page_says(folder):
    assert COMMANDS[0].startswith("grpo.losscheck ")
    out = run(folder, *COMMANDS[0].split())
    assert "A·tanh(2·(ρ-1))/2" in out and "all checks passed" in out
    assert (folder / "losscheck.png").stat().st_size > 1000


def test_it_trains_as_the_page_says(folder):
    assert COMMANDS[1].startswith("grpo.train ")
    program, *words = COMMANDS[1].split()
    out = run(folder, program, "debug=one_step", "tracking=none", "name=first", "max_tokens=16", *words)
    assert "A·tanh(2·(ρ-1))/2" in out
    assert (folder / "outputs" / "first" / "summary.json").exists()


@pytest.fixture(scope="module")
def trained(folder):
    """Folder and header of two small steps with an advantage, a KL estimator and a reward from outside."""
    words = "debug=one_step tracking=none name=second max_tokens=16 advantage=mine loss=mine_kl rewards=mine"
    out = run(folder, "grpo.train", *words.split(), "rewards.components.brevity.function.words=2", "--config-dir", ".")
    return folder / "outputs" / "second", out


@pytest.fixture(scope="module")
def samples(trained):
    """Completions of the run, as lists: one for each question of a step."""
    rows = map(json.loads, (trained[0] / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    return [list(rows) for _, rows in groupby(rows, key=lambda row: (row["step"], row["id"]))]


@pytest.mark.slow
def test_an_advantage_from_outside_is_what_the_run_uses(trained, samples):
    assert "A = 2·mean over the group of sign(r - r')" in trained[1]
    for group in samples:
        rewards = [row["reward"] for row in group]
        beaten = [sum((r > other) - (r < other) for other in rewards) for r in rewards]
        assert [row["advantage"] for row in group] == pytest.approx([2 * n / len(group) for n in beaten], abs=1e-6)
    assert any(row["advantage"] for group in samples for row in group)  # not all groups were equal


@pytest.mark.slow
def test_a_reward_from_outside_is_what_the_run_pays(trained, samples):
    rows = [row for group in samples for row in group]
    for row in rows:
        words = len(row["completion"].split())
        assert row["rewards"]["brevity"] == pytest.approx(min(max(2 - words / 2, 0), 1) if row["tokens"] else 0)
        paid = {"accuracy": 1.0, "format": 0.5, "length": 1.0, "brevity": 0.2}
        assert row["reward"] == pytest.approx(sum(w * row["rewards"][k] for k, w in paid.items()), abs=1e-6)
    assert len({row["rewards"]["brevity"] for row in rows}) > 1
    metrics = json.loads((trained[0] / "metrics.jsonl").read_text().splitlines()[1])
    assert metrics["rewards/brevity/mean"] > 0


def test_a_reward_is_added_as_its_page_says(folder):
    for command in REWARD_COMMANDS[:2]:
        out = run(folder, *shlex.split(command), "--cfg", "job", "--package", "rewards.components")
        assert "_target_: my_rewards.brevity" in out and "words: 30" in out and "accuracy:" in out


@pytest.mark.slow
def test_a_kl_estimator_from_outside_is_in_the_equation_of_the_run(trained):
    assert "0.1·2·(1 - √(π_ref/π))²" in trained[1]


def test_a_kl_estimator_from_outside_is_what_the_loss_adds(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    with initialize_config_module("conf", version_base="1.3"):
        loss = build(compose("train", ["loss=mine_kl", "beta=0.5", f"hydra.searchpath=[file://{folder}]"]).loss, "loss")
    x = made_up(loss, 3)
    d_NT = x.logp_NT - x.ref_logp_NT
    expected_NT = 2 * (1 - (-d_NT / 2).exp()) ** 2
    assert torch.allclose(loss(x).metrics["kl"][x.mask_NT], expected_NT[x.mask_NT], atol=1e-12)
    # d/dd 2(1 - e^(-d/2))² = 2(1 - e^(-d/2))·e^(-d/2), a token of n_tokens, times β
    got, _ = gradient(loss, x)
    loss.beta = 0.0
    slope_NT = got - gradient(loss, x)[0]
    expected_NT = 0.5 * 2 * (1 - (-d_NT / 2).exp()) * (-d_NT / 2).exp() / x.n_tokens
    assert torch.allclose(slope_NT[x.mask_NT], expected_NT[x.mask_NT], atol=1e-12)
    loss.beta = 0.5
    assert "pulls towards the reference" in reference(loss)
