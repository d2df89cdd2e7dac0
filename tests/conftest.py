"""Fixtures shared by the tests: a tiny random checkpoint and a few questions with made-up clips."""

import hashlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

from data.prompt import Prompt
from data.question import Clip, Question
from grpo.onerank import OneRank  # noqa: F401  (tests take it from here)

# The same examples every time: what fails here fails there. No deadline: a busy machine is no fault.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
providers._get_local_constants = Constants  # else some are of whatever was imported before


def pytest_collection_modifyitems(items):
    """Files with slow tests first, the longest before all: two processes then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != "test_train.py", item.path not in slow))


@pytest.fixture(autouse=True)
def no_rank_left():
    """A process group made in a test is not for the programs that later tests start."""
    yield
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": r"model\.layers\.\d+\.self_attn\.(q|v)_proj", "seed": 0}
CHOICES = ("dog", "rain", "bell", "train")


def make_prompt() -> Prompt:
    return Prompt(system=None, instruction="Listen.")


def make_question(name: str, **changes) -> Question:
    return Question(
        **{"id": name, "audio": None, "question": f"Which sound is in {name}?", "choices": CHOICES, "answer": 1}
        | changes
    )


def make_clip(seed: int, seconds: float = 0.6) -> Clip:
    rng = np.random.default_rng(seed)
    time = np.arange(int(16000 * seconds)) / 16000
    wave = 0.4 * np.sin(2 * np.pi * rng.uniform(200, 3000) * time) + 0.05 * rng.standard_normal(len(time))
    return Clip(wave.astype(np.float32), 16000)


def build_checkpoint(folder) -> None:
    from grpo.tiny import build

    texts = ["Listen. Which sound is in this? Choices: A. dog B. rain C. bell D. train <think>one</think>"] * 3
    build(folder, texts, hidden=64, layers=2, audio_hidden=32, audio_layers=1, vocab_size=400, seed=0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a random Qwen2.5-Omni with 64 hidden units, full-Omni layout."""
    folder = tmp_path_factory.mktemp("tiny")
    build_checkpoint(folder)
    return folder


@pytest.fixture
def policy(checkpoint):
    """A policy with a LoRA adapter whose B is not zero, so that adapter on and off differ."""
    import torch

    from grpo.policy import Policy

    policy = Policy(checkpoint, LORA, prompt=make_prompt())
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return policy.eval()


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
