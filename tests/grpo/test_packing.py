"""Layouts of prompts and completions, worked by hand, and the cutting of a step into micro-batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.packing import Block, pack, parts_needed, split

PROMPTS = [torch.tensor([10, 11, 12]), torch.tensor([20, 21])]
COMPLETIONS = [[(1, 2), (3,), ()], [(4, 5, 6)]]


def test_a_shared_row_holds_each_prompt_once():
    packed = pack(PROMPTS, COMPLETIONS)
    assert packed.ids_RL.tolist() == [[10, 11, 12, 1, 2, 3, 20, 21, 4, 5, 6]]
    assert packed.position_RL.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4]]
    assert packed.mask_RL.all() and packed.tokens == 11
    assert packed.blocks == (Block(0, 3, (2, 1, 0)), Block(6, 2, (3,)))
    assert packed.predictor_M.tolist() == [2, 3, 2, 7, 8, 9]  # a prompt's last token predicts each first token
    assert packed.target_M.tolist() == [1, 2, 3, 4, 5, 6] and packed.lengths_N == (2, 1, 0, 3)
    assert pack(PROMPTS, COMPLETIONS, multiple=8).ids_RL.shape == (1, 16)


@pytest.mark.parametrize(("pad", "shift"), [("right", 0), ("left", 1)])
def test_separate_rows_hold_one_completion_each(pad, shift):
    packed = pack(PROMPTS, COMPLETIONS, forward="separate", pad=pad)
    rows = [[10, 11, 12, 1, 2], [10, 11, 12, 3], [10, 11, 12], [20, 21, 4, 5, 6]]
    assert [row[m].tolist() for row, m in zip(packed.ids_RL, packed.mask_RL, strict=True)] == rows
    assert packed.mask_RL[1].tolist() == ([True] * 4 + [False] if pad == "right" else [False] + [True] * 4)
    assert packed.prompt_of_block == (0, 0, 0, 1) and packed.lengths_N == (2, 1, 0, 3)
    assert packed.predictor_M.tolist() == [2, 3, 7 + shift, 16, 17, 18]


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), data=st.data())
def test_a_split_is_whole_in_order_and_as_even_as_neighbours_allow(sizes, data):
    parts = data.draw(st.integers(1, len(sizes)))
    cuts = split(sizes, parts)
    assert len(cuts) == parts and all(len(c) for c in cuts)
    assert [i for c in cuts for i in c] == list(range(len(sizes)))
    largest = max(sum(sizes[i] for i in c) for c in cuts)

    def least(sizes, parts):  # by trying every first cut
        if parts == 1:
            return sum(sizes)
        return min(max(sum(sizes[:i]), least(sizes[i:], parts - 1)) for i in range(1, len(sizes) - parts + 2))

    assert len(sizes) > 9 or largest == least(sizes, parts)
    budget = data.draw(st.integers(1, 60))
    needed = parts_needed(sizes, budget)
    assert all(sum(sizes[i] for i in c) <= budget or len(c) == 1 for c in split(sizes, needed)) or max(sizes) > budget
    assert parts_needed(sizes, None) == 1


def test_more_parts_than_groups_are_refused():
    with pytest.raises(ValueError, match="2 groups cannot be cut into 3 parts"):
        split([5, 5], 3)
