"""Rollout engines: questions in, groups of sampled completions out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from grpo.batch import Encoded, Group


@dataclass(frozen=True)
class Sampling:
    """How to sample. `seed` and `step` fix every sample; temperature and banned ids are the policy's own."""

    max_tokens: int
    seed: int = 0
    step: int = 0
    greedy: bool = False


class Rollout(Protocol):
    """What the loop needs of a rollout engine."""

    version: int  # of the weights it holds

    def generate(self, prompts: Sequence[Encoded], copies: int, sampling: Sampling) -> list[Group]: ...

    def close(self) -> None: ...


def sample_seed(seed: int, step: int, question: str, sample: int) -> int:
    """63-bit seed of one sample, a function of its name only: not of rank, batch, engine or what came before."""
    digest = hashlib.sha256(f"{seed}/{step}/{question}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
