"""What a run keeps count of beside the maths: its time over resumes, its tokens a second."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from grpo import run as module
from grpo.run import Run


@pytest.fixture
def clock(monkeypatch):
    """The seconds that a run sees, moved by hand."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def leg(folder, clock, *, world, saved=None):
    """A run at the start of one leg, its policy, data and engine left out; `saved` is the checkpoint it resumes."""
    run = object.__new__(Run)
    cfg = OmegaConf.create({"rollout": {}, "resume": saved is not None})
    OmegaConf.save(cfg, folder / "config.yaml")
    vars(run).update(
        cfg=cfg, folder=folder, world=world, rank=0, engine=None, tokens=0, version=0, quarantined={}, objective=None,
        checkpoints=SimpleNamespace(load=lambda engine: dict(saved)),
        rollouts=SimpleNamespace(state=lambda: None, load_state=lambda step, pending: None),
        sync=SimpleNamespace(push=lambda version: None), display=SimpleNamespace(say=lambda text: None),
        before={"seconds": 0.0, "device_seconds": 0.0}, began=clock.seconds,
    )  # fmt: skip
    if saved:
        assert run._restore() == {"step": 3, "completions": 0}  # what is counted elsewhere is no part of the state
    return run


def test_the_seconds_of_every_leg_are_counted_with_the_ranks_it_had(tmp_path, clock):
    first = leg(tmp_path, clock, world=4)
    clock.seconds += 100
    saved = {"step": 3, "completions": 0} | first._progress()
    clock.seconds += 5000  # nothing runs
    second = leg(tmp_path, clock, world=1, saved=saved)
    clock.seconds += 20
    assert second._cost() == {"seconds": 120.0, "device_seconds": 420.0}
    third = leg(tmp_path, clock, world=2, saved=saved | second._progress())
    clock.seconds += 1
    assert third._cost() == {"seconds": 121.0, "device_seconds": 422.0}


def test_a_checkpoint_from_before_seconds_were_kept_resumes(tmp_path, clock):
    saved = {"step": 3, "completions": 0} | leg(tmp_path, clock, world=1)._progress()
    del saved["seconds"], saved["device_seconds"]
    run = leg(tmp_path, clock, world=1, saved=saved)
    clock.seconds += 7
    assert run._cost() == {"seconds": 7.0, "device_seconds": 7.0}


@pytest.mark.parametrize(("tokens", "wanted"), [(600, 75.0), (None, None)])
def test_tokens_per_second_are_of_the_step_and_its_whole_time(tmp_path, clock, monkeypatch, tokens, wanted):
    run, logged = leg(tmp_path, clock, world=2), {}
    monkeypatch.setattr(module.loop, "sync", lambda run, groups: {})
    monkeypatch.setattr(Run, "_figures", lambda self, metrics, state: {})
    run.settings = SimpleNamespace(reference_every=None, eval_every=5, steps=9, questions=2, generations=2,
                                   checkpoint_every=5, samples_every=5)  # fmt: skip
    run.clock, run.sampler = module.Clock(), SimpleNamespace(epoch=lambda step: 0.5)
    run.display.update = lambda step, figures: None
    for stage, seconds in [("rollout", 6.0), ("update", 2.0)]:
        with run.clock(stage):
            clock.seconds += seconds
    log = SimpleNamespace(metrics=lambda step, values: logged.update(values), samples=lambda rows: None)
    run._finish(2, metrics={}, rows=[], groups=[], state={"completions": 0}, log=log, end=9, tokens=tokens)
    assert logged["step_time"] == 8.0 and logged.get("tokens_per_second") == wanted  # 600 tokens in 6 + 2 seconds
