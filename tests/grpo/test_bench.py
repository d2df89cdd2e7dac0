"""The benchmark's arithmetic, its table, and one real case of it; the large checkpoint in small."""

import json

import pytest
import torch

from grpo import bench
from grpo.policy import Policy
from grpo.tiny import random_checkpoint

SMALL = {
    "text_config": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
                        num_key_value_heads=1, vocab_size=2048,
                        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6])),
    "audio_config": dict(d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128, output_dim=64),
    "vision_config": dict(out_hidden_size=64),
}  # fmt: skip


def test_medians_of_all_rounds_and_the_ratio(monkeypatch):
    runs = {"0": iter([[1.0, 2.0], [9.0]]), "1": iter([[4.0], [4.0, 5.0]])}
    seen = []

    def one_run(folder, overrides, skip):
        seen.append((folder.name, overrides, skip))
        return [dict.fromkeys(bench.STAGES, t) for t in next(runs[folder.name[0]])]

    monkeypatch.setattr(bench, "one_run", one_run)
    times = bench.measure({"a=1": ["x=1"], "b": []}, ["steps=2"], rounds=2, skip=1)
    assert [name for name, *_ in seen] == ["0-0", "1-0", "0-1", "1-1"]  # in turns; a name may hold what a path may not
    assert seen[0][1:] == (["steps=2", "x=1"], 1)
    assert times["a=1"]["step_time"] == [2.0, 1.0, 9.0] and times["b"]["time/sync"] == [4.0, 4.0, 5.0]
    assert bench.table(times).splitlines()[-1].endswith("| 4 (4 to 5) | 2.00 |")


def test_a_run_that_fails_shows_its_last_words(tmp_path):
    with pytest.raises(RuntimeError, match="there is no such key"):
        bench.one_run(tmp_path / "run", ["nonsense=1"], 0)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench", "--gpu"])
    bench.main()
    assert "skipped: no CUDA device" in capsys.readouterr().out


def test_the_random_checkpoint_has_the_sizes_asked_for(tmp_path):
    random_checkpoint(tmp_path, SMALL, filled=2000)
    policy = Policy(tmp_path, None, prompt=None, dtype="bfloat16")
    text = policy.thinker.config.text_config
    assert (text.num_hidden_layers, text.vocab_size, len(policy.thinker.audio_tower.layers)) == (3, 2048, 2)
    assert len(policy.banned_ids) < 60  # all that the tokenizer knows may be sampled
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    layers = {name: file for name, file in index.items() if ".layers." in name}
    assert len(set(layers.values())) == 3 + 2  # a file each: no more than one layer is ever in memory
    assert policy.thinker.model.layers[2].mlp.up_proj.weight.float().std() == pytest.approx(0.02, rel=0.05)
    before = (tmp_path / "config.json").stat().st_mtime_ns
    random_checkpoint(tmp_path, SMALL, filled=2000)
    assert (tmp_path / "config.json").stat().st_mtime_ns == before  # kept
