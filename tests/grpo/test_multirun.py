"""Multiruns of a small Hydra application: failures, resuming, folders, and jobs as processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from grpo.config import FREE_ON_RESUME
from grpo.multirun import LocalLauncher, _last_line, _quoted, todo

ROOT = Path(__file__).parents[2]
TOY = """
import json, os, pathlib, hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from grpo.multirun import register, todo

@hydra.main(config_path="toyconf", config_name="toy", version_base="1.3")
def run(cfg):
    folder = pathlib.Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode.name == "MULTIRUN" and (cfg := todo(cfg, folder)) is None:
        return
    with open("ran.txt", "a") as file:
        file.write(f"{cfg.loss}{cfg.seed}{'r' if cfg.resume else ''}\\n")
    if os.environ.get("BOOM") == str(cfg.seed):
        raise RuntimeError("boom")
    if os.environ.get("KILL") == str(cfg.seed):
        os.kill(os.getpid(), 9)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "reward": s}) + "\\n" for s in range(4)))
    (folder / "summary.json").write_text(json.dumps({"steps": cfg.steps, "accuracy/final": 0.5}))

if __name__ == "__main__":
    register()
    run()
"""
CONF = """
loss: a
seed: 0
steps: 3
lr: 1.0
resume: false
name: null
hydra:
  callbacks: {multirun: {_target_: grpo.multirun.Multirun}}
  sweep: {dir: "multirun/${now:%H-%M-%S}", subdir: "${hydra:job.num}"}
"""


@pytest.fixture
def work(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "toyconf" / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "toyconf" / "toy.yaml").write_text(CONF)
    ours = OmegaConf.load(ROOT / "conf" / "hydra" / "launcher" / "local.yaml")
    OmegaConf.save(OmegaConf.merge(ours, {"module": "toy"}),
                   tmp_path / "toyconf" / "hydra" / "launcher" / "local.yaml")  # fmt: skip
    return tmp_path


def sweep(work, *words, **env):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{work}", **env}
    command = [sys.executable, "-m", "toy", "-m", *words]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=600, env=env)
    assert "Callback Multirun" not in done.stderr, done.stderr  # Hydra turns a callback's faults into warnings
    return done


def ran(work):
    lines = (work / "ran.txt").read_text().split()
    (work / "ran.txt").unlink()
    return sorted(lines)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_a_failed_job_stops_no_other_and_the_next_time_only_it_runs(work, launcher):
    words = [f"hydra/launcher={launcher}", "name=x", "lr=1.0", "loss=a,b", "seed=0,1"]
    first = sweep(work, *words, BOOM="1")
    folder = work / "multirun" / "x"
    assert first.returncode == 1 and ran(work) == ["a0", "a1", "b0", "b1"]
    assert "4 runs, 2 failed" in first.stdout and "loss=a,seed=1: " in first.stdout and "boom" in first.stdout
    assert "boom" in json.loads((folder / "loss=b,seed=1" / "failure.json").read_text())["error"]
    assert "loss=a" in (folder / "report.md").read_text() and (folder / "report.html").exists()

    again = sweep(work, *words, "resume=true")
    assert again.returncode == 0 and ran(work) == ["a1", "b1"], again.stdout + again.stderr
    assert "4 runs, 0 failed" in again.stdout and not list(folder.rglob("failure.json"))

    longer = sweep(work, *words[:-1], "seed=0,1,2", "resume=true")  # more seeds find the runs that are there
    assert longer.returncode == 0 and ran(work) == ["a2", "b2"] and "6 runs" in longer.stdout
    single = sweep(work, *words[:-1], "seed=2", "resume=true")  # a seed that is not swept stands in the name too
    assert single.returncode == 0 and not (work / "ran.txt").exists() and "6 runs" in single.stdout


@pytest.mark.slow
def test_a_killed_job_is_one_failed_job(work):
    words = ["hydra/launcher=local", "hydra.launcher.jobs=2", "name=x", "seed=0,1,2"]
    done = sweep(work, *words, KILL="1")
    assert done.returncode == 1 and ran(work) == ["a0", "a1", "a2"]
    assert "seed=1: exit status -9" in done.stdout and "3 runs, 1 failed" in done.stdout


@pytest.mark.slow
def test_mistakes_of_a_multirun_start_nothing(work):
    words = ["hydra/launcher=local", "hydra.launcher.jobs=2", "name=x", "seed=0,1"]
    for rank in ("0", "1"):
        ranks = sweep(work, *words[2:], RANK=rank, WORLD_SIZE="2")
        assert ranks.returncode == 1 and "do not start it under torchrun" in ranks.stderr
        assert not (work / "ran.txt").exists() and not (work / "multirun").exists()
    assert sweep(work, *words).returncode == 0 and ran(work) == ["a0", "a1"]
    taken = sweep(work, *words)
    assert taken.returncode == 1 and "already holds a multirun" in taken.stderr
    nothing = sweep(work, "name=nowhere", "resume=true", "seed=0")
    assert nothing.returncode == 1 and "there is no multirun/nowhere" in nothing.stderr
    other = sweep(work, *words, "lr=2.0", "resume=true")  # the finished runs are of another learning rate
    assert other.returncode == 1 and "lr differ" in other.stdout and not (work / "ran.txt").exists()
    newest = sweep(work, "hydra/launcher=local", "seed=0,1,2", "resume=true")  # without a name: the newest
    assert newest.returncode == 0 and ran(work) == ["a2"], newest.stdout
    assert (work / "multirun" / "x" / "seed=2" / "summary.json").exists()


# ---------------------------------------------------------------- parts


def config(**changes):
    return OmegaConf.create({"steps": 10, "seed": 0, "resume": True, "name": None, **changes})


def test_what_is_left_of_a_job(tmp_path, monkeypatch):
    assert todo(config(resume=False), tmp_path).resume is False
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert todo(config(), tmp_path).resume is False and not (tmp_path / "metrics.jsonl").exists()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert todo(config(), tmp_path).resume is True and (tmp_path / "metrics.jsonl").exists()
    assert todo(config(resume=False), tmp_path).resume is False
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the same job, queued again
    assert todo(config(resume=False), tmp_path).resume is True
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    (tmp_path / "summary.json").write_text('{"steps": 5}')  # stopped by stop_at
    assert todo(config(), tmp_path).resume is True
    (tmp_path / "summary.json").write_text('{"steps": 10}')
    OmegaConf.save(config(name="other", resume=False), tmp_path / "config.yaml")
    assert todo(config(), tmp_path) is None
    with pytest.raises(ValueError, match="seed"):
        todo(config(seed=1), tmp_path)


def test_the_given_config_is_not_written_to(tmp_path):
    cfg = config()
    todo(cfg, tmp_path)
    assert cfg.resume is True


@pytest.mark.parametrize("key", sorted(FREE_ON_RESUME))
def test_a_finished_job_fits_whatever_the_free_keys_are(tmp_path, key):
    (tmp_path / "summary.json").write_text('{"steps": 10}')
    OmegaConf.save(config(**{key: "before"}), tmp_path / "config.yaml")
    assert todo(config(**{key: "now", "resume": True}), tmp_path) is None


def test_the_free_keys_are_keys_of_a_run():
    known = OmegaConf.load(ROOT / "conf" / "train.yaml")
    assert FREE_ON_RESUME <= known.keys() | {name for d in known.defaults if not isinstance(d, str) for name in d}


@pytest.mark.parametrize("text", ["a b", "it's", "a=b,c", "\\'", "${x}", "multirun/x/loss=a,seed=0"])
def test_any_folder_is_a_value_of_an_override(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if text != "${x}":  # an interpolation stays one, quoted or not: folders do not look like that
        assert OverridesParser.create().parse_override(f"k={_quoted(text)}").value() == text


def test_the_last_line_of_an_output(tmp_path):
    (tmp_path / "o").write_bytes(b"x\n\xff\nerror: y\n\nSet the environment variable HYDRA_FULL_ERROR=1 for more\n")
    assert _last_line(tmp_path / "o") == "error: y" and _last_line(tmp_path / "none") == "no output"


def test_launcher_settings_are_checked():
    with pytest.raises(ValueError, match="jobs"):
        LocalLauncher(jobs=0)
    with pytest.raises(ValueError, match="devices"):
        LocalLauncher(jobs=2, devices=[0])
