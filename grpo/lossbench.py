"""Cost of advantage, loss and its metrics beside a training step: `python -m grpo.lossbench loss=grpo` (any loss name).

    python -m grpo.lossbench [loss=NAME ...] [questions=2] [group=6] [tokens=256] [vocabulary=152064] [hidden=64]

A training step here is only its last stage: hidden states -> logits -> tempered log-softmax, log-probs and entropy
(grpo/logprob.py) -> backward into the hidden states. A real step adds the transformer, so a real share is smaller. With
hidden=3584 the stage is that of the 7B model; 64 makes it as cheap as it can be. Uses the GPU if there is one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from grpo.advantage import advantages, group_std
from grpo.batch import LossInputs
from grpo.logprob import chosen_and_entropy
from grpo.losscheck import with_entropy_cut


@dataclass(frozen=True)
class Sizes:
    questions: int = 2
    group: int = 6
    tokens: int = 256
    vocabulary: int = 152064
    hidden: int = 64
    chunk: int = 256  # tokens whose logits exist at a time: bounds memory, not results

    @property
    def rows(self) -> int:
        return self.questions * self.group


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of one call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def log_prob_stage(sizes: Sizes, device: str) -> Callable[[], object]:
    """Hidden states to log-probs and entropy, and back: the part of a training step that no step can leave out."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    n = sizes.rows * sizes.tokens
    hidden = torch.randn(n, sizes.hidden, generator=generator, device=device, dtype=dtype).requires_grad_()
    head = torch.randn(sizes.vocabulary, sizes.hidden, generator=generator, device=device, dtype=dtype) / 8
    ids = torch.randint(0, sizes.vocabulary, (n,), generator=generator, device=device)

    def part(hidden_MD, ids_M):
        return chosen_and_entropy(hidden_MD @ head.T, ids_M, 0.9, ())

    def step():
        logp = [checkpoint(part, h, i, use_reentrant=False)[0]
                for h, i in zip(hidden.split(sizes.chunk), ids.split(sizes.chunk), strict=True)]  # fmt: skip
        torch.cat(logp).sum().backward()
        hidden.grad = None

    return step


def loss_stage(loss, sizes: Sizes, device: str) -> Callable[[], object]:
    """Advantages of the step, the loss with all its metrics, their reduction as the loop does it, and backward."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (sizes.rows, sizes.tokens)
    logp_NT = -torch.rand(shape, generator=generator, device=device)
    others = [logp_NT + 0.1 * torch.randn(shape, generator=generator, device=device) for _ in range(3)]
    entropy_NT = torch.rand(shape, generator=generator, device=device)
    mask_NT = torch.ones(shape, dtype=torch.bool, device=device)
    reward_BG = torch.rand(sizes.questions, sizes.group, generator=generator, device=device)

    def step():
        advantage_BG = advantages(group_std, reward_BG)
        leaf = logp_NT.clone().requires_grad_()
        entropy = entropy_NT.clone().requires_grad_(getattr(loss, "needs_entropy_gradient", False))
        x = LossInputs(leaf, *others, entropy, advantage_BG.flatten(), mask_NT, float(mask_NT.numel()),
                       float(sizes.rows), sizes.group, 1.0)  # fmt: skip
        out = loss(with_entropy_cut(loss, x))
        out.loss.backward()
        for name, value in out.metrics.items():
            kept = value[mask_NT]
            _ = (kept.max() if name.endswith("/max") else kept.min() if name.endswith("/min") else kept.sum()).item()

    return step


def main() -> None:
    from grpo.lossdocs import ROOT, built

    given = dict(word.split("=", 1) for word in sys.argv[1:])
    names = given.pop("loss", "grpo").split(",")
    sizes = Sizes(**{k: int(v) for k, v in given.items()})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = seconds(log_prob_stage(sizes, device), 3)
    print(f"{sizes} on {device}, {torch.get_num_threads()} threads")
    print(f"log-prob stage of a training step   {1e3 * whole:10.1f} ms")
    for name in names:
        part = seconds(loss_stage(built(Path(ROOT / "conf" / "loss" / f"{name}.yaml")), sizes, device), 9)
        print(f"advantage + loss + metrics, {name:<8}{1e3 * part:10.1f} ms   {part / whole:.2%} of it")


if __name__ == "__main__":
    main()
