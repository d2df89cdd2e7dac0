"""A LoRA-adapted weight as one matrix: one function for trainer and engine, so that both hold the same bits."""

from __future__ import annotations

from torch import Tensor


def merged(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + (B A)·scale as peft's `merge` computes it on a CPU, in a tensor of its own.

    base [out, in], a [r, in], b [out, r]. The product is taken in float32, rounded to the adapter's dtype and added.
    Always from the same base: nothing drifts, however many versions went before.
    """
    delta = ((b.float() @ a.float()) * scale).to(b.dtype)
    return base + delta.to(base.dtype)
