"""Out of memory in an update: a real limit of the system, and the step made again of smaller micro-batches."""

import os
import re
import resource
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from grpo.config import RunError, Unfinished, composed, settings
from grpo.loss import surrogate
from grpo.micro import REMEMBERED, out_of_memory, remember, remembered, smaller
from grpo.run import Run
from tests.test_train import SMALL, lines, timeless, train

ROOM = 2 * 2**20  # bytes that the whole step's update does not fit in
STEP = 256  # completions
_whole: list[int] = []
_full: list[torch.Tensor] = []


def tight(x, ratio_NT, **arguments):
    """GRPO's surrogate; from the second step on the last rank has no more memory for its whole share at once."""
    _full.clear()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if len(ratio_NT) == STEP // world and rank == world - 1:
        _whole.append(1)
    if len(ratio_NT) == STEP // world and len(_whole) > 1:
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


BASE = [o for o in SMALL if not o.startswith(("questions", "generations", "micro_tokens", "steps", "model.lora",
                                              "updates", "max_tokens", "checkpoint"))]  # fmt: skip
WORDS = ["steps=3", "questions=32", "generations=8", "micro_tokens=null", "model.lora.dropout=0", "max_tokens=40",
         "checkpoint.every=1"]  # fmt: skip
TIGHT = "loss.surrogate._target_=tests.grpo.test_memory.tight"


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    train(work, *WORDS, "name=free", base=BASE)
    assert lines(work, "free")[1]["grad_norm"] > 1e-3
    return work


def same(work, name):
    for mine, theirs in zip(*(timeless(lines(work, n)) for n in (name, "free")), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=2e-4)


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_made_again_with_the_same_numbers(free):
    done = train(free, *WORDS, "name=tight", TIGHT, base=BASE)
    told = re.findall(r"rank 0 ran out of memory in step 2 \(micro_tokens=null\): made again with micro_tokens=\d+",
                      done.stdout)  # fmt: skip
    assert len(told) == 1
    same(free, "tight")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero0", "zero3"])
def test_on_one_of_two_ranks_a_resume_makes_it_again_with_the_same_numbers(free, engine):
    name = [f"name={engine}", f"engine={engine}"]
    done = train(free, *WORDS, *name, TIGHT, base=BASE, ranks=2, ok=False)
    told = re.findall(r"error: rank 1 ran out of memory in step 2 \(micro_tokens=null\): go on with "
                      rf"name={engine} resume=true, which takes micro_tokens=(\d+)", done.stderr)  # fmt: skip
    assert len(told) == 1 and done.returncode == 75 and "rank 1 (process" in done.stderr
    assert len(lines(free, engine)) == 2
    done = train(free, *WORDS, *name, TIGHT, "resume=true", base=BASE, ranks=2)
    assert f"micro_tokens={told[0]}, for" in done.stdout and "after step 1" in done.stdout
    same(free, engine)


def test_a_run_that_cannot_write_it_down_says_what_to_give(tmp_path):
    assert shrink(tmp_path / "gone", [100, 100], micro_tokens=8192) == 100  # made again all the same
    with pytest.raises(RunError, match="go on with resume=true micro_tokens=100") as error:
        shrink(tmp_path / "gone", [100, 100], micro_tokens=8192, world=2)
    assert error.value.status == 1


def test_what_a_rank_left_is_read_by_a_resume(tmp_path):
    assert remembered(tmp_path, None) is None and remembered(tmp_path, 8192) == 8192
    remember(tmp_path, 3, 5, 400)
    remember(tmp_path, 0, 5, 600)
    assert remembered(tmp_path, None) == remembered(tmp_path, 8192) == 400 and remembered(tmp_path, 300) == 300
    for odd in ("", "[]", "{}", '{"micro_tokens": 0}', '{"micro_tokens": "400"}', '{"micro_tokens": true}'):
        (tmp_path / REMEMBERED / "rank-3.json").write_text(odd)
        with pytest.raises(RunError, match=r"rank-3\.json holds no micro_tokens .*: delete it"):
            remembered(tmp_path, None)


def shrink(folder, sizes, *, unchanged=True, world=1, stage=0, **changes):
    run = SimpleNamespace(
        settings=replace(settings(composed([])), **changes), rank=0, world=world, folder=folder,
        policy=SimpleNamespace(tokens_of=lambda group: group), display=SimpleNamespace(say=lambda text: None),
        engine=SimpleNamespace(stage=stage, forget=lambda: None), cfg=composed([]),
        _to_go_on=lambda: "go on with resume=true",
    )  # fmt: skip
    Run._shrink(run, 4, sizes, unchanged)
    return run.settings.micro_tokens


def test_when_it_is_not_made_again(tmp_path):
    assert shrink(tmp_path, [100, 100, 100, 100], micro_tokens=8192) == remembered(tmp_path, 8192) == 200
    again = "ran out of memory in step 5 .*: go on with resume=true"
    for odd in ({"world": 2}, {"stage": 3}, {"unchanged": False}):
        with pytest.raises(Unfinished, match=f"{again}, which takes micro_tokens=200"):
            shrink(tmp_path, [100, 100, 100, 100], micro_tokens=8192, **odd)
    with pytest.raises(RunError, match=f"{again} micro_tokens=200") as error:
        shrink(tmp_path, [100, 100, 100, 100], micro_tokens=8192, out_of_memory="stop")
    assert error.value.status == 1 and Unfinished.status == 75
    with pytest.raises(RunError, match=r"with one question at a time: model\.gradient_checkpointing=true"):
        shrink(tmp_path, [100, 100], micro_tokens=100)


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
