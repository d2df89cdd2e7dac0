"""The one record that leaves this package, and the sound that belongs to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Question:
    """A multiple-choice question about a stretch of audio. Choices are bare texts; `answer` is the gold one's index."""

    id: str
    audio: Path  # absolute
    question: str
    choices: tuple[str, ...]
    answer: int  # None only where `manifest.read(hidden=True)` let a benchmark keep its answers to itself
    start: float | None = None  # seconds
    end: float | None = None  # seconds
    task: str | None = None
    source: str | None = None
    license: str | None = None
    span: tuple[int, int] | None = None  # offset and length in bytes: the clip lies within `audio`, a tar shard
    sha256: str | None = None  # of the clip's file
    clip: str | None = None  # where it was recorded: a YouTube id and its seconds, a Freesound name
    thinking: str | None = None  # worked out beforehand, for supervised training
    semantic_elements: str | None = None
    benchmark: str | None = None  # a name of data.scoring.RULES
    difficulty: str | None = None
    category: str | None = None
    subcategory: str | None = None
    meta: Mapping | None = field(default=None, hash=False)  # whatever else; `row`: the row as published

    @property
    def gold(self) -> str:
        return self.choices[self.answer]

    @property
    def stretch(self) -> tuple[Path, tuple[int, int] | None, float | None, float | None]:
        """What is heard: (audio, span, start, end). Questions on one clip have the same."""
        return self.audio, self.span, self.start, self.end

    def shuffled(self, seed: int, epoch: int) -> Question:
        """The same question with its options in the order of (seed, epoch, id), whatever was asked before it."""
        key = hashlib.sha256(f"{seed} {epoch} {self.id}".encode()).digest()
        order = np.random.default_rng(list(key)).permutation(len(self.choices)).tolist()
        return replace(self, choices=tuple(self.choices[i] for i in order), answer=order.index(self.answer))


@dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by: two clips are the same if their sha256 is
class Clip:
    """A mono waveform: float32 samples [S] at `hz`."""

    samples: np.ndarray
    hz: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.hz

    @cached_property
    def sha256(self) -> str:
        """Hash of the samples: the same sound, the same hash, whatever file it came from."""
        return hashlib.sha256(np.ascontiguousarray(self.samples).tobytes()).hexdigest()
