"""A data set of made-up sounds: real FLAC files and a manifest, written once, the same bytes every time.

Length, peak level, sample rate and channels are drawn without looking at the answer, so that nothing but the sound
itself tells it: with every clip silenced, accuracy must stay at chance.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from data.manifest import Manifest, read, write
from data.question import Question

Rng = np.random.Generator
SPLITS = ("train", "eval")
FORMATS = [(16000, 1)] * 3 + [(44100, 2), (48000, 2)]  # Hz, channels; drawn with equal chances
NUMBERS = ("one", "two", "three", "four", "five")

# ---- sounds: time [S] in seconds -> wave [S] of any level ----


def _tone(time: np.ndarray, hz: float | np.ndarray, rng: Rng) -> np.ndarray:
    return np.sin(2 * np.pi * (hz * time + rng.random()))


def _sweep(time: np.ndarray, low: float, high: float, rng: Rng) -> np.ndarray:
    return _tone(time, low + (high - low) * time / (2 * time[-1]), rng)  # half: phase is the integral of frequency


def low_tone(time: np.ndarray, rng: Rng) -> np.ndarray:
    return _tone(time, rng.uniform(150, 300), rng)


def high_tone(time: np.ndarray, rng: Rng) -> np.ndarray:
    return _tone(time, rng.uniform(2500, 3500), rng)


def noise(time: np.ndarray, rng: Rng) -> np.ndarray:
    return rng.standard_normal(len(time))


def clicks(time: np.ndarray, rng: Rng) -> np.ndarray:
    every = rng.uniform(0.06, 0.14)
    return rng.standard_normal(len(time)) * np.exp(-((time + rng.uniform(0, every)) % every) / 0.003)


def rising_chirp(time: np.ndarray, rng: Rng) -> np.ndarray:
    return _sweep(time, rng.uniform(250, 500), rng.uniform(3000, 4500), rng)


def falling_chirp(time: np.ndarray, rng: Rng) -> np.ndarray:
    return _sweep(time, rng.uniform(3000, 4500), rng.uniform(250, 500), rng)


def warble(time: np.ndarray, rng: Rng) -> np.ndarray:
    swing = _tone(time, rng.uniform(4, 8), rng)
    return np.sin(2 * np.pi * rng.uniform(900, 1300) * time + 40 * swing)


def chord(time: np.ndarray, rng: Rng) -> np.ndarray:
    root = rng.uniform(300, 420)
    return sum(_tone(time, root * k, rng) for k in (1, 1.26, 1.5, 2, 3, 4))


def beep(time: np.ndarray, rng: Rng) -> np.ndarray:
    start = rng.uniform(0.1, 0.6) * time[-1]
    inside = (time >= start) & (time < start + 0.2 * time[-1])
    return _tone(time, rng.uniform(1600, 2000), rng) * inside


def tremolo(time: np.ndarray, rng: Rng) -> np.ndarray:
    return _tone(time, rng.uniform(600, 800), rng) * (1 + _tone(time, rng.uniform(5, 9), rng))


def hum(time: np.ndarray, rng: Rng) -> np.ndarray:
    root = rng.uniform(48, 62)
    return sum(_tone(time, root * k, rng) / k for k in range(1, 8))


def buzz(time: np.ndarray, rng: Rng) -> np.ndarray:
    root = rng.uniform(500, 700)
    return sum(_tone(time, root * k, rng) / k for k in (1, 3, 5))  # a whole square wave folds into noise at 16 kHz


def wind(time: np.ndarray, rng: Rng) -> np.ndarray:
    walk = np.cumsum(rng.standard_normal(len(time)))
    return walk - np.linspace(walk[0], walk[-1], len(walk))


def hiss(time: np.ndarray, rng: Rng) -> np.ndarray:
    """A noise band some 1500 Hz wide: slow noise times a high tone."""
    slow = np.convolve(rng.standard_normal(len(time)), np.ones(max(1, round(0.001 / time[1]))), "same")
    return slow * _tone(time, rng.uniform(5000, 6500), rng)


# Option text -> sound; `kinds=8` takes the first eight, which differ in timbre. The later ones differ in pitch or in
# how they move, which takes longer to learn. The first words differ, so that one token tells the options apart.
KINDS: dict[str, Callable] = {
    "low tone": low_tone, "noise": noise, "clicks": clicks, "warble": warble, "chord": chord, "hum": hum, "wind": wind,
    "hiss": hiss, "buzz": buzz, "rising chirp": rising_chirp, "falling chirp": falling_chirp, "beep in silence": beep,
    "high tone": high_tone, "tremolo": tremolo,
}  # fmt: skip

# ---- tasks: (time, gold, names, rng) -> wave [S], distractors that must be among the options, others to draw from ----


def _kind(time: np.ndarray, gold: str, names: list[str], rng: Rng):
    return KINDS[gold](time, rng), [], _without(names, gold)


def _count(time: np.ndarray, gold: str, names: list[str], rng: Rng):
    slot, within = np.divmod(8 * time / (time[-1] + time[1]), 1)
    places = rng.choice(8, 1 + NUMBERS.index(gold), replace=False)
    wave = _tone(time, rng.uniform(1000, 2000), rng) * np.isin(slot, places) * (within < 0.6)
    return wave, [], _without(NUMBERS, gold)


def _order(time: np.ndarray, gold: str, names: list[str], rng: Rng):
    second = str(rng.choice(_without(names, gold)))  # always an option, or hearing what is there would be enough
    half = len(time) // 2
    parts = [_level(KINDS[gold](time[:half], rng)), _level(KINDS[second](time[: len(time) - half], rng))]
    return np.concatenate(parts), [second], _without(names, gold, second)


def _pitch(time: np.ndarray, gold: str, names: list[str], rng: Rng):
    middle, step = rng.uniform(500, 1500), rng.uniform(1.2, 1.6)
    first, second = (middle / step, middle * step) if gold == "higher" else (middle * step, middle / step)
    half = len(time) // 2
    wave = np.concatenate([_tone(time[:half], first, rng), _tone(time[half:], second, rng)])
    return wave, [], _without(("higher", "lower"), gold)


# Name -> function, question, golds (None: the kinds), range of seconds
TASKS = {
    "kind": (_kind, "Which sound is this?", None, (0.5, 3.0)),
    "count": (_count, "How many beeps are there?", NUMBERS, (1.5, 3.0)),
    "order": (_order, "Which sound comes first?", None, (1.5, 3.0)),
    "pitch": (_pitch, "Is the second tone higher or lower than the first?", ("higher", "lower"), (1.5, 3.0)),
}


def questions(folder: str | Path, *, split: str, count: int, kinds: int | Sequence[str] = 8,
              tasks: Sequence[str] = ("kind",), options: int = 4, seed: int = 0) -> Manifest:  # fmt: skip
    """The manifest of `count` questions of one split, written under `folder` the first time it is asked for.

    The folder of a split is named by a hash of the arguments and of this file; splits draw from different random
    streams. Raises ValueError for an unknown kind, task or split, or fewer kinds than options.
    """
    if isinstance(kinds, int) and kinds > len(KINDS):
        raise ValueError(f"data.{split}: kinds={kinds}, but there are {len(KINDS)}: {', '.join(KINDS)}")
    names = list(KINDS)[:kinds] if isinstance(kinds, int) else list(kinds)
    for what, given, known in [("kind", names, KINDS), ("task", tasks, TASKS), ("split", [split], SPLITS)]:
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"data.{split}: unknown {what} {unknown[0]!r}; there are {', '.join(known)}")
    if count < 1 or not tasks or not 2 <= options <= len(set(names)):
        raise ValueError(f"data.{split}: count={count} must be at least 1, options={options} from 2 to the number of "
                         f"kinds ({len(set(names))}), and tasks not empty")  # fmt: skip
    spec = {"split": split, "count": count, "kinds": names, "tasks": list(tasks), "options": options, "seed": seed,
            "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}  # fmt: skip
    final = Path(folder) / f"{split}-{hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:12]}"
    if not final.exists():
        temporary = final.with_name(f".{final.name}-{uuid.uuid4().hex[:8]}")
        try:
            (temporary / "audio").mkdir(parents=True)
            _write(temporary, split, count, names, list(tasks), options, seed)
            (temporary / "spec.json").write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, final)
        except OSError:
            if not final.exists():
                raise
            # Another process was faster: its bytes are the same.
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return read(final / "manifest.jsonl")


def _write(folder: Path, split: str, count: int, names: list[str], tasks: list[str], options: int, seed: int) -> None:
    rows = []
    for i in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), i])
        hz, channels = FORMATS[rng.integers(len(FORMATS))]
        level = 10 ** rng.uniform(-1.0, -0.1)
        make, text, golds, (shortest, longest) = TASKS[tasks[i % len(tasks)]]
        time = np.arange(int(rng.uniform(shortest, longest) * hz)) / hz

        # Golds take turns, and so do the places of each gold: neither says anything of the other.
        turn, which = divmod(i // len(tasks), len(golds := golds or names))
        wave, forced, others = make(time, golds[which], names, rng)
        number = min(options, 1 + len(forced) + len(others))
        choices = forced + [str(c) for c in rng.choice(others, number - 1 - len(forced), replace=False)]
        choices = [choices[k] for k in rng.permutation(number - 1)]
        answer = (turn + which) % number
        choices.insert(answer, golds[which])

        sound = level * _level(wave) + 0.002 * rng.standard_normal(len(time))
        pan = rng.uniform(0.3, 0.7)
        if channels == 2:  # the mean of the two is the sound
            sound = np.stack([2 * pan * sound, 2 * (1 - pan) * sound], axis=1)
        audio = folder / "audio" / f"{split}-{i:05d}.flac"
        soundfile.write(audio, np.clip(0.7 * sound, -1, 1).astype(np.float32), hz, format="FLAC")
        rows.append(Question(audio.stem, audio, text, tuple(choices), answer, task=tasks[i % len(tasks)],
                             source="synthetic", license="CC0-1.0"))  # fmt: skip
    write(folder / "manifest.jsonl", rows, folder)


def _level(wave: np.ndarray) -> np.ndarray:
    return wave / (np.abs(wave).max() + 1e-9)


def _without(names: Sequence[str], *some: str) -> list[str]:
    return [name for name in names if name not in some]
