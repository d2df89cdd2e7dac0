"""The plan against what is there: names, shapes, bytes of a forward pass; and the published run's figures by hand."""

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from grpo.batch import Completion, Group
from grpo.bench.ranks import Case, measured, model, planned
from grpo.config import ConfigError, run_name
from grpo.plan import (
    AUDIO,
    Given,
    Micro,
    kept_bytes,
    main,
    plan,
    read_shape,
    step_space,
    synced_of,
    trained_of,
    weights_of,
)
from grpo.policy import Policy
from grpo.sync.full import by_layer, weights
from grpo.sync.names import whole_groups
from grpo.sync.traffic import OMNI_7B, sync_bytes
from tests.conftest import LORA, make_clip, make_prompt, make_question

FULL = r"model\..*|lm_head\..*"
ALL = LORA | {"targets": r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"}
PLACEMENTS = ["1gpu", "4gpu_published", "4gpu_colocate", "8gpu", "2x8gpu"]


def composed(*overrides):
    if not OmegaConf.has_resolver("run_name"):
        OmegaConf.register_new_resolver("run_name", run_name)
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("train", ["experiment=audsemthinker_qa_grpo", *overrides])
    OmegaConf.resolve(cfg)
    return cfg


def make(checkpoint, lora, **more):
    return Policy(checkpoint, lora, full=FULL, prompt=make_prompt(), **more)


@pytest.mark.parametrize("lora", [LORA, ALL, None])
def test_names_and_shapes_are_the_models(checkpoint, lora):
    policy, shape = make(checkpoint, lora), read_shape(checkpoint / "config.json")
    real = {n: tuple(p.shape) for n, p in make(checkpoint, None).thinker.named_parameters()}
    mine = weights_of(shape)
    assert mine.pop(AUDIO) == (sum(torch.Size(s).numel() for n, s in real.items() if n.startswith(AUDIO)),)
    assert mine == {n: s for n, s in real.items() if not n.startswith(AUDIO)}
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert sum(trained_of(shape, lora, FULL).values()) == trained


@pytest.mark.parametrize("lora", [LORA, ALL, None])
def test_bytes_of_a_sync(checkpoint, lora):
    """The very weights that grpo/sync/full.py and Policy.adapter choose to send (their receipts: test_delta.py)."""
    policy = make(checkpoint, lora)
    said = synced_of(read_shape(checkpoint / "config.json"), lora, FULL, 4)
    found = weights(policy.model)
    members = {m for g in whole_groups(w.module for w in found if w.trained) for m in g}
    assert said["full"] == sum(w.tensor().nbytes for w in found if w.module in members)
    assert said["full, first"] == sum(w.tensor().nbytes for layer in by_layer(found) for w in layer)
    if lora:
        assert said["delta"] == said["adapter"] == sum(t.nbytes for t in policy.adapter().values())


@pytest.mark.parametrize("forward", ["shared", "separate"])
@pytest.mark.parametrize("lora", [LORA | {"dropout": 0.05}, ALL, None])
def test_what_a_forward_pass_keeps(checkpoint, lora, forward):
    policy, shape, copies = make(checkpoint, lora, forward=forward), read_shape(checkpoint / "config.json"), 4
    prompt = policy.encode(make_question("a"), make_clip(0, 2.0))
    completion = Completion(tuple(range(100, 140)), (0.0,) * 40, "", False, 0)
    batch = policy.prepare([Group(prompt, (completion,) * copies)] * 2)
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    policy.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        policy(batch)
    measured = sum(t.untyped_storage().nbytes() for t in kept.values())
    micro = Micro(2, copies, len(prompt.prompt_ids), 40, forward == "shared")
    said = kept_bytes(shape, lora, FULL, dtype="float32", micro=micro, flex=False, checkpointing=False)
    print(f"said / measured = {said / measured:.3f}")
    assert said == pytest.approx(measured, rel=0.15)


def test_checkpointing_keeps_a_layer_and_the_inputs_of_all():
    micro = Micro(1, 6, 420, 150)
    whole, some = (kept_bytes(OMNI_7B, LORA, None, dtype="bfloat16", micro=micro, flex=True, checkpointing=c)
                   for c in (False, True))  # fmt: skip
    assert some == whole // 28 + 28 * (420 + 6 * 150) * 3584 * 2 and some < whole / 10


def test_the_published_run_by_hand():
    p = plan(composed("placement=4gpu_published"), OMNI_7B, Given())
    assert p.trainer["weights"] == pytest.approx((8_255_263_744 + 2_523_136) * 2 / 3)
    assert p.trainer["optimizer"] == 2_523_136 * 12 / 3  # float32 master and two moments
    assert p.synced["delta"] == sync_bytes(OMNI_7B, ["q_proj", "v_proj"], r=8)["delta"]
    # 28 layers, keys and values, 4 heads of 128, 2 bytes; 6 questions whose prompt is kept once
    assert p.engine["keys and values of a step"] == 28 * 2 * 4 * 128 * 2 * 6 * (420 + 6 * 150)
    assert p.step["completions"] == 36 and p.step["tokens of the update"] == 6 * (420 + 6 * 150)


def test_what_a_step_of_the_optimizer_needs_by_hand():
    def needs(lora=None, **how):
        return step_space(OMNI_7B, lora, FULL, **how)

    embeddings = 152_064 * 3584  # the largest weight
    assert needs(stage=0, ranks=1, gpu=False) == 4 * 2 * embeddings
    every = needs(stage=0, ranks=1, gpu=True) / 4
    assert needs(stage=2, ranks=4, gpu=True) == 4 * every / 4 and needs(stage=2, ranks=4, gpu=False) == 8 * every / 4
    # 50 million of a rank's weights and the last to come, the gradients copied
    assert needs(stage=3, ranks=4, gpu=True) == 4 * 2 * (50_000_000 + embeddings / 4)
    assert needs(LORA | {"r": 8}, stage=3, ranks=4, gpu=False) == 4 * 3 * 2_523_136 / 4
    assert needs(LORA | {"r": 8}, stage=3, ranks=4, gpu=True, offload=True) == 4 * 2 * 2_523_136 / 4  # the host's


@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_fits_its_gpus_and_shares_evenly(name, capsys):
    cfg = composed(f"placement={name}")
    place = cfg.placement
    assert place.name == name and cfg.generations == 6 and cfg.questions % place.ranks == 0
    if name == "1gpu":
        assert (cfg.engine.stage, cfg.questions) == (2, 8)
    else:
        assert cfg.questions == 2 * place.ranks and cfg.engine.stage == 3  # two questions a device
    if not cfg.rollout.get("sleep"):  # then the engine is on a GPU of its own
        assert cfg.rollout._target_.endswith("VLLMServer") and cfg.rollout.gpus not in range(place.ranks)
    p = plan(cfg, OMNI_7B, Given())
    assert sum(p.trainer.values()) < 80e9 and p.engine["room for keys and values"] > p.engine["the same at max_tokens"]


def test_offload_moves_the_states_to_the_host():
    p = plan(composed("placement=4gpu_colocate", "engine=zero3_offload"), OMNI_7B, Given())
    assert "weights" in p.host and "weights" not in p.trainer and "optimizer" in p.host
    assert p.host["optimizer's step"] and not any("step" in name for name in p.trainer)


def test_the_command(checkpoint, capsys):
    main([f"model.path={checkpoint}", "--prompt", "60", "--completion", "20"])
    assert "memory of a training rank" in (text := capsys.readouterr().out) and "bytes of a sync" in text
    for words, said in (["model.path=owner/unknown"], "no folder with a config.json"), (["stepz=1"], "stepz: there is"):
        with pytest.raises(SystemExit, match=said):
            main(["experiment=audsemthinker_qa_grpo", *words])
    with pytest.raises(ConfigError, match="--device tpu"):
        plan(composed(), OMNI_7B, Given(device="tpu"))


@pytest.mark.slow
def test_memory_of_a_rank_in_a_real_step(tmp_path):
    """The rest of the table in docs/plan.md: `python -m grpo.bench zero`."""
    model(tmp_path)
    case = Case(3, 2, full=True, live=0)
    peak = max(rank["peak"] for rank in measured(tmp_path, case))
    assert planned(tmp_path, case) == pytest.approx(peak, rel=0.15)
