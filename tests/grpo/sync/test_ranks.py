"""Two ranks under ZeRO-3, an engine beside each: the rollouts and losses of one rank. And whole runs of grpo.train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.grpo.vllm_engines import needs_vllm
from tests.test_train import SMALL, lines, timeless, train

pytestmark = [needs_vllm, pytest.mark.slow]
ROOT = Path(__file__).parents[3]
VLLM = ["rollout=vllm", "rollout.max_model_len=512", "rollout.kv_cache_gib=0.1", "model.lora.dropout=0",
        "sync.probe_every=1"]  # fmt: skip


@pytest.fixture(scope="module")
def histories(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
           "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}  # fmt: skip
    script = [str(Path(__file__).with_name("rank_worker.py")), str(checkpoint), str(out)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    for command in ([*script, "0"], [*torchrun, *script, "3"]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {n: json.loads((out / f"{n}.json").read_text()) for n in (1, 2)}


@pytest.mark.parametrize("strategy", ["adapter", "delta", "full"])
def test_two_ranks_under_zero3_are_one_rank(histories, strategy):
    one, two = histories[1][strategy], histories[2][strategy]
    for a, b in zip(one, two, strict=True):
        assert a["tokens"] == b["tokens"]
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert max(a["gap"], b["gap"], a["probe"], b["probe"]) <= 1e-5
        assert (a["keys"], a["bytes"]) == (b["keys"], b["bytes"])
    assert one[0]["tokens"] != one[1]["tokens"]


def test_strategies_train_alike(histories):
    losses = {name: [step["loss"] for step in history] for name, history in histories[1].items()}
    assert losses["adapter"] == pytest.approx(losses["full"], abs=1e-5)
    assert losses["delta"] == pytest.approx(losses["full"], abs=1e-5)
    assert histories[1]["delta"] and len({round(x, 4) for x in losses["full"]}) > 1


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def straight(work):
    train(work, *VLLM, "name=straight")
    return lines(work, "straight")


def test_a_run_with_vllm(work, straight):
    assert [row["step"] for row in straight] == list(range(7))
    for row in straight[1:]:
        assert row["sampling/sampling_logp_difference/max"] <= 2e-5
        assert row["sync/bytes"] > 0 and row["sync/changed"] == 14
    assert all(row["sync/probe_error"] <= 1e-5 for row in straight[1:])
    versions = [row["version"] for row in lines(work, "straight", "samples.jsonl")]
    assert versions == [step for step in range(6) for _ in range(16)]


def test_stopped_and_resumed_it_is_the_same_run(work, straight):
    # two more starts of vLLM: the second half would differ if the engine did not get the checkpoint's adapter
    train(work, *VLLM, "name=resumed", "stop_at=2")
    train(work, *VLLM, "name=resumed", "resume=true")
    assert timeless(lines(work, "resumed")) == timeless(straight)
    assert lines(work, "resumed", "samples.jsonl") == lines(work, "straight", "samples.jsonl")


def test_two_ranks_of_a_run(work, straight):
    train(work, *VLLM, "engine=zero3", "name=ranks", "stop_at=2", ranks=2)
    samples = lines(work, "ranks", "samples.jsonl")
    mine = [row["completion"] for row in lines(work, "straight", "samples.jsonl")]
    assert [row["completion"] for row in samples] == mine[: len(samples)]
    for a, b in zip(timeless(lines(work, "ranks")), timeless(straight), strict=False):
        for key in a.keys() & b.keys() - {"sync/probe_error"}:
            close = {"abs": 1e-5} if key == "loss" else {"abs": 2e-4, "rel": 1e-3}
            assert a[key] == pytest.approx(b[key], **close), (a["step"], key)


def test_a_pair_that_does_not_fit_is_one_line(work):
    done = train(work, "sync=delta", ok=False, base=SMALL)
    text = done.stdout + done.stderr
    assert "rollout=vllm" in text and "error:" in text and "Traceback" not in text, text


def test_with_lag_it_is_repeatable_and_resumes_with_what_waited(work):
    lag = [*VLLM, "rollout.lag=1", "rollout.correction=truncate"]
    train(work, *lag, "name=lag")
    train(work, *lag, "name=lag_resumed", "stop_at=3")
    train(work, *lag, "name=lag_resumed", "resume=true")
    rows, resumed = lines(work, "lag"), lines(work, "lag_resumed")
    versions = [row["version"] for row in lines(work, "lag", "samples.jsonl")]
    assert versions == [max(step - 1, 0) for step in range(6) for _ in range(16)]
    # the first probe of a new engine may round otherwise: its caches are empty
    errors = [[row.pop("sync/probe_error", 0.0) for row in run] for run in (resumed, rows)]
    assert max(map(max, errors)) <= 1e-5
    assert timeless(resumed) == timeless(rows)
    assert lines(work, "lag_resumed", "samples.jsonl") == lines(work, "lag", "samples.jsonl")
    assert rows[2]["sampling/sampling_logp_difference/max"] > 1e-3  # one step off-policy, and weighed for it
    assert rows[2]["weights/sampler/mean"] != 1.0
