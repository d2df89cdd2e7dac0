"""Memory of each rank in a real optimizer step; the section `zero` of grpo.bench runs it under torchrun.

python -m grpo.bench.ranks CHECKPOINT CASE, a `Case` as JSON

Prints a line of JSON: for every rank the bytes that came after the libraries: once the engine was built, and at most in
its second step. On a CPU that is anonymous memory, looked at every millisecond; on a GPU what torch allocated.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from grpo.bench.update import LORA, Bench, Shape, random_group
from grpo.engine import LIVE, Engine, start_distributed, stop_distributed, zero_config
from grpo.plan import Micro, read_shape, states, work_space
from grpo.policy import Policy
from grpo.tiny import random_checkpoint

FULL = r"model\..*|lm_head\..*"


@dataclass(frozen=True)
class Case:
    """What is measured: a step of `groups` x `copies` completions on each rank, in one micro-batch."""

    stage: int
    ranks: int
    full: bool = False  # whole weights, else LoRA
    checkpointing: bool = False
    live: int = LIVE
    groups: int = 1
    copies: int = 6
    prompt: int = 200
    completion: int = 50

    def json(self) -> str:
        return json.dumps(asdict(self))


def measured(folder: Path, case: Case) -> list[dict[str, int]]:
    """What each rank says of itself. Raises RuntimeError with what it said where one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
               f"--nproc-per-node={case.ranks}", "-m", "grpo.bench.ranks", str(folder), case.json()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("[{"))


def planned(folder: Path, case: Case) -> float:
    """What grpo.plan says of a rank's memory in that step."""
    shape, lora = read_shape(folder / "config.json"), None if case.full else LORA
    micro = Micro(case.groups, case.copies, case.prompt, case.completion)
    lasting = states(shape, lora, FULL, stage=case.stage, ranks=case.ranks, dtype="float32")
    passing = work_space(shape, lora, FULL, stage=case.stage, ranks=case.ranks, dtype="float32", micro=micro,
                         live=case.live, gpu=torch.cuda.is_available(), checkpointing=case.checkpointing)  # fmt: skip
    return sum(lasting.values()) + sum(passing.values())


def model(folder: Path) -> None:
    """Write the checkpoint that is measured: 389 MiB in float32."""
    shape = Shape(hidden=768, layers=8, heads=12, intermediate=3072, vocabulary=20_000)
    folder.mkdir(parents=True, exist_ok=True)
    random_checkpoint(folder, shape.sizes(), filled=shape.vocabulary - 200, dtype=torch.float32)


def now() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)  # what was freed goes back to the system
    libc.mallopt(-3, 2**18)  # M_MMAP_THRESHOLD: and goes back at once from now on
    return anonymous()


def anonymous() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


class Peak:
    """The most memory while the context is open."""

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.most, self._done = now(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self):
        while not torch.cuda.is_available() and not self._done.wait(0.001):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.most = torch.cuda.max_memory_allocated()


def main(folder: str, words: str) -> None:
    case = Case(**json.loads(words))
    rank, world = start_distributed()
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    zero = zero_config(stage=case.stage, clip=1.0, dtype="float32", world=world, live=case.live)
    optimizer = partial(torch.optim.AdamW, lr=1e-5)
    first = Engine(torch.nn.Linear(64, 64, device=device), optimizer, zero)  # what the libraries set up at first use
    first.backward(first(torch.ones(64, 64, device=device)).sum())
    first.step(1e-5)
    gc.collect()
    before = now()
    policy = Policy(folder, None if case.full else LORA | {"seed": 0}, full=FULL, prompt=Bench.PROMPT, device=device,
                    gradient_checkpointing=case.checkpointing, zero3=zero if case.stage == 3 else None)  # fmt: skip
    if case.stage < 3:
        for p in policy.parameters():  # on a CPU they are mapped from the checkpoint's file
            p.data = p.data.clone()
    engine = Engine(policy, optimizer, zero)
    gc.collect()
    built = now() - before
    batch = [random_group(policy, i + 10 * rank, case.prompt, case.completion, case.copies) for i in range(case.groups)]

    def step():
        policy.audio_cache.clear()
        policy.train()
        logp, _ = engine(policy.prepare(batch))
        engine.backward(logp.sum() / 1000)
        engine.step(1e-5)

    step()
    gc.collect()
    with Peak() as peak:
        step()
    found = engine.gather([{"built": built, "peak": peak.most - before}])
    if rank == 0:
        print(json.dumps(found))
    stop_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
