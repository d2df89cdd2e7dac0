"""What the tests of real vLLM share: a policy with random adapters, small engines, and the measure of agreement."""

import importlib.util
import math

import pytest
import torch

from tests.conftest import LORA, make_clip, make_prompt, make_question

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

# Every kind of adapted matrix, and fused groups in part: k and up stay as they are, q, v and gate change.
TARGETS = r"model\.layers\.\d+\.(self_attn\.(q|v|o)_proj|mlp\.(gate|down)_proj)"
NAMES = ("x", "yy", "a longer name")


def make_policy(checkpoint, dtype="float32", lora=True, **changes):
    from grpo.policy import Policy

    adapter = LORA | {"targets": TARGETS} if lora else None
    return Policy(str(checkpoint), adapter, prompt=make_prompt(), dtype=dtype, temperature=0.8, **changes).eval()


def make_engine(policy, **changes):
    from grpo.rollout.vllm import VLLMRollout

    return VLLMRollout(policy, **{"max_model_len": 512, "max_num_seqs": 32, "kv_cache_gib": 0.05} | changes)


def randomise(policy, seed, size=0.1):
    """New A and B everywhere: about as far from the base as a long run ends up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_" in name:
                p.copy_(size * torch.randn(p.shape, generator=generator))


def questions(policy):
    """Three prompts of unequal length, each longer than a block of the prefix cache."""
    return [policy.encode(make_question(n), make_clip(i, 0.8 + 0.4 * i)) for i, n in enumerate(NAMES)]


@torch.no_grad()
def gap(policy, groups):
    """max |log-prob(engine) - log-prob(trainer)| over all sampled tokens, nats."""
    logp_NT, _ = policy(policy.prepare(groups))
    rows = zip(logp_NT.tolist(), [c for g in groups for c in g.completions], strict=True)
    gaps = [abs(a - b) for row, c in rows for a, b in zip(row, c.sampler_logp, strict=False)]
    return max(gaps) if all(map(math.isfinite, gaps)) else math.inf


def tokens(groups):
    return [[c.token_ids for c in g.completions] for g in groups]
