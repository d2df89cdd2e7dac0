"""Asked to stop: SIGUSR1, SIGUSR2 (time limits, submitit), SIGTERM (pre-emption) and SIGINT (Ctrl-C) end a run so that
it can go on: exit status 75 means "stopped to be continued: the same command with resume=true".

    while parts are built     the process ends right away
    in a rollout engine       the step is abandoned; nothing of it was trained, a resumed run makes it again
    in a step's updates       they are finished, then the checkpoint is written; what follows them is left to the resume
    `grace` seconds later     the process ends wherever it is; the last whole checkpoint stays

A signal more than `ECHO` seconds after the first ends the process at once. Nearer ones are the same request: SLURM
signals a job's processes, and torchrun signals its workers once more.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOPPED = 75  # EX_TEMPFAIL of sysexits.h
ECHO = 2.0  # seconds
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class _Asked(BaseException):
    """Out of whatever the main thread is at: no Exception, which readers of clips and libraries take for their own."""


class Stopping:
    """Whether, by which signal and since when this process is asked to stop. One a process: `install` makes it."""

    def __init__(self):
        self.number: int | None = None  # of the first signal
        self.since = 0.0
        self.grace: float | None = None  # None: nothing is trained yet, a signal ends the process
        self.before: dict[int, object] = {}  # handlers that stood here: submitit's, which asks for a requeue
        self._waits = False

    def __bool__(self) -> bool:
        return self.number is not None

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number else "a signal to another rank"

    @property
    def left(self) -> float:
        """Seconds until this process, which is asked to stop, ends wherever it is."""
        return max(self.since + (self.grace or 0.0) - time.monotonic(), 0.0)

    def training(self, grace: float) -> None:
        """From now on a signal lets the run end in order, within `grace` seconds."""
        self.grace = grace

    @contextmanager
    def waiting(self, error: type[Exception]):
        """Context in which the main thread waits for an engine: a signal raises `error` out of it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        try:
            try:
                self._waits = True
                if self:
                    self._leave_wait()
                yield
            finally:
                self._waits = False
        except _Asked:
            raise error(f"{self.name}: no longer waiting for the rollout engine") from None

    def leave(self) -> NoReturn:
        """End in order; first what stood in our place hears of the signal (submitit has the job requeued by it)."""
        earlier = self.before.get(self.number)
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(self.number, None)
        raise SystemExit(STOPPED)

    # ---------------------------------------------------------------- within the handler

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if time.monotonic() - self.since > ECHO:
                _end(f"stopping  {signal.Signals(number).name} after {self.name}: ends at once")
            return
        self.number, self.since = number, time.monotonic()
        if self.grace is None:
            _say(f"stopping  {self.name} before anything was trained")
            _later(120.0, lambda: _end("stopping  some part did not end by itself"))
            self.leave()
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            _say(f"stopping  {self.name}: finishes what it is at, for at most {self.grace:g} s")
        _later(self.grace, lambda: _end(f"stopping  rank {rank} is not done {self.grace:g} s after {self.name} "
                                        f"(checkpoint.grace): ends now, the last checkpoint stays"))  # fmt: skip
        if self._waits:
            self._leave_wait()

    def _leave_wait(self) -> NoReturn:
        self._waits = False
        raise _Asked


STOPPING = Stopping()


def install() -> Stopping:
    """Take over the signals, in the main thread (elsewhere: nothing is taken over). Called again: changes nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            earlier = signal.getsignal(number)
            if getattr(earlier, "__self__", None) is not STOPPING:
                STOPPING.before[number] = earlier
                signal.signal(number, STOPPING._receive)
    return STOPPING


def _later(seconds: float, call: Callable[[], object]) -> None:
    """By a thread of its own: Python runs a handler only once C code has come back."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # print may be what was interrupted: its buffer is not to be entered twice


def _end(text: str) -> NoReturn:
    _say(text)
    os._exit(STOPPED)
