"""What state is a clip in? Many of them at once (data.pool), with a journal that a killed run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data.audio import ClipError, decode
from data.pool import LOST, MEMORY, each


@dataclass(frozen=True)
class Job:
    """A stretch of a file, or of a member of a shard."""

    path: str
    span: tuple[int, int] | None = None
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Look:
    """What was learned: `state` is "ok" or a reason of data.audio, `sha256` is of the file's or the member's bytes."""

    state: str
    message: str = ""
    seconds: float | None = None
    hz: int | None = None  # of the file
    channels: int | None = None
    sha256: str | None = None


def look(job: Job, min_seconds: float, max_seconds: float) -> Look:
    """Decode one clip and judge it."""
    path = Path(job.path)
    try:
        clip, info = decode(path, span=job.span, start=job.start, end=job.end, min_seconds=min_seconds,
                            max_seconds=max_seconds)  # fmt: skip
        return Look("ok", "", round(clip.seconds, 4), info.samplerate, info.channels, file_hash(path, job.span))
    except ClipError as error:
        return Look(error.reason, str(error))
    except MemoryError:
        return Look("unreadable", f"{path}: takes more than {MEMORY >> 30} GiB to decode")


def look_at_all(jobs: Sequence[Job], journal: Path, *, min_seconds: float, max_seconds: float, workers: int,
                progress: Callable = lambda done, total: None) -> dict[Job, Look]:  # fmt: skip
    """`look` at each job, in `workers` processes (0: here). What is in `journal` already, of the same file with the
    same limits, is not looked at again; what is learned is added at once, so that a killed run goes on where it was.
    """
    keys = {job: _key(job, min_seconds, max_seconds) for job in jobs}
    known = _read(journal)
    looks = {job: known[key] for job, key in keys.items() if key in known}
    left = [job for job in keys if job not in looks]
    progress(len(looks), len(keys))
    with journal.open("a", encoding="utf-8") as file:
        for job, seen in _looks(left, min_seconds, max_seconds, workers):
            looks[job] = seen
            file.write(json.dumps([keys[job], asdict(seen)]) + "\n")
            file.flush()
            progress(len(looks), len(keys))
    return looks


def file_hash(path: Path, span: tuple[int, int] | None = None) -> str:
    """SHA-256 of a file's bytes, or of those of a span."""
    offset, left = span or (0, path.stat().st_size)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while left > 0 and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _looks(jobs: list[Job], min_seconds: float, max_seconds: float, workers: int) -> Iterator[tuple[Job, Look]]:
    judge = partial(look, min_seconds=min_seconds, max_seconds=max_seconds)
    for place, seen in each(judge, jobs, workers, _lost):
        yield jobs[place], seen


def _lost(job: Job) -> Look:
    return Look("unreadable", f"{job.path}: {LOST}")


def _key(job: Job, min_seconds: float, max_seconds: float) -> str:
    try:
        stat = os.stat(job.path)
        file = [stat.st_size, stat.st_mtime_ns]
    except OSError:
        file = None
    return json.dumps([job.path, job.span, job.start, job.end, file, min_seconds, max_seconds])


def _read(journal: Path) -> dict[str, Look]:
    """What a journal holds; the half line that a killed run leaves is cut off."""
    known: dict[str, Look] = {}
    if not journal.exists():
        return known
    whole = 0
    with journal.open("rb") as file:
        for line in file:
            try:
                key, seen = json.loads(line)
                known[key] = Look(**seen)
            except (ValueError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            whole += len(line)
    os.truncate(journal, whole)
    return known
