"""`python -m grpo.train -m hydra/sweeper=optuna KEY=SPACE ...`: a multirun that goes on from the best results so far.

    loss=grpo,dapo      one of these            beta=interval(0.0,0.2)             a number from this stretch
    updates=range(1,4)  1, 2 or 3               'beta=tag(log,interval(1e-3,1))'   the same, evenly in its logarithm
    steps=200           held fixed              'updates=int(interval(1,8))'       a whole number, both ends included

What a job returns (accuracy/final) is maximised. Optuna chooses, through its ask/tell interface: the plugin that Hydra
names for it stops at Optuna 2. The sampler is seeded, so the same command with resume=true asks for the same values and
finds the runs that are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf


class OptunaSweeper(Sweeper):
    """Asks Optuna for values, runs them, tells it what came of them.

    Args:
        n_trials: runs at most; values that come up a second time count, and are not run again.
        at_once: trials asked for before any of them has ended; as many as the launcher runs side by side.
        direction: maximize or minimize what a job returns.
        sampler: an optuna.samplers object as a config (`_target_`).
    """

    __module__ = "hydra_plugins.grpo_optuna"  # see LocalLauncher in grpo/multirun.py

    def __init__(self, n_trials: int, at_once: int, direction: str, sampler: DictConfig):
        if n_trials < 1 or at_once < 1:
            raise ValueError(f"hydra.sweeper: n_trials={n_trials} and at_once={at_once} must be at least 1")
        if direction not in ("maximize", "minimize"):
            raise ValueError(f"hydra.sweeper.direction must be maximize or minimize, got {direction!r}")
        self.n_trials, self.at_once, self.direction, self.sampler = n_trials, at_once, direction, sampler

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        try:
            import optuna
        except ImportError as error:
            raise HydraException("hydra/sweeper=optuna needs Optuna: pip install 'optuna>=5'") from error
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = {o.get_key_element(): o for o in parser.parse_overrides(arguments)}  # of a key given twice, the last
        swept = {key: space(o) for key, o in given.items() if o.is_sweep_override()}
        if not swept:
            raise HydraException("hydra/sweeper=optuna: no key has several values, such as loss=grpo,dapo")
        fixed = [o.input_line for k, o in given.items() if k not in swept]
        self.validate_batch_is_legal([fixed + words for words in each_choice(swept)])  # a mistake starts nothing

        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction=self.direction, sampler=instantiate(self.sampler))
        jobs: list[JobReturn] = []
        results: dict[tuple[str, ...], float | None] = {}  # by the words of a trial; None: it failed
        while len(study.trials) < self.n_trials:
            trials = [study.ask(swept) for _ in range(min(self.at_once, self.n_trials - len(study.trials)))]
            words = [tuple(f"{k}={t.params[k]}" for k in swept) for t in trials]
            new = [w for w in dict.fromkeys(words) if w not in results]
            if new:
                ended = self.launcher.launch([[*fixed, *w] for w in new], initial_job_idx=len(jobs))
                results |= {w: outcome(job) for w, job in zip(new, ended, strict=True)}
                jobs += ended
            for trial, w in zip(trials, words, strict=True):
                failed = results[w] is None
                study.tell(trial, results[w], state=optuna.trial.TrialState.FAIL if failed else None)
                print(f"trial     {trial.number + 1}/{self.n_trials} {'failed' if failed else f'{results[w]:.4g}'}: "
                      f"{' '.join(w)}{'' if w in new else ' (again: not run a second time)'}", flush=True)  # fmt: skip
        if any(value is not None for value in results.values()):
            print(f"best      {study.best_value:.4g}: {' '.join(f'{k}={v}' for k, v in study.best_params.items())}")
            best = {"best_evaluated_params": study.best_params, "best_evaluated_value": study.best_value}
            # the file and the names of Hydra's sweepers
            (folder / "optimization_results.yaml").write_text(yaml.safe_dump({"name": "optuna", **best}))
        return jobs


def space(override: Override):
    """The distribution of one swept key: numbers of a range or an interval, else one of the words."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = override.value()
    log = "log" in getattr(sweep, "tags", ())
    try:
        if isinstance(sweep, IntervalSweep):
            whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
            return (IntDistribution if whole else FloatDistribution)(sweep.start, sweep.end, log=log)
        words = [*override.sweep_string_iterator()]
        if not words:
            raise ValueError("it is empty")
        if isinstance(sweep, RangeSweep):
            whole = all(isinstance(n, int) for n in (sweep.start, sweep.stop, sweep.step))
            ends, step = sorted([float(words[0]), float(words[-1])]), abs(sweep.step)
            if whole:
                return IntDistribution(int(ends[0]), int(ends[1]), log=log, step=step)
            return FloatDistribution(*ends, log=log, step=float(step))
        if log:
            raise ValueError("a list of words has no logarithm")
        return CategoricalDistribution(words)
    except ValueError as error:
        raise HydraException(f"hydra/sweeper=optuna cannot search {override.input_line}: {error}") from error


def each_choice(swept: Mapping) -> list[list[str]]:
    """A few jobs in which every word, and an end of every stretch, comes up: they are composed before anything runs."""
    columns = [[f"{k}={c}" for c in getattr(d, "choices", None) or (d.low,)] for k, d in swept.items()]
    return [[column[min(i, len(column) - 1)] for column in columns] for i in range(max(map(len, columns)))]


def outcome(job: JobReturn) -> float | None:
    """What a job returned, None if it failed or returned no finite number."""
    value = job._return_value if job.status is JobStatus.COMPLETED else None
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None
