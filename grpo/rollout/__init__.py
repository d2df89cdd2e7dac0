"""Rollout engines: questions in, groups of sampled completions out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from grpo.batch import Encoded, Group

# vLLM's name for what `float32_head` does in grpo/policy.py. It is read from the config of the language model alone.
HEAD = {"thinker_config": {"text_config": {"head_dtype": "float32"}}}


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the only ones that vLLM knows


def lora_rank(r: int) -> int:
    """vLLM's rank for adapters of rank r. Raises ValueError where it has none."""
    if r > LORA_RANKS[-1]:
        raise ValueError(f"sync=adapter: vLLM takes LoRA ranks up to {LORA_RANKS[-1]}, and model.lora.r is {r}: use "
                         f"sync=delta")  # fmt: skip
    return next(rank for rank in LORA_RANKS if rank >= r)


class RolloutError(RuntimeError):
    """The rollout engine cannot answer, and repeating does not help: says what was seen and what to do."""


def ignore(place: int, group: Group) -> None:
    pass


@dataclass(frozen=True)
class Sampling:
    """How to sample. `seed` and `step` fix every sample; temperature and banned ids are the policy's own."""

    max_tokens: int
    seed: int = 0
    step: int = 0
    greedy: bool = False


Done = Callable[[int, Group], object]  # told of each group, by its place among the prompts, as soon as it is whole


class Rollout(Protocol):
    """What the loop needs of a rollout engine."""

    version: int  # of the weights it holds

    def generate(self, prompts: Sequence[Encoded], copies: int, sampling: Sampling,
                 done: Done = ignore) -> list[Group]: ...  # fmt: skip

    def close(self) -> None: ...


class WeightHolder(Rollout, Protocol):
    """An engine with weights of its own: what the sync strategies (grpo/sync) need of it as well.

    `call` and `send` run a method of the worker extension (grpo/sync/worker.py) on every worker of every engine and
    give the workers' answers. Tensors given to `send` may change as soon as it returns.
    """

    every_rank: bool  # True: each trainer rank has an engine and pushes to it; False: rank 0 pushes for all

    def call(self, method: str, **arguments) -> list: ...

    def send(self, method: str, tensors: Mapping[str, Tensor], **arguments) -> list: ...

    def refresh(self, version: int, *, audio_changed: bool) -> None:
        """Forget what was computed with older weights; from now on completions are of `version`."""

    def load_adapter(self, version: int, tensors: Mapping[str, Tensor], config: Mapping) -> list:
        """Sample from now on through this LoRA adapter (names and config as vLLM wants them) under a fresh id.

        Answers like `Bridge.bridge_adapter`, for every worker: what the adapter matched there.
        """

    def score(self, groups: Sequence[Group]) -> list[list[list[float]]]:
        """Log-probs of given completions under the weights now held, [group][completion][token]."""


def sample_seed(seed: int, step: int, question: str, sample: int | str) -> int:
    """63-bit seed of one sample, a function of its name only: not of rank, batch, engine or what came before."""
    digest = hashlib.sha256(f"{seed}/{step}/{question}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def group_seed(seed: int, step: int, question: str) -> int:
    """62-bit seed of a whole group, for vLLM: with n=G it gives sample i the seed s + i, which must fit 63 bits."""
    return sample_seed(seed, step, question, "group") >> 1


def one_slot(prompt: Encoded, audio_id: int) -> list[int]:
    """The prompt's ids with its run of audio placeholders shrunk to one: the form that vLLM expands again."""
    ids = prompt.prompt_ids.tolist()
    if prompt.mel is None:
        return ids
    first = ids.index(audio_id)
    after = next((i for i in range(first, len(ids)) if ids[i] != audio_id), len(ids))
    return [*ids[: first + 1], *ids[after:]]


def check_prompt(prompt: Encoded, engine_ids: Sequence[int]) -> None:
    """Raise ValueError unless the engine expanded the prompt to the very ids that the trainer will compute on."""
    mine, theirs = prompt.prompt_ids.tolist(), list(engine_ids)
    if mine != theirs:
        shared = min(len(mine), len(theirs))
        at = next((i for i in range(shared) if mine[i] != theirs[i]), shared)
        raise ValueError(f"question {prompt.id}: the rollout engine read another prompt than the trainer "
                         f"({len(theirs)} tokens for {len(mine)}, first difference at {at}): do both load the same "
                         f"checkpoint and processor?")  # fmt: skip
