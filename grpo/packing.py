"""How prompts and completions are laid out for a forward pass: index arithmetic only, no model.

    shared     one row, no padding:   | prompt a | a1 | a2 | a3 | prompt b | b1 | b2 | b3 |
    separate   a row a completion:    | prompt a | a1 |        and so on, padded to one length

In both a completion's first token has the rotary position behind its prompt's last, so that the numbers are the same.
`shared` is the default: a prompt is computed once, whatever the number of its completions. `separate` is what it is
checked against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """One prompt and its completions behind each other in a row: where it starts, and how many tokens each has."""

    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.prompt + sum(self.completions)


@dataclass(frozen=True)
class Packed:
    """R rows of L tokens (`shared`: one row) that hold N completions of B prompts, M completion tokens in all.

    All three axes of the rotary position agree: sound and text have no height or width.
    """

    ids_RL: Tensor
    position_RL: Tensor
    mask_RL: Tensor  # bool, False: padding
    blocks: tuple[Block, ...]  # in flat R*L numbering, row by row
    prompt_of_block: tuple[int, ...]
    predictor_M: Tensor  # flat index of the token that predicts each completion token, completions in order
    target_M: Tensor  # the predicted token ids
    lengths_N: tuple[int, ...]  # tokens of each completion

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(block.size for block in self.blocks)

    def to(self, device: torch.device | str) -> Packed:
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)
                                if isinstance(getattr(self, f.name), Tensor)})  # fmt: skip


def pack(prompts: Sequence[Tensor], completions: Sequence[Sequence[Sequence[int]]], *, forward: str = "shared",
         pad: str = "right", multiple: int = 1) -> Packed:  # fmt: skip
    """Lay out prompts [P_b] and the completions (token ids) of each. Completions may be empty, and of unequal number.

    Args:
        pad: side of the padding in `separate` rows.
        multiple: of which the length of a `shared` row is to be: kernels are compiled for few lengths then.
    """
    shared = forward == "shared"
    spans = [(b, [answer]) for b, answers in enumerate(completions) for answer in answers]
    if shared:
        spans = [(b, list(answers)) for b, answers in enumerate(completions)]
    sizes = [len(prompts[b]) + sum(map(len, answers)) for b, answers in spans]
    rows, length = (1, -(-sum(sizes) // multiple) * multiple) if shared else (len(spans), max(sizes))
    ids, position = (np.zeros(rows * length, dtype=np.int64) for _ in range(2))
    mask = np.zeros(rows * length, dtype=bool)
    blocks, predictor, target, lengths, cursor = [], [], [], [], 0
    for r, ((b, answers), size) in enumerate(zip(spans, sizes, strict=True)):
        if not shared:
            cursor = r * length + (length - size if pad == "left" else 0)
        prompt, first = len(prompts[b]), cursor + len(prompts[b])
        blocks.append(Block(cursor, prompt, tuple(map(len, answers))))
        ids[cursor:first] = prompts[b].numpy()
        position[cursor:first] = np.arange(prompt)
        mask[cursor : cursor + size] = True
        cursor = first
        for answer in answers:
            end = cursor + len(answer)
            ids[cursor:end] = answer
            position[cursor:end] = prompt + np.arange(len(answer))
            predictor += [first - 1, *range(cursor, end - 1)][: len(answer)]
            target += answer
            lengths.append(len(answer))
            cursor = end
    return Packed(
        *(torch.from_numpy(a).view(rows, length) for a in (ids, position, mask)), tuple(blocks),
        tuple(b for b, _ in spans), torch.tensor(predictor, dtype=torch.long), torch.tensor(target, dtype=torch.long),
        tuple(lengths),
    )  # fmt: skip


def parts_needed(sizes: Sequence[int], budget: int | None) -> int:
    """Least number of runs of neighbours with at most `budget` tokens each; what is larger alone goes alone."""
    return len(_greedy(sizes, budget or sum(sizes)))


def split(sizes: Sequence[int], parts: int) -> list[range]:
    """Cut `sizes` into `parts` runs of neighbours, none empty, whose largest sum is as small as it can be.

    Raises ValueError when there are fewer sizes than parts.
    """
    if not 1 <= parts <= len(sizes):
        raise ValueError(f"{len(sizes)} groups cannot be cut into {parts} parts")
    low, high = max(sizes), sum(sizes)
    while low < high:  # the least limit that needs no more than `parts`
        middle = (low + high) // 2
        low, high = (low, middle) if len(_greedy(sizes, middle)) <= parts else (middle + 1, high)
    cuts = _greedy(sizes, low)
    while len(cuts) < parts:  # cutting further never makes a part larger
        i = max(range(len(cuts)), key=lambda i: len(cuts[i]))
        r, middle = cuts[i], (cuts[i].start + cuts[i].stop) // 2
        cuts[i : i + 1] = [range(r.start, middle), range(middle, r.stop)]
    return cuts


def _greedy(sizes: Sequence[int], limit: int) -> list[range]:
    cuts, first, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > first and total + size > limit:
            cuts.append(range(first, i))
            first, total = i, 0
        total += size
    return [*cuts, range(first, len(sizes))]
