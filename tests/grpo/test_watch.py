"""Ranks that watch each other: real processes, one of which dies or hangs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.watch import Sign, Watch

ROOT = Path(__file__).parents[2]
STORE = r"rank 0's node holds the store at 127\.0\.0\.1, which does not answer"
# mode -> (whose fault it is, its status, what is said of it)
FAULTS = {
    "loop": (1, 1, r"no step forward for \d+ s: rank 1 \(.*\) is at step 20, sum, .*watch_worker\.py:\d+ in misbehave"),
    "raise": (1, 1, r"ended at step 20, sum, .*watch_worker\.py:\d+ in misbehave: KeyError: 'a mistake of mine'"),
    "exit": (1, 1, r"ended at step \d+, sum.*: its own message stands above"),
    "unfinished": (1, 75, r"ended at step 20, sum.*: Unfinished: no room"),
    "store-exit": (0, 1, r"ended at step \d+, sum.*: its own message stands above"),
    "SIGKILL": (1, -9, r"died without a word at step \d+, sum, .*: killed from outside, out of memory, or a crash"),
    "SIGSTOP": (1, -9, r"no sign of life for \d+ s, last at step \d+, sum, .*: stopped, or its node is lost"),
    "store-SIGKILL": (0, -9, STORE + "|died without a word"),
    "store-SIGSTOP": (0, -9, STORE + r" \(nothing for \d+ s"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """{mode: [(status, what it said), ... of each rank]}"""
    command = [sys.executable, str(Path(__file__).with_name("watch_worker.py")), str(tmp_path_factory.mktemp("ranks"))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    modes = [*FAULTS, "nobody", "same", "well", "slept"]
    done = subprocess.run([*command, *modes], env=env, cwd=ROOT, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def errors(ranks):
    return [line for _, text in ranks for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("mode", FAULTS)
def test_all_end_and_say_which_rank_it_was(ended, mode):
    culprit, status, told = FAULTS[mode]
    others = [r for i, r in enumerate(ended[mode]) if i != culprit]
    assert ended[mode][culprit][0] == status and [s for s, _ in others] == [max(status, 1)] * 2
    found = errors(others)
    assert found and all(f"rank {culprit}" in line and re.search(told, line) for line in found), ended[mode]
    assert "resume=true goes on from the last checkpoint" in found[0]
    own = ended[mode][culprit][1]
    if mode == "loop":  # it shows where
        assert "rank 1 ends here" in own and "in misbehave" in own
    assert "exit" not in mode or "error: said by itself" in own
    assert mode != "raise" or "KeyError: 'a mistake of mine'" in own


def test_where_nobody_waits_nobody_is_blamed(ended):
    assert [status for status, _ in ended["nobody"]] == [1, 1, 1]
    line = errors(ended["nobody"])[0]
    assert "no step forward" in line and all(f"rank {r} (" in line for r in range(3)) and "others wait" not in line


def test_an_error_of_all_ranks_lets_each_end_in_order(ended):
    assert [status for status, _ in ended["same"]] == [1, 1, 1]
    for rank, (_, text) in enumerate(ended["same"]):
        assert f"rank {rank} is done" in text and "ValueError: the same on all ranks" in text
    assert errors(ended["same"]) == []


NOBODY = 2**22 + 1  # no process has so high a number


def judged(still=0.0, over=(), **ranks):
    """What rank 0 of three says where the others are as given: (moved, waits), on machines of their own."""
    watch = Watch()
    watch.rank, watch.world, watch.silent, watch.stuck = 0, 3, 60.0, 60.0
    watch._mine = Sign("node", "mine", os.getpid())
    signs = {r: Sign("node", f"other {r}", NOBODY, moved=m, waits=w, at=f"place {r}")
             for r, (m, w) in enumerate(ranks.values())}  # fmt: skip
    return watch._judge(signs, set(over), dict.fromkeys(range(3), 0.0), still)


def test_who_is_behind_is_named_where_nobody_seems_to_wait():
    """NCCL's collectives are queued: the host waits elsewhere, and not in torch.distributed."""
    culprits, what = judged(61, a=(7, False), b=(6, False), c=(7, False))
    assert culprits == [1] and what.startswith(
        "no step forward for 61 s: rank 1 (process 4194305 on node) is at place 1"
    )
    assert judged(61, a=(7, True), b=(6, True), c=(6, False))[0] == [2]
    assert judged(61, a=(7, False), b=(7, False), c=(7, False))[0] == []
    assert judged(59, a=(7, False), b=(6, False), c=(7, False)) is None


def test_a_process_of_another_machine_is_not_taken_for_a_dead_one_here():
    assert judged(a=(1, True), b=(1, True), c=(1, True)) is None  # of the same host name


def test_those_that_end_in_order_say_nothing(ended):
    assert [status for status, _ in ended["well"]] == [0, 0, 0] and errors(ended["well"]) == []


def test_a_job_that_was_suspended_as_a_whole_goes_on(ended):
    assert [status for status, _ in ended["slept"]] == [0, 0, 0] and errors(ended["slept"]) == []
