"""`delta` does not drift: after 1,000 random syncs the engine is, bit for bit, one that loaded the merged checkpoint.

And what each strategy sends, measured on the tiny model and computed for the 7B one.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.rollout import Sampling
from grpo.sync import worker
from grpo.sync.adapter import Adapter
from grpo.sync.delta import Delta
from grpo.sync.full import Full
from grpo.sync.merge import merged
from grpo.sync.names import checkpoint_name
from grpo.sync.traffic import OMNI_7B, Shape, sync_bytes
from tests.conftest import OneRank
from tests.grpo.vllm_engines import make_engine, make_policy, needs_vllm, questions, randomise

SYNCS = 1000


@pytest.fixture(scope="module")
def policy(checkpoint):
    return make_policy(checkpoint)


@pytest.fixture(scope="module")
def engine(policy):
    made = make_engine(policy)
    yield made
    made.close()


def peft_merged(policy):
    """The adapted matrices as peft itself merges them, by checkpoint name."""
    policy.model.merge_adapter()
    found = {checkpoint_name(n): p.detach().clone() for n, p in policy.model.named_parameters() if ".base_layer." in n}
    policy.model.unmerge_adapter()
    return found


def logps(engine, prompts):
    groups = engine.generate(prompts, 4, Sampling(12, seed=1))
    return [(c.token_ids, c.sampler_logp) for g in groups for c in g.completions]


@needs_vllm
def test_a_thousand_syncs_later_it_is_a_freshly_merged_model(checkpoint, policy, engine, tmp_path, monkeypatch):
    loaded = {}
    load = worker.Bridge.bridge_load

    def watched(self, version, tensors=None, path=None, data=None):
        loaded.update({n: t.clone() for n, t in tensors.items()} if version == SYNCS else {})
        return load(self, version, tensors, path, data)

    monkeypatch.setattr(worker.Bridge, "bridge_load", watched)
    sync = Delta(policy, OneRank(policy), engine)
    kept = {n: p.detach().clone() for n, p in policy.named_parameters() if "lora_" not in n}
    for version in range(1, SYNCS + 1):
        randomise(policy, seed=version)
        sync.push(version)
    assert all(torch.equal(p, kept[n]) for n, p in policy.named_parameters() if n in kept)

    wanted = peft_merged(policy)
    matrices = {n for n in wanted if n.endswith(".weight")}
    assert len(matrices) == 10 and all(torch.equal(loaded[n], wanted[n]) for n in matrices)

    fresh_folder = tmp_path / "merged"
    shutil.copytree(checkpoint, fresh_folder)
    tensors = load_file(fresh_folder / "model.safetensors")
    assert not any(torch.equal(tensors[n], wanted[n]) for n in matrices)
    save_file(tensors | wanted, fresh_folder / "model.safetensors", metadata={"format": "pt"})
    fresh = make_engine(make_policy(fresh_folder, lora=False))
    mine, theirs = engine_weights(engine), engine_weights(fresh)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    prompts = questions(policy)
    assert logps(engine, prompts) == logps(fresh, prompts)
    fresh.close()


def engine_weights(engine):
    """vLLM's parameters as they are, packed by its kernels."""
    return engine.llm.apply_model(lambda model: {n: p.detach().clone() for n, p in model.named_parameters()})[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_merge_is_pefts(checkpoint, dtype):
    policy = make_policy(checkpoint, dtype)
    randomise(policy, 1)
    modules = {checkpoint_name(n): m for n, m in policy.model.named_modules() if hasattr(m, "lora_A")}
    ours = {
        n: merged(m.base_layer.weight, m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"])
        for n, m in modules.items()
    }
    theirs = peft_merged(policy)
    assert ours and all(torch.equal(w, theirs[f"{n}.weight"]) for n, w in ours.items())


@needs_vllm
def test_bytes_of_a_sync(policy, engine):
    adapters = make_engine(policy, adapters=True)
    one = OneRank(policy)
    full = Full(policy, one, engine)
    receipts = {"full, first": full.push(1), "full": full.push(2), "delta": Delta(policy, one, engine).push(3),
                "adapter": Adapter(policy, one, adapters).push(4)}  # fmt: skip
    adapters.close()
    config = policy.thinker.config
    text, audio = config.text_config, config.audio_config
    shape = Shape(
        hidden=text.hidden_size, layers=text.num_hidden_layers, heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads, head_dim=32, intermediate=text.intermediate_size, vocab=text.vocab_size,
        audio_layers=audio.encoder_layers, audio_hidden=audio.d_model, audio_intermediate=audio.encoder_ffn_dim,
    )  # fmt: skip
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    assert {name: r.bytes for name, r in receipts.items()} == sync_bytes(shape, targets, r=4, itemsize=4)


def test_bytes_of_the_7b_model_by_hand():
    got = sync_bytes(OMNI_7B, ["q_proj", "v_proj"], r=8)
    # A [8, 3584] and B [3584, 8] of q, A [8, 3584] and B [512, 8] of v, 28 layers, 2 bytes
    assert got["adapter"] == got["delta"] == 28 * 8 * (3584 + 3584 + 3584 + 512) * 2 == 5_046_272
    # whole q+k+v with their biases
    assert got["full"] == 28 * (3584 * 3584 + 3584 + 2 * (512 * 3584 + 512)) * 2 == 925_102_080
    assert 16.4e9 < got["full, first"] < 16.7e9
