"""The one record that leaves this package, and the sound that belongs to it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
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
    answer: int
    start: float | None = None  # seconds
    end: float | None = None  # seconds
    task: str | None = None
    source: str | None = None
    license: str | None = None

    @property
    def gold(self) -> str:
        return self.choices[self.answer]


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
