"""Ranks that watch each other: real processes, one of which dies or hangs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# mode -> (whose fault it is, its status, what is said of it)
FAULTS = {
    "loop": (1, 1, r"no step forward for 3 s: rank 1 \(.*\) is at step 20, sum, .*watch_worker\.py:\d+ in misbehave"),
    "raise": (1, 1, r"ended: KeyError: 'a mistake of mine'"),
    "exit": (1, 1, r"ended: its own message stands above"),
    "SIGKILL": (1, -9, r"died without a word at step \d+, sum, .*: killed from outside, out of memory, or a crash"),
    "SIGSTOP": (1, -9, r"no sign of life for 2 s, last at step \d+, sum, .*: stopped, or its node is lost"),
    "store": (0, -9, r"rank 0's node holds the store at 127\.0\.0\.1, which does not answer|died without a word"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """{mode: [(status, what it said), ... of each rank]}"""
    command = [sys.executable, str(Path(__file__).with_name("watch_worker.py")), str(tmp_path_factory.mktemp("ranks"))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *FAULTS, "nobody", "well", "slept"], env=env, cwd=ROOT, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def errors(ranks):
    return [line for _, text in ranks for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("mode", FAULTS)
def test_all_end_and_say_which_rank_it_was(ended, mode):
    culprit, status, told = FAULTS[mode]
    others = [r for i, r in enumerate(ended[mode]) if i != culprit]
    assert ended[mode][culprit][0] == status and [s for s, _ in others] == [1, 1]
    found = errors(others)
    assert found and all(f"rank {culprit}" in line and re.search(told, line) for line in found), ended[mode]
    assert "resume=true goes on from the last checkpoint" in found[0]
    own = ended[mode][culprit][1]
    if mode == "loop":  # it shows where
        assert "rank 1 ends here" in own and "in misbehave" in own
    assert mode != "exit" or "error: said by itself" in own
    assert mode != "raise" or own.rstrip().endswith("KeyError: 'a mistake of mine'")


def test_where_nobody_waits_nobody_is_blamed(ended):
    assert [status for status, _ in ended["nobody"]] == [1, 1, 1]
    line = errors(ended["nobody"])[0]
    assert "no step forward" in line and all(f"rank {r} (" in line for r in range(3)) and "others wait" not in line


def test_those_that_end_in_order_say_nothing(ended):
    assert ended["well"] == [[0, ""]] * 3


def test_a_job_that_was_suspended_as_a_whole_goes_on(ended):
    assert ended["slept"] == [[0, ""]] * 3
