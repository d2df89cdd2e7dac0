"""What state is a clip in? Many of them at once, in processes of their own that a hostile file may bring down."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

from data.audio import ClipError, decode

MEMORY = 4 * 2**30  # bytes of address space a process may take: the longest clip allowed needs half a gigabyte
CHUNK = 16  # clips handed over at a time


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
    if not workers:
        for job in jobs:
            yield job, look(job, min_seconds, max_seconds)
        return
    chunks = [jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)]
    chunks.reverse()
    while chunks:
        running = {}
        # Not forked: a child of a process with threads may wait for ever for a lock that one of them held.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_limit) as pool:
            try:
                while chunks or running:
                    while chunks and len(running) < 2 * workers:
                        chunk = chunks.pop()
                        running[pool.submit(_look_at, chunk, min_seconds, max_seconds)] = chunk
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        seen = future.result()
                        yield from zip(running.pop(future), seen, strict=True)
            except BrokenProcessPool:
                pass  # one of the chunks in flight did it: its clips are looked at one by one
        yield from _one_by_one([job for chunk in running.values() for job in chunk], min_seconds, max_seconds)


def _one_by_one(jobs: list[Job], min_seconds: float, max_seconds: float) -> Iterator[tuple[Job, Look]]:
    """Each in turn in one process, and in a new one after a clip has brought it down."""
    left = iter(jobs)
    job = next(left, None)
    while job is not None:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_limit) as pool:
            try:
                while job is not None:
                    yield job, pool.submit(look, job, min_seconds, max_seconds).result()
                    job = next(left, None)
            except BrokenProcessPool:
                yield job, Look("unreadable", f"{job.path}: the process that decoded it died")
                job = next(left, None)


def _look_at(jobs: list[Job], min_seconds: float, max_seconds: float) -> list[Look]:
    return [look(job, min_seconds, max_seconds) for job in jobs]


def _limit() -> None:
    """What a process does first: it bounds its memory, and leaves when the one that started it is killed."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent_process().join()
    os._exit(1)


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
