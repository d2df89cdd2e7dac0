"""vLLM in-process: what is refused, what a sample depends on, what it leaves alone in the trainer's process."""

import gc
import os
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo.batch import Group
from grpo.rollout import RolloutError, Sampling, check_prompt, group_seed, one_slot
from grpo.rollout.hf import HFRollout
from tests.grpo.vllm_engines import gap, make_engine, make_policy, needs_vllm, questions, tokens

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def policy(checkpoint):
    return make_policy(checkpoint)


@pytest.fixture(scope="module")
def engine(policy):
    made = make_engine(policy)
    yield made
    made.close()


def test_the_policys_distribution(policy, engine):
    groups = engine.generate(questions(policy), 8, Sampling(20))
    assert gap(policy, groups) <= 1e-5
    for c in (c for g in groups for c in g.completions):
        assert c.truncated == (c.token_ids[-1] not in policy.stop_ids) and len(c.token_ids) <= 20
        assert sum(t in policy.stop_ids for t in c.token_ids) == (not c.truncated)
        assert c.text == policy.decode(c.token_ids) and len(c.sampler_logp) == len(c.token_ids)


def test_greedy_is_the_trainers(policy, engine):
    greedy = Sampling(20, greedy=True)
    prompts = questions(policy)
    assert tokens(engine.generate(prompts, 2, greedy)) == tokens(HFRollout(policy).generate(prompts, 2, greedy))


def test_a_sample_depends_on_its_name_only(policy, engine):
    prompts = questions(policy)
    base = tokens(engine.generate(prompts, 4, Sampling(12, seed=1, step=2)))
    assert base == tokens(engine.generate(prompts, 4, Sampling(12, seed=1, step=2)))
    alone = [tokens(engine.generate([p], 3, Sampling(12, seed=1, step=2)))[0] for p in reversed(prompts)]
    assert [group[:3] for group in base] == alone[::-1]
    assert base != tokens(engine.generate(prompts, 4, Sampling(12, seed=2, step=2)))
    assert base != tokens(engine.generate(prompts, 4, Sampling(12, seed=1, step=3)))
    assert len(set(base[0])) > 1  # copies differ


def test_seeds_of_a_group_fit_63_bits():
    seeds = [group_seed(0, step, "q") for step in range(1000)]
    assert len(set(seeds)) == 1000 and 0 <= min(seeds) and max(seeds) < 2**62


def test_scores_are_the_samplers(policy, engine):
    groups = engine.generate(questions(policy), 2, Sampling(12))
    sampled = [logp for g in groups for c in g.completions for logp in c.sampler_logp]
    scored = [logp for g in engine.score(groups) for row in g for logp in row]
    assert scored == pytest.approx(sampled, abs=1e-5)


def test_a_score_of_a_banned_token_is_minus_infinity(policy, engine):
    group = engine.generate(questions(policy)[:1], 1, Sampling(3))[0]
    banned = replace(group.completions[0], token_ids=(policy.banned_ids[0],))
    assert engine.score([Group(group.prompt, (banned,))]) == [[[float("-inf")]]]


def test_another_prompt_is_an_error(policy, engine, monkeypatch):
    prompt = questions(policy)[0]
    assert one_slot(prompt, policy.thinker.config.audio_token_id).count(policy.thinker.config.audio_token_id) == 1
    longer = replace(prompt, samples=np.concatenate([prompt.samples, prompt.samples]))
    with pytest.raises(ValueError, match=r"question x: the rollout engine read another prompt .* first difference at"):
        engine.generate([longer], 2, Sampling(4))
    with pytest.raises(ValueError, match="question x carries no waveform"):
        engine.generate([replace(prompt, samples=None)], 2, Sampling(4))
    with pytest.raises(ValueError, match="first difference at 2"):
        check_prompt(prompt, [*prompt.prompt_ids[:2].tolist(), 0])


def test_more_prompt_tokens_than_a_batch_holds(policy):
    # a seeded prompt that is computed in two parts ended vLLM on a CPU: "CPU Generator does not use offset"
    small = make_engine(policy, arguments={"max_num_batched_tokens": 512})
    prompts = [replace(p, id=f"{p.id} {i}") for i in range(12) for p in questions(policy)]
    groups = small.generate(prompts, 4, Sampling(12))
    assert sum(len(p.prompt_ids) for p in prompts) > 2 * 512 and gap(policy, groups) <= 1e-5
    small.close()


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p"])
def test_settings_that_bias_the_ratio_are_refused_unless_asked_for(policy, name):
    value = {"top_p": 0.9, "top_k": 5, "min_p": 0.1}[name]
    with pytest.raises(ValueError, match="biased_sampling=true"):
        make_engine(policy, **{name: value})


def test_asked_for_they_work_and_are_biased(policy):
    biased = make_engine(policy, top_k=2, biased_sampling=True)
    assert gap(policy, biased.generate(questions(policy), 4, Sampling(12))) > 0.1
    biased.close()


@pytest.mark.parametrize(("ids", "reason"), [((5, 6), "length"), ((), "abort")])
def test_a_completion_cut_short_of_its_limit_is_an_error(policy, engine, monkeypatch, ids, reason):
    prompt = questions(policy)[0]
    answer = SimpleNamespace(index=0, token_ids=ids, finish_reason=reason, logprobs=[])
    out = SimpleNamespace(prompt_token_ids=prompt.prompt_ids.tolist(), outputs=[answer])
    monkeypatch.setattr(engine, "_ask", lambda requests, settings: [(0, out)])
    with pytest.raises(RolloutError, match=rf"{len(ids)} of 9 tokens: raise rollout\.max_model_len above"):
        engine.generate([prompt], 1, Sampling(9))


def test_a_missing_vllm_is_one_line(policy, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="extra cpu or gpu, or use rollout=hf"):
        make_engine(policy)


def test_a_small_kv_cache_is_one_line(policy):
    with pytest.raises(ValueError, match=r"raise rollout\.kv_cache_gib") as error:
        make_engine(policy, kv_cache_gib=0.0001)
    assert "\n" not in str(error.value)


def test_a_guest_in_the_trainers_process(policy):
    def state():
        return (random.random(), np.random.rand(), torch.rand(1).item())

    def seeded(then):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        then()
        return state()

    threads, cores, set_threads = torch.get_num_threads(), os.sched_getaffinity(0), torch.set_num_threads
    quiet = seeded(lambda: None)
    made = []
    assert seeded(lambda: made.append(make_engine(policy))) == quiet
    assert seeded(lambda: made[0].generate(questions(policy), 2, Sampling(4))) == quiet
    made[0].close()
    made[0].close()  # twice does no harm
    made.clear()
    gc.collect()
    assert torch.distributed.is_initialized()  # vLLM's own shutdown would have ended the trainer's process group
    assert (threads, cores) == (torch.get_num_threads(), os.sched_getaffinity(0))
    assert torch.set_num_threads is set_threads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: a CPU's vLLM ignores sleep")
def test_sleep_frees_memory_and_changes_nothing(checkpoint):
    policy = make_policy(checkpoint, "bfloat16", device="cuda")
    engine = make_engine(policy, kv_cache_gib=1.0)
    prompts = questions(policy)
    before = tokens(engine.generate(prompts, 4, Sampling(12)))
    assert engine.asleep == {"weights", "kv_cache"}
    asleep = torch.cuda.mem_get_info()[0]
    assert tokens(engine.generate(prompts, 1, Sampling(12, greedy=True)))  # stays awake after an evaluation
    assert not engine.asleep and asleep - torch.cuda.mem_get_info()[0] > 2**29
    assert tokens(engine.generate(prompts, 4, Sampling(12))) == before
    engine.close()
