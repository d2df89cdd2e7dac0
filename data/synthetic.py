"""A data set of made-up sounds: real FLAC files and a manifest, written once, the same bytes every time.

Length, loudness, sample rate and channels are drawn without looking at the kind of sound, so that nothing but the
sound itself tells the answer: with every clip silenced, accuracy must stay at chance.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from data.manifest import Manifest, read, write
from data.question import Question

Rng = np.random.Generator


def _sweep(time: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.sin(2 * np.pi * (low * time + (high - low) * time**2 / (2 * time[-1])))


def _bursts(time: np.ndarray, hz: int, every: float, decay: float, carrier: np.ndarray) -> np.ndarray:
    return carrier * np.exp(-(time % every) / decay)


def low_tone(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    return np.sin(2 * np.pi * rng.uniform(150, 300) * time)


def high_tone(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    return np.sin(2 * np.pi * rng.uniform(2500, 3500) * time)


def noise(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    return 0.4 * rng.standard_normal(len(time))


def clicks(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    return _bursts(time, hz, rng.uniform(0.06, 0.14), 0.003, rng.standard_normal(len(time)))


def rising_chirp(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    return _sweep(time, rng.uniform(250, 500), rng.uniform(3000, 4500))


def falling_chirp(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    return _sweep(time, rng.uniform(3000, 4500), rng.uniform(250, 500))


def warble(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    swing = np.sin(2 * np.pi * rng.uniform(4, 8) * time)
    return np.sin(2 * np.pi * rng.uniform(900, 1300) * time + 40 * swing)


def chord(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    root = rng.uniform(300, 420)
    return sum(np.sin(2 * np.pi * root * k * time) for k in (1, 1.26, 1.5, 2, 3, 4)) / 4


def beep(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    start = rng.uniform(0.1, 0.6) * time[-1]
    inside = (time >= start) & (time < start + 0.2 * time[-1])
    return np.sin(2 * np.pi * rng.uniform(1600, 2000) * time) * inside


def hum(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    return sum(np.sin(2 * np.pi * rng.uniform(48, 62) * k * time) / k for k in range(1, 8)) / 2


def buzz(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    return 0.6 * np.sign(np.sin(2 * np.pi * rng.uniform(500, 700) * time))


def wind(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    smooth = np.cumsum(rng.standard_normal(len(time)))
    smooth -= np.linspace(smooth[0], smooth[-1], len(smooth))
    return smooth / (np.abs(smooth).max() + 1e-9)


def tremolo(time: np.ndarray, hz: int, rng: Rng) -> np.ndarray:
    return np.sin(2 * np.pi * rng.uniform(600, 800) * time) * (0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(5, 9) * time))


# Option text -> sound. The first words differ, so that one token tells the options apart.
KINDS: dict[str, Callable] = {
    "low tone": low_tone, "noise": noise, "clicks": clicks, "rising chirp": rising_chirp,
    "falling chirp": falling_chirp, "warble": warble, "chord": chord, "beep in silence": beep,
    "high tone": high_tone, "tremolo": tremolo, "hum": hum, "buzz": buzz, "wind": wind,
}  # fmt: skip
TASKS = ("kind", "count", "order", "pitch")
NUMBERS = ("one", "two", "three", "four", "five")


def questions(folder: str | Path, *, split: str, count: int, kinds: int | Sequence[str] = 8, tasks: Sequence[str] = ("kind",),
              options: int = 4, seed: int = 0) -> Manifest:  # fmt: skip
    """The manifest of `count` questions of one split under `folder`, written there the first time.

    The folder of a split is named by a hash of the arguments and of this file; splits draw from different random
    streams. Raises ValueError for an unknown kind, task or split, or fewer kinds than options.
    """
    names = list(KINDS)[:kinds] if isinstance(kinds, int) else list(kinds)
    if unknown := [n for n in names if n not in KINDS] + [t for t in tasks if t not in TASKS]:
        raise ValueError(f"data.{split}: unknown kind or task {unknown[0]!r}; kinds: {', '.join(KINDS)}; tasks: {', '.join(TASKS)}")
    if split not in ("train", "eval") or count < 1 or not 2 <= options <= len(names):
        raise ValueError(f"data.{split}: needs split train or eval, count >= 1 and {options} options out of {len(names)} kinds")
    spec = json.dumps([split, count, names, list(tasks), options, seed, Path(__file__).read_text(encoding="utf-8")])
    final = Path(folder) / f"{split}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"
    if not final.exists():
        temporary = final.with_name(f".{final.name}-{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "audio").mkdir(parents=True)
        _write(temporary, split, count, names, list(tasks), options, seed)
        try:
            os.replace(temporary, final)
        except OSError:  # another process was faster: its bytes are the same
            shutil.rmtree(temporary)
    return read(final / "manifest.jsonl")


def _write(folder: Path, split: str, count: int, names: list[str], tasks: list[str], options: int, seed: int) -> None:
    rows = []
    for i in range(count):
        rng = np.random.default_rng([seed, ("train", "eval").index(split), i])
        task, turn = tasks[i % len(tasks)], i // len(tasks)
        hz, channels = [(16000, 1), (16000, 1), (16000, 1), (44100, 2), (48000, 2)][rng.integers(5)]
        seconds = rng.uniform(0.5, 3.0) if task == "kind" else rng.uniform(1.5, 3.0)
        time = np.arange(int(seconds * hz)) / hz
        wave, text, gold, others = _TASKS[task](time, hz, rng, names, turn)
        choices = [str(c) for c in rng.choice(others, min(options, len(others) + 1) - 1, replace=False)]
        answer = (turn // max(1, len(names) if task == "kind" else 1) + turn) % (len(choices) + 1)
        choices.insert(answer, gold)
        level = 10 ** rng.uniform(-1.0, -0.1)
        sound = level * wave / (np.abs(wave).max() + 1e-9) + 0.002 * rng.standard_normal(len(time))
        if channels == 2:  # panned: the channel mean is the sound
            pan = rng.uniform(0.3, 0.7)
            sound = np.stack([2 * pan * sound, 2 * (1 - pan) * sound], axis=1)
        audio = folder / "audio" / f"{split}-{i:05d}.flac"
        soundfile.write(audio, np.clip(0.7 * sound, -1, 1).astype(np.float32), hz, format="FLAC")
        rows.append(Question(f"{split}-{i:05d}", audio, text, tuple(choices), answer, task=task, source="synthetic", license="CC0-1.0"))
    write(folder / "manifest.jsonl", rows, folder)


def _kind(time, hz, rng, names, turn):
    gold = names[turn % len(names)]
    return KINDS[gold](time, hz, rng), "Which sound is this?", gold, [n for n in names if n != gold]


def _count(time, hz, rng, names, turn):
    n = 1 + turn % len(NUMBERS)
    slots = rng.choice(8, n, replace=False)
    wave = sum(np.sin(2 * np.pi * 1500 * time) * ((time * 8 / time[-1] % 8).astype(int) == s) * ((time * 8 / time[-1]) % 1 < 0.6) for s in slots)
    return wave, "How many beeps are there?", NUMBERS[n - 1], [w for w in NUMBERS if w != NUMBERS[n - 1]]


def _order(time, hz, rng, names, turn):
    first, second = (names[k] for k in rng.choice(len(names), 2, replace=False))
    half = len(time) // 2
    wave = np.concatenate([KINDS[first](time[:half], hz, rng), KINDS[second](time[: len(time) - half], hz, rng)])
    return wave, "Which sound comes first?", first, [n for n in names if n != first]


def _pitch(time, hz, rng, names, turn):
    low, step = rng.uniform(300, 900), rng.uniform(1.5, 2.5)
    higher = turn % 2 == 0
    half = len(time) // 2
    pitch = np.where(np.arange(len(time)) < half, low if higher else low * step, low * step if higher else low)
    gold = "higher" if higher else "lower"
    return np.sin(2 * np.pi * np.cumsum(pitch) / hz), "Is the second tone higher or lower than the first?", gold, ["lower" if higher else "higher"]


_TASKS = {"kind": _kind, "count": _count, "order": _order, "pitch": _pitch}
