"""Every conf/rewards/*.yaml builds, and what the two doc pages say is what happens."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from rewards.weighted import WeightedRewards

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "conf" / "rewards").glob("*.yaml"))
CONTEXT = {"answer": 1, "choices": ("cat", "dog"), "question": "Which?", "n_tokens": 30, "truncated": False}


def build(name: str, *overrides: str) -> WeightedRewards:
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose(f"rewards/{name}", overrides=["+think_words=25", *overrides])
    return instantiate(cfg.rewards)


def completion(thought: int, answer: str) -> str:
    return (
        f"<think>{' '.join(['word'] * thought)}</think>\n<semantic_elements>bark</semantic_elements>\n"
        f"<answer>{answer}</answer>"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_and_pays_a_perfect_completion_its_maximum(name):
    rewards = build(name)
    thought = 20 if name == "published" else 25  # without encouragement L(25) = 0.5, L(20) = 1
    scores = rewards.score([completion(thought, "B. dog"), "", "B. dog"], contexts=[CONTEXT] * 3)
    maximum = {"audsem": 2.5, "no_length": 1.5, "accuracy_only": 1.0, "published": 2.5}
    assert scores.total[0] == pytest.approx(maximum[name], abs=1e-6)
    # the released rules pay an empty completion for its length, and the bare answer for both
    assert scores.total[1:] == ([1.0, 2.0] if name == "published" else [0.0, 0.0])
    first_line = (ROOT / "conf" / "rewards" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first_line.startswith("# ") and f"`rewards={name}`" in first_line


def test_default_is_described():
    text = "1 accuracy + 0.5 format + 1 length(target=25, alpha=0.1, delta=0.5, encourage=True)"
    assert build("audsem").describe() == text


def test_length_follows_the_prompts_word_budget():
    rewards = build("audsem", "think_words=12")
    assert rewards.score([completion(26, "A")], contexts=[CONTEXT]).total == [0.5]  # 26 words for 12: length 0


def test_overrides_of_the_docs():
    assert build("audsem", "rewards.components.length.weight=0.5").weights == (1.0, 0.5, 0.5)
    assert build("audsem", "~rewards.components.length").names == ("accuracy", "format")
    gated = build("audsem", "rewards.components.length.function._target_=rewards.length.length_if_correct")
    assert gated.score([completion(25, "A")], contexts=[CONTEXT]).total == [0.5]


def test_add_a_reward_page(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "add-a-reward.md").read_text(encoding="utf-8")
    python, command, yaml, _ = re.findall(r"```\w+\n(.*?)```", page, re.S)
    (tmp_path / "my_rewards.py").write_text(python, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    assert len((python + command + yaml).splitlines()) < 25

    argv = shlex.split(command)
    assert argv[:3] == ["python", "-m", "grpo.train"]
    by_command = build("audsem", *argv[3:])
    assert by_command.describe().endswith(" + 0.2 brevity(words=30)")
    # 22 + 3 white-space-separated words: the tags glue theirs together, and 25 <= 30 pays in full
    assert by_command.score([completion(22, "B")], contexts=[CONTEXT]).components[0][-1] == 1.0

    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "mine.yaml").write_text(yaml, encoding="utf-8")
    with initialize_config_module("conf", version_base="1.3"):
        words = ["rewards=mine", "think_words=25", f"hydra.searchpath=[file://{tmp_path}]"]  # as by --config-dir
        by_file = instantiate(compose("train", words).rewards)
    assert by_file.describe() == by_command.describe()


# The rows of "What odd completions earn" in docs/rewards.md: (accuracy, format, length), with a thought of 22 words.
TABLE = {
    "one of the ways to say B": (completion(22, "**B**"), (1, 1, 1)),
    "contradiction": (completion(22, "A. dog"), (0, 1, 1)),
    "line breaks": (completion(22, "\nB\n").replace("word word", "word\nword"), (1, 1, 1)),
    "two answers, both B": (completion(22, "B") + "<answer>dog</answer>", (1, 0, 1)),
    "two answers, B and A": (completion(22, "B") + "<answer>A</answer>", (0, 0, 1)),
    "no tags": ("B. dog", (0, 0, 0)),
    "empty": ("", (0, 0, 0)),
    "think never closed": (completion(22, "B").replace("</think>", ""), (1, 0, 0)),
    "answer never closed": (completion(22, "B").replace("</answer>", ""), (0, 0, 1)),
    "answer inside the thought": (f"<think>{'word ' * 22}<answer>B</answer></think>", (1, 0, 0)),
    "text before": ("So: " + completion(22, "B"), (1, 0, 1)),
    "text after": (completion(22, "B") + " Done.", (1, 0, 1)),
    "empty thought": (completion(0, "B"), (1, 0, 0)),
    "empty elements": (completion(22, "B").replace("bark", ""), (1, 0, 1)),
    "two thoughts": (completion(22, "B") + "<think>word</think>", (1, 0, 0)),
    "gold in the thought, answer A": (completion(22, "A").replace("word word", "B. dog"), (0, 1, 1)),
    "not tags": (completion(22, "B").replace("think>", "Think>"), (1, 0, 0)),
}


@pytest.mark.parametrize("case", TABLE)
def test_table_of_odd_completions(case):
    text, earned = TABLE[case]
    assert build("audsem").score([text], contexts=[CONTEXT]).components == [pytest.approx(earned, abs=1e-6)]
