"""Reward functions in a process of their own: one that never returns, or crashes, costs a completion and not the run.

The process, with all that it started, is killed when a call has had its time: that ends a regular expression that
backtracks for ever, or a C library, as surely as a network that does not answer. The next call starts another.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import random  # noqa: F401  (seeded below)
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial, reduce
from numbers import Real

FUNCTION, PARTIAL = "$function", "$partial"  # in place of a function among hyper-parameters
ENDED = 5.0  # seconds for the system to say how a process has ended that has closed its end of the pipe
START = 300.0  # seconds that importing the functions may take: some bring a model along
PASSED_OVER = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class ApartError(RuntimeError):
    """The process of the reward functions cannot start."""


class Apart:
    """`apart([(name, args, kwargs), ...])` is a list of (number, None), or (None, why there is none).

    Args:
        functions: by name. They go there as the names they can be imported by, with hyper-parameters as JSON, and live
            in the process: what one remembers between calls is lost when another brings it down. `random`, numpy and
            torch are seeded with 0.
        seconds: that a call may take.
    Raises ValueError for a function that cannot be imported by its name.
    """

    def __init__(self, functions: Mapping[str, Callable[..., float]], seconds: float):
        self.seconds, written = seconds, {}
        for name, function in functions.items():
            try:
                written[name] = _written(function)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"components.{name} cannot run in a process of its own ({error}): a function at the top level of a "
                    f"module can, with what JSON can hold, or set seconds: null, which leaves it in the trainer and "
                    f"without a time limit"
                ) from error
        self._functions = _message({"functions": written, "seconds": seconds})
        self._process: subprocess.Popen | None = None

    def __call__(self, calls: Sequence[tuple[str, tuple, Mapping]]) -> list[tuple[float | None, str | None]]:
        done: list[tuple[float | None, str | None]] = []
        while len(done) < len(calls):
            self._run()
            self._send(_message(_plain(calls[len(done) :])))
            while len(done) < len(calls) and (line := self._line(self.seconds)):
                done.append(tuple(json.loads(line)))
            if len(done) < len(calls):
                done.append((None, self._why(self.seconds)))
        return done

    def close(self) -> None:
        """End the process, whatever it is at."""
        if self._process is not None:
            self._why(0)

    def _run(self) -> None:
        """See to it that a process is ready for calls. Raises ApartError where it ends before that."""
        if self._process is not None and self._process.poll() is not None:  # between two calls: nobody's fault here
            self._why(0)
        if self._process is None:
            path = os.pathsep.join(p or os.getcwd() for p in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rewards.apart"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
            )  # fmt: skip
            self._said, self._closed = b"", False
            self._send(self._functions)
            if not self._line(START):
                raise ApartError(f"the reward functions could not be imported: {self._why(START)}; what was said of it "
                                 f"stands above")  # fmt: skip

    def _send(self, message: bytes) -> None:
        """What does not get through, to one that has died or does not read, gets no answer either."""
        with suppress(BrokenPipeError):
            while message and select.select([], [self._process.stdin], [], self.seconds)[1]:
                message = message[os.write(self._process.stdin.fileno(), message[: select.PIPE_BUF]) :]

    def _line(self, seconds: float) -> bytes | None:
        """The next line from the process; None where none comes within `seconds`, or it has ended."""
        until = time.monotonic() + seconds
        while b"\n" not in self._said:
            ready, _, _ = select.select([self._process.stdout], [], [], max(until - time.monotonic(), 0))
            more = self._process.stdout.read(65536) if ready else b""
            if not more:
                self._closed = bool(ready)
                return None
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        return line

    def _why(self, seconds: float) -> str:
        """End the process, and all that it started, if it has not ended; how it ended."""
        process, self._process = self._process, None
        try:
            status = process.wait(ENDED if self._closed else 0.2)  # what ends by itself says why
        except subprocess.TimeoutExpired:
            status = None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close(), process.stdout.close()
        if status is None:
            return f"no answer within {seconds:g} s"
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"its process ended with {name}"


def _message(content: object) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _plain(value: object):
    """Config nodes, which look like lists and mappings, and functions among the hyper-parameters, as JSON has them.

    Raises TypeError for what would be another thing there, such as a mapping whose keys are numbers.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str) or key in (FUNCTION, PARTIAL)]:
            raise TypeError(f"the key {odd[0]!r} of a mapping: keys must be texts")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item) for item in value]
    return _written(value)


def _written(function: Callable) -> dict:
    """What `_read` makes the function of again. Raises ValueError or TypeError where that cannot be."""
    if isinstance(function, partial):
        return {PARTIAL: [_written(function.func), _plain(function.args), _plain(function.keywords)]}
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or "<" in name or module == "__main__":
        raise ValueError(f"{function!r} cannot be imported by a name")
    if reduce(getattr, name.split("."), importlib.import_module(module)) is not function:
        raise ValueError(f"{module}.{name} is another one")
    return {FUNCTION: [module, name]}


# ---------------------------------------------------------------- in the process


def _read(written: object):
    """A function of what `_written` says; its hyper-parameters may be functions, too."""
    if isinstance(written, list):
        return [_read(value) for value in written]
    if not isinstance(written, dict):
        return written
    if FUNCTION in written:
        module, name = written[FUNCTION]
        return reduce(getattr, name.split("."), importlib.import_module(module))
    if PARTIAL in written:
        function, args, keywords = (_read(value) for value in written[PARTIAL])
        return partial(function, *args, **keywords)
    return {key: _read(value) for key, value in written.items()}


def _thawed(value: object):
    """The context has tuples, which JSON has not."""
    return tuple(value) if isinstance(value, list) else value


def serve() -> None:
    """Answer lists of calls from stdin, a line of JSON each both ways, until it is closed."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a function prints
    # The trainer decides what a signal to all of a job's processes means; it closes the pipe when it ends.
    for number in PASSED_OVER:
        signal.signal(number, _pass_over)
    os.register_at_fork(after_in_child=lambda: [signal.signal(number, signal.SIG_DFL) for number in PASSED_OVER])
    asked = json.loads(calls.readline())
    functions, seconds = {name: _read(f) for name, f in asked["functions"].items()}, asked["seconds"]
    for name in ("random", "numpy.random", "torch"):  # of those that the functions brought
        if name in sys.modules:
            getattr(sys.modules[name], "manual_seed" if name == "torch" else "seed")(0)
    answers.write(b"ready\n"), answers.flush()
    for line in calls:
        for name, args, kwargs in json.loads(line):
            signal.setitimer(signal.ITIMER_REAL, seconds + 60)  # where nobody is left to kill it
            answer = call(functions[name], *args, **{k: _thawed(v) for k, v in kwargs.items()})
            signal.setitimer(signal.ITIMER_REAL, 0)
            answers.write(json.dumps(answer).encode() + b"\n"), answers.flush()


def _pass_over(number, frame) -> None:
    """A handler, not SIG_IGN: programs that a function starts do not inherit it."""


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
