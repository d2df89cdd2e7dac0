"""Benchmarks with columns choice_a to choice_d and a letter for an answer: MMSU and AIR-Bench Foundation."""

from __future__ import annotations

from data.options import index
from data.sources import Source


def _row(row: dict) -> dict:
    choices = [str(row[k]) for k in ("choice_a", "choice_b", "choice_c", "choice_d") if row.get(k) not in (None, "")]
    answer = row.get("answer_gt")
    return {"question": row.get("question"), "choices": choices, "answer": index(answer, choices) if answer else None,
            "task": row.get("task_name")}  # fmt: skip


def mmsu(row: dict) -> dict:
    """id, audio_path, question, choice_a.., answer_gt (text), task_name, category, sub-category ..."""
    return _row(row) | {
        "id": row.get("id"), "audio": row.get("audio_path"), "benchmark": "mmsu", "source": "mmsu",
        "category": row.get("category"), "subcategory": row.get("sub-category"),
    }  # fmt: skip


def air_bench(row: dict) -> dict:
    """path (under TASK_DATASET/), question, choice_a.., answer_gt, task_name, dataset_name, uniq_id."""
    unique = row.get("uniq_id")
    return _row(row) | {
        "id": None if unique is None else f"{row.get('task_name')}-{unique}",
        "audio": f"{row.get('task_name')}_{row.get('dataset_name')}/{row.get('path')}", "benchmark": "air_bench",
        "source": row.get("dataset_name"), "category": row.get("task_name"),
    }  # fmt: skip


SOURCES = [
    Source("mmsu", "MMSU: its JSONL", mmsu, benchmark=True, license="MIT"),
    Source("air_bench", "AIR-Bench Foundation_meta.json", air_bench, benchmark=True, license="CC-BY-NC-4.0"),
]
