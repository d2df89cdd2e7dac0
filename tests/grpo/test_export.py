"""Exports: merged by the shared rule, in layouts that load, with a card whose snippet runs as pasted."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grpo.answer import ask, listener
from grpo.config import ConfigError
from grpo.export import export, full_config, main
from grpo.load import find, open_policy, prompt_of
from grpo.policy import Policy
from grpo.predict import prompt_hash
from grpo.rollout import Sampling
from grpo.rollout.hf import HFRollout
from tests.conftest import LORA, make_clip, make_prompt, make_question
from tests.grpo.vllm_engines import TARGETS, gap, make_engine, needs_vllm, questions, tokens

GREEDY = Sampling(16, greedy=True)


def make_run(checkpoint, folder):
    """A run's folder with one checkpoint, as grpo.train leaves it."""
    lora = LORA | {"targets": TARGETS}
    policy = Policy(str(checkpoint), lora, prompt=make_prompt())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    policy.save_adapter(folder / "checkpoints" / "step-000007")
    (folder / "checkpoints" / "last.json").write_text('{"folder": "step-000007"}')
    config = {"prompt": {"_target_": "data.prompt.Prompt", "system": None, "instruction": "Listen."}, "max_tokens": 16,
              "model": {"dtype": "float32", "lora": lora}, "steps": 7, "questions": 2, "seed": 0,
              "data": {"audio": "real"}, "optim": {"schedule": {"lr": 0.1}}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    return make_run(checkpoint, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def out(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "mine"
    assert main([str(run), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(run):
    found = find(run)
    return open_policy(found, prompt_of(found))


def exported(out, **changes):
    found = find(out)
    return open_policy(found, prompt_of(found), **changes)


def answers(policy):
    return HFRollout(policy).generate(questions(policy), 1, GREEDY)


def gap_to(policy, groups):
    return gap(policy, groups)


def test_what_answers_is_known_by_its_weights(checkpoint, run, out, tmp_path):
    found = find(run)
    assert found.identity["base_sha256"] == find(checkpoint).identity["base_sha256"] and found.identity["step"] == 7
    merged = find(out).identity  # under one name and path another day other weights may lie
    assert merged["adapter_sha256"] is None and merged["base_sha256"] not in (None, found.identity["base_sha256"])
    assert find("owner/name").identity["base_sha256"] is None
    with pytest.raises(ConfigError, match=r"'first' of .* must be best, last or the number of a step"):
        find(run, "first")


def test_merged_as_peft_merges(checkpoint, run, out):
    peft = Policy(str(checkpoint), LORA | {"targets": TARGETS}, prompt=make_prompt())
    peft.load_adapter(load_file(run / "checkpoints" / "step-000007" / "adapter_model.safetensors"))
    wanted = {f"thinker.{k}": v for k, v in peft.model.merge_and_unload().state_dict().items()}
    got = load_file(out / "model.safetensors")
    assert all(torch.equal(got[k], v) for k, v in wanted.items())
    base = load_file(checkpoint / "model.safetensors")
    assert got.keys() == base.keys() and sum(not torch.equal(got[k], base[k]) for k in base) == 10  # 5 x 2 layers


def test_export_in_transformers(trained, out):
    groups = answers(trained)
    policy = exported(out)
    assert tokens(answers(policy)) == tokens(groups) and gap_to(policy, groups) <= 1e-5
    assert prompt_hash(policy) == prompt_hash(trained) == json.loads((out / "prompt.json").read_text())["prompt_hash"]


def test_adapter_in_transformers(trained, out, run):
    groups = answers(trained)
    policy = exported(out / "adapter")
    assert hasattr(policy.model, "peft_config")
    assert tokens(answers(policy)) == tokens(groups) and gap_to(policy, groups) <= 1e-5
    off = open_policy(find(run), make_prompt(), lora=False)
    assert tokens(answers(off)) != tokens(groups)  # the adapter matters


def test_the_layout_is_the_full_models(out):
    """Config and names are those of the full class. (Its from_pretrained wants spk_dict.pt, a pickle for speech.)"""
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    model = Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig.from_pretrained(out))
    model.load_state_dict(load_file(out / "model.safetensors"))  # strict
    assert not model.has_talker


@needs_vllm
@pytest.mark.slow
def test_export_in_vllm(trained, out):
    groups, policy = answers(trained), exported(out)
    engine = make_engine(policy)
    try:
        assert tokens(engine.generate(questions(policy), 1, GREEDY)) == tokens(groups)
        logp = [x for g in engine.score(groups) for row in g for x in row]
        assert logp == pytest.approx([x for g in groups for c in g.completions for x in c.sampler_logp], abs=1e-5)
    finally:
        engine.close()


@needs_vllm
@pytest.mark.slow
def test_adapter_in_vllm(trained, out, checkpoint):
    """vLLM's own loader reads adapter-vllm/ from the folder."""
    from vllm.lora.request import LoRARequest

    groups = answers(trained)
    engine = make_engine(trained, adapters=True)
    try:
        engine.adapter = LoRARequest("exported", 1, str(out / "adapter-vllm"))
        assert tokens(engine.generate(questions(trained), 1, GREEDY)) == tokens(groups)
        logp = [x for g in engine.score(groups) for row in g for x in row]
        assert logp == pytest.approx([x for g in groups for c in g.completions for x in c.sampler_logp], abs=1e-5)
    finally:
        engine.close()


def test_the_published_layout_loads_and_is_converted(checkpoint, tmp_path, capsys):
    """A bare Thinker with only a tokenizer beside it, as gijs/audsemthinker-qa-grpo is."""
    whole = Policy(str(checkpoint), None, prompt=make_prompt())
    bare = tmp_path / "bare"
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(bare)
    whole.tokenizer.save_pretrained(bare)
    assert json.loads((bare / "config.json").read_text())["model_type"] == "qwen2_5_omni_thinker"
    with safe_open(bare / "model.safetensors", "pt") as tensors:
        assert not any(k.startswith("thinker.") for k in tensors.keys())
    loaded = Policy(str(bare), None, prompt=make_prompt(), processor=str(checkpoint))
    assert tokens(answers(loaded)) == tokens(answers(whole))
    assert main([str(bare), str(tmp_path / "no"), "--prompt", "card"]) == 2
    assert "has a tokenizer only" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main([str(bare), str(tmp_path / "full"), "--prompt", "short", "--processor", str(checkpoint)]) == 0
    got, wanted = load_file(tmp_path / "full" / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in got)
    assert tokens(answers(exported(tmp_path / "full"))) == tokens(HFRollout(whole).generate(
        [exported(tmp_path / "full").encode(make_question(n), make_clip(i, 0.8 + 0.4 * i))
         for i, n in enumerate(("x", "yy", "a longer name"))], 1, GREEDY))  # fmt: skip


def test_the_cards_snippet_runs_as_pasted(out, tmp_path):
    card = (out / "README.md").read_text()
    # A random model likes special tokens, which our sampler bans and transformers does not: here their logits are 0
    tensors = load_file(out / "model.safetensors")
    banned = [i for i in exported(out).banned_ids if i < len(tensors["thinker.lm_head.weight"])]
    tensors["thinker.lm_head.weight"][banned] = 0
    shutil.copytree(out, tmp_path / "out")
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    card = card.replace(f"MODEL, CLIP = {str(out)!r}", f"MODEL, CLIP = {str(tmp_path / 'out')!r}")
    head = yaml.safe_load(card.split("---")[1])
    assert head["pipeline_tag"] == "audio-text-to-text" and head["library_name"] == "transformers"
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    clip = make_clip(3, 1.3)
    soundfile.write(tmp_path / "clip.wav", clip.samples, clip.hz, subtype="FLOAT")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    question = ask(tmp_path / "clip.wav", "What is heard?", ["Speech", "Music", "Rain", "Silence"])
    ours = next(listener(tmp_path / "out").answers([question]))
    assert done.stdout.strip() == ours["completion"].strip()


def test_shards_stay_shards(checkpoint, run, tmp_path):
    """A base of two files, and parts that speak, which are left out."""
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({k: tensors[k] for k in names[::2]}, base / "model-00001-of-00002.safetensors")
    second = {k: tensors[k] for k in names[1::2]} | {"talker.x": torch.zeros(1)}
    save_file(second, base / "model-00002-of-00002.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"talker_config": {}, "token2wav_config": {}}
    (base / "config.json").write_text(json.dumps(config))
    found = find(run)
    export(type(found)(**{**vars(found), "base": str(base)}), tmp_path / "out", prompt=make_prompt())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys() and len(set(index["weight_map"].values())) == 2
    assert tokens(answers(exported(tmp_path / "out"))) == tokens(answers(open_policy(found, prompt_of(found))))


def test_what_cannot_be_exported(run, out, tmp_path, capsys):
    assert main([str(run), str(out)]) == 2 and "there already" in capsys.readouterr().err
    assert main([str(run), str(tmp_path / "x"), "--checkpoint", "3"]) == 2
    assert "step-000003 is not there" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "x")]) == 2 and "is no model" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="neither a Qwen"):
        full_config({"model_type": "llama"}, "float32")
    odd = tmp_path / "odd"
    shutil.copytree(run, odd)
    file = odd / "checkpoints" / "step-000007" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.9.self_attn.q_proj"
    save_file({f"{name}.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}, file)
    assert main([str(odd), str(tmp_path / "x")]) == 2
    assert "has no weight thinker.model.layers.9.self_attn.q_proj.weight" in capsys.readouterr().err
    assert not [p for p in Path(tmp_path).iterdir() if p.name.startswith(".")]
