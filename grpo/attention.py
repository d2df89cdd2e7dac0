"""Attention within packed rows (grpo/packing.py): a token of a completion sees its prompt and the earlier tokens of its
own completion, nothing else.

Two ways with the same numbers. `Prefix` cuts a row into rectangles that PyTorch's own kernels compute without waste:
the prompt is plain causal attention, the completions of a group are a batch that shares the prompt's keys. `block_mask`
is for FlexAttention, whose kernel leaves out the blocks of the mask that are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from grpo.packing import Block


@dataclass(frozen=True)
class Rectangle:
    """One block's completions as a batch: G of at most C tokens."""

    prompt: slice
    slots_GC: Tensor  # place in the row of each token; 0 where a completion is shorter
    real: Tensor  # flat index into G*C of the tokens that exist, in the order of the row
    visible: Tensor  # bool [C, P + C]


class Prefix:
    """The layout of a row, in place of a mask: made once a forward pass, used by every layer."""

    def __init__(self, blocks: Sequence[Block], device: torch.device | str):
        self.parts = [_rectangle(block, device) for block in blocks]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of [1, heads, L, D] queries over [1, kv heads, L, D] keys and values, as [1, L, heads, D]."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # grouped-query attention: PyTorch's CPU kernel takes equal numbers of heads only
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        out = []
        for part in self.parts:
            q, k, v = (t[:, :, part.prompt] for t in (query, key, value))
            out.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1))
            if not len(part.real):
                continue
            own_q, own_k, own_v = (t[0][:, part.slots_GC].transpose(0, 1) for t in (query, key, value))  # [G, H, C, D]
            g = len(own_q)
            k, v = (torch.cat([p.expand(g, -1, -1, -1), own], 2) for p, own in ((k, own_k), (v, own_v)))
            answer = scaled_dot_product_attention(own_q, k, v, attn_mask=part.visible, scale=scale)
            out.append(answer.transpose(1, 2).flatten(0, 1)[part.real])
        return torch.cat(out)[None]


def _rectangle(block: Block, device) -> Rectangle:
    lengths = [n for n in block.completions if n]
    longest = max(lengths, default=0)
    end = block.start + block.prompt
    starts = end + torch.tensor([0, *lengths], dtype=torch.long).cumsum(0)[:-1]
    column_C = torch.arange(longest)
    exists_GC = column_C < torch.tensor(lengths, dtype=torch.long)[:, None]
    slots_GC = (starts[:, None] + column_C).masked_fill(~exists_GC, 0)
    own = torch.ones(longest, longest, dtype=torch.bool).tril()
    visible = torch.cat([torch.ones(longest, block.prompt, dtype=torch.bool), own], 1).to(device)
    return Rectangle(slice(block.start, end), slots_GC.to(device), exists_GC.flatten().nonzero()[:, 0].to(device),
                     visible)  # fmt: skip


def places(blocks: Sequence[Block], length: int) -> tuple[Tensor, Tensor]:
    """(block, segment) [L] of each place of a row: segment 0 is the prompt, 1.. its completions; padding is -1."""
    block_L, segment_L = torch.full((2, length), -1)
    for b, block in enumerate(blocks):
        block_L[block.start : block.start + block.size] = b
        counts = torch.tensor([block.prompt, *block.completions])
        segment_L[block.start : block.start + block.size] = torch.arange(len(counts)).repeat_interleave(counts)
    return block_L, segment_L


def visible(block_L: Tensor, segment_L: Tensor, q, k) -> Tensor:
    """Whether place `q` sees place `k`: the rule of the module, for indices of any shape."""
    same, prompt_or_own = block_L[q] == block_L[k], (segment_L[k] == 0) | (segment_L[k] == segment_L[q])
    return (k <= q) & same & prompt_or_own


def block_mask(blocks: Sequence[Block], length: int, device) -> BlockMask:
    """The rule as FlexAttention's block-sparse mask [1, 1, L, L]."""
    block_L, segment_L = (t.to(device) for t in places(blocks, length))
    return create_block_mask(
        lambda batch, head, q, k: visible(block_L, segment_L, q, k), None, None, length, length, device=device
    )
