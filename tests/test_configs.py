"""Every YAML composes, binds to its function's signature and builds; wrong keys are one clear line."""

import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from grpo.config import ConfigError, build, build_objective, check_call, check_targets, check_type, run_name, settings

CONF = Path(__file__).parents[1] / "conf"
# conf/cluster is no part of a run's config: tests/launch/test_slurm.py reads each of them
GROUPS = sorted(p.parent.name + "=" + p.stem for p in CONF.glob("*/*.yaml") if p.parent.name != "cluster")
if not OmegaConf.has_resolver("run_name"):
    OmegaConf.register_new_resolver("run_name", run_name)


SFT = {"experiment=audsemthinker_qa"}  # for grpo.sft, the others for grpo.train


def composed(*overrides, main="train"):
    with initialize_config_module("conf", version_base="1.3"):
        return compose(main, list(overrides))


def fill(overrides):
    """Values for keys that a user must give."""
    return [*overrides, "data.train.path=x", "data.eval.path=y"] if "data=manifest" in overrides else overrides


@pytest.mark.parametrize("group", GROUPS)
def test_every_yaml_composes_and_fits_its_signatures(group):
    cfg = composed(*fill([group]), main="sft" if group in SFT else "train")
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_targets(cfg)
    if group not in SFT:
        settings(cfg)
    for key in ("prompt",) if group in SFT else ("loss", "advantage", "rewards", "prompt"):
        build(cfg[key], key)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONF)))
def test_every_yaml_says_what_it_is(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ") and len(lines[0]) > 12


def test_published_values_of_the_supervised_stage():
    cfg = composed("experiment=audsemthinker_qa", main="sft")
    assert (cfg.model.lora.r, cfg.model.lora.alpha, cfg.optim.schedule.lr, cfg.epochs) == (8, 16, 2e-4, 1)
    assert (cfg.questions, cfg.max_tokens, cfg.optim.clip, cfg.target.missing) == (4, 768, 0.0, None)


def test_published_values():
    cfg = composed("experiment=audsemthinker_qa_grpo")
    assert (cfg.model.path, cfg.model.dtype) == ("Qwen/Qwen2.5-Omni-7B", "bfloat16")
    assert (cfg.model.lora.r, cfg.model.lora.alpha, cfg.model.lora.dropout) == (8, 16, 0.05)
    assert (cfg.generations, cfg.loss.beta, cfg.questions, cfg.think_words) == (6, 0.01, 8, 25)
    assert (cfg.loss.surrogate.clip_low, cfg.loss.surrogate.clip_high) == (0.2, 0.2)
    assert (cfg.optim.schedule.lr, cfg.engine.stage, cfg.temperature) == (1e-6, 3, 0.9)
    assert (cfg.advantage.ddof, cfg.advantage.eps) == (1, 1e-4)
    assert "25 words" in " ".join(
        p["text"] for m in build(cfg.prompt, "prompt").messages(_question()) for p in m["content"] if "text" in p
    )


def _question():
    from tests.conftest import make_question

    return make_question("x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+loss.betta=1", "loss.betta.*did you mean 'beta'"),
        ("loss.beta=abc", "loss.beta must be float, got 'abc'"),
        ("loss.surrogate._target_=grpo.loss.surrogate.cliped", "loss.surrogate._target_: cannot import"),
        ("+loss.surrogate.cliplow=1", "did you mean 'clip_low'"),
        ("advantage.ddof=x", "advantage.ddof must be int"),
    ],
)
def test_a_wrong_component_is_named_before_anything_starts(override, message):
    with pytest.raises(ConfigError, match=message):
        check_targets(composed(override))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=many", "steps must be int, got 'many'"),
        ("seed=1.5", "seed must be int"),
        ("resume=maybe", "resume must be bool"),
        ("eval.every=0", "eval.every must be at least 1"),
        ("generations=1", "group of one"),
        ("temperature=0", "temperature must be above 0"),
        ("micro_tokens=0", "micro_tokens must be at least 1, or null"),
    ],
)
def test_a_wrong_daily_key_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        settings(composed(override))


def test_uneven_splits_are_refused():
    s = settings(composed("questions=6"))
    s.check_ranks(3)
    with pytest.raises(ConfigError, match="4 ranks"):
        s.check_ranks(4)


@pytest.mark.parametrize("loss", ["tis", "icepop", "sequence_tis"])
def test_a_correction_beside_a_loss_that_corrects_is_refused(loss):
    build_objective(composed(f"loss={loss}"))
    with pytest.raises(ConfigError, match=r"loss\.weights\..* already weighs .* rollout\.correction=mask"):
        build_objective(composed(f"loss={loss}", "rollout.correction=mask"))
    assert "sampler" in build_objective(composed("loss=grpo", "rollout.correction=mask")).weights


def test_a_partial_with_missing_arguments_is_refused_at_the_start():
    from grpo.loss.aggregate import constant

    with pytest.raises(ConfigError, match=r"loss\.aggregate.*length"):
        check_call("loss.aggregate", constant, "loss_NT", "x")


def test_type_checks():
    assert check_type("k", 3, float) == 3.0
    assert check_type("k", None, int | None) is None
    with pytest.raises(ConfigError, match="k must be int or null"):
        check_type("k", True, int | None)
    with pytest.raises(ConfigError, match="k must be float"):
        check_type("k", True, float)


def test_components_in_lists_are_checked_too():
    node = OmegaConf.create({"parts": [{"_target_": "grpo.optim.Schedule", "warmpu": 1}]})
    with pytest.raises(ConfigError, match=r"parts\[0\]\.warmpu: .*did you mean 'warmup'"):
        check_targets(node)


@pytest.mark.parametrize("override", ["beta=-1", "loss.beta=-1"])
def test_what_a_component_refuses_is_reported_with_its_key(override):
    with pytest.raises(ConfigError, match=r"loss: loss\.beta must be at least 0, got -1"):
        build(composed(override).loss, "loss")


def test_run_name(tmp_path):
    assert run_name("mine", True, str(tmp_path)) == "mine"
    with pytest.raises(ConfigError, match="no run under"):
        run_name(None, True, str(tmp_path))
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "last.json").write_text("{}")
    assert run_name(None, True, str(tmp_path)) == "old"
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    (tmp_path / "new" / "checkpoints" / "last.json").write_text("{}")
    os.utime(tmp_path / "old" / "checkpoints" / "last.json", (0, 0))
    assert run_name(None, True, str(tmp_path)) == "new"
