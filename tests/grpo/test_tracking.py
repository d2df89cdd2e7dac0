"""The files of a run: what is written comes back; a resume drops the steps after its checkpoint and nothing else."""

import json
import math
import sys
from types import ModuleType

import pytest

from grpo.config import ConfigError
from grpo.report.curves import read_metrics
from grpo.report.read import read_run
from grpo.tracking import NoTracker, RunLog, Wandb

# All that str.splitlines() takes for the end of a line, and that JSON leaves as it is or escapes.
BREAKS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei\rj\r\nk\nl"


def completions(folder):
    return [json.loads(line)["completion"] for line in (folder / "samples.jsonl").read_bytes().split(b"\n") if line]


def test_a_resume_keeps_every_sample_whatever_its_text(tmp_path):
    log = RunLog(tmp_path, NoTracker())
    log.samples([{"step": s, "completion": f"{s} {BREAKS}"} for s in (1, 1, 2, 3)])
    RunLog(tmp_path, NoTracker(), 2)
    assert completions(tmp_path) == [f"{s} {BREAKS}" for s in (1, 1, 2)]


@pytest.mark.parametrize("cut", range(1, 13))
def test_the_half_line_of_a_killed_run_goes_wherever_it_was_cut(tmp_path, cut):
    path = tmp_path / "samples.jsonl"
    RunLog(tmp_path, NoTracker()).samples([{"step": s, "completion": "é\u2028ü"} for s in (1, 2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])  # cut 1 leaves a whole object without its line's end
    RunLog(tmp_path, NoTracker(), 2)
    assert completions(tmp_path) == ["é\u2028ü"] * (2 if cut == 1 else 1) and path.read_bytes() in (
        whole, whole[: len(whole) // 2]
    )  # fmt: skip


def test_a_corrupt_line_before_others_is_named_and_nothing_is_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff{"st\n{"step": 2}\n')
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        RunLog(tmp_path, NoTracker(), 2)
    assert path.read_bytes() == b'{"step": 1}\n\xff{"st\n{"step": 2}\n'


def test_metrics_are_read_back_by_whole_lines(tmp_path):
    log = RunLog(tmp_path, NoTracker())
    log.metrics(1, {"rewards/a\u2028b/mean": 0.5, "loss": math.nan})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "rewards/a\u2028b/mean": 0.5, "loss": None}]


def test_a_resumed_run_has_not_ended(tmp_path):
    log = RunLog(tmp_path, NoTracker())
    log.metrics(1, {"loss": 0.0})
    log.summary({"steps": 1})
    (tmp_path / "failure.json").write_text('{"error": "boom"}')
    assert read_run(tmp_path).state == "failed"
    RunLog(tmp_path, NoTracker(), 1)
    assert read_run(tmp_path).state == "running" and not (tmp_path / "summary.json").exists()


def test_wandb_cannot_end_a_run(tmp_path, monkeypatch, capsys):
    """Whatever the client raises, in any call: told once, and the run's own files go on."""

    class Broken(ModuleType):
        Settings = staticmethod(lambda **_: None)

        @staticmethod
        def init(**_):
            raise ConnectionError("no way out\nsecond line")

    monkeypatch.setitem(sys.modules, "wandb", Broken("wandb"))
    tracker = Wandb(mode="online")
    tracker.start(tmp_path, {}, "run")
    tracker.log(1, {"reward": 1.0})
    tracker.table(1, [{"step": 1}])
    tracker.finish({})
    said = capsys.readouterr().err
    assert said.count("wandb") == 1 and "ConnectionError: no way out; the run goes on without it" in said
