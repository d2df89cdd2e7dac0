"""One weight, four spellings; and what goes through the worker's door."""

import base64

import pytest
import torch
from safetensors.torch import save, save_file

from grpo.sync.names import (
    SyncError,
    adapter_for_vllm,
    checkpoint_name,
    group_of,
    module_of,
    whole_groups,
)
from tests.grpo.vllm_engines import make_policy, needs_vllm

Q = "model.layers.0.self_attn.q_proj"


def test_spellings():
    assert checkpoint_name(f"base_model.model.{Q}.base_layer.weight") == f"thinker.{Q}.weight"
    assert checkpoint_name(f"{Q}.bias") == f"thinker.{Q}.bias"
    assert adapter_for_vllm(f"base_model.model.{Q}.lora_A.weight") == f"base_model.model.thinker.{Q}.lora_A.weight"
    assert module_of(f"base_model.model.{Q}.lora_B.weight") == (f"thinker.{Q}", "B")


def test_other_names_are_errors():
    with pytest.raises(SyncError, match="adapter's weight"):
        checkpoint_name(f"base_model.model.{Q}.lora_A.default.weight")
    for name in (f"{Q}.lora_A.weight", f"base_model.model.{Q}.weight", f"base_model.model.{Q}.lora_C.weight"):
        with pytest.raises(SyncError, match="not peft's name"):
            module_of(name)


def test_fused_groups():
    assert group_of("a.q_proj") == ("a.q_proj", "a.k_proj", "a.v_proj")
    assert group_of("a.up_proj") == ("a.gate_proj", "a.up_proj") and group_of("a.o_proj") == ("a.o_proj",)
    assert whole_groups(["a.v_proj", "a.q_proj", "a.down_proj", "b.k_proj"]) == [
        ("a.q_proj", "a.k_proj", "a.v_proj"), ("a.down_proj",), ("b.q_proj", "b.k_proj", "b.v_proj"),
    ]  # fmt: skip


@pytest.mark.parametrize("lora", [True, False])
def test_every_weight_of_the_trainer_is_in_the_checkpoint(checkpoint, lora):
    from safetensors.torch import load_file

    from grpo.sync.full import by_layer, weights

    policy = make_policy(checkpoint, lora=lora)
    found = {w.name: w for w in weights(policy.model)}
    stored = {n: t for n, t in load_file(checkpoint / "model.safetensors").items() if ".visual." not in n}
    assert found.keys() == stored.keys() and all(found[n].base.shape == t.shape for n, t in stored.items())
    assert [len({w.layer for w in layer}) for layer in by_layer(list(found.values()))] == [1] * len(
        {w.layer for w in found.values()}
    )


@needs_vllm
def test_the_three_ways_in(tmp_path, monkeypatch):
    from grpo.sync.worker import received

    tensors = {"a": torch.arange(3.0)}
    (tmp_path / "inside").mkdir()
    save_file(tensors, tmp_path / "inside" / "x.safetensors")
    save_file(tensors, tmp_path / "y.safetensors")
    data = base64.b64encode(save(tensors)).decode()
    inside = str(tmp_path / "inside" / "x.safetensors")
    with pytest.raises(SyncError, match="not inside"):  # no folder was given at the start
        received(None, inside, None)
    monkeypatch.setenv("GRPO_SYNC_DIR", str(tmp_path / "inside"))
    for got in (received(tensors, None, None), received(None, inside, None), received(None, None, data)):
        assert torch.equal(got["a"], tensors["a"])
    for path in (tmp_path / "y.safetensors", tmp_path / "inside" / ".." / "y.safetensors"):
        with pytest.raises(SyncError, match="not inside"):
            received(None, str(path), None)
    with pytest.raises(SyncError, match="in one way"):
        received(tensors, inside, None)
