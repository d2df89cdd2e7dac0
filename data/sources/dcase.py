"""The audio questions of the DCASE challenges' task 5, 2025 and 2026. Evaluation sets withhold the answer."""

from __future__ import annotations

from data.options import index, listed
from data.sources import Source


def dcase2025(row: dict) -> dict:
    """id, audio_url, question, choice ["A. text", ...], answer "A. text", question_type; one JSON file a question."""
    choices = listed(row.get("choice", row.get("choices")))
    return {
        "id": row.get("id"), "audio": row.get("audio_url"), "question": row.get("question"), "choices": choices,
        "answer": index(row["answer"], choices) if row.get("answer") else None, "task": row.get("question_type"),
        "source": "dcase2025", "benchmark": "dcase2025",
    }  # fmt: skip


def dcase2026(row: dict) -> dict:
    """id, audio_path, question_text, multi_choice, answer: the field names of R1-AQA."""
    choices = listed(row.get("multi_choice"))
    return {
        "id": row.get("id"), "audio": row.get("audio_path"), "question": row.get("question_text"), "choices": choices,
        "answer": index(row["answer"], choices) if row.get("answer") not in (None, "") else None,
        "source": "dcase2026", "benchmark": "dcase2026",
    }  # fmt: skip


SOURCES = [
    Source("dcase2025", "DCASE 2025 task 5: a folder of JSON files", dcase2025, benchmark=True, license="MIT"),
    Source("dcase2026", "DCASE 2026 task 5: dev.jsonl", dcase2026, benchmark=True, license="Apache-2.0"),
]
