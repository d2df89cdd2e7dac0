"""From a composed Hydra config to checked objects: wrong keys and types are one clear line before anything starts."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.errors import HydraException, MissingConfigException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from grpo.signals import STOPPED


class ConfigError(ValueError):
    """A mistake in the configuration: names the key, what is wrong with it and what would be right."""


class RunError(RuntimeError):
    """A run that cannot go on: says why, and from where it can."""

    status = 1  # of the process


class Unfinished(RunError):
    """A run that ended so that the same command with resume=true goes on by itself, as a cluster's job does."""

    status = STOPPED


# Keys that say how long, how visibly, how fast or where a run goes on, not what it does: a resumed run may change them,
# a multirun's finished job fits whatever they are, and they are no column of the report.
FREE_ON_RESUME = frozenset(
    "bench resume stop_at name tracking checkpoint log samples encoded workers audio_cache micro_tokens profile cache "
    "dry_run engine placement max_nonfinite watch out_of_memory".split()
)

# How patient a run is with its rewards may change too.
FREE_OF_REWARDS = frozenset({"max_failed", "seconds"})


def differing(saved: Mapping, mine: Mapping, free: Set[str] = FREE_ON_RESUME) -> list[str]:
    """Keys of two resolved configs that make them two runs, in order."""

    def of(cfg: Mapping, key: str):
        if key == "rewards" and isinstance(cfg.get(key), Mapping):
            return {k: v for k, v in cfg[key].items() if k not in FREE_OF_REWARDS}
        return cfg.get(key)

    return sorted(k for k in saved.keys() | mine.keys() if k not in free and of(saved, k) != of(mine, k))


def zero_stage(stage: int, dtype: str) -> int:
    """The ZeRO stage that DeepSpeed is given for `engine.stage`: in bfloat16 at least 2, on one rank as well.

    Below, DeepSpeed sums the gradients of micro-batches and ranks in bfloat16, and at stage 0 it begins with an AdamW
    step on zeros, which its bias correction counts. Weights stay whole on every rank at 2, as they do at 0.
    """
    return max(stage, 2) if dtype == "bfloat16" else stage


# Keys of `rollout` that are the run's, whatever the engine (conf/train.yaml).
ROLLOUT_KEYS = ("lag", "correction", "correction_level", "correction_cap")


@dataclass(frozen=True)
class Settings:
    """The short daily keys. Everything else lives in config groups."""

    steps: int  # rollouts; each makes `updates` optimizer steps
    seed: int  # of LoRA's A, question order and sampling
    questions: int  # B: questions per step, over all ranks
    generations: int  # G: completions per question
    micro_tokens: int | None  # tokens per forward/backward on a rank, in whole groups; null: all at once
    out_of_memory: str  # halve: make a step that did not fit again with half of micro_tokens; or stop
    updates: int  # optimizer steps per rollout (mu)
    max_tokens: int  # length limit of a completion
    temperature: float
    think_words: int  # word budget of the thought, in the prompt and in the length reward
    resume: bool
    dry_run: bool
    stop_at: int | None  # stop after this step as if interrupted; resume=true goes on
    eval_every: int
    eval_batch: int
    eval_questions: int | None  # asked at each evaluation, of the held-out and of each benchmark; null: all
    checkpoint_every: int
    checkpoint_keep: int  # so many of the last ones stay, and the best
    checkpoint_grace: float  # seconds from a signal to the end, whatever the run is at
    watch_silent: float  # seconds without a sign of life of a rank, until all end
    watch_stuck: float  # seconds without a step forward of any rank, until all end
    log_every: int
    samples_every: int
    encoded: int  # questions whose features stay in memory
    workers: int  # threads that read and transform the next step's clips ahead of time
    profile: bool | int  # trace this many steps (true: 2), once the first two are over
    max_nonfinite: int  # steps in a row with a loss or gradient that is not finite, until the run stops
    save_rollouts: bool | int  # keep every step, or every n-th, on disk for grpo.replay_loss
    reference_every: int | None  # steps after which the policy becomes its own reference; null: the start stays it
    dynamic_sampling_rounds: int  # rollouts a step at most, to find groups that teach; 1: off
    dynamic_sampling_by: str  # what must differ in a group: reward, or the name of a component
    rollout_lag: int  # 1: the next step's completions are sampled while this step trains
    rollout_correction: str  # weight on the policy term for the sampler's distance: none, truncate or mask
    rollout_correction_level: str  # token or sequence
    rollout_correction_cap: float

    def __post_init__(self):
        for name in ("questions", "generations", "updates", "max_tokens", "think_words",
                     "eval_every", "eval_batch", "max_nonfinite", "checkpoint_every", "checkpoint_keep", "log_every",
                     "samples_every", "dynamic_sampling_rounds"):  # fmt: skip
            if getattr(self, name) < 1:
                key = re.sub("_(every|keep|rounds)", r".\1", name)
                raise ConfigError(f"{key} must be at least 1, got {getattr(self, name)}")
        for name in ("checkpoint_grace", "watch_silent", "watch_stuck"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name.replace('_', '.')} must be above 0 seconds, got {getattr(self, name):g}")
        if self.micro_tokens is not None and self.micro_tokens < 1:
            raise ConfigError(f"micro_tokens must be at least 1, or null, got {self.micro_tokens}")
        if self.out_of_memory not in ("halve", "stop"):
            raise ConfigError(f"out_of_memory must be halve or stop, got {self.out_of_memory}")
        if self.reference_every is not None and self.reference_every < 1:
            raise ConfigError(f"reference_every must be at least 1, or null, got {self.reference_every}")
        if self.dynamic_sampling_rounds > 1 and self.rollout_lag:
            raise ConfigError("dynamic_sampling asks further questions within a step, rollout.lag=1 samples the step "
                              "ahead: choose one of them")  # fmt: skip
        if self.eval_questions is not None and self.eval_questions < 1:
            raise ConfigError(f"eval.questions must be at least 1, or null, got {self.eval_questions}")
        for name in ("steps", "encoded", "workers", "profile"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name, choices in {"lag": (0, 1), "correction": ("none", "truncate", "mask"),
                              "correction_level": ("token", "sequence")}.items():  # fmt: skip
            if (value := getattr(self, f"rollout_{name}")) not in choices:
                raise ConfigError(f"rollout.{name} must be {' or '.join(map(str, choices))}, got {value}")
        if self.rollout_correction_cap <= 1:
            raise ConfigError(f"rollout.correction_cap must be above 1, got {self.rollout_correction_cap}")
        if self.temperature <= 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}")
        if self.generations < 2:
            raise ConfigError("generations must be at least 2: a group of one has no advantage")

    @property
    def traced_steps(self) -> int:
        return 2 if self.profile is True else int(self.profile)

    def check_ranks(self, world: int) -> None:
        """Raises ConfigError where the questions of a step cannot be shared evenly."""
        if self.questions % world:
            raise ConfigError(f"questions={self.questions} cannot be shared evenly by {world} ranks")


def settings(cfg: DictConfig) -> Settings:
    """Read and check the short keys (`eval.every` becomes `eval_every`)."""
    known = OmegaConf.load(Path(conf.__file__).parent / "train.yaml")
    groups = {str(name) for entry in known.defaults if not isinstance(entry, str) for name in entry}
    if odd := sorted(map(str, cfg.keys() - known.keys() - groups)):
        near = difflib.get_close_matches(odd[0], [*map(str, known), *groups], n=1)
        raise ConfigError(f"{odd[0]}: there is no such key{f'; did you mean {near[0]!r}?' if near else ''}")
    values = {}
    hints = typing.get_type_hints(Settings)
    for f in fields(Settings):
        nested = f.name.split("_")[0] in ("eval", "checkpoint", "watch", "log", "samples", "rollout")
        key = f.name.replace("_", ".", 1) if nested else f.name.replace("sampling_", "sampling.")
        values[f.name] = check_type(key, OmegaConf.select(cfg, key), hints[f.name])
    return Settings(**values)


def check_type(key: str, value, hint):
    """`value` if it is of the annotated plain type (an int passes as a float), else ConfigError naming the key."""
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    if not all(o in (int, float, bool, str, type(None)) for o in options):
        return value  # not a plain type: the component checks it itself
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if any(value is None if o is type(None) else isinstance(value, o) and (o is not int or not isinstance(value, bool))
           for o in options):  # fmt: skip
        return value
    names = " or ".join("null" if o is type(None) else o.__name__ for o in options)
    raise ConfigError(f"{key} must be {names}, got {value!r}")


def check_targets(node, key: str = "", positional: Mapping[str, tuple[str, ...]] | None = None) -> None:
    """Walk a config and bind every `_target_` to its function's signature, long before it is called.

    A partial is otherwise accepted with wrong arguments and fails at its first call, after a whole rollout.
    Raises ConfigError with the key, the argument and its nearest right spelling.
    """
    if OmegaConf.is_list(node) or isinstance(node, list):
        for i, item in enumerate(node):
            check_targets(item, f"{key}[{i}]")
        return
    if not isinstance(node, dict | DictConfig):
        return
    for name, child in node.items():
        check_targets(child, f"{key}.{name}" if key else str(name))
    if "_target_" not in node:
        return
    target = node["_target_"]
    try:
        function = get_object(target)
    except Exception as error:
        raise ConfigError(f"{key}._target_: cannot import {target!r} ({str(error).splitlines()[0]})") from error
    signature = inspect.signature(function)
    given = engine_keys(node) if key == "rollout" else node
    given = {k: v for k, v in given.items() if not (k.startswith("_") and k.endswith("_"))}
    known = {n for n, p in signature.parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
                raise ConfigError(f"{key}.{name}: {target} takes no such argument; {hint}")
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception:
        hints = {}  # an annotation that needs imports of its own module: nothing to check against
    for name, value in given.items():
        if name in hints and not OmegaConf.is_config(value):
            check_type(f"{key}.{name}", value, hints[name])


def check_call(key: str, function: Callable, *positional: str) -> None:
    """Raise ConfigError unless `function(*positional)` could be called: missing or surplus arguments are named."""
    inner = function.func if isinstance(function, partial) else function
    try:
        inspect.signature(function).bind(*positional)
    except TypeError as error:
        raise ConfigError(f"{key}: {getattr(inner, '__name__', inner)}({', '.join(positional)}): {error}") from error


def build(node: DictConfig, key: str, **extra):
    """Instantiate one config node; a ValueError of the component is reported with the node's key."""
    try:
        return instantiate(node, **extra)
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, ValueError | TypeError | FileNotFoundError):
            raise ConfigError(f"{key}: {cause}") from error
        raise


def build_objective(cfg: DictConfig):
    """What is optimised: `loss`, with the weight that `rollout.correction` asks for. Raises ConfigError."""
    from grpo.loss.formula import plain
    from grpo.loss.weight import CORRECTIONS, correction

    objective, rollout = build(cfg.loss, "loss"), cfg.rollout
    for piece, positional in getattr(objective, "calls", {}).items():
        check_call(f"loss.{piece}", getattr(objective, piece), *positional)
    if rollout.correction == "none":
        return objective
    if not hasattr(objective, "weights"):
        raise ConfigError("rollout.correction weighs the policy term of grpo.loss.objective.Objective, and loss= is "
                          "another: take the weight from grpo.loss.weight there")  # fmt: skip
    for name, weight in objective.weights.items():
        if name == "sampler" or plain(weight) in CORRECTIONS:
            raise ConfigError(f"loss.weights.{name} already weighs for the sampler's distance: with rollout.correction="
                              f"{rollout.correction} it would count twice. Choose one of them")  # fmt: skip
    objective.weights["sampler"] = correction(rollout.correction, rollout.correction_level, rollout.correction_cap)
    return objective


def engine_keys(rollout: DictConfig) -> DictConfig:
    """The config of the rollout engine alone: without the keys that are the run's."""
    return OmegaConf.create({k: v for k, v in OmegaConf.to_container(rollout).items() if k not in ROLLOUT_KEYS})


def run_name(name: str | None, resume: bool, root: str) -> str:
    """Folder of a run under `root`: its name; without one the newest when resuming, else the time of day."""
    if name:
        if str(name) != Path(str(name)).name or str(name) in (".", ".."):
            raise ConfigError(f"name={name}: the name of a folder under {root}/ is wanted, without slashes")
        return str(name)
    if resume:
        runs = [p for p in Path(root).glob("*") if (p / "checkpoints" / "last.json").exists()]
        if not runs:
            raise ConfigError(f"resume=true, but no run under {root}/ has a checkpoint")
        return max(runs, key=lambda p: (p / "checkpoints" / "last.json").stat().st_mtime).name
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def composed(words: Sequence[str]) -> DictConfig:
    """The config that `python -m grpo.train` makes of these overrides, not resolved yet. Raises what Hydra raises."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    with initialize_config_module("conf", version_base="1.3"):
        return compose("train", list(words))


@contextmanager
def one_line_errors(main: str = "train") -> Iterator[None]:
    """Context of an entry point: a mistake in the configuration, conf/`main`.yaml, ends the process with one line."""
    try:
        yield
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {composition_error(error, main)}")


def composition_error(error: Exception, main: str = "train") -> str:
    """One line for what Hydra or OmegaConf could not compose: the key or group, and what would be right."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={name}: there is no such choice; {group} can be {', '.join(sorted(error.options))}"
    text = " ".join(str(error).split()).split(" full_key:")[0]
    text = text.removeprefix("ConfigError raised while resolving interpolation: ")
    if "'hydra/launcher/submitit_slurm'" in text:
        return "hydra/launcher=slurm needs the package hydra-submitit-launcher: make setup brings it"
    if missing := re.fullmatch(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]} must be given: {missing[1]}=VALUE"
    if key := re.search(r"Could not override '([^']+)'", text):
        with initialize_config_module("conf", version_base="1.3"):
            known = _keys(OmegaConf.to_container(compose(main), resolve=False))
        near = difflib.get_close_matches(key[1], known, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"python -m grpo.{main} --help lists the keys"
        return f"{key[1]}: there is no such key; {meant}"
    return text


def _keys(node, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    return [k for name, child in node.items() for k in (f"{prefix}{name}", *_keys(child, f"{prefix}{name}."))]
