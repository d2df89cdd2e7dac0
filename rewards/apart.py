"""Reward functions in a process of their own: one that never returns, or crashes, costs a completion and not the run.

A timer of the system (SIGALRM, which nobody handles there) bounds each call: it ends a regular expression that
backtracks for ever, or a C library, as surely as a network that does not answer. What dies is started anew.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

START = 300.0  # seconds that importing the functions may take: some bring a model along


class ApartError(RuntimeError):
    """The process of the reward functions cannot start."""


class Apart:
    """`apart([(name, args, kwargs), ...])` is a list of (number, None), or (None, why there is none).

    Args:
        functions: by name; importable by their names, as pickle wants it. They live in the process: what one remembers
            between calls is lost when another brings it down. Python's `random` starts there from the same seed.
        seconds: that a call may take.
    Raises ValueError for a function that cannot be imported by its name.
    """

    def __init__(self, functions: Mapping[str, Callable[..., float]], seconds: float):
        self.seconds = seconds
        for name, function in functions.items():
            try:
                pickle.dumps(function)
            except Exception as error:
                raise ValueError(
                    f"components.{name} cannot run in a process of its own ({error}): write the function at the top "
                    f"level of a module, or set seconds: null, which leaves it in the trainer and without a time limit"
                ) from error
        self._functions = pickle.dumps((dict(functions), seconds))
        self._process: subprocess.Popen | None = None

    def __call__(self, calls: Sequence[tuple[str, tuple, Mapping]]) -> list[tuple[float | None, str | None]]:
        done: list[tuple[float | None, str | None]] = []
        while len(done) < len(calls):
            process, lost = self._running(), len(done)
            try:
                pickle.dump(list(calls[lost:]), process.stdin)
                process.stdin.flush()
                while len(done) < len(calls):
                    if not (line := process.stdout.readline()):
                        break
                    done.append(tuple(json.loads(line)))
            except BrokenPipeError:
                pass
            if len(done) < len(calls):
                done.append((None, self._why()))
        return done

    def _running(self) -> subprocess.Popen:
        """The process, ready for calls. Raises ApartError where it ends before that."""
        if self._process is None:
            path = os.pathsep.join(p or os.getcwd() for p in sys.path)
            self._process = subprocess.Popen([sys.executable, "-m", "rewards.apart"], stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path})  # fmt: skip
            try:
                self._process.stdin.write(self._functions)
                self._process.stdin.flush()
            except BrokenPipeError:
                pass
            if not self._process.stdout.readline():
                raise ApartError(f"the reward functions could not be imported: {self._why(START)}; what it said stands "
                                 f"above")  # fmt: skip
        return self._process

    def _why(self, seconds: float | None = None) -> str:
        """How the process ended; forgets it."""
        process, self._process = self._process, None
        process.stdin.close(), process.stdout.close()
        status = process.wait()
        if status == -signal.SIGALRM:
            return f"no answer within {seconds or self.seconds:g} s"
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"its process ended with {name}"


# ---------------------------------------------------------------- in the process


def serve() -> None:
    """Answer lists of calls from stdin, a line of JSON each, until it is closed."""
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a function prints
    # The trainer decides what a signal to all of a job's processes means; it closes stdin when it ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, START)
    functions, seconds = pickle.load(calls)
    signal.setitimer(signal.ITIMER_REAL, 0)
    random.seed(0)
    answers.write(b"ready\n"), answers.flush()
    while True:
        try:
            some = pickle.load(calls)
        except EOFError:
            return
        for name, args, kwargs in some:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            answer = call(functions[name], *args, **kwargs)
            signal.setitimer(signal.ITIMER_REAL, 0)
            answers.write(json.dumps(answer).encode() + b"\n"), answers.flush()


def call(function: Callable[..., float], *args, **kwargs) -> tuple[float | None, str | None]:
    """(the function's number, None), or (None, what was wrong): a user's function may do anything."""
    try:
        value = function(*args, **kwargs)
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"a reward must be a finite number, got {value!r}")
        return float(value), None
    except (Exception, SystemExit) as error:
        return None, f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    serve()
