"""Log-probabilities and entropy, worked by hand."""

from math import inf, log

import pytest
import torch

from grpo.logprob import chosen_and_entropy, tempered


def test_golden_values():
    # logits 0, log 2, log 4 at temperature 0.5 are doubled: weights 1, 4, 16; without the last 1/5 and 4/5
    logits = torch.tensor([[0.0, log(2), log(4)]])
    assert tempered(logits, 0.5, ())[0].tolist() == pytest.approx([log(1 / 21), log(4 / 21), log(16 / 21)])
    assert tempered(logits, 0.5, [2])[0].tolist() == pytest.approx([log(1 / 5), log(4 / 5), -inf])
    logp, entropy = chosen_and_entropy(logits, torch.tensor([1]), 0.5, [2])
    assert logp.item() == pytest.approx(log(4 / 5))
    assert entropy.item() == pytest.approx(-(log(1 / 5) / 5 + 4 * log(4 / 5) / 5))  # a banned id adds 0, not nan


def test_the_softmax_is_in_float32():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    logp = tempered(logits, 0.9, [3])
    assert logp.dtype == torch.float32 and torch.equal(logp, tempered(logits.float(), 0.9, [3]))


def test_only_the_chosen_log_prob_has_a_gradient():
    logits = torch.zeros(1, 4, requires_grad=True)
    logp, entropy = chosen_and_entropy(logits, torch.tensor([0]), 1.0, [3])
    assert not entropy.requires_grad
    logp.sum().backward()  # one-hot minus softmax, and nothing for the banned id
    assert logits.grad[0].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0])
