"""Supervised warm start: teaches a random model the answer format and nothing about sound.

Each question comes with one lesson for each of its options, all in the same batch: the labels are the same whatever is
heard, so all that the model knows of listening afterwards it learned from rewards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from grpo.batch import Completion, Encoded, Group
from grpo.optim import Schedule, cosine

THOUGHTS = ["I listen and choose one option."]
ELEMENTS = ["One sound."]


def lesson(choice: str, rng: random.Random) -> str:
    """A completion in the right format that answers `choice`."""
    return (
        f"<think>{rng.choice(THOUGHTS)}</think>\n<semantic_elements>{rng.choice(ELEMENTS)}</semantic_elements>\n"
        f"<answer>{choice}</answer>"
    )


def warm_start(policy, questions: Sequence, encode: Callable[[object], Encoded], *, steps: int, batch: int, lr: float,
               seed: int, report: Callable[[int, float], None] = lambda step, loss: None) -> None:  # fmt: skip
    """Fine-tune the language model (not the audio tower) of `policy` in place; `batch` questions a step."""
    rng = random.Random(seed)
    parameters = [*policy.thinker.model.parameters(), *policy.thinker.lm_head.parameters()]
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = Schedule(lr=lr, warmup=10, shape=cosine)
    policy.train()
    stop = policy.stop_ids[0]
    for step in range(steps):
        groups = []
        for question in rng.sample(list(questions), batch):
            lessons = [(*policy.tokenizer(lesson(c, rng))["input_ids"], stop) for c in question.choices]
            completions = tuple(Completion(ids, (0.0,) * len(ids), "", False, 0) for ids in lessons)
            groups.append(Group(encode(question), completions))
        logp_NT, _ = policy(policy.prepare(groups))
        loss = -logp_NT.sum() / (logp_NT != 0).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps)
        optimizer.step()
        report(step, loss.item())
    policy.requires_grad_(False)
