"""Fair times: everything that is compared runs in turns in one process, so that a machine that slows down slows all."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Ratio:
    """How many times longer one thing takes than another: median of the rounds, least, most."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.least:.2f} to {self.most:.2f})"


def side_by_side(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each of `rounds` calls, taken in turns, after one call each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds + 1):
        for name in work if i % 2 else reversed(work):
            gc.collect()
            start = time.perf_counter()
            work[name]()
            _wait()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(longer: list[float], shorter: list[float]) -> Ratio:
    pairs = [a / b for a, b in zip(longer, shorter, strict=True)]
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes that `work` needs at its peak beyond what is there before it: of the GPU, else of this process (Linux)."""
    work()  # caches, and pages that are only touched once
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that using it again is seen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts at what is there now
    before = _resident("VmRSS")
    work()
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
