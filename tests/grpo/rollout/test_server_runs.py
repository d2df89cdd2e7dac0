"""Whole runs of grpo.train with a real vLLM server, one of them with its server killed at random moments."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.grpo.rollout.test_server_vllm import children
from tests.grpo.vllm_engines import needs_vllm
from tests.test_train import ROOT, SMALL, lines, timeless, train

pytestmark = [needs_vllm, pytest.mark.slow]
SERVER = ["rollout=vllm_server", "rollout.max_model_len=512", "rollout.kv_cache_gib=0.1", "rollout.backoff=0.1",
          "rollout.tries=8", "model.lora.dropout=0", "sync.probe_every=1", "tracking=none"]  # fmt: skip
KILLS = int(os.environ.get("GRPO_TEST_KILLS", 1))  # 20 take twenty minutes


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def calm(work):
    train(work, *SERVER, "name=calm", f"steps={6 * max(1, KILLS // 4)}")
    return lines(work, "calm")


def test_a_run_with_a_server(work, calm):
    for row in calm[1:]:
        assert row["sampling/sampling_logp_difference/max"] <= 2e-5 and row["sync/probe_error"] <= 1e-5
        assert row["sync/bytes"] > 0 and row["sync/changed"] == 14
    assert [row["version"] for row in lines(work, "calm", "samples.jsonl")][::16] == list(range(len(calm) - 1))


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def test_its_server_killed_at_random_moments_it_is_the_same_run(work, calm):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "grpo.train", *SMALL, *SERVER, "name=killed", f"steps={len(calm) - 1}"]
    run = subprocess.Popen(command, cwd=work, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    moments, killed, log = random.Random(KILLS), 0, work / "outputs" / "killed" / "metrics.jsonl"
    steps = sorted(moments.choices(range(1, len(calm) - 2), k=KILLS))  # lines that are written when it is killed
    while run.poll() is None and killed < KILLS:
        time.sleep(0.01)
        keepers = [pid for pid in children(run.pid) if "serve.py" in command_of(pid)]
        victims = [pid for keeper in keepers for pid in children(keeper)]
        if victims and log.exists() and log.read_text().count("\n") >= steps[killed]:
            time.sleep(moments.uniform(0.0, 0.5))  # anywhere in a step: rollout, update, sync
            with contextlib.suppress(ProcessLookupError):
                os.kill(moments.choice(victims), signal.SIGKILL)  # its API process, or one behind it
                killed += 1
    output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output[-4000:]
    assert killed == KILLS, f"the run ended after {killed} kills"
    print(f"{killed} kills, {len(calm) - 1} steps")
    assert lines(work, "killed")[-1]["rollout/restarts"] >= 1 and calm[-1]["rollout/restarts"] == 0
    for mine, theirs in zip(timeless(lines(work, "killed")), timeless(calm), strict=True):
        # A server rounds by what else it has in hand: timing moves the last bits of its log-probs, not its tokens.
        rounded = {key for key in theirs if key.startswith(("sampling/", "sync/probe_error", "rollout/"))}
        assert {k: v for k, v in mine.items() if k not in rounded} == {
            k: v for k, v in theirs.items() if k not in rounded
        }
        for key in rounded:
            assert key.startswith("rollout/") or mine[key] == pytest.approx(theirs[key], abs=1e-5)
    assert lines(work, "killed", "samples.jsonl") == lines(work, "calm", "samples.jsonl")


def test_two_ranks_under_zero3_share_a_server(work, calm):
    train(work, *SERVER, "engine=zero3", "name=ranks", "stop_at=2", f"steps={len(calm) - 1}", ranks=2)
    samples = lines(work, "ranks", "samples.jsonl")
    mine = [row["completion"] for row in lines(work, "calm", "samples.jsonl")]
    assert [row["completion"] for row in samples] == mine[: len(samples)] and len(samples) == 32
    for a, b in zip(timeless(lines(work, "ranks")), timeless(calm), strict=False):
        for key in a.keys() & b.keys() - {"sync/probe_error"}:
            close = {"abs": 1e-5} if key == "loss" else {"abs": 2e-4, "rel": 1e-3}
            assert a[key] == pytest.approx(b[key], **close), (a["step"], key)
