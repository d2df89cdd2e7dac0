"""MuChoMusic: the CSV with a right answer and three distractors, or the evaluation JSON with options in order."""

from __future__ import annotations

import hashlib

import numpy as np

from data.options import bare
from data.sources import Source

ANSWERS = ("correct_answer", "distractor_1_answer", "distractor_2_answer", "distractor_3_answer")


def muchomusic(row: dict) -> dict:
    """Options in the order of `answer_orders` (0 is the right one); for the CSV, which has the right one first, in an
    order drawn from the row's text."""
    if "answer_orders" in row:
        order, choices = [int(i) for i in row["answer_orders"]], [str(a) for a in row["answers"]]
        name, question = str(row.get("id")), _question(row["prompt"])
    else:
        texts = [str(row[k]) for k in ANSWERS if row.get(k) not in (None, "")]
        seed = hashlib.sha256("\n".join([str(row.get("question")), *texts]).encode()).digest()
        order = np.random.default_rng(list(seed)).permutation(len(texts)).tolist()
        choices, question = [texts[i] for i in order], row.get("question")
        name = str(row.get("dataset_identifier")).removesuffix(".json")
        name = name.rpartition("_")[0] if row.get("dataset") == "musiccaps" else name
    return {
        "audio": row.get("audio_path") or name, "clip": name, "question": question, "choices": bare(choices),
        "answer": order.index(0), "task": "music", "source": row.get("dataset"), "benchmark": "muchomusic",
        "category": row.get("genre") or None, "meta": {"answer_orders": order},
    }  # fmt: skip


def _question(prompt: str) -> str:
    return prompt.partition("\n Options:")[0].rpartition("Question: ")[2].strip()


SOURCES = [
    Source("muchomusic", "MuChoMusic CSV or evaluation JSON", muchomusic, benchmark=True, license="CC-BY-SA-4.0")
]
