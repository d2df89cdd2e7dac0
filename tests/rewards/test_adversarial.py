"""A megabyte of the worst text: a quadratic scan would take hours here, a linear one a second."""

import subprocess
import sys

import pytest

from rewards import accuracy, format, length, tags

MEGABYTE = 1 << 20
UNITS = [
    "<", "</", "x", " ", "\n", "é", "a\u0301\u0316", "(", "**", "<think>", "</think>", "<think></think>", "<think>\n",
    "<answer>", "</answer>", "<answer>B</answer>", "</think> ", "</think><semantic_elements>", "</think>\n<answer>",
]  # fmt: skip
WRAPPERS = ["{0}", "<think>{0}</think> <answer>{0}</answer>"]
QUESTION = {"choices": ("cat", "dog"), "answer": 1}


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_a_megabyte_is_scored_in_linear_time(unit):
    for wrapper in WRAPPERS:
        text = wrapper.format(unit * (MEGABYTE // len(unit.encode())))
        tags.parse(text)
        assert accuracy.accuracy(text, **QUESTION) in (0.0, 1.0)
        assert accuracy.exact(text, **QUESTION) in (0.0, 1.0)
        assert format.format(text) in (0.0, 1.0)
        assert format.published(text) in (0.0, 0.5)
        assert format.published(text, semantic=False) in (0.0, 0.5)
        assert 0.0 <= length.length(text) <= 1.0
        assert 0.0 <= length.published(text) <= 1.0


def test_combining_marks_are_not_normalised_by_the_megabyte():
    assert accuracy.choice("a" + "\u0301\u0316" * (MEGABYTE // 4), QUESTION["choices"]) is None


def test_rewards_need_nothing_but_the_standard_library():
    code = (
        "import importlib, pkgutil, sys, rewards\n"
        "for module in pkgutil.iter_modules(rewards.__path__): importlib.import_module('rewards.' + module.name)\n"
        "others = {'torch', 'numpy', 'data', 'grpo', 'hydra', 'omegaconf', 'transformers'} & sys.modules.keys()\n"
        "assert len([m for m in sys.modules if m.startswith('rewards.')]) >= 6 and not others, others"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
