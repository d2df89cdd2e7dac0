"""Each way in which a sync goes silently wrong: with the remedy it is exact, without it wrong, and the probe sees it.

The tests take one remedy away and must then see the fault: a remedy that is not needed, or no longer in place, fails.
"""

import pytest
import torch

from grpo.rollout import RolloutError, Sampling
from grpo.sync import adapter as adapter_module
from grpo.sync.adapter import Adapter
from grpo.sync.delta import Delta
from grpo.sync.full import Full
from grpo.sync.names import SyncError, module_of
from tests.conftest import OneRank
from tests.grpo.vllm_engines import gap, make_engine, make_policy, needs_vllm, questions, randomise

pytestmark = needs_vllm
GOOD, BAD = 1e-5, 1e-2


@pytest.fixture(scope="module")
def policy(checkpoint):
    return make_policy(checkpoint)


@pytest.fixture(scope="module")
def plain(policy):
    engine = make_engine(policy)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def lora(policy):
    engine = make_engine(policy, adapters=True)
    yield engine
    engine.close()


@pytest.fixture
def base(policy):
    """Puts the policy's base weights back after a test that changes them."""
    kept = {n: p.detach().clone() for n, p in policy.named_parameters() if "lora_" not in n}
    yield
    with torch.no_grad():
        for n, p in policy.named_parameters():
            if n in kept:
                p.copy_(kept[n])
    policy.audio_cache.clear()


def sample(engine, policy, step=0):
    return engine.generate(questions(policy), 4, Sampling(10, seed=3, step=step))


def settled(strategy, policy, engine, **probe):
    """A strategy whose engine holds seed 1's weights and has sampled from them, and those samples."""
    sync = strategy(policy, OneRank(policy), engine, **{"probe_every": 1} | probe)
    randomise(policy, 1)
    sync.push(1)
    groups = sample(engine, policy)
    assert gap(policy, groups) <= GOOD
    return sync, groups


def test_stale_prefix_cache(policy, plain, monkeypatch):
    sync, groups = settled(Delta, policy, plain)
    randomise(policy, 2)
    with monkeypatch.context() as m:
        m.setattr(plain.llm, "reset_prefix_cache", lambda: True)
        with pytest.raises(SyncError, match="log-probs differ"):
            sync.push(2, groups)
        assert gap(policy, sample(plain, policy)) > BAD
    sync.push(3, groups)
    assert gap(policy, sample(plain, policy)) <= GOOD


def test_stale_audio_embeddings(policy, plain, base, monkeypatch):
    _, groups = settled(Full, policy, plain)
    with torch.no_grad():
        for name, p in policy.thinker.named_parameters():
            if name.startswith("audio_tower") and p.dim() > 1:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    policy.audio_cache.clear()  # the trainer's own: a tower that is trained has none
    with monkeypatch.context() as m:
        m.setattr(plain.llm.llm_engine, "reset_encoder_cache", lambda: None)
        with pytest.raises(SyncError, match="log-probs differ"):
            Full(policy, OneRank(policy), plain, probe_every=1).push(
                2, groups
            )  # a first sync: sends every weight, the tower's too
        assert gap(policy, sample(plain, policy)) > BAD
    Full(policy, OneRank(policy), plain).push(3, groups)
    assert gap(policy, sample(plain, policy)) <= GOOD


def test_back_to_the_checkpoint(policy, plain):
    # the tower of the test before is gone again: later tests start from what the checkpoint holds
    Full(policy, OneRank(policy), plain).push(4)
    assert gap(policy, sample(plain, policy)) <= GOOD


def test_part_of_a_fused_group(policy, plain, monkeypatch):
    sync, groups = settled(Delta, policy, plain)
    randomise(policy, 2)
    q = "thinker.model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(SyncError, match=r"k_proj\.bias' is missing"):
        part = {q: torch.zeros(64, 64), q.replace("weight", "bias"): torch.zeros(64)}
        plain.send("bridge_load", part, version=2)
    from vllm.model_executor.model_loader.reload import meta as reload_meta

    with monkeypatch.context() as m:
        m.setattr("grpo.sync.worker.whole_groups", lambda modules: [(m,) for m in modules])
        # The parts that did not come are fresh memory, which may by chance still hold the right values.
        fresh = reload_meta.materialize_meta_tensor
        m.setattr(reload_meta, "materialize_meta_tensor", lambda t: fresh(t).normal_(0, 0.1))
        with pytest.raises(SyncError, match="log-probs differ"):
            sync.push(2, groups)
        assert gap(policy, sample(plain, policy)) > BAD
    sync.push(3, groups)
    assert gap(policy, sample(plain, policy)) <= GOOD


def test_adapter_under_a_wrong_name(policy, lora, monkeypatch):
    sync, groups = settled(Adapter, policy, lora)
    randomise(policy, 2)
    with monkeypatch.context() as m:
        m.setattr(adapter_module, "adapter_for_vllm", lambda name: name)  # peft's own names
        with pytest.raises(SyncError, match="vLLM has no module for 10 of 10"):
            sync.push(2, groups)
        m.setattr("grpo.sync.worker.lora_modules", lambda manager: Everything())
        with pytest.raises(SyncError, match="log-probs differ"):  # loads without a word, and changes nothing
            sync.push(3, groups)
        assert gap(policy, sample(lora, policy)) > BAD
    sync.push(4, groups)
    assert gap(policy, sample(lora, policy)) <= GOOD


class Everything(set):
    """A set in which everything is: what a check that always passes compares with."""

    def __rsub__(self, other):
        return set()


def test_the_engine_writes_into_the_trainers_adapter(policy, lora, monkeypatch):
    sync, _ = settled(Adapter, policy, lora)
    randomise(policy, 2)
    mine = {n: p.detach().clone() for n, p in policy.adapter().items()}

    def changed():
        return [n for n, p in policy.adapter().items() if not torch.equal(p, mine[n])]

    sync.push(2)
    assert not changed()
    with monkeypatch.context() as m:
        m.setattr("grpo.sync.worker.own", dict)  # no copies
        sync.push(3)
        assert changed() and all("lora_B" in n for n in changed())  # alpha/r was multiplied into B
    randomise(policy, 2)


@pytest.mark.parametrize("strategy", [Adapter, Delta, Full])
def test_what_was_sent_is_not_shared(policy, plain, lora, strategy):
    # the trainer's next step must not reach the engine before the next sync
    engine = lora if strategy is Adapter else plain
    _, groups = settled(strategy, policy, engine)
    randomise(policy, 2)
    engine.refresh(1, audio_changed=True)
    again = sample(engine, policy)
    assert [c.sampler_logp for g in again for c in g.completions] == [
        c.sampler_logp for g in groups for c in g.completions
    ]


def test_a_sampled_placeholder(policy, plain, base, monkeypatch):
    audio = policy.thinker.config.audio_token_id
    randomise(policy, 1)
    with torch.no_grad():  # by far the likeliest token wherever the hidden state points this way
        head = policy.thinker.lm_head.weight
        head[audio] = 40 * head.abs().mean() * torch.sign(head[5])
    Full(policy, OneRank(policy), plain).push(1)
    groups = sample(plain, policy)
    sampled = {t for g in groups for c in g.completions for t in c.token_ids}
    assert not sampled & set(policy.banned_ids) and gap(policy, groups) <= GOOD
    with monkeypatch.context() as m:
        m.setattr(policy, "banned_ids", [])
        groups = sample(plain, policy)
        assert audio in {t for g in groups for c in g.completions for t in c.token_ids}
        with pytest.raises(ValueError, match="audio placeholders"):
            gap(policy, groups)


def test_a_key_that_matches_nothing(policy, plain, lora):
    Full(policy, OneRank(policy), plain).push(1)
    for name in ("thinker.model.layers.9.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        with pytest.raises(SyncError, match="is no weight of the checkpoint"):
            plain.send("bridge_load", {name: torch.zeros(1)}, version=2)
    tensors = {n.replace("layers.1.", "layers.7."): t for n, t in policy.adapter().items()}
    scale = {module_of(n)[0]: 2.0 for n in tensors}
    with pytest.raises(SyncError, match=r"layers\.7\.[a-z_.]+ came with"):
        plain.send("bridge_delta", tensors, version=2, scale=scale)
    with pytest.raises(SyncError, match="no module for 5 of 10"):
        sync = Adapter(policy, OneRank(policy), lora)
        lora.load_adapter(2, {adapter_module.adapter_for_vllm(n): t for n, t in tensors.items()}, sync.config)
    assert gap(policy, sample(plain, policy)) <= GOOD  # what was refused has changed nothing


def test_a_failed_push_is_an_error_on_every_rank(policy, plain):
    class TwoRanks(OneRank):
        def gather(self, items):
            return [*items, "rank 1: its engine is gone"]

    with pytest.raises(SyncError, match=r"version 7 did not reach the engine \(delta\): rank 1: its engine is gone"):
        Delta(policy, TwoRanks(policy), plain).push(7)


def test_a_probe_that_fails_on_one_rank_fails_on_all(policy, plain):
    class TwoRanks(OneRank):
        def together(self, call, error):
            call()
            raise error("rank 1: its engine is gone")

    sync, groups = settled(Delta, policy, plain)
    sync.probe.engine = TwoRanks(policy)
    with pytest.raises(RolloutError, match="rank 1: its engine is gone"):
        sync.push(2, groups)


def test_what_an_earlier_run_sent_can_be_taken_back(policy, plain):
    randomise(policy, 1)
    Full(policy, OneRank(policy), plain).push(1)
    randomise(policy, 0, size=0.0)
    assert gap(policy, sample(plain, policy)) > BAD
    assert plain.call("bridge_reset")[0] > 20 and plain.call("bridge_version") == [0]
    plain.refresh(0, audio_changed=True)
    assert gap(policy, sample(plain, policy)) <= GOOD  # the checkpoint's own
    assert plain.call("bridge_reset") == [0]


def test_the_probe_has_its_turns(policy, plain):
    sync, groups = settled(Delta, policy, plain, probe_every=3)
    errors = [sync.push(v, groups).probe_error for v in range(2, 9)]
    # version 2, the first with completions to compare, as after a resume; then 4 and 7
    assert [e is None for e in errors] == [False, True, False, True, True, False, True]
    never = Delta(policy, OneRank(policy), plain, probe_every=0)
    assert never.push(9, groups).probe_error is None
