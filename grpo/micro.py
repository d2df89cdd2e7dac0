"""A rank's share of a step cut into micro-batches of whole groups: memory, not results."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.batch import Group
from grpo.checkpoint import write_json
from grpo.config import RunError
from grpo.packing import parts_needed, split

REMEMBERED = "out_of_memory"  # folder within a run's


@dataclass(frozen=True)
class Micro:
    """Some of a rank's groups: which rows of its [N, T] they are, how wide, and what the policy wants of them."""

    rows_n: Tensor  # int64, on the policy's device
    width: int
    questions: tuple[int, ...]  # of the rank's
    prepared: Any  # of Policy.prepare


def micro_batches(
    engine, policy, groups: Sequence[Group], budget: int | None, idle_B: Tensor | None = None
) -> list[Micro]:
    """Groups in order, at most `budget` tokens at a time (a larger group goes alone); without those that are `idle_B`.

    All ranks get equally many, each at least one group: under ZeRO-3 a forward pass needs them all.
    """
    idle = [False] * len(groups) if idle_B is None else idle_B.tolist()
    sizes = [policy.tokens_of(g) for g in groups]
    wanted = [b for b in range(len(groups)) if not idle[b]]
    mine = parts_needed([sizes[b] for b in wanted], budget) if wanted else 1
    parts = int(engine.reduce({"parts": float(mine)}, "max")["parts"])
    wanted = sorted(wanted + [b for b in range(len(groups)) if idle[b]][: max(parts - len(wanted), 0)])
    audio, g, out = policy.encode_audio([groups[b].prompt for b in wanted]), len(groups[0].completions), []
    for part in split([sizes[b] for b in wanted], parts):
        some = tuple(wanted[i] for i in part)
        prepared = policy.prepare([groups[b] for b in some], [audio[i] for i in part])
        rows = torch.tensor([b * g + i for b in some for i in range(g)], device=policy.device)
        width = max(len(c.token_ids) for b in some for c in groups[b].completions)
        out.append(Micro(rows, width, some, prepared))
    return out


def out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host, had no room for a tensor."""
    # The CPU's allocator, CUDA's libraries and NCCL have no class of their own for it.
    told = re.search(r"out of memory|DefaultCPUAllocator|ALLOC_FAILED", str(error))
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(told)


def smaller(sizes: Sequence[int], budget: int | None) -> int | None:
    """About half of `budget`, so that groups of `sizes` tokens make more micro-batches; None where each is alone."""
    parts, budget = parts_needed(sizes, budget), min(budget or sum(sizes), sum(sizes))
    while budget > 1:
        budget //= 2
        if parts_needed(sizes, budget) > parts:
            return budget
    return None


def remember(folder: Path, rank: int, step: int, budget: int) -> bool:
    """Leave in a run's folder what a resume of it starts from; False where nothing can be written there."""
    try:
        (folder / REMEMBERED).mkdir(exist_ok=True)
        write_json(folder / REMEMBERED / f"rank-{rank}.json", {"step": step, "micro_tokens": budget})
    except OSError:
        return False
    return True


def remembered(folder: Path, budget: int | None) -> int | None:
    """`budget`, or what a rank of the run has left if that is less. Raises RunError where that is no number."""
    known = [] if budget is None else [budget]
    for path in sorted((folder / REMEMBERED).glob("*.json")):
        try:
            known.append(json.loads(path.read_text())["micro_tokens"])
            if type(known[-1]) is not int or known[-1] < 1:
                raise ValueError(known[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} holds no micro_tokens ({error}): delete it") from error
    return min(known, default=None)


@torch.no_grad()
def frozen(engine, policy, micro: Sequence[Micro], shape: tuple[int, int], *, reference: bool = False) -> list[Tensor]:
    """Log-probs and entropies, each of `shape` [N, T], without dropout or gradient: of the policy or the reference."""
    whole = [torch.zeros(shape, device=policy.device) for _ in range(2)]
    policy.eval()
    with engine.reference() if reference else nullcontext():
        for m in micro:
            for into, values in zip(whole, engine(m.prepared), strict=True):
                into[m.rows_n, : m.width] = values
    policy.train()
    return whole
