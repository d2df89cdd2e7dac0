"""Probes ask the same items: only what they are meant to change differs."""

from pathlib import Path

import numpy as np
import pytest

from grpo.config import ConfigError
from grpo.probes import other_clips, variants
from tests.conftest import make_clip, make_question

QUESTIONS = [make_question(f"q{i}", audio=Path(f"{i // 2}.wav"), choices=tuple("wxyz")[: 2 + i % 3]) for i in range(9)]


def ways(probe):
    return variants(probe, QUESTIONS, lambda q: make_clip(int(q.audio.stem)), seed=3, permutations=4)


def test_shuffled_is_always_another_clip():
    others = other_clips(QUESTIONS, 3)
    assert all(others[q.id].audio != q.audio for q in QUESTIONS)
    assert {o.audio for o in others.values()} == {q.audio for q in QUESTIONS}  # no clip is left out
    with pytest.raises(ConfigError, match="at least two clips"):
        other_clips(QUESTIONS[:2], 0)


def test_silence_keeps_the_length():
    (way,) = ways("silent")
    clip = way.clip(QUESTIONS[0])
    assert not np.any(clip.samples) and len(clip.samples) == len(make_clip(0).samples)
    assert ways("no_audio")[0].clip(QUESTIONS[0]) is None


def test_permuted_choices_keep_their_gold():
    runs = ways("permuted")
    assert len(runs) == 4 and len({run.name for run in runs}) == 4
    for run in runs:
        for shown, original, order in zip(run.questions, QUESTIONS, run.orders, strict=True):
            assert shown.id == original.id and shown.gold == original.gold and shown.choices != original.choices
            assert [original.choices[i] for i in order] == list(shown.choices)
    assert ways("permuted")[2].orders == runs[2].orders  # the same again


def test_an_unknown_probe_is_named():
    with pytest.raises(ConfigError, match="'loud' is not one of silent"):
        ways("loud")
