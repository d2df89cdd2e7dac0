"""A checkpoint is whole or not there, and the last and the best are the ones that stay."""

import errno
import json
import os
import resource
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from grpo.checkpoint import CheckpointError, Checkpoints, write_json


def engine(value, loaded=None):
    """An engine of one rank whose whole state is one number."""
    return SimpleNamespace(
        rank=0, gather=list, together=lambda call, error: call(), gathered=nullcontext,
        state=lambda: {"w/master": torch.tensor([float(value)])},
        load_state=lambda tensors: loaded.append(tensors["w/master"].item()),
    )  # fmt: skip


POLICY = SimpleNamespace(save_adapter=lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"))


def broken(folder):
    raise OSError("disk full")


def folders(path):
    return sorted(p.name for p in path.iterdir() if p.is_dir())


def test_the_last_comes_back_and_the_best_stays(tmp_path):
    checkpoints, loaded = Checkpoints(tmp_path), []
    assert checkpoints.load(engine(0, loaded)) is None and not loaded
    for step, best in [(2, False), (4, True), (6, False), (8, False)]:
        checkpoints.save(step, POLICY, engine(step), {"tokens": 10 * step}, best=best)
    assert folders(tmp_path) == ["step-000004", "step-000008"]
    assert Checkpoints(tmp_path).load(engine(0, loaded)) == {"step": 8, "tokens": 80} and loaded == [8.0]
    assert json.loads((tmp_path / "best.json").read_text()) == {"folder": "step-000004"}
    assert (tmp_path / "step-000008" / "adapter_model.safetensors").exists()


def test_a_resumed_state_is_saved_under_its_new_step(tmp_path):
    """A run that is resumed twice goes on from its last checkpoint, not from its first one's step."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, POLICY, engine(2), {"tokens": 20}, best=False)
    state = checkpoints.load(engine(0, []))
    checkpoints.save(4, POLICY, engine(4), state | {"tokens": 40}, best=False)
    assert checkpoints.load(engine(0, [])) == {"step": 4, "tokens": 40}


def test_a_run_killed_while_saving_keeps_the_checkpoint_before(tmp_path):
    checkpoints, loaded = Checkpoints(tmp_path), []
    checkpoints.save(2, POLICY, engine(2), {}, best=False)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(4, SimpleNamespace(save_adapter=broken), engine(4), {}, best=True)
    assert "step-000004" not in folders(tmp_path) and not (tmp_path / "best.json").exists()
    assert checkpoints.load(engine(0, loaded)) == {"step": 2} and loaded == [2.0]
    checkpoints.save(4, POLICY, engine(4), {}, best=True)  # what the killed run left is not in the way
    assert folders(tmp_path) == ["step-000004"]


def test_saved_twice_at_one_step_and_killed_between_the_names(tmp_path, monkeypatch):
    checkpoints, loaded, replace = Checkpoints(tmp_path), [], os.replace
    checkpoints.save(2, POLICY, engine(2), {}, best=True)

    def killed(a, b):
        if a.name.startswith(".tmp-"):
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr("grpo.checkpoint.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, POLICY, engine(3), {}, best=False)
    monkeypatch.undo()
    assert checkpoints.load(engine(0, loaded)) == {"step": 2} and loaded == [2.0]
    checkpoints.save(2, POLICY, engine(3), {}, best=False)
    assert checkpoints.load(engine(0, loaded)) == {"step": 2} and loaded == [2.0, 3.0]
    assert folders(tmp_path) == ["step-000002"]


def test_the_best_survives_a_kill_between_the_names(tmp_path, monkeypatch):
    checkpoints, replace = Checkpoints(tmp_path, keep=1), os.replace
    checkpoints.save(2, POLICY, engine(2), {}, best=True)
    monkeypatch.setattr("grpo.checkpoint.os.replace",
                        lambda a, b: broken(a) if a.name.startswith(".tmp-") else replace(a, b))  # fmt: skip
    with pytest.raises(CheckpointError):
        checkpoints.save(2, POLICY, engine(3), {}, best=False)
    monkeypatch.undo()
    for step in (4, 6):
        checkpoints.save(step, POLICY, engine(step), {}, best=False)
    best = checkpoints._named("best")
    assert best.exists() and load_file(best / "trainer.safetensors")["w/master"].item() == 2.0


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


@pytest.mark.parametrize(
    ("spoil", "file", "why"),
    [
        (cut, "trainer.safetensors", "bytes, "),
        (flip, "adapter_model.safetensors", "adapter_model.safetensors is not what was written (sha256)"),
        (os.unlink, "trainer.json", "trainer.json is missing"),
        (os.unlink, "manifest.json", "not written to its end"),
        (cut, "manifest.json", "manifest.json cannot be read"),
    ],
)
def test_a_spoilt_checkpoint_is_passed_over_for_the_one_before(tmp_path, spoil, file, why):
    checkpoints, loaded, said = Checkpoints(tmp_path, keep=2), [], []
    for step in (2, 4, 6):
        checkpoints.save(step, POLICY, engine(step), {}, best=False)
    assert folders(tmp_path) == ["step-000004", "step-000006"]
    spoil(tmp_path / "step-000006" / file)
    assert checkpoints.load(engine(0, loaded), said.append) == {"step": 4} and loaded == [4.0]
    assert len(said) == 1 and "step-000006" in said[0] and why in said[0]
    spoil(tmp_path / "step-000004" / file)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        checkpoints.load(engine(0, loaded), said.append)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_more_leaves_the_checkpoint_before(tmp_path, monkeypatch, number):
    """`save_file` stands for the disk: safetensors raises an error of its own kind, the system OSError."""
    checkpoints, loaded = Checkpoints(tmp_path, keep=2), []
    checkpoints.save(2, POLICY, engine(2), {}, best=False)

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("grpo.checkpoint.save_file", full)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(4, POLICY, engine(4), {}, best=False)
    said = str(caught.value)
    assert "\n" not in said and os.strerror(number) in said and "step-000002 is the last whole one" in said
    assert folders(tmp_path) == ["step-000002"]  # nothing half is left to take room
    assert checkpoints.load(engine(0, loaded)) == {"step": 2} and loaded == [2.0]


def test_a_real_disk_that_is_full(tmp_path):
    """The system itself refuses to write a file past a limit: safetensors' error is told like any other."""
    checkpoints, loaded = Checkpoints(tmp_path, keep=2), []
    checkpoints.save(2, POLICY, engine(2), {}, best=False)
    large = engine(4)
    large.state = lambda: {"w/master": torch.zeros(1 << 20)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        with pytest.raises(CheckpointError, match=r"step 4 could not be written .*step-000002 is the last whole one"):
            checkpoints.save(4, POLICY, large, {}, best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert checkpoints.load(engine(0, loaded)) == {"step": 2} and loaded == [2.0]


def test_every_file_of_a_checkpoint_is_written_before_it_is_named(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("grpo.checkpoint.os.replace", lambda a, b: seen.append((a.name, b.name, sorted(
        p.name for p in a.iterdir()) if a.is_dir() else a.read_text())) or a.rename(b))  # fmt: skip
    Checkpoints(tmp_path).save(2, POLICY, engine(2), {}, best=False)
    names = [b for _, b, _ in seen]
    assert names.index("step-000002") < names.index("last.json")
    assert seen[names.index("step-000002")][2] == ["adapter_model.safetensors", "manifest.json", "trainer.json",
                                            "trainer.safetensors"]  # fmt: skip


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})
    monkeypatch.setattr("grpo.checkpoint.os.replace", lambda a, b: broken(a))
    with pytest.raises(OSError, match="disk full"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
