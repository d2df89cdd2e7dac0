"""Your own questions: a spreadsheet saved as CSV, JSONL or Parquet, and Hugging Face data sets with an Audio column."""

from __future__ import annotations

import re

from data.manifest import OPTIONAL, RowError
from data.options import index, listed, within
from data.sources import Source

AUDIO = ("__audio__", "audio", "context", "audio_path", "path", "file", "file_name")
QUESTION = ("question", "instruction", "question_text", "prompt")
CHOICES = ("choices", "options", "multi_choice", "choice")
ANSWER = ("answer", "correct", "label", "answer_gt", "correct_answer", "solution")
TEXTS = [k for k, kind in OPTIONAL.items() if kind is str and k not in ("sha256", "benchmark")]


def table(row: dict) -> dict:
    """Columns audio, question, answer (text, letter or index), and choices or a column each: A, B, C or choice_a ..

    Other columns of the manifest (task, source, thinking ...) are kept under their names, `meta` too.
    """
    audio, question, choices, answer = (_first(row, names) for names in (AUDIO, QUESTION, CHOICES, ANSWER))
    if choices is None:
        columns = sorted(k for k in row if re.fullmatch(r"(?i)((choice|option)[ _]?)?[a-z]", k))
        choices = [str(row[k]) for k in columns if row[k] not in (None, "")]
    if len(choices) == 0:
        question, choices = within(str(question))
    choices = listed(choices)
    if isinstance(answer, str) and answer.isdecimal() and answer not in choices:
        answer = int(answer)
    kept = {k: str(row[k]) for k in TEXTS if row.get(k) not in (None, "")}
    try:
        times = {k: float(row[k]) for k in ("start", "end") if row.get(k) not in (None, "")}
    except (TypeError, ValueError) as error:
        raise RowError("bad_range", f"start and end must be seconds: {error}") from error
    meta = {"meta": row["meta"]} if isinstance(row.get("meta"), dict) else {}
    name = row.get("id") or row.get("__key__")
    return kept | times | meta | {
        "id": name, "audio": audio, "question": question, "choices": choices, "answer": index(answer, choices)
    }  # fmt: skip


def _first(row: dict, names):
    return next((row[n] for n in names if row.get(n) not in (None, "")), None)


SOURCES = [
    Source("table", "your own CSV, TSV, JSONL or Parquet", table),
    Source("hf", "a Hugging Face data set's Parquet with an Audio column", table),
]
