"""What a run keeps count of beside the maths, over stops and resumes: its time, its devices, its tokens a second."""

import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from grpo import run as module
from grpo.config import ConfigError
from grpo.report.compare import figures
from grpo.report.read import read_run
from grpo.run import Run
from tests.conftest import OneRank, make_question


@pytest.fixture
def clock(monkeypatch):
    """The seconds that a run sees: a step takes 8 of them and 600 tokens a rank; model and picture are left out."""
    now = SimpleNamespace(seconds=1000.0)

    def step(run, number, collected):
        with run.clock("update"):
            now.seconds += 8
        run.tokens += 600 * run.world
        return {"reward": 1.0, "completions/mean_length": 5.0}, [], []

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(module, "collect", lambda run, step: ([], {}))
    monkeypatch.setattr(module.loop, "step", step)
    monkeypatch.setattr(module.loop, "sync", lambda run, groups: {})
    monkeypatch.setattr(module, "curves", lambda folder: None)
    monkeypatch.setattr(Run, "header", lambda run: "")
    monkeypatch.setattr(module, "facts", lambda dataset, policy: {"data_fingerprint": dataset.fingerprint})
    monkeypatch.setattr(Run, "evaluate", lambda run: {"accuracy/heldout": 0.5})
    return now


class OneEngine(OneRank):
    begun = 0


class Saved:
    """Checkpoints in memory: each stays what JSON makes of it."""

    state = None

    def save(self, step, policy, engine, state, best):
        self.state = json.dumps(state | {"step": step})

    def load(self, engine, say):
        return json.loads(self.state)


def leg(folder, saved, clock, *, ranks=1, stop_at=None, resume=False, seen=lambda: None, data="f"):
    """One leg of a run of 6 steps, with a checkpoint every 2nd. `seen` is called at the end of each step."""
    run, nothing = object.__new__(Run), lambda *_, **__: None
    cfg = OmegaConf.create({"tracking": {"_target_": "grpo.tracking.NoTracker"}, "rollout": {}, "rewards": {},
                            "steps": 6})  # fmt: skip
    vars(run).update(
        cfg=cfg, folder=folder, world=ranks, rank=0, engine=OneEngine(), policy=None, objective=None, checkpoints=saved,
        tokens=0, version=0, quarantined={}, before={"seconds": 0.0, "device_seconds": 0.0}, clock=module.Clock(),
        settings=SimpleNamespace(steps=6, stop_at=stop_at, resume=resume, traced_steps=0, reference_every=None,
                                 eval_every=9, questions=2, generations=2, checkpoint_every=2, samples_every=9,
                                 checkpoint_grace=90.0, max_nonfinite=3, out_of_memory="stop",
                                 rollout_lag=0),
        dataset=SimpleNamespace(fingerprint=data, train=[]), heldout=[make_question("q")],
        sampler=SimpleNamespace(epoch=lambda step: 0.5), sync=SimpleNamespace(push=nothing),
        rollouts=SimpleNamespace(state=nothing, load_state=nothing), may_rest=False,
        display=SimpleNamespace(say=nothing, start=nothing, stop=nothing, samples=nothing,
                                update=lambda step, figures: seen()),
    )  # fmt: skip
    return run._train()


def test_the_time_of_all_legs_with_the_ranks_each_had(tmp_path, clock):
    saved, states = Saved(), []
    first = leg(tmp_path, saved, clock, ranks=4, stop_at=2)
    assert (first["seconds"], first["device_seconds"], first["ranks"]) == (16, 64, 4)
    assert read_run(tmp_path).state == "stopped"
    clock.seconds += 5000  # nothing runs
    leg(tmp_path, saved, clock, resume=True, stop_at=4, seen=lambda: states.append(read_run(tmp_path).state))
    assert states == ["running"] * 2  # not stopped: the summary of the leg before is gone
    last = leg(tmp_path, saved, clock, ranks=2, resume=True)
    assert (last["seconds"], last["device_seconds"], last["tokens"]) == (48, 64 + 16 + 32, 600 * (2 * 4 + 2 + 2 * 2))
    run = read_run(tmp_path)
    assert run.state == "finished" and run.device == last["device"] and run.ranks == 4
    hours = figures(run)
    assert hours["hours"] == pytest.approx(48 / 3600)
    assert hours.get("gpu_hours", hours.get("device_hours")) == pytest.approx(112 / 3600)


def test_a_run_whose_data_have_changed_is_not_resumed(tmp_path, clock):
    saved = Saved()
    leg(tmp_path, saved, clock, stop_at=2)
    with pytest.raises(ConfigError, match=r"the data have changed since .* began \(fingerprint f, now e\)"):
        leg(tmp_path, saved, clock, resume=True, data="e")


def test_a_checkpoint_from_before_seconds_were_kept_resumes(tmp_path, clock):
    saved = Saved()
    leg(tmp_path, saved, clock, stop_at=4)
    saved.state = json.dumps({k: v for k, v in json.loads(saved.state).items() if not k.endswith("seconds")})
    assert leg(tmp_path, saved, clock, resume=True)["seconds"] == 16  # of its own leg
    assert figures(read_run(tmp_path))["hours"] == pytest.approx(48 / 3600)  # by the times of its steps


def test_tokens_per_second_are_of_one_step_over_all_ranks(tmp_path, clock):
    saved = Saved()
    leg(tmp_path, saved, clock, ranks=2, stop_at=2)
    unfinished = {"metrics": {"reward": 1.0, "completions/mean_length": 5.0}, "rows": []}
    saved.state = json.dumps(json.loads(saved.state) | {"step": 3, "unfinished": unfinished})
    clock.seconds += 50
    leg(tmp_path, saved, clock, resume=True)
    rows = read_run(tmp_path).rows
    # 600 tokens a rank in 8 seconds; step 3 began in another process, so that its time is not known
    assert [r.get("tokens_per_second") for r in rows] == [None, 150, 150, None, 75, 75, 75]


@pytest.mark.parametrize("world", [1, 2])
def test_a_clip_that_one_rank_cannot_read_is_left_out_on_all(monkeypatch, world):
    rows = [make_question(f"q{i}") for i in range(4)]
    elsewhere = ("f", {"q1": "missing", "held": "silent"})
    monkeypatch.setattr(module.torch.distributed, "all_gather_object",
                        lambda parts, mine: parts.__setitem__(slice(None), [mine, elsewhere]))  # fmt: skip
    here = SimpleNamespace(fingerprint="f", unreadable={"q3": "empty"}, train=rows)
    assert module.agreed_unreadable(here, world) == ({"q3": "empty"} | ({"q1": "missing"} if world == 2 else {}))
    here.fingerprint = "e"
    if world == 2:
        with pytest.raises(ConfigError, match=r"rank 1 has read other questions than rank 0 \(fingerprints f and e\)"):
            module.agreed_unreadable(here, world)
