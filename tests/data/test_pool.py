"""What a clip may do to the process that reads it, and that the others are read all the same."""

import os
import signal
import time

import pytest

from data.pool import each


def work(job):
    """Dies at "crash", is far from its end at "loop", takes its time, but not the processor's, at "wait"."""
    if job == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    while job == "loop" and time.process_time() < 20:
        pass
    if job == "wait":
        time.sleep(0.5)
    if job == "much":
        try:
            return bytes(2**31)
        except MemoryError:
            return "too much"
    return job


def lost(job):
    return f"lost {job}"


def test_a_clip_that_crashes_or_takes_too_long_is_found_out_alone():
    jobs = ["a", "loop", "b", "wait", "crash", "c", "much"]
    seen = dict(each(work, jobs, 1, lost, memory=2**31, patience=0.3))
    assert [seen[i] for i in range(7)] == ["a", "lost loop", "b", "wait", "lost crash", "c", "too much"]


def test_without_processes_and_without_jobs():
    assert list(each(work, ["a", "b"], 0, lost)) == [(0, "a"), (1, "b")] and not list(each(work, [], 1, lost))


def fail(job):
    raise OSError(job)


def test_what_is_raised_there_is_raised_here():
    with pytest.raises(OSError, match="x"):
        list(each(fail, ["x"], 1, lost))
