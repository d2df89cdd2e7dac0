"""Questions in, judged answers out: the one path of the loop's held-out accuracy, grpo.evaluate, answer and demo.

An answer is one completion a question, greedy unless asked otherwise, read by the strict rule: right if it names the
gold option and no other, as the reward reads it. Every question gets an Answer, whatever went wrong with it: the
denominator is fixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from data.audio import ClipError
from data.question import Question
from grpo.rollout import Rollout, RolloutError, Sampling
from grpo.watch import WATCH
from rewards.accuracy import named
from rewards.tags import parse

STATES = ("ok", "no tag", "not a choice", "ambiguous", "truncated", "audio error")


@dataclass(frozen=True)
class Answer:
    """One answered question. `choice` is None unless `state` is ok."""

    question: Question
    state: str  # one of STATES
    choice: int | None = None  # index into the choices in the order in which they were shown
    text: str = ""  # the whole completion
    think: str | None = None
    semantic_elements: str | None = None
    answer: str | None = None  # the answer block as the model wrote it
    tokens: int = 0  # of the completion
    prompt_tokens: int = 0
    truncated: bool = False  # by the length limit
    clip_sha256: str = ""
    problem: str | None = None  # why the audio could not be heard

    @property
    def right(self) -> bool:
        """By the strict rule: the option that the answer names is the gold one."""
        q = self.question
        known = q.answer is not None and q.answer >= 0  # of a question that a user asks it is not
        return self.choice is not None and known and q.choices[self.choice] == q.gold

    @property
    def bare(self) -> str:
        """What goes to official scorers: the chosen option's bare text, else the answer block as it is."""
        return (self.answer or "") if self.choice is None else self.question.choices[self.choice]


def read(question: Question, text: str, *, truncated: bool = False, **facts) -> Answer:
    """A completion as an Answer, by the strict rule. Answer blocks that disagree are ambiguous."""
    tags, choices = parse(text), question.choices
    answers = list(dict.fromkeys(tags.blocks["answer"]))
    options = [named(a, choices) for a in answers]
    texts = {choices[i] for found in options for i in found}  # an option printed twice is one option
    if not answers:
        state = "truncated" if truncated else "no tag"
    elif not texts:
        state = "not a choice"
    else:
        state = "ok" if len(texts) == 1 and all(options) else "ambiguous"
    choice = min(options[0]) if state == "ok" else None
    return Answer(question, state, choice, text, tags.think, tags.semantic_elements, tags.answer, truncated=truncated,
                  **facts)  # fmt: skip


def predict(questions: Sequence[Question], encode: Callable, rollout: Rollout, *, sampling: Sampling,
            batch: int = 64, stand_in: Callable | None = None) -> Iterator[Answer]:  # fmt: skip
    """One Answer a question, in order; `batch` are asked at once. `encode(question)` may raise ClipError.

    `stand_in(question)` is asked in place of one that cannot be heard, and its answer dropped: as many are asked as
    there are questions, whatever their clips.

    Raises RolloutError where the engine cannot answer.
    """
    for i in range(0, len(questions), batch):
        WATCH.moved()
        part = questions[i : i + batch]
        encoded, problems = {}, {}
        for at, question in enumerate(part):
            try:
                encoded[at] = encode(question)
            except ClipError as error:
                problems[at] = f"{error.reason}: {error}"
                if stand_in is not None:
                    encoded[at] = stand_in(question)
        groups = rollout.generate(list(encoded.values()), 1, sampling) if encoded else []
        by_place = dict(zip(encoded, groups, strict=True))
        for at, question in enumerate(part):
            if at in problems:
                yield Answer(question, "audio error", problem=problems[at])
                continue
            prompt, (said,) = by_place[at].prompt, by_place[at].completions
            yield read(question, said.text, truncated=said.truncated, tokens=len(said.token_ids),
                       prompt_tokens=len(prompt.prompt_ids), clip_sha256=prompt.clip_sha256)  # fmt: skip


def heldout_accuracy(questions: Sequence[Question], encode: Callable, rollout: Rollout, engine, *, max_tokens: int,
                     stand_in: Callable, batch: int = 64, waiting: Callable = nullcontext) -> float:  # fmt: skip
    """Share of `questions` answered rightly, greedily; ranks share the work. Every question stays in the denominator.

    `stand_in`: see `predict`.
    `waiting` makes the context in which this rank alone waits for its answers.
    Raises RolloutError on all ranks if one of them got no answers.
    """

    def count() -> float:
        mine = list(questions[engine.rank :: engine.world])
        # All ranks ask equally many: where an engine uses the trainer's partitioned weights, each needs the others.
        filler = [questions[0]] * (-(-len(questions) // engine.world) - len(mine))
        sampling = Sampling(max_tokens=max_tokens, greedy=True)
        with waiting():
            answers = list(predict([*mine, *filler], encode, rollout, sampling=sampling, batch=batch,
                                   stand_in=stand_in))  # fmt: skip
        return float(sum(a.right for a in answers[: len(mine)]))

    right = engine.together(count, RolloutError)
    return engine.reduce({"right": right})["right"] / len(questions)


def spread(questions: Sequence, count: int | None) -> list:
    """`count` of the questions, evenly spread over them and always the same; all where `count` is None or more."""
    if count is None or count >= len(questions):
        return list(questions)
    return [questions[i * len(questions) // count] for i in range(count)]


def prompt_hash(policy) -> str:
    """12 hex digits of what the model is given for one fixed question: template, system turn, instruction, letters.

    Training, evaluation, command line and server write it down, so that two numbers can be known to share a prompt.
    """
    return hash_of(policy.prompt, lambda messages: policy.processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True))  # fmt: skip


def hash_of(prompt, render: Callable[[list], str]) -> str:
    """`prompt_hash` of a prompt and its processor's chat template."""
    sample = Question("sample", None, "What is heard?", ("dog", "rain", "bell"), 0)
    return hashlib.sha256(json.dumps(render(prompt.messages(sample))).encode()).hexdigest()[:12]
