"""Whole runs of grpo.train that train whole weights: same numbers at every stage, resume, export."""

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from grpo.config import ConfigError
from grpo.engine import Engine, start_distributed, zero_config
from grpo.export import main as export
from grpo.load import find, open_policy, prompt_of
from grpo.policy import Policy
from grpo.run import lora_of
from tests.conftest import make_prompt
from tests.test_train import SMALL, lines, timeless, train

slow = pytest.mark.slow  # whole runs
WHOLE = [*(o for o in SMALL if not o.startswith(("model.lora", "steps", "updates"))), "model.lora=null", "steps=2",
         "optim.schedule.lr=1e-3", "eval.every=2", "checkpoint.every=1"]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def straight(work):
    return train(work, "name=straight", base=WHOLE).stdout


def close(mine, theirs):
    """Like runs up to rounding; the second step's numbers follow AdamW's first, which amplifies it."""
    for a, b in zip(mine, theirs, strict=True):
        for key in a.keys() & b.keys():
            assert a[key] == pytest.approx(b[key], abs=2e-4, rel=2e-3), (a["step"], key)


@slow
def test_sharded_stopped_and_resumed_it_is_the_same_run(work, straight):
    assert "weights in 27 tensors" in straight and "reference held as a copy" in straight
    train(work, "name=sharded", "engine=zero3", "stop_at=1", base=WHOLE, ranks=2)
    train(work, "name=sharded", "engine=zero2", "resume=true", base=WHOLE)
    close(timeless(lines(work, "sharded")), timeless(lines(work, "straight")))
    first, second = timeless(lines(work, "straight"))[1:]
    assert abs(first["kl"]) < 1e-6 < second["kl"]  # the reference is the start, not the policy
    state = {n: load_file(work / "outputs" / n / "checkpoints/step-000002/trainer.safetensors")
             for n in ("straight", "sharded")}  # fmt: skip
    assert state["straight"].keys() == state["sharded"].keys()
    assert not any(k.endswith("/reference") for k in state["straight"])  # the checkpoint it started from holds it


@slow
def test_its_export_is_the_policy(work, straight, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    run, out = work / "outputs/straight", tmp_path / "out"
    found = find(run, "last")
    assert export([str(run), str(out), "--checkpoint", "last"]) == 0
    masters = load_file(run / "checkpoints/step-000002/trainer.safetensors")
    for folder in (found, find(out)):
        weights = dict(open_policy(folder, prompt_of(folder)).thinker.named_parameters())
        for key in [k for k in masters if k.endswith("/master")]:
            assert torch.equal(weights[key.removesuffix("/master").removeprefix("model.")], masters[key])
    card = (out / "README.md").read_text()
    assert "whole weights" in card and f"base_model: {found.origin}" in card and "tiny-" in found.origin


def test_what_trains_nothing_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="nothing would be trained"):
        lora_of(OmegaConf.create({"seed": 0, "model": {"lora": None, "full": None}}))
    with pytest.raises(ValueError, match=r"model\.full='nothing' matches no weight"):
        Policy(checkpoint, None, full="nothing", prompt=make_prompt())


def test_without_adapter_and_copy_there_is_no_reference(checkpoint):
    start_distributed()
    policy = Policy(checkpoint, None, full=r"lm_head\..*", prompt=make_prompt())
    engine = Engine(policy, torch.optim.SGD, zero_config(stage=0, clip=0, dtype="float32", world=1))
    with pytest.raises(RuntimeError, match="no reference policy"), engine.reference():
        pass


@pytest.mark.parametrize("name", ["adapter", "delta"])
def test_syncs_of_adapters_are_refused(name):
    from types import SimpleNamespace

    from grpo.sync.adapter import Adapter
    from grpo.sync.delta import Delta

    with pytest.raises(ValueError, match=r"model\.lora is null: use sync=full"):
        {"adapter": Adapter, "delta": Delta}[name](SimpleNamespace(has_adapter=False), None, None)
