"""Log-probabilities and entropy, worked by hand."""

from math import inf, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.logprob import chosen_and_entropy, logits_of, tempered

EYE = torch.eye  # with it as projection the hidden states are the logits


def test_golden_values():
    # logits 0, log 2, log 4 at temperature 0.5 are doubled: weights 1, 4, 16; without the last 1/5 and 4/5
    logits = torch.tensor([[0.0, log(2), log(4)]])
    assert tempered(logits, 0.5, ())[0].tolist() == pytest.approx([log(1 / 21), log(4 / 21), log(16 / 21)])
    assert tempered(logits, 0.5, [2])[0].tolist() == pytest.approx([log(1 / 5), log(4 / 5), -inf])
    logp, entropy = chosen_and_entropy(logits, EYE(3), torch.tensor([1]), 0.5, [2])
    assert logp.item() == pytest.approx(log(4 / 5))
    assert entropy.item() == pytest.approx(-(log(1 / 5) / 5 + 4 * log(4 / 5) / 5))  # a banned id adds 0, not nan


def test_the_softmax_is_in_float32():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    logp = tempered(logits, 0.9, [3])
    assert logp.dtype == torch.float32 and torch.equal(logp, tempered(logits.float(), 0.9, [3]))
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(logits_of(hidden, weight), hidden.float() @ weight.float().T)


def test_only_the_chosen_log_prob_has_a_gradient():
    logits = torch.zeros(1, 4, requires_grad=True)
    logp, entropy = chosen_and_entropy(logits, EYE(4), torch.tensor([0]), 1.0, [3])
    assert not entropy.requires_grad
    logp.sum().backward()  # one-hot minus softmax, and nothing for the banned id
    assert logits.grad[0].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0])


def test_entropy_has_a_gradient_only_where_it_is_asked_for():
    logits = torch.randn(3, 7, requires_grad=True)
    ids = torch.tensor([1, 2, 3])
    assert not chosen_and_entropy(logits, EYE(7), ids, 0.7, [5])[1].requires_grad
    logp, entropy = chosen_and_entropy(logits, EYE(7), ids, 0.7, [5], True)
    assert logp.requires_grad and entropy.requires_grad
    with torch.no_grad():
        assert not chosen_and_entropy(logits, EYE(7), ids, 0.7, [5], True)[1].requires_grad


def test_the_gradient_of_the_entropy_by_hand():
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.5]], requires_grad=True)
    _, entropy = chosen_and_entropy(logits, EYE(4), torch.tensor([0]), 2.0, [3], True)
    entropy.sum().backward()
    p = torch.tensor([0.3, -1.2, 2.0]).div(2).softmax(-1)
    h = -(p * p.log()).sum()
    expected = -p * (p.log() + h) / 2  # dH/dz_j = -p_j (log p_j + H) / temperature; a banned id takes no part
    assert torch.allclose(entropy[0], h, atol=1e-6)
    assert torch.allclose(logits.grad[0], torch.cat([expected, torch.zeros(1)]), atol=1e-6)


def plainly(hidden, weight, ids, temperature, banned):
    """With all logits in memory and autograd's own backward pass."""
    logp = tempered(hidden @ weight.T, temperature, banned)
    entropy = -(logp.exp() * logp.masked_fill(logp.isinf(), 0.0)).sum(-1)
    return logp.gather(-1, ids[:, None])[:, 0], entropy


@settings(max_examples=40, deadline=None, derandomize=True)
@given(m=st.integers(0, 9), d=st.integers(1, 6), v=st.integers(3, 40), chunk=st.integers(1, 10),
       trained=st.booleans(), with_entropy=st.booleans(), seed=st.integers(0, 10**6))  # fmt: skip
def test_chunks_give_the_values_and_gradients_of_all_logits(m, d, v, chunk, trained, with_entropy, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, by_logp, by_entropy = normal(m, d), normal(v, d), normal(m), normal(m)
    ids = torch.randint(1, v, (m,), generator=generator)
    results = []
    for function in (plainly, lambda *a: chosen_and_entropy(*a, with_entropy, chunk)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        logp, entropy = function(h, w, ids, 0.7, [0])
        total = (logp * by_logp).sum() + ((entropy * by_entropy).sum() if with_entropy else 0.0)
        total.backward()
        results.append([logp, entropy, h.grad, *([w.grad] if trained else [])])
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, atol=2e-5), (mine - theirs).abs().max()


def test_no_more_logits_exist_at_a_time_than_a_chunk(monkeypatch):
    sizes = []
    seen = tempered.__globals__
    monkeypatch.setitem(seen, "tempered", lambda logits, *a, f=tempered: sizes.append(len(logits)) or f(logits, *a))
    monkeypatch.setitem(seen, "LOGITS_AT_ONCE", 300)
    hidden = torch.randn(20, 4, requires_grad=True)
    weight = torch.randn(100, 4, requires_grad=True)
    logp, _ = chosen_and_entropy(hidden, weight, torch.zeros(20, dtype=torch.long), 1.0, ())
    logp.sum().backward()
    assert max(sizes) == 3 and sum(sizes) == 40  # once forward, once more for the projection's own gradient
