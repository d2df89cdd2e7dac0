"""Training and held-out questions with their clips: validated, with everything that was left out on record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable

import numpy as np

from data.audio import ClipError, check_header, load
from data.manifest import Problem
from data.question import Clip, Question


class DataError(ValueError):
    """The data cannot be trained on: says what is wrong and what to do."""


class Dataset:
    """Two lists of questions, `train` and `eval`, and `clip(question)`.

    A row that is wrong is left out. A question whose clip cannot be read stays, and is noted in `unreadable` (id to
    reason): the order of the others does not hang on what could be read on that day, on that machine.

    Args:
        train, eval: iterables of Question, such as `data.manifest.read(...)`; a list from your own function will do.
        audio: "real", or "silent" to replace every clip by zeros of its length (does the model listen at all?).
        hz: sample rate of the clips, the model's.
        verify: "decode" reads every clip at the start, "header" looks at headers, "none" trusts them.
        max_bad_fraction: share of rows of a split that may be left out before the data is refused.
        shuffle_options: ask a training question with its options in another order every epoch (data.sampler).
        progress: called with (done, total) while clips are verified.
    Raises DataError when too many rows are bad, a split is empty, or held-out questions or clips are in training too.
    """

    def __init__(self, train: Iterable[Question], eval: Iterable[Question], *, audio: str = "real", hz: int = 16000,
                 min_seconds: float = 0.03, max_seconds: float = 30.0, verify: str = "decode",
                 max_bad_fraction: float = 0.01, shuffle_options: bool = False,
                 progress: Callable | None = None):  # fmt: skip
        if audio not in ("real", "silent"):
            raise DataError(f"data.audio must be 'real' or 'silent', got {audio!r}")
        if verify not in ("decode", "header", "none"):
            raise DataError(f"data.verify must be 'decode', 'header' or 'none', got {verify!r}")
        self.audio, self.hz, self.verify, self.max_bad_fraction = audio, hz, verify, max_bad_fraction
        self.shuffle_options = shuffle_options
        self.limits = {"min_seconds": min_seconds, "max_seconds": max_seconds}
        self.problems: list[Problem] = []
        self.unreadable: dict[str, str] = {}
        self.train = self._accept("train", train, progress)
        self.eval = self._accept("eval", eval, progress)
        self._check_held_out()

    def clip(self, question: Question) -> Clip:
        """The waveform of a question. Raises ClipError (data.audio)."""
        clip = load(question.audio, **_where(question), hz=self.hz, **self.limits)
        if self.audio == "silent":
            clip = Clip(np.zeros_like(clip.samples), clip.hz)
        return clip

    @property
    def readable(self) -> list[Question]:
        """The training questions without those whose clip is known to be unreadable."""
        return [q for q in self.train if q.id not in self.unreadable]

    @property
    def left_out(self) -> str:
        """What of the rows is not used, in words."""
        clips = len(self.unreadable)
        return f"{len(self.problems) - clips} rows left out, {clips} clips unreadable"

    @property
    def fingerprint(self) -> str:
        """Short hash over all rows of both splits: two runs with the same one asked the same questions."""
        rows = [
            [[q.id, q.audio.name, q.start, q.end, q.question, q.choices, q.answer] for q in split]
            for split in (self.train, self.eval)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]

    def _accept(self, split: str, source: Iterable[Question], progress: Callable | None) -> list[Question]:
        questions = list(source)
        problems = list(getattr(source, "problems", []))
        total = len(questions) + len(problems)
        file, lines = str(getattr(source, "path", f"data.{split}")), getattr(source, "lines", {})
        good: dict[str, Question] = {}
        unreadable: dict[str, str] = {}
        for i, question in enumerate(questions):
            line = lines.get(question.id, i + 1)
            try:
                if question.id in good:  # a manifest has looked already; a list from a user's function has not
                    problems.append(Problem(file, line, question.id, "duplicate_id", f"id {question.id!r} came before"))
                    continue
                if question.answer is None:
                    problems.append(Problem(file, line, question.id, "no_answer", "its answer is withheld"))
                    continue
                good[question.id] = question
                if self.verify == "decode":
                    self.clip(question)
                elif self.verify == "header":
                    check_header(question.audio, **_where(question), hz=self.hz, **self.limits)
            except ClipError as error:
                unreadable[question.id] = error.reason
                problems.append(Problem(file, line, question.id, error.reason, str(error)))
            if progress:
                progress(i + 1, len(questions))
        if total == 0:
            raise DataError(f"data.{split} ({file}) has no questions")
        if len(good) == len(unreadable) or len(problems) > self.max_bad_fraction * total:
            see = f"See all with `python -m data.check {file}`. " if hasattr(source, "path") else ""
            shown = "\n".join(f"  {p.file}:{p.line} {p.id or '-'} {p.reason}: {p.message}" for p in problems[:10])
            raise DataError(
                f"{len(problems)} of {total} rows of data.{split} are bad, data.max_bad_fraction="
                f"{self.max_bad_fraction} allows {int(self.max_bad_fraction * total)}. The first ones:\n{shown}\n"
                f"{see}Mend them, or raise data.max_bad_fraction"
            )
        self.problems += problems
        self.unreadable |= unreadable
        return list(good.values())

    def _check_held_out(self) -> None:
        ids = {q.id for q in self.train}
        clips = {_stretch(q) for q in self.train}
        for q in self.eval:
            if q.id in ids:
                raise DataError(f"question {q.id!r} is in data.train and data.eval: held-out must be held out")
            if _stretch(q) in clips:
                raise DataError(
                    f"the clip of held-out question {q.id!r} ({q.audio}) is in data.train too: keep all questions "
                    f"about a clip on one side"
                )


def _where(question: Question) -> dict:
    return {"span": question.span, "start": question.start, "end": question.end}


def _stretch(question: Question) -> tuple:
    return question.audio, question.span, question.start or 0.0, question.end
