"""AVQA as R1-AQA, Ke-Omni-R and AudioMCQ write it: JSONL with an index, a letter or a text for the answer."""

from __future__ import annotations

from data.options import index, listed
from data.sources import Source


def avqa(row: dict) -> dict:
    """id, question_text, multi_choice, answer, audio_path or video_name; AudioMCQ: question, choices, gemini_cot."""
    choices = listed(row.get("multi_choice", row.get("choices")))
    return {
        "id": row.get("id"), "audio": row.get("audio_path") or row.get("video_name"), "clip": row.get("video_name"),
        "question": row.get("question_text", row.get("question")), "choices": choices,
        "answer": index(row.get("answer"), choices), "thinking": row.get("gemini_cot"),
        "task": row.get("question_type"), "source": row.get("dataset_name") or row.get("source_dataset") or "avqa",
    }  # fmt: skip


SOURCES = [Source("avqa", "AVQA / R1-AQA / AudioMCQ JSONL", avqa)]
