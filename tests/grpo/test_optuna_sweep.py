"""hydra/sweeper=optuna on an objective of microseconds: what is asked, what is told, failures, repeats, resuming."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import OmegaConf

from grpo.multirun import register
from grpo.optuna_sweep import OptunaSweeper, each_choice, outcome, space

optuna = pytest.importorskip("optuna", reason="the extra `sweep` is not installed: make setup")
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402

ROOT = Path(__file__).parents[2]
# The best is b at x = 0.3; c fails always.
TOY = """
import json, pathlib, hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from grpo.multirun import register, result, todo

@hydra.main(config_path="toyconf", config_name="toy", version_base="1.3")
def run(cfg):
    folder = pathlib.Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode.name == "MULTIRUN" and (cfg := todo(cfg, folder)) is None:
        return result(folder)
    with open("ran.txt", "a") as file:
        file.write(f"{cfg.loss} {cfg.x}\\n")
    if cfg.loss == "c":
        raise RuntimeError("boom")
    value = (cfg.loss == "b") - (cfg.x - 0.3) ** 2
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": value}) + "\\n")
    (folder / "summary.json").write_text(json.dumps({"steps": cfg.steps, "accuracy/final": value}))
    return value

if __name__ == "__main__":
    register()
    run()
"""
CONF = """
loss: a
x: 0.0
seed: 0
steps: 1
resume: false
name: null
hydra:
  callbacks: {multirun: {_target_: grpo.multirun.Multirun}}
  sweep: {dir: "multirun/${now:%H-%M-%S}", subdir: "${hydra:job.num}"}
  job_logging: {disable_existing_loggers: false, root: {handlers: [], level: WARNING}}
  hydra_logging: {root: {handlers: [console], level: WARNING}}
"""


@pytest.fixture
def work(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    for group, name, new in [("launcher", "local", {"module": "toy"}), ("sweeper", "optuna", {})]:
        ours = OmegaConf.load(ROOT / "conf" / "hydra" / group / f"{name}.yaml")
        (tmp_path / "toyconf" / "hydra" / group).mkdir(parents=True)
        OmegaConf.save(OmegaConf.merge(ours, new), tmp_path / "toyconf" / "hydra" / group / f"{name}.yaml")
    (tmp_path / "toyconf" / "toy.yaml").write_text(CONF)
    return tmp_path


def sweep(work, *words):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(work), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "toy", "-m", "hydra/sweeper=optuna", "name=s", *words]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=600, env=env)
    assert "Callback Multirun" not in done.stderr, done.stderr
    return done


def ran(work):
    path = work / "ran.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


@pytest.mark.slow
def test_it_finds_the_best_goes_past_failures_and_resumes(work):
    words = ["loss=a,b,c", "x=interval(0.0,1.0)", "hydra.sweeper.n_trials=25"]
    done = sweep(work, *words)
    jobs = ran(work)
    assert len(jobs) == 25, done.stderr
    failed = [job for job in jobs if job.startswith("c")]
    assert failed and jobs.index(failed[0]) < 10 and done.returncode == 1  # the failures are listed at the end
    assert f"25 runs, {len(failed)} failed" in done.stdout and done.stdout.count(" failed: loss=c") == len(failed)
    late = [job[0] for job in jobs[10:]]  # past the sampler's random start
    assert late.count("b") > 2 * late.count("a"), jobs
    best = yaml.safe_load((work / "multirun" / "s" / "optimization_results.yaml").read_text())
    assert best["best_evaluated_params"]["loss"] == "b" and best["best_evaluated_value"] > 0.95
    summaries = [json.loads(p.read_text()) for p in (work / "multirun" / "s").glob("*/summary.json")]
    assert len(summaries) == 25 - len(failed)
    assert max(s["accuracy/final"] for s in summaries) == best["best_evaluated_value"]

    again = sweep(work, *words, "resume=true")  # the same values are asked for: only what failed runs
    assert sorted(ran(work)) == sorted(failed), again.stdout + again.stderr
    assert yaml.safe_load((work / "multirun" / "s" / "optimization_results.yaml").read_text()) == best


@pytest.mark.slow
def test_beside_each_other_in_processes_of_their_own(work):
    done = sweep(work, "loss=b,c", "x=0.3,0.5", "hydra.sweeper.n_trials=5", "hydra/launcher=local",
                 "hydra.launcher.jobs=2")  # fmt: skip
    jobs = ran(work)
    assert len(set(jobs)) == len(jobs) and 2 <= len(jobs) <= 4, done.stdout + done.stderr  # values are not run twice
    assert done.stdout.count("trial  ") == 5 and "not run a second time" in done.stdout


@pytest.mark.slow
def test_a_mistake_starts_nothing(work):
    for word, said in [("loss=b", "no key has several values"), ("y=1,2", "Could not override 'y'"),
                       ("x=tag(log,interval(0.0,1.0))", "cannot search x=")]:  # fmt: skip
        done = sweep(work, word)
        assert done.returncode and said in done.stderr and not ran(work), word
        assert not (work / "multirun").exists()


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("loss=grpo,dapo", CategoricalDistribution(["grpo", "dapo"])),
        ("x=choice(1,10,100)", CategoricalDistribution(["1", "10", "100"])),
        ("x=interval(0,1)", FloatDistribution(0.0, 1.0)),
        ("x=tag(log,interval(1e-4,3e-3))", FloatDistribution(1e-4, 3e-3, log=True)),
        ("x=int(interval(1,8))", IntDistribution(1, 8)),
        ("x=range(1,4)", IntDistribution(1, 3)),
        ("x=range(0,10,4)", IntDistribution(0, 8, step=4)),
        ("x=range(8,0,-4)", IntDistribution(4, 8, step=4)),
        ("x=range(0,1,0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("x=tag(log,range(1,100))", IntDistribution(1, 99, log=True)),
    ],
)
def test_spaces(word, expected):
    assert space(OverridesParser.create().parse_override(word)) == expected


@pytest.mark.parametrize("word", ["x=tag(log,interval(0,1))", "x=interval(2,1)", "x=range(1,1)",
                                  "x=tag(log,choice(a,b))", "x=tag(log,range(1,9,2))"])  # fmt: skip
def test_a_space_that_cannot_be_searched_says_so(word):
    with pytest.raises(HydraException, match="cannot search x="):
        space(OverridesParser.create().parse_override(word))


def test_every_word_is_composed_before_the_first_run():
    swept = {"a": CategoricalDistribution(["1", "2", "3"]), "b": FloatDistribution(0.5, 1.0)}
    assert each_choice(swept) == [["a=1", "b=0.5"], ["a=2", "b=0.5"], ["a=3", "b=0.5"]]


@pytest.mark.parametrize(
    ("status", "value", "expected"),
    [
        (JobStatus.COMPLETED, 0.5, 0.5),
        (JobStatus.COMPLETED, 1, 1.0),
        (JobStatus.COMPLETED, None, None),  # what the callback makes of a failure
        (JobStatus.COMPLETED, math.nan, None),
        (JobStatus.COMPLETED, "0.5", None),
        (JobStatus.FAILED, RuntimeError("boom"), None),
    ],
)
def test_what_a_job_came_to(status, value, expected):
    job = JobReturn(status=status)
    job.return_value = value
    assert outcome(job) == expected


@pytest.mark.parametrize("wrong", [{"n_trials": 0}, {"at_once": 0}, {"direction": "up"}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptunaSweeper(**{"n_trials": 1, "at_once": 1, "direction": "maximize", "sampler": None, **wrong})


def test_grpo_train_composes_it():
    from hydra import compose, initialize_config_module

    register()
    with initialize_config_module("conf", version_base="1.3"):
        words = ["hydra/sweeper=optuna", "hydra/launcher=local", "hydra.launcher.jobs=3", "hydra.sweeper.n_trials=8"]
        hydra = compose("train", words, return_hydra_config=True).hydra
    assert (hydra.sweeper._target_, hydra.sweeper.n_trials) == ("hydra_plugins.grpo_optuna.OptunaSweeper", 8)
    assert hydra.sweeper.at_once == 3
