"""Sampling: seeded by name, without placeholders, from the distribution it reports."""

from types import SimpleNamespace

import torch

from grpo.policy import Policy
from grpo.rollout import Sampling, sample_seed
from grpo.rollout.hf import Chooser, HFRollout
from tests.conftest import LORA, make_clip, make_prompt, make_question


def sample(policy, names, copies=2, **sampling):
    prompts = [policy.encode(make_question(n), make_clip(len(n))) for n in names]
    return HFRollout(policy).generate(prompts, copies, Sampling(**{"max_tokens": 10} | sampling))


def ids(groups):
    return [[c.token_ids for c in g.completions] for g in groups]


def test_same_seed_same_samples_and_each_part_of_the_name_counts(policy):
    base = ids(sample(policy, ["x"], seed=1, step=2))
    assert base == ids(sample(policy, ["x"], seed=1, step=2))
    assert base != ids(sample(policy, ["x"], seed=2, step=2))
    assert base != ids(sample(policy, ["x"], seed=1, step=3))
    assert base[0][0] != base[0][1]
    assert len({sample_seed(1, 2, "x", 0), sample_seed(1, 2, "y", 0), sample_seed(1, 2, "x", 1)}) == 3


def test_a_sample_does_not_depend_on_its_batch(policy):
    together = ids(sample(policy, ["x", "yy", "a long name"], copies=3))
    for i, name in enumerate(["x", "yy", "a long name"]):
        alone = ids(sample(policy, [name], copies=2))[0]
        assert alone == together[i][:2]
    small = HFRollout(policy, batch=3)
    prompts = [policy.encode(make_question(n), make_clip(len(n))) for n in ["x", "yy", "a long name"]]
    assert ids(small.generate(prompts, 3, Sampling(10))) == together


def test_banned_ids_are_never_sampled(policy):
    audio = policy.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert audio in policy.banned_ids and not set(policy.stop_ids) & set(policy.banned_ids)
    with torch.no_grad():  # make the placeholder by far the likeliest token
        policy.thinker.lm_head.weight[audio] = 100 * policy.thinker.lm_head.weight.mean(0)
    sampled = {
        t for g in sample(policy, ["x", "yy"], copies=8, max_tokens=20) for c in g.completions for t in c.token_ids
    }
    assert sampled and not sampled & set(policy.banned_ids)


def test_truncation_is_known_from_the_missing_stop_token(policy):
    for group in sample(policy, ["x", "yy"], copies=8, max_tokens=15):
        for c in group.completions:
            assert c.truncated == (c.token_ids[-1] not in policy.stop_ids)
            assert len(c.token_ids) == 15 if c.truncated else len(c.token_ids) <= 15
            assert sum(t in policy.stop_ids for t in c.token_ids) == (not c.truncated)


def test_greedy_takes_the_likeliest_token(policy):
    logits = torch.randn(4, 9)
    scores = Chooser(1.0, [2], None)(None, logits)
    assert scores.argmax(-1).tolist() == logits.index_fill(1, torch.tensor([2]), -1e9).argmax(-1).tolist()


def test_chooser_samples_the_distribution_that_it_reports():
    # 20,000 seeded draws from p = softmax(logits / T): the frequencies lie within 4 standard errors
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0])
    n, temperature = 20000, 1.7
    chooser = Chooser(temperature, [3], [sample_seed(0, 0, "q", i) for i in range(n)])
    drawn = chooser(None, logits.expand(n, 4)).argmax(-1)
    p = torch.softmax(logits[:3] / temperature, -1)
    frequency = torch.bincount(drawn, minlength=4) / n
    assert frequency[3] == 0
    assert ((frequency[:3] - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()
    assert torch.allclose(chooser.logp[0], p.log()[drawn], atol=1e-6)


def test_greedy_needs_no_seed(policy):
    first, other = (sample(policy, ["x"], greedy=True, seed=seed) for seed in (0, 1))
    assert ids(first) == ids(other) and ids(first)[0][0] == ids(first)[0][1]


def test_rollouts_are_free_of_dropout_and_leave_the_mode_as_it_was(checkpoint):
    def drawn(dropout, training):
        policy = Policy(checkpoint, LORA | {"dropout": dropout}, prompt=make_prompt()).train(training)
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.data.fill_(0.1)
        groups = sample(policy, ["x"], copies=2)
        assert policy.training == training
        return [c.sampler_logp for g in groups for c in g.completions]

    assert drawn(0.9, True) == drawn(0.0, False)


class Fixed:
    """A policy that says [5, stop] and [5, 6], however it is asked."""

    temperature, banned_ids, stop_ids, training = 1.0, (), [9], False

    def eval(self):
        return self

    def train(self, mode):
        return self

    def decode(self, ids):
        return str(ids)

    def generate(self, prompts, copies, choose, max_tokens):
        for _ in range(3):  # a third token is made where another row of the batch goes on
            choose(None, torch.zeros(2, 10))
        return [[5, 9], [5, 6]]


def test_a_completion_ends_with_its_stop_token_and_knows_its_weights():
    rollout = HFRollout(Fixed())
    rollout.version = 4
    stopped, cut = rollout.generate([SimpleNamespace(id="x")], 2, Sampling(max_tokens=2))[0].completions
    assert (stopped.truncated, cut.truncated) == (False, True)  # both have as many tokens as the limit allows
    assert len(stopped.sampler_logp) == len(cut.sampler_logp) == 2 and stopped.version == cut.version == 4
