"""Ranks that watch each other: when one dies or hangs, all end within a bounded time, and say which one it was.

Every rank writes a line into the store of the process group once a second, from a thread of its own, and reads those
of the others. It ends, with status 1, when one

    is gone         its process has ended, or it says that it ends by an error
    is silent       nothing came from it for `silent` seconds: stopped, swapped out, its node lost
    is stuck        no rank has moved for `stuck` seconds; it is the one that does not wait for others

Without this, the others would wait for the time limit of the process group, and nobody would know for whom.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import re
import socket
import sys
import sysconfig
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType

from torch.distributed import TCPStore

from grpo.signals import STOPPED, STOPPING

PERIOD = 1.0  # seconds between two looks
LAST = 2.0  # seconds that the speaking rank leaves the others to end by themselves
# What a rank is told by the libraries when another has gone.
LOST_PEER = re.compile(r"closed by peer|reset by peer|broken pipe|gloo|NCCL|socket|TCPStore|DistNetworkError", re.I)
LIBRARIES = (sysconfig.get_path("stdlib"), "site-packages", "<frozen")
COLLECTIVE = (os.path.join("torch", "distributed"), os.path.join("deepspeed", "comm"))


@dataclass
class Sign:
    """What a rank says of itself."""

    host: str
    process: int
    beat: int = 0  # one more each time
    moved: int = 0  # one more with everything that its main thread begins
    at: str = ""  # what that thread is at
    waits: bool = False  # for other ranks, in a collective
    ended: str | None = None  # why, where it ends before the others


class Watch:
    """One a process: WATCH. Without other ranks it does nothing."""

    def __init__(self):
        self.step, self.stage, self.moves = 0, "start", 0
        self._on = False

    def moved(self, stage: str | None = None) -> None:
        """The main thread begins something."""
        self.moves += 1
        self.stage = stage or self.stage

    def start(self, rank: int, world: int, *, silent: float, stuck: float) -> None:
        """Begin to watch, once the process group is there; another call changes nothing."""
        if world == 1 or self._on:
            return
        self._on, self.rank, self.world, self.silent, self.stuck = True, rank, world, silent, stuck
        self._mine = Sign(socket.gethostname(), os.getpid())
        self._lock = threading.Lock()
        # A connection of its own: another's may be held by a collective.
        self._store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                               timeout=timedelta(seconds=silent))  # fmt: skip
        self._write()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        self._hook, sys.excepthook = sys.excepthook, self._uncaught
        atexit.register(self._at_exit)

    def stop(self) -> None:
        """All ranks have come to the end: nobody misses this one from now on. The store may go once all have called."""
        if self._on:
            self._on, sys.excepthook = False, self._hook
            self._done.set()
            self._thread.join()
            self._end_with("")
            atexit.unregister(self._at_exit)

    # ---------------------------------------------------------------- this rank

    def _write(self, ended: str | None = None) -> None:
        """Say how this rank is. What was once said of its end stays."""
        with self._lock:
            mine, frame = self._mine, sys._current_frames().get(threading.main_thread().ident)
            mine.beat, mine.moved = mine.beat + 1, self.moves
            mine.at = f"step {self.step}, {self.stage}{_place(frame)}"
            mine.waits = _waits(frame)
            mine.ended = mine.ended if ended is None else ended
            self._store.set(_key(self.rank), json.dumps(asdict(mine)))

    def _end_with(self, reason: str) -> None:
        with suppress(RuntimeError):  # the store may have ended first
            self._write(ended=reason)

    def _uncaught(self, kind, error, trace) -> None:
        if issubclass(kind, RuntimeError) and LOST_PEER.search(str(error)):
            time.sleep(self.silent + 3 * PERIOD)  # the watching thread ends this, and says which it was
        else:
            self._end_with(f"{kind.__name__}: {error}".splitlines()[0])
        self._hook(kind, error, trace)

    def _at_exit(self) -> None:
        """The main thread has come to its end, and not by `stop`."""
        if self._mine.ended is None:
            self._end_with("" if STOPPING else "its own message stands above")

    # ---------------------------------------------------------------- the others

    def _run(self) -> None:
        now = time.monotonic()
        looked, heard, moved = now, dict.fromkeys(range(self.world), now), now
        before: dict[int, Sign] = {}
        while not self._done.wait(PERIOD):
            try:
                self._write()
                present = [r for r in range(self.world) if self._store.check([_key(r)])]
                signs = {r: Sign(**json.loads(self._store.get(_key(r)))) for r in present}
            except RuntimeError as error:
                self._end([0], f"rank 0's node holds the store at {os.environ['MASTER_ADDR']}, which does not answer "
                               f"({str(error).splitlines()[0][:100]})")  # fmt: skip
            now, late = time.monotonic(), time.monotonic() - looked > self.silent / 2
            for rank in range(self.world):  # what this process slept through it cannot judge
                if late or (rank in signs and signs[rank] != before.get(rank)):
                    heard[rank] = now
            if late or any(signs[r].moved != before[r].moved for r in signs.keys() & before.keys()):
                moved = now
            looked, before = now, signs
            if verdict := self._judge(signs, {r: now - t for r, t in heard.items()}, now - moved):
                self._end(*verdict)

    def _judge(self, signs: dict[int, Sign], quiet: dict[int, float], still: float) -> tuple[list[int], str] | None:
        """(the ranks it was, what there is to say), or None. `quiet`, `still`: seconds since a sign, since a move."""
        for rank, sign in signs.items():
            if sign.ended and rank != self.rank:
                return [rank], f"{self._named(rank, sign)} ended: {sign.ended}"
        there = {rank: sign for rank, sign in signs.items() if sign.ended is None}
        for rank, sign in there.items():
            if sign.host == self._mine.host and not _alive(sign.process):
                return [rank], (f"{self._named(rank, sign)} died without a word at {sign.at}: killed from outside, out "
                                f"of memory, or a crash")  # fmt: skip
        for rank, seconds in quiet.items():
            if seconds > self.silent and (rank not in signs or rank in there):
                last = f", last at {signs[rank].at}" if rank in signs else ""
                return [rank], (f"{self._named(rank, signs.get(rank))} has given no sign of life for {seconds:.0f} s"
                                f"{last}: stopped, or its node is lost")  # fmt: skip
        if still > self.stuck:
            stuck = [rank for rank, sign in there.items() if not sign.waits]
            if len(stuck) == len(there):
                stuck = []  # nobody to name
            who = "; ".join(f"{self._named(r, there[r])} is at {there[r].at}" for r in stuck or there)
            return stuck, f"no step forward for {still:.0f} s: {who}" + (", and the others wait" if stuck else "")
        return None

    def _named(self, rank: int, sign: Sign | None) -> str:
        return f"rank {rank}" + (f" (process {sign.process} on {sign.host})" if sign else "")

    def _end(self, culprits: list[int], what: str) -> None:
        """End this process; the lowest rank that it was not says why."""
        others = [r for r in range(self.world) if r not in culprits]
        if self.rank in culprits:
            self._end_with(what)
            _say(f"rank {self.rank} ends here:")
            faulthandler.dump_traceback(2)
        if self.rank == min(others or culprits):
            _say(f"error: {what}. All ranks end; resume=true goes on from the last checkpoint")
            time.sleep(LAST)
        elif self.rank not in culprits:
            time.sleep(LAST / 2)
        os._exit(STOPPED if STOPPING else 1)


WATCH = Watch()


def _key(rank: int) -> str:
    return f"grpo/watch/{rank}"


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode())


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _frames(frame: FrameType | None):
    while frame is not None:
        yield frame
        frame = frame.f_back


def _waits(frame: FrameType | None) -> bool:
    """Whether the main thread is in a collective."""
    return any(part in f.f_code.co_filename for f in _frames(frame) for part in COLLECTIVE)


def _place(frame: FrameType | None) -> str:
    """Innermost line of this project's or the user's own code."""
    for f in _frames(frame):
        if not any(part in f.f_code.co_filename for part in LIBRARIES):
            return f", {f.f_code.co_filename}:{f.f_lineno} in {f.f_code.co_name}"
    return ""
