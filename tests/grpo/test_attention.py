"""Attention within packed rows against a softmax over the written-out mask."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.attention import Prefix, block_mask, places, visible
from grpo.packing import Block


def mask_of(blocks, length):
    index = torch.arange(length)
    return visible(*places(blocks, length), index[:, None], index[None, :])


def test_who_sees_whom():
    # two of a prompt, two of its first completion, one of the second; another prompt of one token; two of padding
    assert mask_of([Block(0, 2, (2, 1)), Block(5, 1, ())], 8).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],  # the prompt and itself, not the first completion
        [0, 0, 0, 0, 0, 1, 0, 0],  # nothing of the other group
        [0, 0, 0, 0, 0, 0, 1, 0],  # padding sees padding, so that its softmax is finite
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]


def test_the_block_sparse_mask_follows_the_rule():
    blocks = [Block(0, 150, (40, 90, 0)), Block(280, 20, (60,))]
    length = 384
    sparse = block_mask(blocks, length, "cpu")
    index = torch.arange(length)
    written = sparse.mask_mod(0, 0, index[:, None], index[None, :])
    assert torch.equal(written, mask_of(blocks, length))
    assert 0 < sparse.sparsity() < 100


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 7), max_size=4)), min_size=1, max_size=3),
    heads=st.sampled_from([(2, 2), (4, 2), (6, 1)]),
    seed=st.integers(0, 10**6),
)
def test_rectangles_give_the_softmax_over_the_mask(sizes, heads, seed):
    blocks, start = [], 0
    for prompt, completions in sizes:
        blocks.append(Block(start, prompt, tuple(completions)))
        start += blocks[-1].size
    generator = torch.Generator().manual_seed(seed)
    shape = [(1, h, start, 8) for h in (heads[0], heads[1], heads[1])]
    ours, plain = ([torch.randn(s, generator=torch.Generator().manual_seed(seed + i)).requires_grad_()
                    for i, s in enumerate(shape)] for _ in range(2))  # fmt: skip
    out = Prefix(blocks, "cpu")(*ours, 0.3)
    q, k, v = plain
    k, v = (t.repeat_interleave(heads[0] // heads[1], 1) for t in (k, v))
    scores = (0.3 * q @ k.transpose(-1, -2)).masked_fill(~mask_of(blocks, start), float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    assert out.shape == expected.shape and torch.allclose(out, expected, atol=1e-5)
    by = torch.randn(out.shape, generator=generator)
    (out * by).sum().backward()
    (expected * by).sum().backward()
    for mine, theirs in zip(ours, plain, strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-4)
