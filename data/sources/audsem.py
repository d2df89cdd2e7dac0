"""AudSem's multiple-choice questions (gijs/audsem, mc_qa), text without audio, and the reference's tar shards.

A shard's sample holds file_name, question (with its "Choices:" lines), choices, answer ("B. text"), thinking and
perhaps semantic_elements. The published CSV has been seen by nobody here: its columns are taken to be the same; others
are named with `--column file_name=THEIRS`.
"""

from __future__ import annotations

from data.manifest import RowError
from data.options import index, listed, within
from data.sources import Source

NAMES = ("file_name", "clip_name", "clip", "filename", "name")
IDS, STARTS, ENDS = ("youtube_id", "video_id", "ytid"), ("start", "start_time", "start_seconds"), ("end", "end_time")


def _first(row: dict, names) -> str | None:
    return next((str(row[n]) for n in names if row.get(n) not in (None, "")), None)


def mc_qa(row: dict) -> dict:
    """One question with its four options."""
    clip = _first(row, NAMES)
    if clip is None and (video := _first(row, IDS)) and (start := _first(row, STARTS)) and (end := _first(row, ENDS)):
        clip = f"{video} ({start}-{end})"
    if clip is None:
        raise RowError("missing_key", f"no clip: one of the columns {', '.join(NAMES)}, or an id with start and end")
    text, choices = str(row.get("question") or ""), row.get("choices")
    question, options = within(text) if "\nChoices:" in text or not choices else (text, [])
    options = listed(choices) if choices else options
    return {
        "id": row.get("__key__") or row.get("id"), "audio": row.get("__audio__") or clip, "clip": clip,
        "question": question, "choices": options, "answer": index(row.get("answer"), options),
        "thinking": row.get("thinking") or None, "semantic_elements": row.get("semantic_elements") or None,
        "source": "audsem",
    }  # fmt: skip


SOURCES = [
    Source("audsem", "AudSem mc_qa: CSV, Parquet or tar shards", mc_qa, license="CC-BY-NC-SA-4.0", filtered=True)
]
