"""Supervised fine-tuning, the paper's other stage: `python -m grpo.sft experiment=audsemthinker_qa`. See `--help`.

On the manifest that GRPO trains on, with the same model, data, prompt, engine and checkpoints. What is minimised:

    - mean over the target tokens of the whole step of  log π(token)

A target is the row's thought, semantic elements and answer in their tags, and the stop token. The result is a run's
folder like GRPO's: `grpo.evaluate` asks it, `grpo.export` merges it, and GRPO starts from the export (model.path=).
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from data.question import Question
from grpo.signals import STOPPING, install
from grpo.train import guard_packages

FREE_ON_RESUME = set(
    "resume stop_at name tracking checkpoint log encoded workers audio_cache micro_tokens cache engine watch".split()
)
TYPES = {"epochs": float, "steps": int | None, "seed": int, "questions": int, "micro_tokens": int | None,
         "workers": int, "max_tokens": int, "resume": bool, "stop_at": int | None, "encoded": int}  # fmt: skip


def target(question: Question, *, tags: Sequence[str], letters: bool, missing: Mapping | None) -> str | None:
    """What is taught for a question; None where its row lacks a text and `missing` has none either."""
    blocks = {"answer": f"{ascii_uppercase[question.answer]}. {question.gold}" if letters else question.gold}
    for tag, text in (("think", question.thinking), ("semantic_elements", question.semantic_elements)):
        blocks[tag] = text if text and text.strip() else (missing or {}).get(tag)
    if any(blocks[tag] is None for tag in tags):
        return None
    return "\n".join(f"<{tag}>{blocks[tag].strip()}</{tag}>" for tag in tags)


class Taught:
    """The questions that have a target; `ids(question)` are its tokens with the stop token at the end.

    `left_out` counts the others by reason. Raises ConfigError when more than `max_bad_fraction` are left out.
    """

    def __init__(self, questions: Sequence[Question], policy, *, max_tokens: int, max_bad_fraction: float, **spec):
        from grpo.config import ConfigError

        self.policy, self.spec, self.left_out = policy, spec, Counter()
        texts = {q.id: target(q, **spec) for q in questions}
        known = [q for q in questions if texts[q.id] is not None]
        banned, good = set(policy.banned_ids), set()
        for i in range(0, len(known), 1024):
            part = known[i : i + 1024]
            for question, ids in zip(part, policy.tokenizer([texts[q.id] for q in part])["input_ids"], strict=True):
                if len(ids) >= max_tokens:
                    self.left_out["target longer than max_tokens"] += 1
                elif not banned.isdisjoint(ids):
                    self.left_out["target holds a special token"] += 1
                else:
                    good.add(question.id)
        self.left_out["row without thinking or semantic_elements"] += len(questions) - len(known)
        self.left_out = +self.left_out
        self.questions = [q for q in questions if q.id in good]
        if (bad := sum(self.left_out.values())) > max_bad_fraction * len(questions) or not self.questions:
            why = ", ".join(f"{n} x {reason}" for reason, n in self.left_out.items())
            raise ConfigError(f"{bad} of {len(questions)} training questions have no target ({why}), more than "
                              f"data.max_bad_fraction={max_bad_fraction} allows: mend the manifest, or give "
                              f"target.missing, target.tags or max_tokens")  # fmt: skip

    def ids(self, question: Question) -> tuple[int, ...]:
        """Of the question as it is asked: its options, and so its letter, may stand in another order every epoch."""
        return (*self.policy.tokenizer(target(question, **self.spec))["input_ids"], self.policy.stop_ids[0])


class Fine:
    """One fine-tuning run: builds every part from a composed conf/sft.yaml, then steps."""

    def __init__(self, cfg: DictConfig, folder: Path, display):
        import torch

        from data.sampler import Sampler
        from grpo.checkpoint import Checkpoints
        from grpo.config import ConfigError, build, check_type
        from grpo.engine import Engine, start_distributed, zero_config
        from grpo.loading import Loader
        from grpo.policy import Policy
        from grpo.predict import spread
        from grpo.rollout.hf import HFRollout
        from grpo.run import agreed_unreadable, build_audio_cache, lora_of, prepare_model

        for key, hint in TYPES.items():
            check_type(key, cfg[key], hint)
        self.cfg, self.display = cfg, display
        self.rank, self.world = start_distributed(cfg.watch)
        agreed = [str(folder)]
        if self.world > 1:
            torch.distributed.broadcast_object_list(agreed)
        self.folder = Path(agreed[0])
        if cfg.questions % self.world:
            raise ConfigError(f"questions={cfg.questions} cannot be shared evenly by {self.world} ranks")
        torch.manual_seed(cfg.seed)
        self.schedule = build(cfg.optim.schedule, "optim.schedule")
        self.dataset = build(cfg.data, "data")
        self.quarantined = agreed_unreadable(self.dataset, self.world)
        prompt = build(cfg.prompt, "prompt")
        path = prepare_model(cfg, self.dataset, prompt, self.rank, self.world, display)
        zero = zero_config(**cfg.engine, clip=cfg.optim.clip, dtype=cfg.model.dtype, world=self.world)
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        self.policy = Policy(
            path, lora_of(cfg), full=cfg.model.get("full"), prompt=prompt, dtype=cfg.model.dtype,
            device=device, gradient_checkpointing=cfg.model.gradient_checkpointing, attention=cfg.model.attention,
            forward=cfg.model.forward, zero3=zero if cfg.engine.stage == 3 else None,
            processor=cfg.model.get("processor"), audio_cache=build_audio_cache(cfg),
        )  # fmt: skip
        self.engine = Engine(self.policy, build(cfg.optim.optimizer, "optim.optimizer"), zero)
        self.rollout = HFRollout(self.policy)
        self.max_bad = cfg.data.get("max_bad_fraction", 0.01)
        self.taught = Taught(self.dataset.train, self.policy, max_tokens=cfg.max_tokens,
                             max_bad_fraction=self.max_bad, **OmegaConf.to_container(cfg.target))  # fmt: skip
        self.sampler = Sampler(self.taught.questions, cfg.questions, cfg.seed, self.dataset.shuffle_options)
        self.heldout = spread(self.dataset.eval, cfg.eval.questions)
        self.steps = cfg.steps or max(1, round(cfg.epochs * len(self.taught.questions) / cfg.questions))
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.cfg.checkpoint.keep)
        self.encode = Loader(self._encode, keep=cfg.encoded, workers=cfg.workers)
        self.tokens = 0

    def _encode(self, question: Question):
        return self.policy.encode(question, self.dataset.clip(question))

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step. Its loss is the mean over the target tokens of all ranks and micro-batches."""
        from grpo.config import RunError
        from grpo.micro import out_of_memory, smaller

        groups = self._groups(step)
        try:
            return self._update(step, groups)
        except FloatingPointError as error:
            raise RunError(f"step {step + 1}: {error}. A lower optim.schedule.lr or optim.clip may help; resume=true "
                           f"goes on from the last checkpoint") from error  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            tokens = self.cfg.micro_tokens
            less = smaller([self.policy.tokens_of(g) for g in groups], tokens)
            mend = "model.gradient_checkpointing=true, engine=zero3 or zero3_offload, or shorter clips"
            if less:
                mend = f"go on with resume=true micro_tokens={less}"
            raise RunError(f"rank {self.rank} ran out of memory in step {step + 1} (micro_tokens={tokens or 'null'}): "
                           f"{mend}") from error  # fmt: skip

    def _update(self, step: int, groups: list) -> dict[str, float]:
        import torch

        from grpo.micro import micro_batches
        from grpo.rollout import sample_seed

        self.encode.ahead(self.sampler.batch(step + 1, frozenset(self.quarantined))[self.rank :: self.world])
        micro = micro_batches(self.engine, self.policy, groups, self.cfg.micro_tokens)
        count = self.engine.reduce({"tokens": float(sum(len(g.completions[0].token_ids) for g in groups))})["tokens"]
        torch.manual_seed(sample_seed(self.cfg.seed, step, "dropout", self.rank))  # a resumed run draws the same
        self.policy.train()
        total = 0.0
        for m in micro:
            logp_NT, _ = self.engine(m.prepared)
            loss = -logp_NT.sum() / count  # zeros behind each target's end
            self.engine.backward(loss, last=m is micro[-1])
            total += loss.item()
        rate = self.schedule(step, self.steps)
        norm = self.engine.step(rate)
        self.policy.eval()
        self.tokens += int(count)
        return self.engine.reduce({"loss": total}) | {"grad_norm": norm, "learning_rate": rate}

    def _groups(self, step: int) -> list:
        """This rank's questions of the step with their targets. A clip that cannot be read gives its place away."""
        from data.audio import ClipError
        from grpo.batch import Completion, Group
        from grpo.config import RunError

        while True:
            batch = self.sampler.batch(step, frozenset(self.quarantined))
            groups, failed = [], []
            for question in batch[self.rank :: self.world]:
                try:
                    ids = self.taught.ids(question)
                    groups.append(Group(self.encode(question), (Completion(ids, (0.0,) * len(ids), "", False, 0),)))
                except ClipError as error:
                    failed.append((question.id, error.reason, str(error)))
            if not (failed := self.engine.gather(failed)):
                return groups
            for name, reason, message in failed:
                self.quarantined[name] = reason
                self.display.say(f"quarantined {name} ({reason}): {message}")
            bad = len(self.quarantined.keys() & {q.id for q in self.taught.questions})
            if bad > self.max_bad * len(self.taught.questions):
                raise RunError(f"{bad} of {len(self.taught.questions)} training clips could not be "
                               f"read, more than data.max_bad_fraction allows; look at them with `python -m "
                               f"data.check`")  # fmt: skip

    def evaluate(self) -> float:
        from grpo.predict import heldout_accuracy

        return heldout_accuracy(self.heldout, self.encode, self.rollout, self.engine, max_tokens=self.cfg.max_tokens,
                                batch=self.cfg.eval.batch, stand_in=self.policy.encode_silence)  # fmt: skip

    def train(self) -> dict | None:
        """To the end (or `stop_at`); returns the summary, None when a signal ended it before."""
        from grpo.watch import WATCH

        try:
            return self._train()
        except Exception as error:
            WATCH.ending(error)
            raise
        finally:
            self.encode.close()

    def _train(self) -> dict:
        from grpo.config import ConfigError, build
        from grpo.run import facts, write_provenance
        from grpo.tracking import NoTracker, RunLog
        from grpo.watch import WATCH

        cfg, show = self.cfg, self.display
        began = time.perf_counter()
        left = ", ".join(f"{n} x {reason}" for reason, n in self.taught.left_out.items()) or "none"
        show.say(f"objective minimise  -log π(target token), mean over the step's target tokens\n"
                 f"data      {len(self.taught.questions)} targets (left out: {left}), {len(self.heldout)} held-out "
                 f"questions, fingerprint {self.dataset.fingerprint}\n"
                 f"step      {cfg.questions} questions, {self.steps} steps = "
                 f"{self.sampler.epoch(self.steps):.2f} epochs")  # fmt: skip
        state = self._restore() if cfg.resume else None
        if state is None and not cfg.resume and (self.folder / "metrics.jsonl").exists():
            raise ConfigError(
                f"{self.folder} already holds a run: choose another name=, or continue it with resume=true"
            )
        first = state["step"] if state else 0
        tracker = build(cfg.tracking, "tracking") if self.rank == 0 else NoTracker()
        tracker.start(self.folder, OmegaConf.to_container(cfg, resolve=True), self.folder.name)
        log = RunLog(self.folder, tracker, first if state else -1) if self.rank == 0 else None
        if state is None:
            write_provenance(cfg, self.folder, facts(self.dataset, self.policy), self.rank)
            start = self.evaluate()
            state = {"accuracy/start": start, "accuracy/best": start, "accuracy/final": start}
            if self.rank == 0:
                log.metrics(0, {"accuracy/heldout": start})
        show.say(f"held-out accuracy at the start: {state['accuracy/start']:.3f}")
        show.start("sft", self.steps, first)
        end = min(self.steps, cfg.stop_at or self.steps)
        STOPPING.training(cfg.checkpoint.grace)
        for step in range(first + 1, end + 1):
            clock, WATCH.step = time.perf_counter(), step
            metrics = self.step(step - 1)
            best = False
            if step % cfg.eval.every == 0 or step == self.steps:
                now = metrics["accuracy/heldout"] = self.evaluate()
                best = now > state["accuracy/best"]
                state |= {"accuracy/final": now, "accuracy/best": max(now, state["accuracy/best"])}
            stop = bool(self.engine.reduce({"asked": float(bool(STOPPING))}, "max")["asked"])
            metrics |= {"num_tokens": self.tokens, "epoch": self.sampler.epoch(step),
                        "quarantined": len(self.quarantined), "step_time": time.perf_counter() - clock}  # fmt: skip
            if self.rank == 0:
                log.metrics(step, metrics)
                show.update(step, {"loss": metrics["loss"], "held-out": state["accuracy/final"]})
            if best or stop or step == end or step % cfg.checkpoint.every == 0:
                kept = state | {"tokens": self.tokens, "quarantined": self.quarantined}
                self.checkpoints.save(step, self.policy, self.engine, kept, best=best)
            if step < end and stop:
                show.say(f"stopped   by {STOPPING.name} after step {step}: go on with resume=true")
                return log.close() if log else None
        show.stop()
        summary = {k: state[k] for k in ("accuracy/start", "accuracy/final", "accuracy/best")} | {
            "accuracy/chance": sum(1 / len(q.choices) for q in self.heldout) / len(self.heldout),
            "questions/heldout": len(self.heldout), "steps": end, "tokens": self.tokens,
            "seconds": time.perf_counter() - began, "quarantined": len(self.quarantined),
        }  # fmt: skip
        if self.rank == 0:
            log.summary(summary)
            show.say(f"accuracy  {summary['accuracy/start']:.3f} at the start -> {summary['accuracy/final']:.3f} now\n"
                     f"written   {self.folder}: metrics.jsonl summary.json checkpoints/\n"
                     f"next      python -m grpo.export {self.folder} OUT; "
                     f"python -m grpo.train model.path=OUT")  # fmt: skip
        return summary

    def _restore(self) -> dict | None:
        from grpo.config import ConfigError, differing
        from grpo.run import same_questions

        state = self.checkpoints.load(self.engine, self.display.say)
        if state is None:
            return self.display.say(f"resume=true, but {self.folder} has no checkpoint yet: it begins anew")
        saved = OmegaConf.to_container(OmegaConf.load(self.folder / "config.yaml"))
        mine = OmegaConf.to_container(self.cfg, resolve=True)
        if odd := differing(saved, mine, FREE_ON_RESUME):
            raise ConfigError(f"resume=true, but {', '.join(odd)} differ from {self.folder}/config.yaml: give "
                              f"the same overrides as before, or start a new run")  # fmt: skip
        same_questions(self.dataset, self.folder)
        self.tokens = state.pop("tokens")
        self.quarantined |= state.pop("quarantined")
        self.display.say(f"resumed {self.folder} after step {state['step']}")
        return state


@hydra.main(config_path="pkg://conf", config_name="sft", version_base="1.3")
def run(cfg: DictConfig) -> float:
    from grpo.config import ConfigError, RunError, check_targets
    from grpo.display import Display
    from grpo.engine import stop_distributed
    from grpo.rollout import RolloutError

    stopping = install()
    display = Display(int(os.environ.get("RANK", 0)), cfg.log.every)
    try:
        OmegaConf.resolve(cfg)
        check_targets(cfg)
        summary = Fine(cfg, Path(HydraConfig.get().runtime.output_dir), display).train()
        stop_distributed()
        return summary["accuracy/final"] if summary else stopping.leave()
    except (ConfigError, RunError, RolloutError) as error:
        display.stop()
        sys.exit(f"error: {error}")


def main() -> None:
    from grpo.config import one_line_errors, run_name

    install(), guard_packages()
    OmegaConf.register_new_resolver("run_name", run_name)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    with one_line_errors("sft"):
        run()


if __name__ == "__main__":
    main()
