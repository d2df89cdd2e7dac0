"""One training run: builds every part from the config, then steps, evaluates, logs and checkpoints."""

from __future__ import annotations

import gc
import json
import math
import platform
import random
import resource
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from data.sampler import Sampler
from grpo import loop, profile, record
from grpo.advantage import declared
from grpo.audio_cache import AudioCache
from grpo.batch import Group, moves_without_advantage, needs
from grpo.benchmark import benchmarks
from grpo.checkpoint import Checkpoints, write_json
from grpo.collect import collect
from grpo.config import (
    ROLLOUT_KEYS,
    ConfigError,
    RunError,
    Settings,
    Unfinished,
    build,
    build_objective,
    check_call,
    differing,
    engine_keys,
    settings,
)
from grpo.display import Display
from grpo.engine import Engine, start_distributed, stop_distributed, zero_config
from grpo.loading import Loader
from grpo.loss.formula import describe
from grpo.micro import REMEMBERED, out_of_memory, remember, remembered, smaller
from grpo.policy import Policy
from grpo.predict import heldout_accuracy, prompt_hash, spread
from grpo.report import closing_lines, curves
from grpo.report.curves import read_metrics
from grpo.rollout import RolloutError
from grpo.rollout.lag import Rollouts
from grpo.signals import STOPPING
from grpo.sync.names import SyncError
from grpo.tracking import NoTracker, RunLog
from grpo.watch import WATCH
from rewards.weighted import RewardError

# Of the rollout engine only these must stay: where and how fast it samples is free.
KEPT_OF_ROLLOUT = {"_target_", "top_p", "top_k", "min_p", *ROLLOUT_KEYS}


class Clock:
    """Seconds spent in each named stage since the last `take`."""

    def __init__(self):
        self.spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str):
        start = time.perf_counter()
        WATCH.moved(stage)
        with profile.stage(stage):
            yield
        self.spent[stage] = self.spent.get(stage, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        spent, self.spent = self.spent, {}
        return {f"time/{stage}": seconds for stage, seconds in spent.items()}


class Run:
    """All that one iteration needs (grpo/loop.py), built from a composed config."""

    settings: Settings

    def __init__(self, cfg: DictConfig, folder: Path, display: Display):
        self.cfg, self.display = cfg, display
        self.settings = s = settings(cfg)
        self.rank, self.world = start_distributed(cfg.watch)
        agreed = [str(folder)]
        if self.world > 1:  # a folder named by the time of day may differ by a second between ranks
            torch.distributed.broadcast_object_list(agreed)
        self.folder = folder = Path(agreed[0])
        s.check_ranks(self.world)
        if (place := cfg.get("placement")) and place.ranks != self.world:
            raise ConfigError(f"placement={place.name} is for {place.ranks} training rank(s), and {self.world} "
                              f"started: NPROC={place.ranks // place.nodes} on {place.nodes} node(s)")  # fmt: skip
        random.seed(s.seed), np.random.seed(s.seed), torch.manual_seed(s.seed)

        self.advantage = build(cfg.advantage, "advantage")
        check_call("advantage", partial(self.advantage, **dict.fromkeys(declared(self.advantage))), "reward_BG")
        self.objective = build_objective(cfg)
        # A record holds every group of its step, and so does the step after one that was not finite, to be recorded.
        self.may_rest = self.idle_groups_rest = not (s.save_rollouts or moves_without_advantage(self.objective))
        self.rewards = build(cfg.rewards, "rewards")
        if s.dynamic_sampling_by not in ("reward", *self.rewards.names):
            raise ConfigError(f"dynamic_sampling.by={s.dynamic_sampling_by}: there is no such reward, only reward (the "
                              f"sum), {', '.join(self.rewards.names)}")  # fmt: skip
        if s.reference_every and not needs(self.objective).reference:
            raise ConfigError(f"reference_every={s.reference_every}, but this loss has no KL term: give it a weight "
                              f"(loss.beta=0.1)")  # fmt: skip
        self.schedule = build(cfg.optim.schedule, "optim.schedule")
        WATCH.moved("data")

        self.dataset = build(cfg.data, "data")
        self.sampler = Sampler(self.dataset.train, s.questions, s.seed, self.dataset.shuffle_options)
        if s.dynamic_sampling_rounds * s.questions > len(self.dataset.train):
            raise ConfigError(f"dynamic_sampling.rounds={s.dynamic_sampling_rounds} x questions={s.questions}, but "
                              f"there are only {len(self.dataset.train)} training questions")  # fmt: skip
        self.quarantined = agreed_unreadable(self.dataset, self.world)
        self.heldout = spread(self.dataset.eval, s.eval_questions)
        self.benchmarks = benchmarks(cfg.get("bench"))

        WATCH.moved("model")
        prompt = build(cfg.prompt, "prompt")
        path = prepare_model(cfg, self.dataset, prompt, self.rank, self.world, display)
        zero = zero_config(**cfg.engine, clip=cfg.optim.clip, dtype=cfg.model.dtype, world=self.world)
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        self.policy = Policy(
            path, lora_of(cfg), full=cfg.model.get("full"), prompt=prompt, dtype=cfg.model.dtype,
            temperature=s.temperature, device=device,
            gradient_checkpointing=cfg.model.gradient_checkpointing, forward=cfg.model.forward,
            attention=cfg.model.attention, zero3=zero if cfg.engine.stage == 3 else None,
            audio_cache=build_audio_cache(cfg),
            processor=cfg.model.get("processor"),
        )  # fmt: skip
        WATCH.moved("engine")
        self.engine = Engine(self.policy, build(cfg.optim.optimizer, "optim.optimizer"), zero)
        if needs(self.objective).reference and not self.policy.has_adapter:
            self.engine.hold_reference()
        if hasattr(get_object(cfg.rollout._target_), "every_rank"):  # an engine with weights of its own takes a while
            display.say("starting the rollout engine ...")
        WATCH.moved("rollout engine")
        self.rollout = build(engine_keys(cfg.rollout), "rollout", policy=self.policy)
        try:
            WATCH.moved("sync")
            self.sync = build(cfg.sync, "sync", policy=self.policy, engine=self.engine, rollout=self.rollout)
            self.rollouts = Rollouts(self, s.rollout_lag)
        except BaseException:
            self.rollout.close()
            raise
        self.checkpoints = Checkpoints(folder / "checkpoints", s.checkpoint_keep)
        self.clock = Clock()
        self.encode = Loader(self._encode, keep=s.encoded, workers=s.workers)
        self.version = self.tokens = 0
        self.before = {"seconds": 0.0, "device_seconds": 0.0}  # of the legs that this one resumes

    def _encode(self, question):
        """Question -> Encoded. Raises ClipError when its audio cannot be read."""
        return self.policy.encode(question, self.dataset.clip(question))

    def _encode_for(self, bench, question):
        return self.policy.encode(question, bench.clip(question))

    def quarantine(self, failed: list[tuple[str, str, str]]) -> None:
        """Leave questions out from now on, visibly; stop the run when they become too many."""
        for name, reason, message in failed:
            self.quarantined[name] = reason
            self.display.say(f"quarantined {name} ({reason}): {message}")
        limit = self.cfg.data.get("max_bad_fraction", 0.01) * len(self.dataset.train)
        bad = len(set(self.quarantined) & {q.id for q in self.dataset.train})
        if bad > limit:
            raise RuntimeError(f"{bad} of {len(self.dataset.train)} training clips could not be read, more than "
                               f"data.max_bad_fraction allows; look at them with `python -m data.check`")  # fmt: skip

    def evaluate(self) -> dict[str, float]:
        """Greedy accuracy on the held-out questions, and on the benchmarks of `bench` where there are any."""
        score = partial(heldout_accuracy, rollout=self.rollout, engine=self.engine,
                        max_tokens=self.settings.max_tokens, batch=self.settings.eval_batch,
                        stand_in=self.policy.encode_silence, waiting=self.waiting)  # fmt: skip
        with self.clock("evaluate"):
            scores = {"accuracy/heldout": score(self.heldout, self.encode)}
            for bench in self.benchmarks:
                asked = spread(bench.questions, self.settings.eval_questions)
                scores[f"bench/{bench.name}"] = score(asked, partial(self._encode_for, bench))
            return scores

    def waiting(self):
        """Context in which this rank waits for the rollout engine, and need not when it is asked to stop.

        An engine on the trainer's own weights is waited for under ZeRO-3: the other ranks would miss this one.
        """
        alone = hasattr(self.rollout, "every_rank") or self.engine.stage < 3
        return STOPPING.waiting(RolloutError) if alone else nullcontext()

    def header(self) -> str:
        """The first lines of a run: exactly what is optimised, on what, by which weights."""
        s = self.settings
        count = sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in self.engine.trainable.values())
        tensors = len(self.engine.trainable)
        trained = f"{count:,} LoRA weights on {tensors // 2} modules"
        if not self.policy.has_adapter:
            held = "held as a copy" if self.engine.anchor else "none"
            trained = f"{count:,} weights in {tensors} tensors ({self.cfg.model.full}), reference {held}"
        loss = self.objective.describe() if hasattr(self.objective, "describe") else describe(self.objective)
        return (
            f"objective {loss}\n"
            f"          {describe(self.advantage)}\n"
            f"reward    r = {self.rewards.describe()}\n"
            f"step      {s.questions} questions x {s.generations} completions at temperature {s.temperature:g}, "
            f"{s.updates} update(s); old = {'detach(new)' if s.updates == 1 else 'the first update of the rollout'}\n"
            f"policy    {self.cfg.model.name}, {trained}, "
            f"{self.cfg.model.dtype}, ZeRO-{self.engine.stage}, {self.world} rank(s)\n"
            f"rollout   {_module(self.rollout)}, weights by {_module(self.sync)}, lag {s.rollout_lag}\n"
            f"data      {len(self.dataset.train)} training and {len(self.dataset.eval)} held-out questions, "
            f"{self.dataset.left_out}, audio: {self.cfg.data.audio}, "
            f"fingerprint {self.dataset.fingerprint}"
        )

    # ---------------------------------------------------------------- the whole run

    def train(self) -> dict | None:
        """Train to `steps` (or `stop_at`) and return the summary; None when a signal ended it before."""
        try:
            summary = self._train()
        except Exception as error:
            WATCH.ending(error)
            raise
        finally:
            self.display.stop()
            self.rollouts.close()
            self.rollout.close()
            self.encode.close()
            self.rewards.close()
        stop_distributed()
        return summary

    def _train(self) -> dict | None:
        s, show = self.settings, self.display
        self.began = time.perf_counter()
        show.say(self.header())
        if s.out_of_memory == "halve" and (less := remembered(self.folder, s.micro_tokens)) != s.micro_tokens:
            show.say(f"micro_tokens={less}, for {self.folder / REMEMBERED} says that more did not fit (with more "
                     f"memory now: delete it)")  # fmt: skip
            self.settings = s = replace(s, micro_tokens=less)
        state = self._restore() if s.resume else None
        if state is None and not s.resume and (self.folder / "metrics.jsonl").exists():
            raise ConfigError(
                f"{self.folder} already holds a run: choose another name=, or continue it with resume=true"
            )
        first = state["step"] if state else 0
        tracker = build(self.cfg.tracking, "tracking") if self.rank == 0 else NoTracker()
        tracker.start(self.folder, OmegaConf.to_container(self.cfg, resolve=True), self.folder.name)
        kept = -1 if state is None else first - bool(state.get("unfinished"))  # its lines are written again
        log = RunLog(self.folder, tracker, kept) if self.rank == 0 else None
        if state is None:
            about = facts(self.dataset, self.policy) | {"device": device_name(), "ranks": self.world}
            write_provenance(self.cfg, self.folder, about, self.rank)
            scores = self.evaluate()
            start = scores["accuracy/heldout"]
            state = {"accuracy/start": start, "accuracy/best": start, "accuracy/final": start, "completions": 0}
            if self.rank == 0:
                log.metrics(0, scores)
        show.say(f"held-out accuracy at the start: {state['accuracy/start']:.3f}")
        show.start("train", s.steps, first)

        end = min(s.steps, s.stop_at or s.steps)
        # `done`: what a step trained, until it is synced, evaluated and logged
        trained, done, tokens = first, state.pop("unfinished", None), self.tokens
        finish = partial(self._finish, state=state, log=log, end=end)
        STOPPING.training(s.checkpoint_grace)
        try:
            if done:
                finish(trained, **done, groups=[])
                done = None
            stop = self._asked_to_stop()
            with profile.traced(s.traced_steps * (self.rank == 0), self.folder, show.say) as tick:
                while trained < end and not stop:
                    done, tokens, WATCH.step = None, self.tokens, trained + 1
                    self.idle_groups_rest = self.may_rest and not state.get("nonfinite_in_a_row")
                    metrics, rows, groups = self._step(trained)
                    bad = not math.isfinite(metrics.get("grad_norm", 0.0))
                    state["nonfinite"] = metrics["nonfinite_steps"] = state.get("nonfinite", 0) + bad
                    state["nonfinite_in_a_row"] = bad * (state.get("nonfinite_in_a_row", 0) + 1)
                    trained, done = trained + 1, {"metrics": metrics, "rows": self.engine.gather(rows)}
                    if not (stop := self._asked_to_stop()):
                        finish(trained, **done, groups=groups, tokens=self.tokens - tokens)
                        done, stop = None, trained < end and self._asked_to_stop()
                        tick()
                    if bad and state["nonfinite_in_a_row"] >= s.max_nonfinite:
                        kept = record.step_folder(self.folder, trained).exists()
                        look = f"python -m grpo.replay {self.folder} --step {trained}"
                        raise FloatingPointError(
                            f"loss or gradient was not finite {state['nonfinite_in_a_row']} steps in a row "
                            f"(max_nonfinite={s.max_nonfinite})" + (f"; the last is kept: {look}" if kept else "")
                        )
        except (RolloutError, SyncError, RewardError, FloatingPointError) as error:
            stop = self._asked_to_stop()
            if trained == 0 and not stop:
                raise RunError(str(error)) from error
            if done is None:  # the step will be made anew
                self.tokens = tokens
            self._leave(trained, state, done)
            if not stop:
                raise RunError(f"{error}\nThe checkpoint of step {trained} is written: when the cause is mended, "
                               f"{self._to_go_on()}") from error  # fmt: skip
        else:
            if stop:
                self._leave(trained, state, done)
        show.stop()
        if stop:
            show.say(f"stopped   by {STOPPING.name} after step {trained}: {self._to_go_on()}")
            return log.close() if log else None
        summary = self._summary(state, end)
        if self.rank == 0:
            log.summary(summary)
            curves(self.folder)
            show.say(closing_lines(summary, self.folder))
        return summary

    def _step(self, step: int) -> tuple:
        """One iteration; one that runs out of memory is made again of smaller micro-batches, where that can be."""
        collected, begun = collect(self, step), self.engine.begun
        while True:
            try:
                return loop.step(self, step, collected)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            gc.collect()  # the tensors that the error's frames held
            torch.cuda.empty_cache()
            self._shrink(step, [e.group for e in collected[0]], self.engine.begun == begun)

    def _shrink(self, step: int, groups: Sequence[Group], unchanged: bool) -> None:
        """Halve `micro_tokens` after a step that did not fit: here, or where other ranks miss this one by a resume.

        Raises Unfinished for the latter, and RunError where nothing is to be halved.
        """
        s = self.settings
        there = f"rank {self.rank} ran out of memory in step {step + 1} (micro_tokens={s.micro_tokens or 'null'})"
        if (less := smaller([self.policy.tokens_of(g) for g in groups], s.micro_tokens)) is None:
            raise RunError(f"{there}, with one question at a time: model.gradient_checkpointing=true, engine=zero3 or "
                           f"zero3_offload, a lower max_tokens or fewer generations")  # fmt: skip
        halve = s.out_of_memory == "halve"
        written = halve and remember(self.folder, self.rank, step + 1, less)
        if not halve or self.world > 1 or self.engine.stage or not unchanged:
            if written:
                raise Unfinished(f"{there}: {self._to_go_on()}, which takes micro_tokens={less}")
            raise RunError(f"{there}: {self._to_go_on()} micro_tokens={less}")
        masks = " (with dropout its masks are others)" if (self.cfg.model.lora or {}).get("dropout") else ""
        self.display.say(f"{there}: made again with micro_tokens={less}{masks}")
        self.engine.forget()
        self.settings = replace(s, micro_tokens=less)

    def _asked_to_stop(self) -> bool:
        """Whether any rank was. Every rank calls: all stop at the same place."""
        return bool(self.engine.reduce({"asked": float(bool(STOPPING))}, "max")["asked"])

    def _leave(self, step: int, state: Mapping, unfinished: Mapping | None) -> None:
        """Write what a resumed run needs to go on after `step`; `unfinished` is what that step has yet to log."""
        if step:  # else nothing was trained
            left = state | self._progress(step) | {"unfinished": unfinished}
            if self.settings.rollout_lag and left["pending"] is None and step < self.settings.steps:
                self.display.say(f"the completions of step {step + 1} are not there: a resumed run samples them anew, "
                                 f"with the weights of now")  # fmt: skip
            self.checkpoints.save(step, self.policy, self.engine, left, best=False)

    def _finish(self, step: int, *, metrics: Mapping, rows: list[dict], groups: Sequence[Group], state: dict,
                log: RunLog | None, end: int, tokens: int | None = None) -> None:  # fmt: skip
        """What follows a step's updates: sync, evaluation, checkpoint, log. `step` counts from 1; `tokens` are the
        step's over all ranks, None where its time is not known for a part of it was before a resume."""
        s = self.settings
        metrics = metrics | loop.sync(self, groups)
        if s.reference_every and step % s.reference_every == 0:
            self.engine.refresh_reference()
        best = False
        if step % s.eval_every == 0 or step == s.steps:
            metrics |= (scores := self.evaluate())
            now = scores["accuracy/heldout"]
            best = now > state["accuracy/best"]
            state |= {"accuracy/final": now, "accuracy/best": max(state["accuracy/best"], now)}
        state["completions"] += s.questions * s.generations * int(metrics.get("dynamic_sampling/rounds", 1))
        metrics |= {"num_tokens": self.tokens, "epoch": self.sampler.epoch(step),
                    "quarantined": len(self.quarantined)}  # fmt: skip
        times = self.clock.take()
        metrics |= times | {"step_time": sum(times.values())}
        if tokens is not None:
            metrics["tokens_per_second"] = tokens / metrics["step_time"]
        if self.rank == 0:
            log.metrics(step, metrics)
            log.samples(rows)
            if step % s.samples_every == 0 or step == 1:
                self.display.samples(step, rows[: min(s.generations, 4)])
                log.sample_table(step, rows[: s.generations])
            self.display.update(step, self._figures(metrics, state))
        # Behind its lines, so that a run killed between has none of them missing. Its time counts to the next step.
        if best or step == end or step % s.checkpoint_every == 0:
            with self.clock("checkpoint"):
                if self.rank == 0:
                    log.sync()
                self.checkpoints.save(step, self.policy, self.engine, state | self._progress(step), best=best)

    def _figures(self, metrics: Mapping[str, float], state: Mapping) -> dict[str, float]:
        shown = {"reward": metrics["reward"], "right": metrics.get("rewards/accuracy/mean"),
                 "held-out": state["accuracy/final"], "tokens": metrics["completions/mean_length"],
                 "kl": metrics.get("kl"), "s/step": metrics["step_time"]}  # fmt: skip
        return {name: value for name, value in shown.items() if value is not None}

    def _progress(self, step: int) -> dict:
        bonus = getattr(self.objective, "entropy", None)
        return {"tokens": self.tokens, "quarantined": self.quarantined, "version": self.version,
                "pending": self.rollouts.state(step), "entropy": bonus.state() if bonus else None,
                **self._cost()}  # fmt: skip

    def _cost(self) -> dict[str, float]:
        """Wall-clock of all legs so far, and times the ranks that each had."""
        leg = time.perf_counter() - self.began
        return {"seconds": self.before["seconds"] + leg,
                "device_seconds": self.before["device_seconds"] + leg * self.world}  # fmt: skip

    def _to_go_on(self) -> str:
        named = f"name={self.folder.name} " * (self.folder.parent.name == "outputs")  # else it is one of a multirun
        return f"go on with {named}resume=true"

    def _restore(self) -> dict | None:
        state = self.checkpoints.load(self.engine, self.display.say)
        if state is None:  # so that one command line can be queued again and again
            return self.display.say(f"resume=true, but {self.folder} has no checkpoint yet: it begins anew")
        saved = OmegaConf.to_container(OmegaConf.load(self.folder / "config.yaml"))
        mine = OmegaConf.to_container(self.cfg, resolve=True)
        for cfg in (saved, mine):
            cfg["rollout"] = {k: v for k, v in cfg["rollout"].items() if k in KEPT_OF_ROLLOUT}
        if odd := differing(saved, mine):
            raise ConfigError(f"resume=true, but {', '.join(odd)} differ from {self.folder}/config.yaml: "
                              f"give the same overrides as before, or start a new run")  # fmt: skip
        same_questions(self.dataset, self.folder)
        self.tokens, self.version = state.pop("tokens"), state.pop("version")
        self.quarantined |= state.pop("quarantined")
        self.before = {name: state.pop(name, 0.0) for name in self.before}
        if (entropy := state.pop("entropy")) is not None:
            self.objective.entropy.load_state(entropy)
        self.rollouts.load_state(state["step"], state.pop("pending"))
        if not state.get("unfinished"):
            self.sync.push(self.version)
        self.display.say(f"resumed {self.folder} after step {state['step']}")
        return state

    def _summary(self, state: dict, steps: int) -> dict:
        questions = self.heldout
        usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        summary = {k: state[k] for k in ("accuracy/start", "accuracy/final", "accuracy/best", "completions")}
        summary |= {
            "accuracy/chance": sum(1 / len(q.choices) for q in questions) / len(questions),
            "questions/heldout": len(questions), "steps": steps, "tokens": self.tokens, "ranks": self.world,
            "device": device_name(), **self._cost(), "peak_memory_bytes": max(usage) * 1024,
            "quarantined": len(self.quarantined),
        }  # fmt: skip
        if self.rank == 0:
            reward = [r["reward"] for r in read_metrics(self.folder) if "reward" in r] or [float("nan")]
            summary |= {"reward/first": float(np.mean(reward[:10])), "reward/last": float(np.mean(reward[-10:]))}
        return summary


def lora_of(cfg: DictConfig) -> dict | None:
    """Arguments of the adapter; None where whole weights are trained. Raises ConfigError where nothing would be."""
    if cfg.model.lora is not None:
        return OmegaConf.to_container(cfg.model.lora) | {"seed": cfg.seed}
    if cfg.model.get("full") is None:
        raise ConfigError("model.lora and model.full are both null: nothing would be trained")
    return None


def build_audio_cache(cfg: DictConfig) -> AudioCache:
    try:
        return AudioCache(**cfg.audio_cache)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _module(part) -> str:
    """`vllm` of grpo.rollout.vllm, `shared` of a class in a package itself."""
    package, _, module = type(part).__module__.rpartition(".")
    return type(part).__name__.lower() if package == "grpo" else module


def prepare_model(cfg: DictConfig, dataset, prompt, rank: int, world: int, display: Display) -> str:
    """Path of the checkpoint to train: as configured, or a tiny one built and warm-started into the cache."""
    if cfg.model.path is not None or "tiny" not in cfg.model:
        return str(cfg.model.path)
    from grpo.tiny import prepared

    def report(step: int, loss: float) -> None:
        display.update(step + 1, {"loss": loss})

    tiny = OmegaConf.to_container(cfg.model.tiny, resolve=True)
    if rank == 0:
        display.start("warm start", tiny["warm_start"]["steps"])
        path = prepared(Path(cfg.cache), tiny, dataset, prompt, report=report)
        display.stop()
    if world > 1:
        torch.distributed.barrier()
        path = prepared(Path(cfg.cache), tiny, dataset, prompt, report=report)
    return str(path)


def agreed_unreadable(dataset, world: int) -> dict[str, str]:
    """The training questions (id to reason) whose clip some rank could not read, left out on all: a node may lack one.

    Raises ConfigError, on all ranks, where one of them has read other rows.
    """
    parts = [(dataset.fingerprint, dataset.unreadable)]
    if world > 1:
        parts *= world
        torch.distributed.all_gather_object(parts, parts[0])
    for rank, (fingerprint, _) in enumerate(parts):
        if fingerprint != parts[0][0]:
            raise ConfigError(f"rank {rank} has read other questions than rank 0 (fingerprints {fingerprint} and "
                              f"{parts[0][0]}): the files that data names are not the same on all nodes")  # fmt: skip
    bad = {name: reason for _, unreadable in parts for name, reason in unreadable.items()}
    return {q.id: bad[q.id] for q in dataset.train if q.id in bad}


def same_questions(dataset, folder: Path) -> None:
    """Raises ConfigError where the run in `folder`, which is to be resumed, began with other questions."""
    before = json.loads((folder / "provenance.json").read_text())["data_fingerprint"]
    if dataset.fingerprint != before:
        raise ConfigError(f"resume=true, but the data have changed since {folder} began (fingerprint {before}, now "
                          f"{dataset.fingerprint}): bring the same rows back, or start a new run")  # fmt: skip


def facts(dataset, policy) -> dict:
    """What a model card says of the data, and the prompt's hash."""
    counts = {
        key: dict(Counter(getattr(q, key) or "not stated" for q in dataset.train)) for key in ("license", "source")
    }
    return {"data_fingerprint": dataset.fingerprint, "prompt_hash": prompt_hash(policy),
            "data": {"train": len(dataset.train), "eval": len(dataset.eval), **counts}}  # fmt: skip


def device_name() -> str:
    """Kind of the device that a rank trains on: as CUDA calls it, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def write_provenance(cfg: DictConfig, folder: Path, facts: Mapping, rank: int) -> None:
    """The resolved config, versions, commit and data fingerprint: what a reader of the numbers has to know."""
    if rank:
        return
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    names = ("torch", "transformers", "peft", "deepspeed", "numpy", "soundfile", "torchaudio", "hydra-core")
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
    write_json(folder / "provenance.json", {
        "versions": {n: version(n) for n in names} | {"python": platform.python_version()},
        "machine": platform.machine(), "threads": torch.get_num_threads(),
        "git_commit": git.stdout.strip() if git.returncode == 0 else None, **facts,
    })  # fmt: skip
