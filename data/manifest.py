"""The one manifest format: JSON lines of id, audio, question, choices[], answer (index), and the optional keys of
OPTIONAL (what they mean: data/question.py; `meta` is an object of your own). Errors name file, line and key."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase

from data.question import Question

REQUIRED = {"id": str, "audio": str, "question": str, "choices": list, "answer": int}
OPTIONAL = {
    "start": float, "end": float, "task": str, "source": str, "license": str, "span": list, "sha256": str, "clip": str,
    "thinking": str, "semantic_elements": str, "benchmark": str, "difficulty": str, "category": str, "subcategory": str,
    "meta": dict,
}  # fmt: skip
LONGEST_LINE = 2**20  # bytes: Python makes up to 30 times as much of a line of brackets
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
    lines: dict[str, int] = field(default_factory=dict)  # question id -> line

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)

    def __len__(self) -> int:
        return len(self.questions)


class RowError(ValueError):
    """A row that cannot be used; becomes a Problem."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read(path: str | Path, *, root: str | Path | None = None, hidden: bool = False) -> Manifest:
    """Read and validate every row (not the audio). Audio paths are relative to `root`, by default the file's folder.

    `hidden` allows rows whose answer is null: benchmarks that keep it to themselves, to be answered but not scored.
    Raises FileNotFoundError if there is no such file, ValueError if it has no rows; bad rows become problems.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"manifest {path} does not exist: set data.train.path / data.eval.path")
    root = (path.parent if root is None else Path(root)).resolve()
    questions, problems, lines = [], [], {}
    with path.open("rb") as file:
        for number, raw in enumerate(lines_of(file), start=1):
            if not raw.strip():
                continue
            row = None
            try:
                row = parse(raw)
                question = question_of(row, root, hidden=hidden)
                if question.id in lines:
                    raise RowError("duplicate_id", f"id {question.id!r} stands on line {lines[question.id]} already")
            except RowError as error:
                name = row.get("id") if isinstance(row, dict) and isinstance(row.get("id"), str) else None
                problems.append(Problem(str(path), number, name, error.reason, str(error)))
                continue
            lines[question.id] = number
            questions.append(question)
    if not questions and not problems:
        raise ValueError(f"manifest {path} has no rows")
    return Manifest(path, questions, problems, lines)


def scan(path: str | Path, *, root: str | Path | None = None) -> tuple[list[Question], list[Problem]]:
    """`read` as a pair: good questions, problems of the bad rows."""
    manifest = read(path, root=root)
    return manifest.questions, manifest.problems


def write(path: str | Path, questions: Iterable[Question], root: str | Path) -> None:
    """Write questions as a manifest, audio paths relative to `root`; under a temporary name, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        for q in questions:
            file.write(json.dumps(row_of(q, root), ensure_ascii=False) + "\n")
    temporary.replace(path)


def row_of(q: Question, root: str | Path) -> dict:
    """The manifest row of a question, its audio relative to `root`."""
    row = {"id": q.id, "audio": os.path.relpath(q.audio, root), "question": q.question, "choices": list(q.choices),
           "answer": q.answer}  # fmt: skip
    return row | {k: v for k in OPTIONAL if (v := getattr(q, k)) is not None}


def lines_of(file) -> Iterator[bytes]:
    """Lines of a binary file, those longer than LONGEST_LINE cut to one byte more, so that `parse` refuses them."""
    while line := file.readline(LONGEST_LINE + 1):
        rest = line
        while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE + 1)
        yield line


def parse(raw: bytes) -> dict:
    """One line of JSON as an object. Raises RowError."""
    if len(raw) > LONGEST_LINE:
        raise RowError("bad_json", f"a line of more than {LONGEST_LINE} bytes")
    try:
        row = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: wrong JSON, wrong UTF-8, a number of 5,000 digits
        raise RowError("bad_json", f"not a line of JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowError("bad_json", f"a row must be a JSON object, got {type(row).__name__}")
    return row


def question_of(row: dict, root: Path, *, hidden: bool = False) -> Question:
    """A manifest row as a Question; `root` is an absolute path without links. Raises RowError."""
    _check_keys(row, hidden)
    _check_line(row)
    for key in ("id", "audio", "question"):
        _check_text(key, row[key])
    _check_choices(row["choices"], printed=row.get("benchmark") is not None)
    answer, n = row["answer"], len(row["choices"])
    if answer is not None and not 0 <= answer < n:
        raise RowError("answer_range", f"answer {answer} is not an index into {n} choices (0 is the first)")
    start, end = (row.get(key) for key in ("start", "end"))
    if not 0 <= (start or 0.0) < (math.inf if end is None else end) or end == math.inf:
        raise RowError("bad_range", f"start {start} and end {end} must be seconds with 0 <= start < end")
    if (span := row.get("span")) is not None:
        if len(span) != 2 or not all(type(x) is int and 0 <= x < 2**63 for x in span):
            raise RowError("bad_range", f"span {span} must be the offset and the length of the clip in bytes"[:300])
        span = tuple(span)
    optional = {k: row.get(k) for k in OPTIONAL} | {"span": span}
    return Question(row["id"], _audio(row["audio"], root), row["question"], tuple(row["choices"]), answer, **optional)


def _check_keys(row: dict, hidden: bool) -> None:
    known = REQUIRED | OPTIONAL
    for key in row:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "put extra fields under 'meta'"
            raise RowError("unknown_key", f"unknown key {key!r}; {hint}")
    for key, kind in known.items():
        if key in REQUIRED and key not in row:
            raise RowError("missing_key", f"key {key!r} is missing")
        value = row.get(key)
        if value is None and (key in OPTIONAL or (key == "answer" and hidden)):
            continue
        is_right = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not is_right or isinstance(value, bool):  # True is an int to Python, but not an index
            raise RowError("bad_type", f"key {key!r} must be {kind.__name__}, got {value!r}"[:300])


def _check_line(row: dict) -> None:
    """What is accepted can be written again, in a line that `parse` accepts."""
    try:
        size = len(json.dumps(row, ensure_ascii=False).encode())
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 30) : error.end]
        raise RowError("bad_text", f"half a surrogate pair in the row, at the end of {near!r}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("bad_type", f"not to be written as JSON: {error}"[:300]) from error
    if size > LONGEST_LINE:
        raise RowError("bad_json", f"a row of {size} bytes, at most {LONGEST_LINE} are read")


def _check_text(key: str, text) -> None:
    if not isinstance(text, str):
        raise RowError("bad_type", f"key {key!r}: {text!r} must be str"[:300])
    if not text.strip():
        raise RowError("empty_text", f"key {key!r} is empty")
    if SPECIAL_TOKEN.search(text):
        raise RowError("special_token", f"key {key!r}: {text!r} holds a chat or audio token, which breaks the prompt")
    if "\0" in text:
        raise RowError("bad_text", f"key {key!r}: {text!r} holds a NUL")


def _check_choices(choices: list, *, printed: bool) -> None:
    """`printed`: a benchmark's, asked as they are. MMAU prints an option twice in 27 items, MMAR an empty one in 4."""
    for text in choices:
        if printed and text == "":
            continue
        _check_text("choices", text)
        if "\n" in text:
            raise RowError("line_break", f"choice {text!r} has a line break: it would look like two options")
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise RowError("num_choices", f"{len(choices)} choices: 2 to 26 are needed")
    if not printed and len({c.strip().casefold() for c in choices}) < len(choices):
        raise RowError("duplicate_choices", "two choices have the same text")
    if all(re.match(rf"\(?{a}[.):](\s|$)", c) for a, c in zip(ascii_uppercase, choices, strict=False)):
        raise RowError("lettered_choices", "choices carry their letters ('A. dog'): give bare texts, letters are added")


def _audio(name: str, root: Path) -> Path:
    try:
        audio = (root / name).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise RowError("path_escape", f"audio {name!r} cannot be followed: {error}") from error
    if root not in audio.parents:
        raise RowError("path_escape", f"audio {name!r} lies outside the data root {root}: set root, or move the file")
    return audio
