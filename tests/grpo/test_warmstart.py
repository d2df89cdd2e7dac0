"""The warm start teaches the format and nothing about sound."""

from dataclasses import replace

import pytest
import torch

from grpo.policy import Policy
from grpo.warmstart import warm_start
from rewards.format import format
from tests.conftest import CHOICES, make_clip, make_prompt, make_question

QUESTIONS = [make_question(f"q{i}", answer=i) for i in range(4)]


@pytest.fixture
def plain(checkpoint):
    return Policy(checkpoint, None, prompt=make_prompt())


def taught(policy, questions, clip_seed, monkeypatch, steps=3):
    """Completions that the warm start trained on, and its losses. Clips differ in length."""
    seen, losses, prepare = [], [], policy.prepare

    def watched(groups):
        seen.extend((g.prompt.id, c.token_ids) for g in groups for c in g.completions)
        return prepare(groups)

    def encode(question):
        return policy.encode(question, make_clip(clip_seed, 0.4 + 0.2 * question.answer))

    with monkeypatch.context() as patch:
        patch.setattr(policy, "prepare", watched)
        warm_start(policy, questions, encode, steps=steps, batch=2, lr=1e-2, seed=0,
                   report=lambda step, loss: losses.append(loss))  # fmt: skip
    return seen, losses


def test_lessons_depend_on_neither_sound_nor_gold_answer(plain, monkeypatch):
    lessons, _ = taught(plain, QUESTIONS, 1, monkeypatch)
    others, _ = taught(plain, [replace(q, answer=(q.answer + 1) % 4) for q in QUESTIONS], 2, monkeypatch)
    assert lessons == others and len(lessons) == 3 * 2 * 4  # steps, questions, options


def test_every_option_is_taught_once_and_in_the_right_format(plain, monkeypatch):
    lessons, _ = taught(plain, QUESTIONS, 1, monkeypatch, steps=1)
    for name in {name for name, _ in lessons}:
        texts = [plain.decode(ids) for n, ids in lessons if n == name]
        assert sorted(t.split("<answer>")[1] for t in texts) == sorted(f"{c}</answer>" for c in CHOICES)
    assert all(ids[-1] in plain.stop_ids and format(plain.decode(ids)) == 1.0 for _, ids in lessons)


def test_the_language_model_learns_and_the_audio_tower_stays(plain, monkeypatch):
    before = {n: p.clone() for n, p in plain.thinker.named_parameters()}
    _, losses = taught(plain, QUESTIONS, 1, monkeypatch, steps=6)
    assert 0 < losses[-1] < losses[0]
    moved = {n for n, p in plain.thinker.named_parameters() if not torch.equal(p, before[n])}
    assert {"lm_head.weight", "model.embed_tokens.weight"} < moved
    assert not any(n.startswith("audio_tower.") for n in moved)
    assert not any(p.requires_grad for p in plain.parameters())
