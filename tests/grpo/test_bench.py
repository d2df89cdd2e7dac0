"""The benchmark's arithmetic, its table, and one real case of it; the large checkpoint in small."""

import json

import pytest
import torch

from grpo.bench import __main__ as command
from grpo.bench import runs, timing
from grpo.bench.update import Bench, Shape
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
    waits = {"0": iter([[1.0, 2.0], [9.0]]), "1": iter([[4.0], [4.0, 5.0]])}
    seen = []

    def one_run(folder, overrides, skip):
        seen.append((folder.name, overrides, skip))
        return [dict.fromkeys(runs.STAGES, t) for t in next(waits[folder.name[0]])]

    monkeypatch.setattr(runs, "one_run", one_run)
    times = runs.measure({"a=1": ["x=1"], "b": []}, ["steps=2"], rounds=2, skip=1)
    assert [name for name, *_ in seen] == ["0-0", "1-0", "0-1", "1-1"]  # in turns; a name may hold what a path may not
    assert seen[0][1:] == (["steps=2", "x=1"], 1)
    assert times["a=1"]["step_time"] == [2.0, 1.0, 9.0] and times["b"]["time/sync"] == [4.0, 4.0, 5.0]
    assert runs.table(times).splitlines()[-1].endswith("| 4 (4 to 5) | 2.00 |")


def test_a_run_that_fails_shows_its_last_words(tmp_path):
    with pytest.raises(RuntimeError, match="there is no such key"):
        runs.one_run(tmp_path / "run", ["nonsense=1"], 0)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench", "--gpu"])
    command.main()
    assert "skipped: no CUDA device" in capsys.readouterr().out


def test_ratios_are_of_neighbours_in_time_and_both_ways_round(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def work(name, seconds):
        def call():
            order.append(name)
            now[0] += next(seconds)

        return call

    seconds = timing.side_by_side({"a": work("a", iter([9, 2, 4, 6])), "b": work("b", iter([9, 1, 1, 2]))}, 3)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"] and seconds == {"a": [2, 4, 6], "b": [1, 1, 2]}
    ratio = timing.ratio(seconds["a"], seconds["b"])
    assert (ratio.median, ratio.least, ratio.most) == (3, 2, 4) and str(ratio) == "3.00x (2.00 to 4.00)"


def test_peak_memory_sees_what_is_gone_again():
    def work(size):
        return lambda: torch.ones(size * 2**18).sum()  # `size` MiB of float32

    small, large = (timing.peak_memory(work(size)) / 2**20 for size in (16, 160))
    assert small < 40 and 140 < large < 190


TOWER = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128}
TINY = Shape(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=96, vocabulary=2048, audio=TOWER)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"), TINY)


def test_a_group_has_the_tokens_asked_for(small):
    group = small.group(0, prompt=160, completion=7, copies=3)
    assert len(group.prompt.prompt_ids) == 160 and [len(c.token_ids) for c in group.completions] == [7] * 3
    assert (group.prompt.prompt_ids == small.policy.thinker.config.audio_token_id).sum() == 100
    with pytest.raises(ValueError, match="tokens at least, got 3"):
        small.group(0, prompt=3, completion=7, copies=3)


def test_all_ways_of_a_step_have_the_same_gradient(small):
    groups = [small.group(i, 160, 7, 3) for i in range(2)]
    seen = {}
    keep = lambda logp: seen.setdefault("values", []).append(logp.detach().mean())  # noqa: E731
    small._backward, whole = keep, small._backward
    for how, at_once in (("shared", None), ("separate", None), ("usual", 1), ("shared", 1)):
        small.step(groups, how, at_once=at_once)()
        seen[how, at_once] = torch.stack(seen.pop("values")).mean()
    small._backward = whole
    small.step(groups)()
    values = torch.stack(list(seen.values()))
    assert (values - values[0]).abs().max() <= 1e-5 and all(p.grad is None for p in small.trained)


def test_the_operations_by_hand():
    # q and o 64x64, k and v 64x32, three 64x96: 30,720 a layer; 2 layers, 10 + 2*3 tokens; head 2*3 x 64 x 2048
    matrices, attention = TINY.operations(prompt=10, completion=3, copies=2)
    assert matrices == 2 * 16 * 30_720 + 6 * 64 * 2048
    assert attention == 2 * 2 * 64 * (10 * 10 / 2 + 2 * (3 * 10 + 3 * 3 / 2))


def test_an_unknown_section_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "sped"])
    with pytest.raises(SystemExit):
        command.main()
    assert "there is no section 'sped': forward, memory" in capsys.readouterr().err


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
