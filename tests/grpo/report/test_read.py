"""Reading run folders: states, overrides, and whatever a folder may be broken by."""

import json
import os
import time

import pytest

from grpo.report.build import build
from grpo.report.read import find_runs, number, read_run, read_runs
from tests.grpo.report.factory import healthy_rows, sweep, write_run


def test_runs_are_found_below_any_folder_and_once(tmp_path):
    sweep(tmp_path / "multirun" / "a", losses=("grpo",), seeds=(0, 10, 2), steps=4)
    (tmp_path / "multirun" / "a" / "multirun.yaml").write_text("x: 1")
    (tmp_path / "multirun" / "a" / "loss=grpo,seed=0" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "multirun" / "a" / "loss=grpo,seed=0" / "checkpoints" / "config.yaml").write_text("")
    os.symlink(tmp_path / "multirun", tmp_path / "multirun" / "loop")
    found = find_runs([tmp_path, tmp_path / "multirun" / "a" / "loss=grpo,seed=0"])
    assert [p.name for p in found] == ["loss=grpo,seed=0", "loss=grpo,seed=10", "loss=grpo,seed=2"]


def test_what_a_run_had_for_a_key(tmp_path):
    run = read_run(write_run(tmp_path / "r", overrides=["loss=dapo", "seed=3", "+new.key=a=b"]))
    assert (run.value("loss"), run.value("seed"), run.value("new.key")) == ("dapo", "3", "a=b")
    assert (run.value("model"), run.value("loss.beta"), run.value("nothing.here")) == ("tiny", "0.01", "")


def test_states(tmp_path):
    write_run(tmp_path / "done")
    write_run(tmp_path / "going", finished=False)
    write_run(tmp_path / "old", finished=False)
    os.utime(tmp_path / "old" / "metrics.jsonl", (1, 1))
    write_run(tmp_path / "short", steps=100, rows=healthy_rows(10))
    (tmp_path / "short" / "config.yaml").write_text('{"steps": 500}')
    write_run(tmp_path / "failed")
    (tmp_path / "failed" / "failure.json").write_text('{"error": "RuntimeError: boom"}')
    write_run(tmp_path / "started", rows=[], finished=False)
    states = {r.name: r.state for r in read_runs([tmp_path], now=time.time() + 60)}
    assert states == {"done": "finished", "going": "running", "old": "stopped", "short": "stopped",
                      "failed": "failed", "started": "running"}  # fmt: skip


def test_a_line_that_is_being_written_is_no_fault(tmp_path):
    folder = write_run(tmp_path / "r", finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "rew')
    run = read_run(folder)
    assert run.problems == () and len(run.rows) == 101


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", b"\xff\xfe\x00garbage\n[1, 2]\n{}\n", "3 lines left out: no metrics"),
        ("metrics.jsonl", b"", "no complete line"),
        ("metrics.jsonl", None, "no metrics.jsonl"),
        ("metrics.jsonl", b'{"step": 1e400}\n{"step": -1}\n{"step": "1"}\n{"step": 1.5}\n{"step": true}\n', "5 lines"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", "1 line left out"),
        ("metrics.jsonl", b'{"step": 1' + b"0" * 5000 + b"}\n", "1 line left out"),
        ("summary.json", b"{", "summary.json"),
        ("config.yaml", b"a: [", "config.yaml"),
        ("config.yaml", b"!!python/object/apply:os.system [echo]", "config.yaml"),
        (".hydra/overrides.yaml", b"\x00", "overrides.yaml"),
        (".hydra/hydra.yaml", b"[" * 3000, "hydra.yaml"),
        ("failure.json", b"[]", None),
        (".hydra/overrides.yaml", b"{a: 1}", None),
    ],
)
def test_a_corrupt_folder_is_shown_as_such_and_loses_nothing_else(tmp_path, file, content, said):
    sweep(tmp_path / "s", steps=8)
    bad = tmp_path / "s" / "loss=grpo,seed=1"
    (bad / file).unlink(missing_ok=True)
    if content is not None:
        (bad / file).write_bytes(content)
    runs = {r.name: r for r in build([tmp_path / "s"], tmp_path / "out")}
    assert len(runs) == 6
    assert (said is None) or any(said in p for p in runs[bad.name].problems), runs[bad.name].problems
    assert all(len(r.rows) == 9 and not r.problems for n, r in runs.items() if n != bad.name)
    if said:
        assert said in (tmp_path / "out" / "report.md").read_text() or "metrics" in said


@pytest.mark.parametrize(
    ("metric", "value"),
    [("reward", 1e200), ("reward", 1.7e308), ("rewards/accuracy/mean", 1.7e308), ("step_time", 1.7e308),
     ("grad_norm", 1.7e308), ("num_tokens", -1.7e308), ("accuracy/heldout", 1e200), ("kl", 1e308)],
)  # fmt: skip
def test_a_number_that_overflows_costs_only_itself(tmp_path, metric, value):
    sweep(tmp_path / "s", losses=("grpo", "dapo"), seeds=(0, 1), steps=300)
    bad = tmp_path / "s" / "loss=grpo,seed=1"
    (bad / "summary.json").unlink()
    rows = [row | {metric: value} for row in healthy_rows(300)]
    (bad / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    runs = {r.name: r for r in build([tmp_path / "s"], tmp_path / "out")}
    assert runs[bad.name].problems == ("metrics.jsonl: 301 numbers left out: beyond 1e+100",)
    assert all(r.problems == () for n, r in runs.items() if n != bad.name) and len(runs) == 4


@pytest.mark.parametrize("config", [True, False])
def test_a_step_beyond_the_run_squeezes_no_curve(tmp_path, config):
    sweep(tmp_path / "s", losses=("grpo",), seeds=(0, 1), steps=60)
    bad = tmp_path / "s" / "loss=grpo,seed=1"
    if not config:
        (bad / "config.yaml").unlink()
    with (bad / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1e12, "reward": 1.0}\n')
    runs = build([tmp_path / "s"], tmp_path / "out")
    assert [len(r.rows) for r in runs] == [61, 61]
    assert runs[1].problems == (f"metrics.jsonl: 1 line left out: steps beyond {60 if config else 10**9}",)
    assert '"x":[1,2,3,' in (tmp_path / "out" / "report.html").read_text()


def test_folders_in_the_place_of_files_and_no_permission(tmp_path):
    folder = write_run(tmp_path / "r")
    for name in ("summary.json", "samples.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
        (folder / name).mkdir()
    (run,) = build([tmp_path], tmp_path / "out")
    assert run.state in ("unreadable", "running") and run.problems


def test_values_that_are_no_numbers(tmp_path):
    folder = write_run(tmp_path / "r", rows=[])
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "reward": NaN, "kl": Infinity, "loss": null, "entropy": "x", "grad_norm": true, "a": 1e999}\n'
    )
    (row,) = read_run(folder).rows
    assert row == {"step": 1, "reward": None, "kl": None, "loss": None, "a": None}
    assert (
        number(10**400) is None
        and number(-1e101) is None
        and number(1e100) == 1e100
        and number(True) is None
        and number("1") is None
        and number(3) == 3.0
    )


def test_aliases_that_multiply_cost_nothing(tmp_path):
    folder = write_run(tmp_path / "r")
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    (folder / "config.yaml").write_text(bomb)
    (folder / ".hydra" / "overrides.yaml").write_text("- &b [x]\n- a11=1\n- [*b, *b]\n")
    began = time.process_time()
    run = read_run(folder)
    assert run.value("a11") == "1" and run.value("a10") == "" and time.process_time() - began < 5


def test_no_run_is_an_error_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        build([tmp_path], tmp_path / "out")


def test_a_step_written_twice_counts_once(tmp_path):
    rows = [*healthy_rows(5), {"step": 5, "reward": 9.0}]
    run = read_run(write_run(tmp_path / "r", rows=rows))
    assert [r["step"] for r in run.rows] == [0, 1, 2, 3, 4, 5] and run.rows[-1]["reward"] == 9.0
    json.dumps(run.rows)
