"""One optimizer step is one gradient, however split: micro-batches, ranks, ZeRO stages, padding, checkpointing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo.plan import read_shape, states
from tests.conftest import LORA
from tests.grpo.gradient_worker import FULL as WHOLE

ROOT = Path(__file__).parents[2]
SPLITS = {f"zero{stage}-micro{micro}": {"stage": stage, "micro": micro} for stage in (0, 2, 3) for micro in (1, 2)}
ONE = SPLITS | {
    "whole": {"stage": 0, "micro": 4},
    "zero1": {"stage": 1, "micro": 2},
    "zero3-whole": {"stage": 3, "micro": 4},
    "left": {"stage": 0, "micro": 4, "pad": "left"},
    "separate": {"stage": 0, "micro": 2, "layout": "separate"},
    "checkpointing": {"stage": 0, "micro": 2, "checkpointing": True},
    "checkpointing-zero3": {"stage": 3, "micro": 2, "checkpointing": True},
    **{f"{a}-{m}": {"stage": 0, "micro": m, "aggregated": a} for a in ("token_mean", "constant") for m in (1, 4)},
}
SGD = {
    "sgd": {"stage": 0, "micro": 4, "sgd": 1.0},
    **{f"poisoned-zero{stage}": {"stage": stage, "micro": 4, "poisoned": True} for stage in (0, 2, 3)},
    **{f"infinite-zero{stage}": {"stage": stage, "micro": 2, "poisoned": "loss"} for stage in (0, 2, 3)},
    "poisoned-zero3-parted": {"stage": 3, "micro": 4, "poisoned": True, "at_once": 100},
    **{f"clipped-zero{stage}": {"stage": stage, "micro": 2, "sgd": 1.0, "clip": 1e-4} for stage in (0, 2, 3)},
}
# Whole weights: plain descent, for AdamW makes a step of full size out of a gradient that is only rounding.
FULL = {f"full-zero{stage}": {"stage": stage, "micro": 2, "full": True, "sgd": 0.1} for stage in (0, 1, 2, 3)}
FULL["full-zero3-parted"] = FULL["full-zero3"] | {"at_once": 4_000}  # as of 7B: more than are stepped at once
OFFLOAD = {"offload": {"stage": 3, "micro": 2, "offload": True},
           "full-offload": {"stage": 3, "micro": 2, "offload": True, "full": True, "sgd": 0.1}}  # fmt: skip
OFFLOAD["full-offload-parted"] = OFFLOAD["full-offload"] | {"at_once": 4_000}
RESUMED = {f"resumed-{dtype}-zero{stage}": {"stage": stage, "micro": 1, "dtype": dtype, "resume": True}
           for dtype in ("float32", "bfloat16") for stage in (0, 1, 2, 3)}  # fmt: skip
RESUMED["resumed-float32-zero3-parted"] = RESUMED["resumed-float32-zero3"] | {"at_once": 100}
RESUMED |= {f"{n}-first": v | {"taken": 0} for n, v in RESUMED.items()}
# One of the ranks has more questions in its micro-batch than the other.
TOWER = {f"tower-zero{stage}": {"stage": stage, "micro": 4, "tower": True} for stage in (0, 3)}
UNEVEN = {n: v | {"cuts": [0, 3, 4]} for n, v in TOWER.items()}
FOUR = {n: v | {"micro": 1} for n, v in (SPLITS | FULL | OFFLOAD).items() if not n.endswith("micro2")}
TWO = SPLITS | FULL | OFFLOAD
TWO |= {f"{a}-1": {"stage": 0, "micro": 1, "aggregated": a} for a in ("token_mean", "constant")}


def run_worker(checkpoint, out, ranks, variants):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
           "DS_ACCELERATOR": "cpu"}  # fmt: skip
    command = [
        sys.executable,
        *launcher,
        str(Path(__file__).with_name("gradient_worker.py")),
        str(checkpoint),
        str(out),
    ]
    done = subprocess.run(
        [*command, json.dumps(variants)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("gradients")
    run_worker(checkpoint, out, 1, ONE | SGD | FULL | OFFLOAD | RESUMED | TOWER)
    run_worker(checkpoint, out, 2, TWO | RESUMED | UNEVEN)
    return {p.stem: load_file(p) for p in out.glob("*.safetensors")}


def worst(a, b, prefix=""):
    keys = [k for k in a if "." in k and k.startswith("after/") == (prefix == "after/")]
    assert keys and a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in keys)


@pytest.mark.parametrize(
    "name", [f"1-{n}" for n in ONE if not n.startswith(("token", "constant"))] + [f"2-{n}" for n in SPLITS]
)
def test_every_split_gives_the_gradient_of_the_whole_step(results, name):
    same(results["1-whole"], results[name])


def same(whole, split):
    assert worst(whole, split) <= 1e-6
    assert worst(whole, split, "after/") <= 2e-6
    assert split["loss"].item() == pytest.approx(whole["loss"].item(), abs=1e-6)
    assert split["norm"].item() == pytest.approx(whole["norm"].item(), abs=1e-5)


@pytest.mark.parametrize("name", [f"{ranks}-{n}" for ranks in (1, 2) for n in FULL | OFFLOAD])
def test_whole_weights_and_the_hosts_memory_change_no_number(results, name):
    same(results["1-full-zero0" if "full" in name else "1-whole"], results[name])


def test_whole_weights_are_those_of_the_language_model(results):
    names = [k for k in results["1-full-zero0"] if "." in k and not k.startswith("after/")]
    assert any("embed_tokens" in n for n in names) and any("lm_head" in n for n in names)
    assert not any("audio_tower" in n or "lora_" in n for n in names)
    for name in results:
        if "full" in name:  # its reference is another policy than what is trained
            assert results[name]["gap"].item() > 0.01, name


def of(result, prefix):
    return {k.removeprefix(f"{prefix}/"): v for k, v in result.items() if k.startswith(f"{prefix}/")}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_engine_makes_the_step_that_the_first_one_would(results, ranks, name):
    straight, again = (of(results[f"{ranks}-{name}"], which) for which in ("straight", "resumed"))
    assert straight.keys() == again.keys() and any(k.endswith("/exp_avg_sq") for k in straight)
    assert [k for k in straight if not torch.equal(straight[k], again[k])] == []
    taken = 1 if name.endswith("first") else 3
    assert all(v.item() == taken for k, v in straight.items() if k.endswith("/step"))


@pytest.mark.parametrize("name", [f"{ranks}-{n}" for ranks in (1, 2) for n in TOWER])
def test_an_audio_tower_that_is_trained_hears_as_often_on_all_ranks(results, name):
    same(results["1-tower-zero0"], results[name])
    assert any("audio_tower" in k and results[name][k].abs().max() > 0 for k in results[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_optimizer_holds_is_the_same_at_every_stage(results, dtype):
    """And in bfloat16 it steps float32 weights that the model's are rounded from."""
    want = of(results[f"1-resumed-{dtype}-zero2"], "straight")
    for name in [f"{ranks}-{n}" for ranks in (1, 2) for n in RESUMED if dtype in n and not n.endswith("first")]:
        found = of(results[name], "straight")
        masters = [k for k in want if k.endswith("/master")]
        assert masters and found.keys() == want.keys()
        for key in masters:
            assert (found[key] - want[key]).abs().max() <= (2e-6 if dtype == "float32" else 1e-3), (name, key)
        if dtype == "bfloat16":
            for key in masters:
                assert torch.equal(found[key].bfloat16().float(), found[key.removesuffix("/master")]), (name, key)
            assert any((found[k].bfloat16().float() != found[k]).any() for k in masters)


def test_what_is_no_weight_is_float32_at_every_stage(results):
    """Rotary frequencies above all: DeepSpeed makes them bfloat16 where it loads weights in parts."""
    want = of(results["1-resumed-float32-zero0"], "buffer")
    assert any("inv_freq" in k for k in want) and any("positional" in k for k in want)
    for name in [f"{ranks}-{n}" for ranks in (1, 2) for n in RESUMED]:
        found = of(results[name], "buffer")
        assert found.keys() == want.keys()
        assert all(found[k].dtype == torch.float32 and torch.equal(found[k], want[k]) for k in want), name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [*(f"zero{stage}-micro2" for stage in (0, 2, 3)), *(f for f in FULL if "1" not in f)])
def test_a_rank_holds_what_the_plan_says(checkpoint, results, ranks, name):
    """grpo/plan.py against a census of the tensors; tiny weights are padded, the 7B's are not to speak of."""
    variant = TWO[name]
    want = states(read_shape(checkpoint / "config.json"), None if "full" in name else LORA, WHOLE,
                  stage=variant["stage"], ranks=ranks, dtype="float32")  # fmt: skip
    got = dict(zip(("weights", "gradients", "optimizer"), results[f"{ranks}-{name}"]["bytes"].tolist(), strict=True))
    if "sgd" in variant:  # no states: master weights only
        want["optimizer"] = want["gradients"] * bool(variant["stage"]) if variant["stage"] > 1 else 0
    for key, value in got.items():
        assert value == pytest.approx(want[key], rel=0.02), key


def test_four_ranks(checkpoint, results, tmp_path):
    ranks = 4
    run_worker(checkpoint, tmp_path, ranks, FOUR)
    for name in FOUR:
        same(results["1-full-zero0" if "full" in name else "1-whole"],
             load_file(tmp_path / f"{ranks}-{name}.safetensors"))  # fmt: skip


@pytest.mark.parametrize("aggregate", ["token_mean", "constant"])
@pytest.mark.parametrize("name", ["1-{}-1", "2-{}-1"])
def test_every_aggregate_is_free_of_the_split(results, aggregate, name):
    assert worst(results[f"1-{aggregate}-4"], results[name.format(aggregate)]) <= 1e-6


def test_the_gradient_is_not_trivial_and_aggregates_differ(results):
    whole = results["1-whole"]
    assert whole["norm"].item() > 1e-3
    assert worst(whole, results["1-token_mean-4"]) > 1e-4


@pytest.mark.parametrize("name", ["1-clipped-zero0", "1-clipped-zero2", "1-clipped-zero3"])
def test_clipping_scales_the_step_and_not_the_reported_norm(results, name):
    # descent by lr * g and by lr * g * clip/norm, with lr 1 and clip 1e-4
    plain, clipped, norm = results["1-sgd"], results[name], results["1-sgd"]["norm"].item()
    assert clipped["norm"].item() == pytest.approx(norm, rel=1e-4)
    for key in [k for k in plain if "lora_" in k and not k.startswith("after/")]:
        moved = clipped[f"after/{key}"] - plain[f"after/{key}"]
        assert (moved - plain[key] * (1 - 1e-4 / norm)).abs().max() <= 1e-6


@pytest.mark.parametrize("name", [n for n in SGD if n.startswith(("poisoned", "infinite"))])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(results, name):
    poisoned, other = results[f"1-{name}"], results[f"1-{name.split('-')[0]}-zero0"]
    assert poisoned["norm"].item() == -1
    after = [k for k in poisoned if k.startswith("after/")]
    assert after and all(torch.equal(poisoned[k], other[k]) and poisoned[k].isfinite().all() for k in after)
    whole = results["1-whole"]  # the next step is what it would have been as the first
    assert all((poisoned[f"next/{k[6:]}"] - whole[k]).abs().max() <= 2e-6 for k in after)


def test_values_travel_between_ranks(results):
    assert results["2-zero0-micro1"]["ranks"].tolist() == [0, 1, 1]
    assert results["2-zero0-micro1"]["ends"].tolist() == [0, 1, 1]  # min, max, sum of the ranks' numbers
    assert results["1-whole"]["ranks"].tolist() == [0]
