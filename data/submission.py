"""Predictions as each benchmark's own scorer reads them, and back. Standard library only.

Written from the published rows that `data.prepare` keeps in a manifest's meta.row: every row, always, with an empty
string where there is no answer. (The published scorers drop what is missing, which flatters.)
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from data.question import Question


@dataclass(frozen=True)
class Prediction:
    """What the model said to one question."""

    option: int | None  # index into the question's choices, None where it named none
    text: str = ""  # of the answer block, used where no option was named
    thinking: str = ""


@dataclass(frozen=True)
class Format:
    """`line` gives a published row its predictions, `said` takes them out again, as (row, answer, thinking)."""

    kind: str  # json: one array; jsonl; csv
    line: Callable[[dict, Question, Prediction], dict]
    keys: tuple[str, ...]  # those that `line` adds: the answer first, then the thinking


def _text(q: Question, p: Prediction) -> str:
    """The bare text: "A. text" costs a perfect model 33 of MMAU's 1000 points, the letter alone 998."""
    return p.text if p.option is None else q.choices[p.option]


def _letter(q: Question, p: Prediction) -> str:
    return "" if p.option is None else ascii_uppercase[p.option]


def _dcase2025(row: dict, q: Question, p: Prediction) -> dict:
    """Columns question and answer; an answer is "A. text", so no cell can begin a formula but an id: refused."""
    if q.id[:1] in ("=", "+", "-", "@", "\t", "\r"):
        raise ValueError(f"question {q.id!r}: a spreadsheet would run this id as a formula: rename it")
    return {"question": q.id, "answer": f"{_letter(q, p)}. {_text(q, p)}" if p.option is not None else ""}


FORMATS = {
    "mmau_mini": Format("json", lambda row, q, p: row | {"model_output": _text(q, p)}, ("model_output",)),
    "mmau_test": Format("json", lambda row, q, p: row | {"model_output": _text(q, p)}, ("model_output",)),
    "mmar": Format(
        "jsonl",
        lambda row, q, p: row | {"answer_prediction": _text(q, p), "thinking_prediction": p.thinking},
        ("answer_prediction", "thinking_prediction"),
    ),
    "mmsu": Format("jsonl", lambda row, q, p: row | {"response": _letter(q, p)}, ("response",)),
    "air_bench": Format("jsonl", lambda row, q, p: row | {"response": _letter(q, p)}, ("response",)),
    "muchomusic": Format(
        "json", lambda row, q, p: _muchomusic(row, q) | {"model_output": _letter(q, p)}, ("model_output",)
    ),
    "dcase2025": Format("csv", _dcase2025, ("answer",)),
    "dcase2026": Format("jsonl", lambda row, q, p: row | {"answer_prediction": _text(q, p)}, ("answer_prediction",)),
}


def write(path: str | Path, questions: Sequence[Question], predictions: Mapping[str, Prediction]) -> None:
    """Write the official file of the questions' benchmark; a question without prediction gets an empty one.

    Raises ValueError for questions of several benchmarks or of none, for one prepared without its published row, and
    for a prediction of no question.
    """
    names = {q.benchmark for q in questions}
    if len(names) != 1 or not names <= set(FORMATS):
        raise ValueError(f"questions of one of {', '.join(FORMATS)} are needed, got {sorted(map(str, names))}")
    (name,) = names
    if strangers := set(predictions) - {q.id for q in questions}:
        raise ValueError(f"prediction for {min(strangers)!r}, which is no question of {name}")
    form, lines = FORMATS[name], []
    for q in questions:
        row = (q.meta or {}).get("row")
        if not isinstance(row, dict):
            raise ValueError(f"question {q.id!r} has no meta.row: prepare the benchmark with `python -m data.prepare`")
        lines.append(form.line(row, q, predictions.get(q.id, Prediction(None))))
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        if form.kind == "json":
            json.dump(lines, file, ensure_ascii=False, indent=1)
        elif form.kind == "jsonl":
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        else:
            table = csv.DictWriter(file, list(lines[0]))
            table.writeheader()
            table.writerows(lines)
    temporary.replace(path)


def read(path: str | Path, benchmark: str) -> list[tuple[dict, str, str]]:
    """(published row, answer, thinking) of each line of an official file, in order; answer and thinking "" if absent.

    Raises ValueError for an unknown benchmark or a file of another kind.
    """
    if benchmark not in FORMATS:
        raise ValueError(f"no official file for {benchmark!r}; there are {', '.join(FORMATS)}")
    form = FORMATS[benchmark]
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            if form.kind == "json":
                rows = json.load(file)
            elif form.kind == "jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                rows = list(csv.DictReader(file, strict=True))
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} is not {form.kind}, as {benchmark} has it: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: {benchmark} has one object an item")
    said = []
    for row in rows:
        answer, thinking = (*(str(row.pop(key, "") or "") for key in form.keys), "")[:2]
        said.append((row, answer, thinking))
    return said


def _muchomusic(row: dict, q: Question) -> dict:
    """The evaluation JSON's item; from a CSV's row it is built, with the options in the order they were asked in."""
    if "answer_orders" in row:
        return row
    letters = " ".join(f"({a}) {text}" for a, text in zip(ascii_uppercase, q.choices, strict=False))
    listed = {name: _list(row.get(f"music_{name}")) for name in ("reasoning", "knowledge")}
    return {
        "id": q.clip, "prompt": f"Question: {q.question}\n Options: {letters} \n The correct answer is: ",
        "answers": list(q.choices), "answer_orders": q.meta["answer_orders"], "dataset": row.get("dataset"),
        "genre": row.get("genre") or "", **listed, "audio_path": os.fspath(q.audio.name),
    }  # fmt: skip


def _list(cell: str | None) -> list[str]:
    """A cell such as "['melody', 'rhythm']"."""
    return [part.strip(" '\"") for part in (cell or "").strip("[] ").split(",") if part.strip(" '\"")]
