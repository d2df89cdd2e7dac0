"""The entropy's gradient: right where it is asked for, absent where it is not, and finite beside banned ids."""

import torch

from grpo.logprob import chosen_and_entropy


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
