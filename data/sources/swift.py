"""ms-swift's JSONL: messages, audios, solution."""

from __future__ import annotations

from data.manifest import RowError
from data.options import index, within
from data.sources import Source


def swift(row: dict) -> dict:
    """One clip, one user turn that holds the options; gold in `solution` or the assistant's turn, in tags or bare."""
    messages, audios = row.get("messages"), row.get("audios")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RowError("bad_type", "messages must be a list of objects with role and content")
    if isinstance(audios, str):
        audios = [audios]
    if not isinstance(audios, list) or len(audios) != 1:
        raise RowError("num_audios", f"one clip a question is supported, got {audios!r}"[:300])
    turns = {m.get("role"): str(m.get("content", "")) for m in messages}  # the last of each
    question, choices = within(turns.get("user", "").replace("<audio>", "").strip())
    target = str(row.get("solution") or turns.get("assistant", ""))
    return {
        "id": row.get("id"), "audio": audios[0], "question": question, "choices": choices,
        "answer": index(_block(target, "answer") or target, choices), "thinking": _block(target, "think"),
        "semantic_elements": _block(target, "semantic_elements"), "source": row.get("source") or "swift",
    }  # fmt: skip


def _block(text: str, name: str) -> str | None:
    start, end = text.find(f"<{name}>"), text.find(f"</{name}>")
    return text[start + len(name) + 2 : end].strip() or None if 0 <= start < end else None


SOURCES = [Source("swift", "ms-swift JSONL", swift)]
