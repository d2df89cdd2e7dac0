"""Rollouts by transformers' generate on the trainer's own weights: the reference engine that needs nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo.batch import Completion, Encoded, Group
from grpo.logprob import tempered
from grpo.rollout import Done, Sampling, ignore, sample_seed


class Chooser:
    """Chooses one token per row and keeps its log-probability.

    Sampling is by the Gumbel-max trick with one generator per row: argmax(log p + g) is a sample of p, and depends on
    the row's own seed only.
    """

    def __init__(self, temperature: float, banned_ids: Sequence[int], seeds: Sequence[int] | None):
        self.temperature, self.banned_ids = temperature, banned_ids
        self.generators = None if seeds is None else [torch.Generator().manual_seed(s) for s in seeds]
        self.logp: list[Tensor] = []  # one [N] a token

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        logp_NV = tempered(logits, self.temperature, self.banned_ids)
        scores_NV = logp_NV
        if self.generators is not None:
            race_NV = torch.empty(logp_NV.shape)
            for row, generator in zip(race_NV, self.generators, strict=True):
                row.exponential_(generator=generator)
            scores_NV = logp_NV - race_NV.to(logp_NV.device).log()
        self.logp.append(logp_NV.gather(-1, scores_NV.argmax(-1, keepdim=True))[:, 0].cpu())
        return scores_NV


class HFRollout:
    """See the module. `batch` bounds the completions generated at once (memory)."""

    def __init__(self, policy, *, batch: int = 256):
        self.policy, self.batch, self.version = policy, batch, 0

    def generate(self, prompts: Sequence[Encoded], copies: int, sampling: Sampling,
                 done: Done = ignore) -> list[Group]:  # fmt: skip
        training = self.policy.training
        self.policy.eval()  # dropout would sample from another policy than the one whose log-probs are reported
        at_once = max(1, self.batch // copies)
        groups = []
        for i in range(0, len(prompts), at_once):
            for group in self._generate(prompts[i : i + at_once], copies, sampling):
                done(len(groups), group)
                groups.append(group)
        self.policy.train(training)
        return groups

    def _generate(self, prompts: Sequence[Encoded], copies: int, sampling: Sampling) -> list[Group]:
        policy, s = self.policy, sampling
        seeds = None if s.greedy else [sample_seed(s.seed, s.step, p.id, i) for p in prompts for i in range(copies)]
        chooser = Chooser(policy.temperature, policy.banned_ids, seeds)
        token_ids = policy.generate(prompts, copies, chooser, s.max_tokens)
        logp_NT = torch.stack(chooser.logp, 1).tolist()
        completions = [
            Completion(tuple(ids), tuple(row[: len(ids)]), policy.decode(ids), ids[-1] not in policy.stop_ids,
                       self.version)
            for ids, row in zip(token_ids, logp_NT, strict=True)
        ]  # fmt: skip
        return [Group(p, tuple(completions[i * copies : (i + 1) * copies])) for i, p in enumerate(prompts)]

    def close(self) -> None:
        pass
