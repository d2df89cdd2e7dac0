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


def test_entropy_has_a_gradient_only_where_it_is_asked_for():
    logits = torch.randn(3, 7, requires_grad=True)
    ids = torch.tensor([1, 2, 3])
    assert not chosen_and_entropy(logits, ids, 0.7, [5])[1].requires_grad
    logp, entropy = chosen_and_entropy(logits, ids, 0.7, [5], True)
    assert logp.requires_grad and entropy.requires_grad
    with torch.no_grad():
        assert not chosen_and_entropy(logits, ids, 0.7, [5], True)[1].requires_grad


def test_the_gradient_of_the_entropy_by_hand():
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.5]], requires_grad=True)
    _, entropy = chosen_and_entropy(logits, torch.tensor([0]), 2.0, [3], True)
    entropy.sum().backward()
    p = torch.tensor([0.3, -1.2, 2.0]).div(2).softmax(-1)
    h = -(p * p.log()).sum()
    expected = -p * (p.log() + h) / 2  # dH/dz_j = -p_j (log p_j + H) / temperature; a banned id takes no part
    assert torch.allclose(entropy[0], h, atol=1e-6)
    assert torch.allclose(logits.grad[0], torch.cat([expected, torch.zeros(1)]), atol=1e-6)
