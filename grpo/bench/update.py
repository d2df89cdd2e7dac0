"""The update of one step at chosen sizes: a Thinker with random weights, prompts with sound, completions of random ids.

A trainer step here is what the loop does after a rollout: reference forward, policy forward and backward.

    shared     a group in one row, its clip heard once                     (model.forward=shared)
    separate   a row a completion, its clip heard once                     (model.forward=separate)
    usual      a row a completion, and each row hears its clip, in both passes: what trainers without either do
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.prompt import Prompt
from data.question import Clip, Question
from grpo.batch import Completion, Group
from grpo.logprob import tempered
from grpo.policy import Policy, Prepared
from grpo.tiny import random_checkpoint

LORA = {"r": 8, "alpha": 16, "dropout": 0.0, "targets": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"}  # as published


@dataclass(frozen=True)
class Shape:
    """A Thinker's sizes. The default keeps 7B's proportions: audio tower and head are a tenth of the layers each."""

    hidden: int = 512
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    intermediate: int = 2752
    vocabulary: int = 4096
    audio: dict = field(default_factory=lambda: {"d_model": 256, "encoder_layers": 4, "encoder_attention_heads": 4,
                                                 "encoder_ffn_dim": 1024})  # fmt: skip

    def sizes(self) -> dict:
        """For grpo.tiny.random_checkpoint."""
        third = self.hidden // self.heads // 2 - 2 * (self.hidden // self.heads // 6)
        sections = [third, *[self.hidden // self.heads // 6] * 2]
        return {
            "text_config": {
                "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocabulary,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            },
            "audio_config": self.audio | {"output_dim": self.hidden}, "vision_config": {"out_hidden_size": self.hidden},
        }  # fmt: skip

    def operations(self, prompt: int, completion: int, copies: int) -> tuple[float, float]:
        """Multiply-adds of one forward pass over a group, prompt once: (in matrices, in attention)."""
        head = self.hidden // self.heads
        matrices = self.hidden * head * (2 * self.heads + 2 * self.kv_heads) + 3 * self.hidden * self.intermediate
        tokens = prompt + copies * completion
        pairs = prompt**2 / 2 + copies * (completion * prompt + completion**2 / 2)
        inside = self.layers * tokens * matrices + copies * completion * self.hidden * self.vocabulary
        return inside, 2 * self.layers * pairs * self.hidden


class Bench:
    """A policy of the given shape, and groups for it.

    Args:
        folder: where the checkpoint is made and kept.
        device, dtype: of the policy.
    """

    PROMPT = Prompt(system=None, instruction="Listen.")

    def __init__(self, folder: Path, shape: Shape, *, device: str = "cpu", dtype: str = "float32", checkpointing=False):
        folder.mkdir(parents=True, exist_ok=True)
        random_checkpoint(folder, shape.sizes(), filled=shape.vocabulary - 200, dtype=getattr(torch, dtype))
        self.shape = shape
        self.policy = Policy(folder, LORA, prompt=self.PROMPT, dtype=dtype,
                             device=device, gradient_checkpointing=checkpointing)  # fmt: skip
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        for name, p in self.policy.named_parameters():
            if "lora_B" in name:  # so that policy and reference differ
                p.data.copy_(0.02 * torch.randn(p.shape, generator=generator))

    def group(self, number: int, prompt: int, completion: int, copies: int) -> Group:
        return random_group(self.policy, number, prompt, completion, copies)

    # ---------------------------------------------------------------- ways to make a step

    def step(self, groups: list[Group], how: str = "shared", *, at_once: int | None = None) -> Callable[[], object]:
        """Work that makes the update's passes over `groups`, `at_once` groups in a micro-batch (None: all)."""
        policy, at_once = self.policy, at_once or len(groups)

        def work():
            policy.audio_cache.clear()
            policy.layout = "shared" if how == "shared" else "separate"
            for i in range(0, len(groups), at_once):
                micro = policy.prepare(groups[i : i + at_once])
                if how == "usual":
                    self._hear_each_row(micro)
                with torch.no_grad(), policy.reference():
                    policy(micro)
                if how == "usual":
                    self._hear_each_row(micro)
                self._backward(policy(micro)[0])
            policy.layout = "shared"

        return work

    def plain(self, tokens: int, rows: int, scored: int) -> Callable[[], object]:
        """The floor: transformers' own causal rows of `tokens` tokens in all, log-probabilities of `scored` of them."""
        policy = self.policy
        ids = torch.randint(0, 250, (rows, tokens // rows), generator=torch.Generator().manual_seed(0)).to(
            policy.device
        )

        def logp():
            hidden = policy.thinker.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[:scored]
            out = tempered(policy.thinker.lm_head(hidden), 1.0, ())
            return out.gather(-1, ids.flatten()[:scored, None])

        def work():
            with torch.no_grad(), policy.reference():
                logp()
            self._backward(logp())

        return work

    @torch.no_grad()
    def _hear_each_row(self, micro: Prepared) -> None:
        for prompt in micro.prompts:
            self.policy._hear(prompt)

    def _backward(self, logp: torch.Tensor) -> None:
        logp.mean().backward()
        for p in self.trained:
            p.grad = None


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def random_group(policy: Policy, number: int, prompt: int, completion: int, copies: int) -> Group:
    """A group with a prompt of exactly `prompt` tokens, five eighths of them sound, and equal completions."""
    generator = torch.Generator().manual_seed(number)
    samples = 0.1 * torch.randn(16000 * (prompt * 5 // 8) // 25, generator=generator)
    question = Question(id=str(number), audio=None, question="?", choices=("A", "B"), answer=0)
    made = policy.encode(question, Clip(samples.numpy(), 16000))
    short = prompt - len(made.prompt_ids)
    if short < 0:
        raise ValueError(f"a prompt needs {len(made.prompt_ids)} tokens at least, got {prompt}")
    words = torch.randint(0, 250, (short,), generator=generator)
    made = type(made)(made.id, torch.cat([made.prompt_ids, words]), made.mel, made.clip_sha256)
    ids = torch.randint(0, 250, (copies, completion), generator=generator).tolist()
    return Group(made, tuple(Completion(tuple(i), (0.0,) * completion, "", False, 0) for i in ids))
