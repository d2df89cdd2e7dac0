"""Columns, seeds, intervals and pairs, against numbers worked by hand."""

import csv
import json
import math

import pytest

from grpo.config import FREE_ON_RESUME
from grpo.report.build import build
from grpo.report.compare import columns, estimate, figures, find_baseline, over_seeds, paired, settings, t_quantile
from grpo.report.read import read_runs
from tests.grpo.report.factory import healthy_rows, sweep, write_run


@pytest.fixture
def runs(tmp_path):
    return read_runs([sweep(tmp_path)])


def test_columns_are_the_overrides_that_differ_the_seed_last(runs):
    assert columns(runs) == ["loss", "seed"]


def test_a_default_and_the_same_value_given_do_not_differ(tmp_path):
    write_run(tmp_path / "a", overrides=["loss=grpo", "seed=0", "name=a", "tracking=none", "checkpoint.every=5"])
    write_run(tmp_path / "b", overrides=["seed=1"])
    assert columns(read_runs([tmp_path])) == ["seed"]


@pytest.mark.parametrize("key", [*sorted(FREE_ON_RESUME), "engine.stage", "audio_cache.memory_gib", "log.every",
                                 "hydra/launcher", "hydra.launcher.jobs"])  # fmt: skip
def test_what_a_resumed_run_may_change_is_no_column(tmp_path, key):
    for seed, value in enumerate(("1", "2")):
        write_run(tmp_path / value, overrides=[f"seed={seed}", f"{key}={value}"])
    assert columns(read_runs([tmp_path])) == ["seed"]


def test_a_key_that_only_begins_like_a_free_one_is_a_column(tmp_path):
    for value in "ab":
        write_run(tmp_path / value, overrides=[f"samples_of={value}", f"data.cache={value}"])
    assert columns(read_runs([tmp_path])) == ["samples_of", "data.cache"]


def test_mean_and_interval_by_hand():
    # 1, 2, 3, 4: mean 2.5, variance 5/3, standard error sqrt(5/12) = 0.6454972, t(3) = 3.182
    e = estimate([1.0, 2.0, None, 3.0, 4.0])
    assert (e.mean, e.n) == (2.5, 4) and e.half == pytest.approx(3.182 * 0.6454972, abs=1e-6)
    assert estimate([2.0]).half is None and estimate([None]) is None


def test_t_beyond_the_table():
    assert t_quantile(1) == 12.706 and t_quantile(30) == 2.042
    assert t_quantile(40) == pytest.approx(2.021, abs=2e-3) and t_quantile(10_000) == pytest.approx(1.960, abs=1e-3)


def test_settings_and_their_figures(runs):
    dapo, grpo = settings(runs, columns(runs))
    assert (dapo.label, len(dapo.runs)) == ("loss=dapo", 3) and grpo.label == "loss=grpo"
    # held-out 0.60, 0.62, 0.64: mean 0.62, deviation 0.02, half = 4.303 * 0.02 / sqrt(3)
    e = over_seeds(grpo, "accuracy/final")
    assert e.mean == pytest.approx(0.62) and e.half == pytest.approx(4.303 * 0.02 / math.sqrt(3))


def test_pairs_are_of_one_seed(runs):
    groups = settings(runs, columns(runs))
    (pair, *_) = paired(groups, find_baseline(groups, "grpo"), ["accuracy/final"])
    # differences 0.05, 0.06, 0.07: mean 0.06, deviation 0.01
    assert pair.label == "loss=dapo" and set(pair.seeds) == {"0", "1", "2"} and pair.difference.n == 3
    assert pair.difference.mean == pytest.approx(0.06)
    assert pair.difference.half == pytest.approx(4.303 * 0.01 / math.sqrt(3))


def test_a_run_that_is_still_going_is_compared_at_the_step_both_have(tmp_path):
    write_run(tmp_path / "a", overrides=["loss=grpo", "seed=0"], rows=[
        {"step": s, "reward": 1.0, "accuracy/heldout": s / 100} for s in range(0, 101, 25)])  # fmt: skip
    write_run(tmp_path / "b", overrides=["loss=dapo", "seed=0"], finished=False, rows=[
        {"step": s, "reward": 1.0, "accuracy/heldout": 0.1 + s / 100} for s in range(0, 51, 25)])  # fmt: skip
    groups = settings(runs := read_runs([tmp_path]), columns(runs))
    (pair,) = paired(groups, groups[0], ["accuracy/final"])
    assert pair.difference.mean == pytest.approx(0.1) and pair.difference.half is None


def test_a_seed_that_was_run_twice_is_one_seed(tmp_path):
    for i, seed in enumerate((0, 0, 1)):
        write_run(tmp_path / str(i), overrides=[f"seed={seed}"], rows=[{"step": 1, "reward": float(i)}])
    runs = read_runs([tmp_path])
    e = over_seeds(settings(runs, columns(runs))[0], "reward")
    assert e.n == 2 and e.mean == pytest.approx((0.5 + 2.0) / 2)


def test_figures_of_one_run(tmp_path):
    run = read_runs([write_run(tmp_path / "r", rows=healthy_rows(100))])[0]
    f = figures(run)
    assert f["steps"] == 100 and f["tokens"] == 450_000 and f["hours"] == pytest.approx(130 / 3600)
    assert f["reward"] == pytest.approx(sum(r["reward"] for r in run.rows[-10:]) / 10)
    assert f["accuracy/best"] >= f["accuracy/final"] and f["accuracy/start"] == 0.25


def test_the_time_of_a_resumed_run_is_that_of_all_its_legs(tmp_path):
    old = write_run(tmp_path / "old")  # 100 steps of 1.3 s; its summary counted the last leg only
    (old / "summary.json").write_text('{"steps": 100, "seconds": 40.0}')
    assert figures(read_runs([old])[0])["hours"] == pytest.approx(130 / 3600)


@pytest.mark.parametrize(("device", "figure", "name"), [("NVIDIA H100 80GB HBM3", "gpu_hours", "GPU-hours"),
                                                        ("cpu", "device_hours", "device-hours")])  # fmt: skip
def test_hours_count_the_devices(tmp_path, device, figure, name):
    new, going = write_run(tmp_path / "s" / "a"), write_run(tmp_path / "s" / "b", finished=False)
    write_run(tmp_path / "s" / "old")
    for folder in (new, going):
        (folder / "provenance.json").write_text(json.dumps({"device": device, "ranks": 4}))
    (new / "summary.json").write_text('{"steps": 100, "seconds": 200.0, "device_seconds": 500.0}')  # 100 s on 4, then 1
    a, b, old = map(figures, build([tmp_path / "s"], tmp_path / "out"))
    assert (a["hours"], a[figure]) == pytest.approx((200 / 3600, 500 / 3600))
    assert (
        b[figure] == pytest.approx(4 * 130 / 3600) and figure not in old and old["hours"] == pytest.approx(130 / 3600)
    )
    assert f"hours | {name} |" in (tmp_path / "out" / "report.md").read_text()
    assert device in (tmp_path / "out" / "report.html").read_text()


def test_runs_that_logged_nothing_are_not_averaged(tmp_path):
    sweep(tmp_path)
    (tmp_path / "loss=grpo,seed=2" / "metrics.jsonl").unlink()
    runs = read_runs([tmp_path])
    groups = {g.label: len(g.runs) for g in settings(runs, columns(runs))}
    assert groups == {"loss=grpo": 2, "loss=dapo": 3}


def test_the_baseline_is_named_or_refused(runs):
    groups = settings(runs, columns(runs))
    dapo = next(g for g in groups if g.label == "loss=dapo")
    assert find_baseline(groups, None).label == "loss=grpo" and find_baseline([dapo], None) is dapo
    for name in ("loss=dapo", "dapo", "loss=dapo,seed=1"):
        assert find_baseline(groups, name) is dapo
    with pytest.raises(ValueError, match="loss=grpo"):
        find_baseline(groups, "nothing")


def test_markdown_and_csv(tmp_path):
    sweep(tmp_path / "s")
    build([tmp_path / "s"], tmp_path / "out", baseline="grpo")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| loss=dapo | accuracy, final | +0.06 | " in text and "| 3 |" in text
    assert "| loss=grpo | 3 | 0.25 ± 0 | 0.62 ± 0.05 |" in text
    rows = list(csv.DictReader((tmp_path / "out" / "report.csv").open()))
    assert len(rows) == 6 and {r["loss"] for r in rows} == {"grpo", "dapo"}
    assert [float(r["accuracy/final"]) for r in rows if r["loss"] == "grpo"] == pytest.approx([0.60, 0.62, 0.64])


def test_without_seeds_and_overrides_every_run_stands_for_itself(tmp_path):
    for name in "ab":
        folder = write_run(tmp_path / name)
        for file in (".hydra/overrides.yaml", ".hydra/hydra.yaml", "config.yaml"):
            (folder / file).unlink()
    runs = read_runs([tmp_path])
    assert [g.label for g in settings(runs, columns(runs))] == ["a", "b"]
