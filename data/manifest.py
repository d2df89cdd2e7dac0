"""The one manifest format: JSON lines of id, audio, start?, end?, question, choices[], answer (index), task?, source?,
license?, meta? (anything). Errors name file, line and key."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data.question import Question

REQUIRED = {"id": str, "audio": str, "question": str, "choices": list, "answer": int}
OPTIONAL = {"start": float, "end": float, "task": str, "source": str, "license": str, "meta": dict}
SPECIAL_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>")


@dataclass(frozen=True)
class Problem:
    """Something wrong with one row: where, a short reason code, and a message that says what to do."""

    file: str
    line: int
    id: str | None
    reason: str
    message: str


@dataclass(frozen=True)
class Manifest:
    """The good questions of a manifest file and the problems of its bad rows."""

    path: Path
    questions: list[Question]
    problems: list[Problem]
    lines: dict[str, int]  # question id -> line

    def __iter__(self):
        return iter(self.questions)

    def __len__(self) -> int:
        return len(self.questions)


class RowError(ValueError):
    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read(path: str | Path, *, root: str | Path | None = None) -> Manifest:
    """Read and validate every row (not the audio). Audio paths are relative to `root`, by default the file's folder.

    Raises FileNotFoundError if there is no such file, ValueError if it has no rows; bad rows become problems.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"manifest {path} does not exist: set data.train.path / data.eval.path")
    root = (path.parent if root is None else Path(root)).resolve()
    questions, problems, lines = [], [], {}
    rows = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            rows += 1
            row = None
            try:
                row = _parse(raw)
                question = _question(row, root)
                if question.id in lines:
                    raise RowError("duplicate_id", f"id {question.id!r} stands on line {lines[question.id]} already")
            except RowError as error:
                name = row.get("id") if isinstance(row, dict) and isinstance(row.get("id"), str) else None
                problems.append(Problem(str(path), number, name, error.reason, str(error)))
                continue
            lines[question.id] = number
            questions.append(question)
    if rows == 0:
        raise ValueError(f"manifest {path} has no rows")
    return Manifest(path, questions, problems, lines)


def write(path: str | Path, questions: Iterable[Question], root: str | Path) -> None:
    """Write questions as a manifest, audio paths relative to `root`; under a temporary name, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for q in questions:
            row = {"id": q.id, "audio": os.path.relpath(q.audio, root), "question": q.question,
                   "choices": list(q.choices), "answer": q.answer}  # fmt: skip
            extra = {k: getattr(q, k) for k in ("start", "end", "task", "source", "license")}
            row |= {k: v for k, v in extra.items() if v is not None}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)


def _parse(raw: bytes) -> dict:
    try:
        row = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RowError("bad_json", f"not a line of JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowError("bad_json", f"a row must be a JSON object, got {type(row).__name__}")
    return row


def _question(row: dict, root: Path) -> Question:
    known = REQUIRED | OPTIONAL
    for key in row:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "put extra fields under 'meta'"
            raise RowError("unknown_key", f"unknown key {key!r}; {hint}")
    for key, kind in REQUIRED.items():
        if key not in row:
            raise RowError("missing_key", f"key {key!r} is missing")
        _typed(key, row[key], kind)
    for key, kind in OPTIONAL.items():
        if row.get(key) is not None:
            _typed(key, row[key], kind)
    choices = row["choices"]
    for text in [row["id"], row["question"], *choices]:
        if not isinstance(text, str) or not text.strip():
            raise RowError("empty_text", "id, question and every choice must be non-empty text")
        if SPECIAL_TOKEN.search(text):
            raise RowError("special_token", f"{text!r} holds a chat or audio token, which would break the prompt")
    if len(choices) < 2:
        raise RowError("few_choices", f"{len(choices)} choices, at least 2 are needed")
    if len({c.strip().casefold() for c in choices}) < len(choices):
        raise RowError("duplicate_choices", "two choices have the same text")
    if all(re.match(rf"\(?{chr(65 + i)}[.):]\s", c) for i, c in enumerate(choices[:26])):
        raise RowError("lettered_choices", "choices carry their letters ('A. dog'): give bare texts, letters are added")
    if not 0 <= row["answer"] < len(choices):
        raise RowError("answer_range", f"answer {row['answer']} is not an index into {len(choices)} choices (0 is the first)")
    audio = (root / row["audio"]).resolve()
    if root not in audio.parents:
        raise RowError("path_escape", f"audio {row['audio']!r} lies outside the data root {root}")
    return Question(row["id"], audio, row["question"], tuple(choices), row["answer"],
                    **{k: row.get(k) for k in ("start", "end", "task", "source", "license")})  # fmt: skip


def _typed(key: str, value, kind: type) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right = number if kind is float else isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if not right:
        raise RowError("bad_type", f"key {key!r} must be {kind.__name__}, got {value!r}"[:300])
