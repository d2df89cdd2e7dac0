"""What advantage, loss and metrics cost beside the cheapest training step that there can be.

That step is its last stage only: hidden states of width 64 (a real one has 3,584) -> log-probabilities and entropy over
7B's vocabulary -> backward. A real step adds the transformer, so a real share is smaller still.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from grpo.advantage import advantages, group_std
from grpo.batch import LossInputs
from grpo.logprob import chosen_and_entropy
from grpo.losscheck import with_entropy_cut

QUESTIONS, COPIES, TOKENS, VOCABULARY, HIDDEN = 2, 6, 256, 152_064, 64


def step_stage(device) -> Callable[[], object]:
    """Hidden states to log-probabilities and entropy, and back: what no step can leave out."""
    generator, n = torch.Generator().manual_seed(0), QUESTIONS * COPIES * TOKENS
    hidden = torch.randn(n, HIDDEN, generator=generator).to(device).requires_grad_()
    head = (torch.randn(VOCABULARY, HIDDEN, generator=generator) / 8).to(device)
    ids = torch.randint(0, VOCABULARY, (n,), generator=generator).to(device)

    def work():
        chosen_and_entropy(hidden, head, ids, 0.9, ())[0].sum().backward()
        hidden.grad = None

    return work


def loss_stage(loss, device) -> Callable[[], object]:
    """Advantages of the step, the loss with all its metrics, their reduction as the loop does it, and backward."""
    generator, shape = torch.Generator().manual_seed(0), (QUESTIONS * COPIES, TOKENS)
    logp_NT = -torch.rand(shape, generator=generator)
    others = [(logp_NT + 0.1 * torch.randn(shape, generator=generator)).to(device) for _ in range(3)]
    logp_NT, entropy_NT = logp_NT.to(device), torch.rand(shape, generator=generator).to(device)
    mask_NT = torch.ones(shape, dtype=torch.bool, device=device)
    reward_BG = torch.rand(QUESTIONS, COPIES, generator=generator)

    def work():
        advantage_BG = advantages(group_std, reward_BG)
        leaf = logp_NT.clone().requires_grad_()
        entropy = entropy_NT.clone().requires_grad_(getattr(loss, "needs_entropy_gradient", False))
        x = LossInputs(leaf, *others, entropy, advantage_BG.flatten().to(device), mask_NT, float(mask_NT.numel()),
                       float(len(leaf)), COPIES, 1.0)  # fmt: skip
        out = loss(with_entropy_cut(loss, x))
        out.loss.backward()
        for name, value in out.metrics.items():
            kept = value[mask_NT]
            _ = (kept.max() if name.endswith("/max") else kept.min() if name.endswith("/min") else kept.sum()).item()

    return work
