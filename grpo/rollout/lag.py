"""When a step's completions are made: with `rollout.lag=0` after the last update, with 1 beside it.

    lag=0    rollout 0 | update 0 | sync | rollout 1 | update 1 | sync | ...
    lag=1    rollout 0 | update 0 | sync | update 1  | sync | update 2 | ...
                       | rollout 1       | rollout 2        | rollout 3

Rewards are computed as soon as a question's completions are whole, in a thread of their own, while others still sample.

With lag 1 the completions of step s were sampled with the weights before update s-1: one step off-policy
(`rollout.correction` weighs for it). Seeds are functions of names, and weights change only between rollouts: same seed,
same run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import inf

from data.audio import ClipError
from grpo.batch import Completion, Encoded, Group
from grpo.collect import Earned, score
from grpo.config import ConfigError
from grpo.rollout import RolloutError, Sampling
from grpo.signals import STOPPING
from grpo.watch import WATCH
from rewards.weighted import RewardError


@dataclass(frozen=True)
class Asked:
    """This rank's questions of one step, and their groups to come."""

    step: int
    questions: Sequence
    version: int  # of the weights that its completions are sampled with
    groups: Future
    earned: dict[int, Future]  # place -> what its completions earned; filled as they come


class Rollouts:
    """The groups of each step in order, for one run. At most one rollout is on its way."""

    def __init__(self, run, lag: int):
        if lag and not hasattr(run.rollout, "every_rank"):
            raise ConfigError("rollout.lag=1 needs an engine with weights of its own (rollout=vllm, vllm_server): this "
                              "one samples from the very weights that are trained meanwhile")  # fmt: skip
        if lag and getattr(run.rollout, "sleeps", False):
            raise ConfigError("rollout.lag=1 samples during the update, when a sleeping engine has no memory: "
                              "rollout.sleep=false, and room for both")  # fmt: skip
        if lag and run.rollout.every_rank and (run.cfg.model.lora or {}).get("dropout"):
            raise ConfigError("rollout.lag=1 with an engine in the trainer's process: both would draw from one random "
                              "generator in no fixed order. model.lora.dropout=0, or rollout=vllm_server")  # fmt: skip
        self.run, self.lag = run, lag
        self.pool = ThreadPoolExecutor(1, "rollout") if lag else None
        self.judge = ThreadPoolExecutor(1, "rewards")  # one: a reward need not be thread-safe
        self.asked: Asked | None = None
        self.taken: Asked | None = None  # with lag: what is trained on, which a step that breaks off needs again

    def take(self, step: int) -> list[Earned]:
        """This rank's questions of `step`, their groups and rewards; with lag 1, the next step's are then on their way.

        Every rank calls. Raises RolloutError on all ranks if one of them got no groups, RuntimeError for completions of
        other weights than were asked for.
        """
        run = self.run
        if self.asked is None:
            self._ask(step)
        asked, self.asked = self.asked, None
        self.taken = asked if self.lag else None
        with run.clock("rollout"):
            groups = run.engine.together(lambda: self._wait(asked).result(), RolloutError)
        if stale := {c.version for g in groups for c in g.completions} - {asked.version}:
            raise RuntimeError(f"step {step}: completions of weights version {stale}, expected {asked.version}")
        if self.lag and step + 1 < run.settings.steps:
            self._ask(step + 1)
        with run.clock("reward"):
            return run.engine.together(lambda: [asked.earned[b].result() for b in range(len(groups))], RewardError)

    def more(self, step: int, asked: Set[str]) -> list[Earned]:
        """The same for a further batch of questions of `step`, without those `asked` before (without lag)."""
        self._ask(step, asked)
        return self.take(step)

    def close(self) -> None:
        """Begin nothing any more."""
        self.judge.shutdown(wait=False, cancel_futures=True)

    def settle(self) -> None:
        """Wait until no rank's rollout is on its way, so that engines can take weights. An error stays for `take`."""
        if self.asked is not None:
            with self.run.clock("rollout"):  # together: rank 0 would push to a server that answers another rank
                self.run.engine.together(lambda: self._wait(self.asked), RolloutError)

    def _wait(self, asked: Asked) -> Future:
        """Its groups, which have come or failed. Raises RolloutError in a process that is asked to stop meanwhile."""
        if not asked.groups.done():
            with self.run.waiting():
                asked.groups.exception()
        return asked.groups

    def _ask(self, step: int, asked: Set[str] = frozenset()) -> None:
        run, s = self.run, self.run.settings
        with run.clock("data"):
            questions, prompts = load_questions(run, step, asked)
        earned: dict[int, Future] = {}

        def done(place: int, group: Group) -> None:
            WATCH.busy()
            earned[place] = self.judge.submit(score, run.rewards, questions[place], group)

        arguments = prompts, s.generations, Sampling(s.max_tokens, s.seed, step), done
        if self.pool:
            groups = self.pool.submit(run.rollout.generate, *arguments)
        else:
            groups = Future()
            with run.clock("rollout"):
                try:
                    with run.waiting():
                        made = run.rollout.generate(*arguments)
                    groups.set_result(made)
                except RolloutError as error:
                    groups.set_exception(error)
        self.asked = Asked(step, questions, run.version, groups, earned)

    # ---------------------------------------------------------------- checkpoints

    def state(self, step: int) -> list[dict] | None:
        """The completions that wait for `step`, of all ranks in question order, as JSON; every rank calls.

        None where there are none: not asked for, failed, or, where a rank is asked to stop, not there in half of the
        time that it has left.
        """
        asked = next((a for a in (self.asked, self.taken) if a is not None and a.step == step), None)
        mine, missing, engine = [], [True], self.run.engine
        left = engine.reduce({"left": STOPPING.left / 2 if STOPPING else inf}, "min")["left"]
        if asked is not None:
            with suppress(TimeoutError):
                if not asked.groups.exception(None if left == inf else left):
                    mine, missing = [_record(group) for group in asked.groups.result()], []
        records = engine.gather(mine)
        return None if engine.gather(missing) else records

    def load_state(self, step: int, records: Sequence[Mapping] | None) -> None:
        """Put back what `state` gave before `step`, on any number of ranks; left where a clip is gone since."""
        if not records:
            return
        run = self.run
        questions, prompts = load_questions(run, step)
        asked = run.engine.gather([p.id for p in prompts])
        if gone := [r["id"] for r in records if r["id"] not in asked]:
            run.display.say(f"the completions that wait for step {step + 1} are left and made anew by newer weights: "
                            f"the clip of {', '.join(gone)} cannot be read any more")  # fmt: skip
            return
        share = len(prompts)
        groups: Future = Future()
        mine = records[run.engine.rank * share : (run.engine.rank + 1) * share]
        groups.set_result([_group(run, p, record) for p, record in zip(prompts, mine, strict=True)])
        earned = {b: self.judge.submit(score, run.rewards, q, g)
                  for b, (q, g) in enumerate(zip(questions, groups.result(), strict=True))}  # fmt: skip
        self.asked = Asked(step, questions, records[0]["completions"][0]["version"], groups, earned)


def _record(group: Group) -> dict:
    return {"id": group.prompt.id, "completions": [
        {"token_ids": list(c.token_ids), "sampler_logp": list(c.sampler_logp), "truncated": c.truncated,
         "version": c.version} for c in group.completions
    ]}  # fmt: skip


def _group(run, prompt: Encoded, record: Mapping) -> Group:
    return Group(prompt, tuple(
        Completion(tuple(c["token_ids"]), tuple(c["sampler_logp"]), run.policy.decode(c["token_ids"]), c["truncated"],
                   c["version"]) for c in record["completions"]
    ))  # fmt: skip


def load_questions(run, step: int, asked: Set[str] = frozenset()) -> tuple[list, list[Encoded]]:
    """This rank's questions of `step`, encoded; others than those `asked` before.

    An unreadable clip is quarantined on every rank and replaced.
    """
    share = run.settings.questions // run.engine.world
    while True:
        questions = run.sampler.batch(step, asked | run.quarantined.keys())
        mine = questions[run.engine.rank * share : (run.engine.rank + 1) * share]
        run.encode.ahead(mine)
        encoded, failed = [], []
        for question in mine:
            try:
                encoded.append(run.encode(question))
            except ClipError as error:
                failed.append((question.id, error.reason, str(error)))
        failed = run.engine.gather(failed)
        if not failed:
            break
        run.quarantine(failed)
    if step + 1 < run.settings.steps:
        later = run.sampler.batch(step + 1, run.quarantined.keys())
        run.encode.ahead(later[run.engine.rank * share : (run.engine.rank + 1) * share])
    return mine, encoded
