"""Many runs by `python -m grpo.train -m ...`: what is missing runs, a failure is listed, a report ends it.

Hydra 1.3 runs every job of a batch even when one raises, but then raises the first failure: `on_multirun_end` is not
called, later batches do not start, and a job that is killed takes the sweep with it. Here

    Multirun        a callback (hydra.callbacks) that notes a failed job in its folder as failure.json, lets the sweep
                    go on, and at the end writes the report, lists the failures and exits with status 1
    LocalLauncher   a launcher that gives every job a process of its own, `jobs` at a time: a crash is one failed job
    todo            what is left of a job: nothing, the steps after its checkpoint, or all

A multirun's folder is multirun/NAME with name=NAME, the newest with resume=true, else the time of day; a job's folder
is named after what is swept, and the seed (`loss=dapo,seed=1`), so that a longer list finds the runs that are there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from grpo.config import differing
from grpo.optuna_sweep import OptunaSweeper
from launch.slurm import sweep

CALM = 0.2  # seconds between two looks at the running jobs


class Multirun(Callback):
    """Names the folders, notes failures, and ends with the report.

    Args:
        root: where multiruns without hydra.sweep.dir go.
    """

    def __init__(self, root: str = "multirun"):
        self.root = Path(root)

    def on_multirun_start(self, config: DictConfig, **_) -> None:
        # Callbacks.on_* turn exceptions into warnings, so a mistake has to leave by sys.exit.
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # each rank would be a sweep
            sys.exit("error: a multirun (-m) starts its jobs itself: do not start it under torchrun (NPROC)")
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        plain = {o.key_or_group: o.value() for o in given if not o.is_sweep_override()}
        asked = [line.partition("=")[0].lstrip("+") for line in config.hydra.overrides.hydra]
        resume, new = bool(plain.get("resume", False)), {}
        if "hydra.sweep.dir" not in asked and (resume or plain.get("name")):
            new["hydra.sweep.dir"] = _quoted(str(self._folder(plain.get("name"), resume)))
        swept = [o.key_or_group for o in given if o.is_sweep_override()]
        if swept and "hydra.sweep.subdir" not in asked:
            new["hydra.sweep.subdir"] = "${hydra.job.override_dirname}"
            # a single seed may become several; a word may be given twice, first plain and then swept
            rest = ",".join(_quoted(k) for k in plain if k != "seed" and k not in swept)
            new["hydra.job.config.override_dirname.exclude_keys"] = f"[{rest}]"
        with read_write(config), open_dict(config):  # `overrides.hydra` is what every job is composed with
            config.hydra.overrides.hydra.extend([f"{k}={v}" for k, v in new.items()])
            if "hydra.sweep.dir" in new:
                config.hydra.sweep.dir = str(self._folder(plain.get("name"), resume))
        folder = Path(config.hydra.sweep.dir)
        if (folder / "multirun.yaml").exists() and not resume:
            sys.exit(f"error: {folder} already holds a multirun: choose another name=, or continue it with resume=true")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_) -> None:
        if config.hydra.mode is None or config.hydra.mode.name != "MULTIRUN":
            return
        folder = Path(config.hydra.runtime.output_dir)
        if job_return.status is not JobStatus.FAILED:
            (folder / "failure.json").unlink(missing_ok=True)
            return
        error = job_return._return_value
        name = " ".join(filter_overrides(job_return.overrides or []))
        reason = str(error) if isinstance(error, JobFailed) else f"{type(error).__name__}: {error}"
        trace = "" if isinstance(error, JobFailed) else "".join(traceback.format_exception(error))
        _write(folder / "failure.json", {"error": reason, "overrides": name, "traceback": trace})
        print(f"failed    {folder.name}: {reason}", file=sys.stderr)
        # The failure is on record. Taken for ended, without a value, so that the other jobs and batches go on.
        job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_multirun_end(self, config: DictConfig, **_) -> None:
        from grpo.report.build import build

        folder = Path(config.hydra.sweep.dir)
        runs = build([folder], folder)
        bad = [r for r in runs if r.state in ("failed", "unreadable")]
        print(f"report    {len(runs)} runs, {len(bad)} failed: {folder / 'report.html'} (and .md, .csv)")
        for run in bad:
            print(f"  {run.name}: {run.failure or '; '.join(run.problems)}")
        if bad:
            print(f"again     the same command with resume=true hydra.sweep.dir={folder} runs what is missing")
            sys.exit(1)

    def _folder(self, name: str | None, resume: bool) -> Path:
        if name:
            folder = self.root / str(name)
            if resume and not folder.exists():
                sys.exit(f"error: resume=true, but there is no {folder}")
            return folder
        there = [p.parent for p in self.root.glob("*/multirun.yaml")]
        if not there:
            sys.exit(f"error: resume=true, but there is no multirun under {self.root}/")
        return max(there, key=lambda p: (p / "multirun.yaml").stat().st_mtime)


class JobFailed(RuntimeError):
    """A job's process ended with another status than 0; the message is its last line."""


class LocalLauncher(Launcher):
    """Every job is `python -m MODULE` in a process of its own, its output in the job's folder as output.txt.

    Args:
        jobs: at a time.
        devices: GPUs to share out, one a job; None leaves CUDA_VISIBLE_DEVICES alone.
        module: what is run.
        value: the figure of summary.json that a sweeper is given for a job.
    """

    # Hydra takes launchers from the namespace hydra_plugins only, and looks at no more than the name. The top level of
    # this project is fixed, so the class bears such a name instead of lying in such a folder.
    __module__ = "hydra_plugins.grpo_local"

    def __init__(self, jobs: int = 1, devices: Sequence | None = None, module: str = "grpo.train",
                 value: str = "accuracy/final"):  # fmt: skip
        if jobs < 1:
            raise ValueError(f"hydra.launcher.jobs must be at least 1, got {jobs}")
        self.jobs, self.module, self.value = jobs, module, value
        self.free = [str(d) for d in devices] if devices else None
        if self.free and len(self.free) < jobs:
            raise ValueError(f"hydra.launcher.jobs={jobs}, but only {len(self.free)} devices")

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        returns: dict[int, JobReturn] = {}
        running: dict[int, tuple] = {}
        waiting = list(enumerate(job_overrides))
        total = len(waiting)
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    i, overrides = waiting.pop(0)
                    job = self._begin(initial_job_idx + i, list(overrides))
                    if isinstance(job, JobReturn):
                        returns[i] = job
                    else:
                        running[i] = job
                for i in [i for i, job in running.items() if job[0].poll() is not None]:
                    returns[i] = self._end(*running.pop(i), f"{len(returns) + 1}/{total}")
                time.sleep(CALM if running else 0)
        finally:  # an interrupt: leave no process behind
            for process, *_ in running.values():
                process.terminate()
            for process, *_ in running.values():
                process.wait()
        return [returns[i] for i in range(total)]

    def _begin(self, number: int, overrides: list[str]):
        """A started job (process, composed config, overrides, device), or a JobReturn where nothing is left to do."""
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.job.id, config.hydra.job.num = number, number
        previous = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        try:
            folder = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()
        finally:
            HydraConfig.instance().cfg = previous
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.runtime.output_dir = str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            left = todo(config, folder)
        except ValueError as error:
            return self._returned(config, overrides, JobFailed(str(error)))
        if left is None:
            print(f"kept      {folder.name}: finished before", flush=True)
            return self._returned(config, overrides, None)
        words = [w for w in overrides if w.partition("=")[0] != "resume"]
        words += [f"resume={str(bool(left.resume)).lower()}"] if "resume" in left else []
        words += [w for w in config.hydra.overrides.hydra if not w.startswith(_OF_THE_SWEEP)]
        words += [f"hydra.run.dir={_quoted(str(folder))}"]
        source = [s.path for s in config.hydra.runtime.config_sources if s.provider == "command-line"]
        options = ["--config-dir", source[0]] if source else []
        device = self.free.pop(0) if self.free else None
        env = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device is not None else {})
        with (folder / "output.txt").open("ab") as output:
            process = subprocess.Popen([sys.executable, "-m", self.module, *options, *words], stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=subprocess.STDOUT, env=env)  # fmt: skip
        print(f"started   {folder.name}: {folder / 'output.txt'}", flush=True)
        return process, config, overrides, device, time.monotonic()

    def _end(self, process, config, overrides, device, began, count: str) -> JobReturn:
        if device is not None:
            self.free.append(device)
        error, folder = None, Path(config.hydra.runtime.output_dir)
        if process.returncode:
            error = JobFailed(f"exit status {process.returncode}: {_last_line(folder / 'output.txt')}")
        else:
            print(f"ended     {count} {folder.name}: {time.monotonic() - began:.0f} s", flush=True)
        return self._returned(config, overrides, error)

    def _returned(self, config, overrides, error: JobFailed | None) -> JobReturn:
        folder = Path(config.hydra.runtime.output_dir)
        value = error or result(folder, self.value)
        status = JobStatus.FAILED if error else JobStatus.COMPLETED
        job = JobReturn(overrides=overrides, hydra_cfg=OmegaConf.masked_copy(config, "hydra"), status=status)
        job.return_value = value
        self.context.callbacks.on_job_end(config=config, job_return=job)
        return job


_OF_THE_SWEEP = ("hydra.mode", "hydra.sweep", "hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.run.dir",
                 "hydra.job.config.override_dirname")  # fmt: skip


def register() -> None:
    """Make hydra/launcher=local and slurm and hydra/sweeper=optuna known; before hydra.main."""
    OmegaConf.register_new_resolver("site", sweep, replace=True)  # the values of hydra/launcher=slurm
    for plugin, home in ((LocalLauncher, __name__), (OptunaSweeper, "grpo.optuna_sweep")):
        Plugins.instance().register(plugin)
        # Hydra also imports a plugin by its name. There may be no package of that name at all.
        package, _, module = plugin.__module__.partition(".")
        if package not in sys.modules:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = []
        sys.modules[f"{package}.{module}"] = sys.modules[home]


def result(folder: Path, name: str = "accuracy/final") -> float | None:
    """A figure of the summary of the run in `folder`: what a sweeper is given for a run that is there already."""
    return _read(folder / "summary.json").get(name)


def todo(cfg: DictConfig, folder: Path) -> DictConfig | None:
    """What is left of a multirun's job in `folder`: its config with `resume` set to whether there is a checkpoint to go
    on from, or None when it is finished. Without resume=true everything is left, unless SLURM queued the job again.

    Raises ValueError when the finished run had another config: its result is not this job's.
    """
    if not cfg.get("resume") and int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0:
        return cfg
    summary = _read(folder / "summary.json")
    begun = (folder / "checkpoints" / "last.json").exists()
    if summary.get("steps", -1) >= cfg.steps:
        # steps is compared with the others: a run of more steps is another run
        before = yaml.safe_load((folder / "config.yaml").read_text()) if (folder / "config.yaml").exists() else {}
        now = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), resolve=True)
        if odd := differing(before, now):
            raise ValueError(f"resume=true, but {', '.join(odd)} differ from {folder}/config.yaml: give the "
                             f"same overrides as before, or start a new multirun")  # fmt: skip
        return None
    if not begun:  # stopped before its first checkpoint: the same seed writes the same lines again
        for name in ("metrics.jsonl", "samples.jsonl"):
            (folder / name).unlink(missing_ok=True)
    left = cfg.copy()
    with read_write(left), open_dict(left):
        left.resume = begun
    return left


def _quoted(text: str) -> str:
    """Text as a quoted value of Hydra's override grammar."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", text) + "'"


def _last_line(path: Path) -> str:
    try:
        text = path.read_bytes()[-4000:].decode(errors="replace")
    except OSError:
        return "no output"
    lines = [line.strip() for line in text.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return lines[-1][:500] if lines else "no output"


def _read(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
