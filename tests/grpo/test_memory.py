"""Out of memory in an update: a real limit of the system, and the step made again of smaller micro-batches."""

import re
import resource
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from grpo.config import RunError, composed, settings
from grpo.loss import surrogate
from grpo.micro import out_of_memory, smaller
from grpo.run import Run
from tests.test_train import SMALL, lines, timeless, train

ROOM = 2 * 2**20  # bytes that the whole step's update does not fit in
STEP = 256  # completions
_full: list[torch.Tensor] = []


def tight(x, ratio_NT, **arguments):
    """GRPO's surrogate, in a process that has no more memory as long as the whole step is one micro-batch."""
    _full.clear()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if len(ratio_NT) == STEP:
        no_more_than(used())
        size = 2**30
        while size >= 2**20:  # what the allocator kept of tensors that are gone would be room too
            try:
                _full.append(torch.empty(size, dtype=torch.uint8))
            except RuntimeError:
                size //= 2
        no_more_than(used() + ROOM)
    return surrogate.clipped(x, ratio_NT, **arguments)


def used() -> int:
    return int(re.search(r"VmSize:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024


def no_more_than(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_made_again_with_the_same_numbers(tmp_path):
    base = [
        o
        for o in SMALL
        if not o.startswith(
            ("questions", "generations", "micro_tokens", "steps", "model.lora", "updates", "max_tokens")
        )
    ]
    words = ["steps=2", "questions=32", "generations=8", "micro_tokens=null", "model.lora.dropout=0", "max_tokens=40"]
    train(tmp_path, *words, "name=free", base=base)
    done = train(tmp_path, *words, "name=tight", "loss.surrogate._target_=tests.grpo.test_memory.tight", base=base)
    told = re.findall(r"rank 0 ran out of memory in step 1 \(micro_tokens=null\): made again with micro_tokens=\d+",
                      done.stdout)  # fmt: skip
    assert len(told) == 1
    for mine, theirs in zip(*(timeless(lines(tmp_path, name)) for name in ("tight", "free")), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=2e-6)
    assert lines(tmp_path, "free")[1]["grad_norm"] > 1e-3


def shrink(sizes, *, unchanged=True, world=1, stage=0, **changes):
    run = SimpleNamespace(
        settings=replace(settings(composed([])), **changes), rank=0, world=world, folder=SimpleNamespace(name="mine"),
        policy=SimpleNamespace(tokens_of=lambda group: group), display=SimpleNamespace(say=lambda text: None),
        engine=SimpleNamespace(stage=stage, forget=lambda: None), cfg=composed([]),
    )  # fmt: skip
    Run._shrink(run, 4, sizes, unchanged)
    return run.settings.micro_tokens


def test_when_it_is_not_made_again():
    assert shrink([100, 100, 100, 100], micro_tokens=8192) == 200
    again = "ran out of memory in step 5 .*: go on with name=mine resume=true micro_tokens=200"
    for odd in ({"world": 2}, {"stage": 3}, {"unchanged": False}, {"out_of_memory": "stop"}):
        with pytest.raises(RunError, match=again):
            shrink([100, 100, 100, 100], micro_tokens=8192, **odd)
    with pytest.raises(RunError, match=r"with one question at a time: model\.gradient_checkpointing=true"):
        shrink([100, 100], micro_tokens=100)


@pytest.mark.parametrize(("sizes", "budget", "less"), [
    ([30, 30, 30, 30], None, 60), ([30, 30, 30, 30], 60, 30), ([30, 30, 30, 30], 30, None), ([30], None, None),
    ([90, 10, 10], 100, 12), ([90, 10], 200, 50), ([50, 50], 10, None),
])  # fmt: skip
def test_a_smaller_budget_makes_more_micro_batches(sizes, budget, less):
    assert smaller(sizes, budget) == less


def test_what_running_out_of_memory_looks_like():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert out_of_memory(error.value) and out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError())
    assert not out_of_memory(RuntimeError("expected scalar type Float"))
