"""MMAU (test-mini and test, name the version: v05.15.25) and MMAR, which share a scorer."""

from __future__ import annotations

import re

from data.manifest import RowError
from data.options import index
from data.sources import Source


def mmau_mini(row: dict) -> dict:
    """id, audio_id, question, choices (bare), answer (a choice), task, category (13 times a list), difficulty ..."""
    return _mmau(row, "mmau_mini")


def mmau_test(row: dict) -> dict:
    """As test-mini, answers withheld (blank)."""
    return _mmau(row, "mmau_test")


def _mmau(row: dict, benchmark: str) -> dict:
    choices = _choices(row)
    category = row.get("category")
    return {
        "id": row.get("id"), "audio": row.get("context") or row.get("audio") or row.get("audio_id"),
        "question": row.get("question"), "choices": choices,
        "answer": index(row["answer"], choices) if row.get("answer") else None,
        "task": row.get("task"), "source": row.get("dataset"), "benchmark": benchmark,
        "difficulty": row.get("difficulty"), "subcategory": row.get("sub-category"),
        "category": ", ".join(category) if isinstance(category, list) else category,
    }  # fmt: skip


def mmar(row: dict) -> dict:
    """id, audio_path, question, choices, answer, modality, category, sub-category, language, source, url ..."""
    choices = _choices(row)
    video = re.search(r"[?&]v=([\w-]{11})", row.get("url") or "")
    return {
        "id": row.get("id"), "audio": row.get("audio_path"), "question": row.get("question"), "choices": choices,
        "answer": index(row["answer"], choices) if row.get("answer") else None, "clip": video and video[1],
        "task": row.get("modality"), "source": row.get("source"), "benchmark": "mmar",
        "category": row.get("category"), "subcategory": row.get("sub-category"),
    }  # fmt: skip


def _choices(row: dict) -> list[str]:
    """As printed: the scorer compares with these very texts."""
    if not isinstance(choices := row.get("choices"), list):
        raise RowError("bad_type", f"choices must be a list, got {choices!r}"[:300])
    return choices


SOURCES = [
    Source("mmau_mini", "MMAU test-mini: its JSON, or Parquet with sound", mmau_mini, benchmark=True),
    Source("mmau_test", "MMAU test, answers withheld", mmau_test, benchmark=True),
    Source("mmar", "MMAR-meta.jsonl", mmar, benchmark=True, license="CC-BY-NC-4.0"),
]
