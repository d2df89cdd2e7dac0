"""A fork server for runs that are killed: imports once, then each leg is a fork of it that ends with kill -9.

    python killed.py FOLDER KILLS SEED [STEPS]

An undisturbed run first (`calm`), then runs `killed-0`, `killed-1`, ..., each resumed until done, until KILLS kills
were made. Half of the kills wait for a checkpoint that is being written. Prints one JSON line: what was killed where.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

WORDS = [
    "questions=2", "generations=2", "eval.every=3", "eval.batch=8", "data.train.count=16", "data.eval.count=4",
    "model.tiny.warm_start.steps=3", "model.tiny.build.audio_hidden=64", "max_tokens=6", "model.lora.dropout=0.05",
    "checkpoint.every=1", "tracking=none", "workers=0", "resume=true",
    "+rewards.components.vowels={weight: 1, function: {_target_: tests.grpo.killed.vowels, _partial_: true}}",
]  # fmt: skip


def vowels(completion: str) -> float:
    """A reward that differs between the words of an untaught model, so that its weights move."""
    return sum(completion.count(letter) for letter in "aeiou") / 10


def leg(name: str, steps: int) -> int:
    """Fork a process that runs or goes on with `name`; returns its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        output = os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv = ["grpo.train", *WORDS, f"name={name}", f"steps={steps}"]
        train.main()
        code = 0
    finally:
        os._exit(code)


def ended(pid: int) -> bool:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and not (os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0):
        raise RuntimeError(f"a leg ended by itself with {os.waitstatus_to_exitcode(status)}")
    return bool(done)


def kill_somewhere(pid: int, name: str, chance: random.Random, writing: bool, leg_seconds: float) -> str | None:
    """Kill the leg at a random moment, or within a checkpoint that it writes; None when it was done before."""
    began, wait, look = time.monotonic(), chance.uniform(0, leg_seconds), chance.uniform(0, leg_seconds)
    if writing:
        wait = 2 * leg_seconds
    checkpoints, seen = Path("outputs", name, "checkpoints"), False
    while not seen and time.monotonic() - began < wait:
        if ended(pid):
            return None
        late = time.monotonic() - began > look  # else it would always be the first checkpoint of a leg
        seen = writing and late and checkpoints.is_dir() and any(n.startswith(".") for n in os.listdir(checkpoints))
        time.sleep(0.0005 if writing and late else 0.01)
    if seen:
        time.sleep(chance.uniform(0, 0.05))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        return None
    left = os.listdir(checkpoints) if checkpoints.is_dir() else []
    if any(n.startswith(".") for n in left):
        return "checkpoint"
    return "elsewhere"


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else 4
    os.chdir(folder)
    leg("calm", steps), os.wait()  # makes the tiny model too
    began = time.monotonic()
    pid = leg("again", steps)
    assert os.waitpid(pid, 0)[1] == 0, Path("again.txt").read_text()[-2000:]
    whole = time.monotonic() - began
    chance, where, run = random.Random(seed), [], 0
    while len(where) < kills:
        pid = leg(f"killed-{run}", steps)
        place = kill_somewhere(pid, f"killed-{run}", chance, chance.random() < 0.5, whole)
        if place is None:
            run += 1
        else:
            where.append(place)
    while os.waitpid(leg(f"killed-{run}", steps), 0)[1]:
        raise RuntimeError(Path(f"killed-{run}.txt").read_text()[-2000:])
    names = [f"killed-{i}" for i in range(run + 1)]
    print(json.dumps({"runs": names, "where": {p: where.count(p) for p in sorted(set(where))}}))


if __name__ == "__main__":
    import deepspeed  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from grpo import run, train  # noqa: F401

    main()
