"""What a step trains on: its questions' completions and what they earned; by dynamic sampling only those that teach.

Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a group whose completions all earned the same has no advantage.
With `dynamic_sampling.rounds` above 1, further questions are asked in its place, up to that many rollouts a step. Which
groups are taken depends on the order of the questions alone, not on the number of ranks. When the rounds run out,
groups that teach nothing fill the step: B and all denominators stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from data.question import Question
from grpo.batch import Group
from grpo.watch import WATCH


@dataclass(frozen=True)
class Earned:
    """One question's G completions and their rewards. A reward that failed is NaN, and so is its completion's total."""

    question: Question
    group: Group
    components: list[list[float]]  # [G][R], before weights
    totals: list[float]  # [G]
    failures: tuple[str, ...] = ()  # a line for each completion of which a reward failed

    def differs(self, component: int | None) -> bool:
        """Whether the completions earned unequally: in one component, or in total with None. Failed ones do not."""
        values = self.totals if component is None else [row[component] for row in self.components]
        return all(map(isfinite, self.totals)) and len(set(values)) > 1


def collect(run, step: int) -> tuple[list[Earned], dict[str, float]]:
    """This rank's share of the step's questions, in order, and the metrics of dynamic sampling. Every rank calls."""
    s, engine = run.settings, run.engine
    mine = _checked(run, run.rollouts.take(step))
    if s.dynamic_sampling_rounds == 1:
        return mine, {}
    component = None if s.dynamic_sampling_by == "reward" else run.rewards.names.index(s.dynamic_sampling_by)
    asked, rounds = engine.gather(mine), 1
    while sum(e.differs(component) for e in asked) < s.questions and rounds < s.dynamic_sampling_rounds:
        asked += engine.gather(_checked(run, run.rollouts.more(step, {e.question.id for e in asked})))
        rounds += 1
    teach = [e for e in asked if e.differs(component)]
    chosen = (teach + [e for e in asked if not e.differs(component)])[: s.questions]
    known = [total for e in asked for total in e.totals if isfinite(total)]
    share = s.questions // engine.world
    return chosen[engine.rank * share : (engine.rank + 1) * share], {
        "dynamic_sampling/rounds": float(rounds), "dynamic_sampling/kept": len(teach) / len(asked),
        "dynamic_sampling/reward": sum(known) / max(len(known), 1),
    }  # fmt: skip


def score(rewards, question: Question, group: Group) -> Earned:
    """What a group earned."""
    contexts = [
        {"answer": question.answer, "choices": question.choices, "question": question.question,
         "n_tokens": len(c.token_ids), "truncated": c.truncated} for c in group.completions
    ]  # fmt: skip
    scores = rewards.score([c.text for c in group.completions], contexts=contexts)
    WATCH.busy()
    failed = {f.index: f"question {question.id}, completion {f.index}, {f.component}: {f.error}"
              for f in reversed(scores.failures)}  # fmt: skip
    return Earned(question, group, scores.components, scores.total, tuple(failed.values()))


def _checked(run, earned: list[Earned]) -> list[Earned]:
    """Count the tokens that were made, over all ranks. Raises RewardError, on all, where too many rewards failed."""
    rows = run.engine.gather([(e.failures, len(e.totals)) for e in earned])
    run.rewards.check([line for failures, _ in rows for line in failures], sum(n for _, n in rows))
    groups = [e.group for e in earned]
    made = sum(len(g.prompt.prompt_ids) + sum(len(c.token_ids) for c in g.completions) for g in groups)
    run.tokens += int(run.engine.reduce({"n": float(made)})["n"])
    return earned
