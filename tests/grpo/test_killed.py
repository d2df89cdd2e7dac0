"""kill -9 at random moments, also while a checkpoint is written: the run that goes on is as if never killed."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_train import ROOT, lines, timeless

KILLS = int(os.environ.get("GRPO_TEST_KILLS", 3))  # 50 take minutes
pytestmark = pytest.mark.slow


def hashes(folder: Path, step: int) -> dict[str, str]:
    files = sorted((folder / "checkpoints" / f"step-{step:06d}").glob("*.safetensors"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_killed_at_random_moments_it_ends_with_the_very_same_weights(tmp_path):
    steps = 4
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.grpo.killed", str(tmp_path), str(KILLS), "0", str(steps)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    print(f"{KILLS} kills over {len(said['runs'])} runs of {steps} steps: {said['where']}")
    assert sum(said["where"].values()) == KILLS
    calm = hashes(tmp_path / "outputs" / "calm", steps)
    assert set(calm) == {"adapter_model.safetensors", "trainer.safetensors"}
    assert calm != hashes(tmp_path / "outputs" / "calm", steps - 1)  # the last step moved the weights
    for name in said["runs"]:
        assert hashes(tmp_path / "outputs" / name, steps) == calm, name
        rows = lines(tmp_path, name)
        assert [row["step"] for row in rows] == list(range(steps + 1))  # no gap, no double
        assert timeless(rows) == timeless(lines(tmp_path, "calm"))
        assert lines(tmp_path, name, "samples.jsonl") == lines(tmp_path, "calm", "samples.jsonl")
