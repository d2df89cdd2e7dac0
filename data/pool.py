"""Work on many clips in processes of their own, which a hostile file may bring down, fill or hold up."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process

MEMORY = 4 * 2**30  # bytes of address space a process may take: the longest clip allowed needs half a gigabyte
PATIENCE = 120.0  # seconds of processor time for one clip: an hour of sound takes less. A slow disk takes none
CHUNK = 16  # clips handed over at a time
LOST = "the process that read it died, or took too long"


def each(work: Callable, jobs: Sequence, workers: int, lost: Callable, *, memory: int = MEMORY,
         patience: float = PATIENCE) -> Iterator[tuple[int, object]]:  # fmt: skip
    """(place of a job, work(job)), in the order in which they are done, in `workers` processes (0: here, unguarded).

    Where a process dies, or is ended for its time, the jobs in flight are done one by one, and the one that did it gets
    `lost(job)`. What `work` raises is raised here.
    """
    if not workers:
        for place, job in enumerate(jobs):
            yield place, work(job)
        return
    chunks = [range(i, min(i + CHUNK, len(jobs))) for i in range(0, len(jobs), CHUNK)]
    chunks.reverse()
    start = partial(_pool, memory)
    while chunks:
        running = {}
        with start(workers) as pool:
            try:
                while chunks or running:
                    while chunks and len(running) < 2 * workers:
                        chunk = chunks.pop()
                        running[pool.submit(_all, work, [jobs[i] for i in chunk], patience)] = chunk
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        results = future.result()
                        yield from zip(running.pop(future), results, strict=True)
            except BrokenProcessPool:
                pass  # one of the chunks in flight did it
        left = iter([place for chunk in running.values() for place in chunk])
        place = next(left, None)
        while place is not None:
            with start(1) as pool:
                try:
                    while place is not None:
                        yield place, pool.submit(_all, work, [jobs[place]], patience).result()[0]
                        place = next(left, None)
                except BrokenProcessPool:
                    yield place, lost(jobs[place])
                    place = next(left, None)


def _pool(memory: int, workers: int) -> ProcessPoolExecutor:
    # Not forked: a child of a process with threads may wait for ever for a lock that one of them held.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_limit, initargs=(memory,))


def _all(work: Callable, jobs: list, patience: float) -> list:
    results = []
    try:
        for job in jobs:
            # Nobody handles this signal: it ends the process, within a C library that goes round in circles too.
            signal.setitimer(signal.ITIMER_PROF, patience)
            results.append(work(job))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return results


def _limit(memory: int) -> None:
    """What a process does first: it bounds its memory, and leaves when the one that started it is killed."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent_process().join()
    os._exit(1)
