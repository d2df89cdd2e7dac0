"""`profile=true`: a trace of a few steps that a browser opens. Stages carry the names of the metrics `time/<stage>`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

FIRST = 2  # steps before the trace: the first ones also build caches


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Name what happens inside, for this trace and for NVIDIA's (nsys)."""
    with record_function(name), torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext():
        yield


@contextmanager
def traced(steps: int, folder: Path, say) -> Iterator:
    """A function to call after every step; `steps` of them go into `folder`/trace.json.gz. 0: nothing happens."""
    if not steps:
        yield lambda: None
        return
    file, gpu = Path(folder) / "trace.json.gz", torch.cuda.is_available()

    def write(profiler) -> None:
        profiler.export_chrome_trace(str(file))
        say(f"trace     {file}: open it at ui.perfetto.dev, or in chrome://tracing")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    plan = schedule(wait=FIRST - 1, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
    if not file.exists():
        say(f"trace     none was written: it begins after {FIRST} steps")
