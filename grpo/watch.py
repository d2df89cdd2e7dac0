"""Ranks that watch each other: when one dies or hangs, all end within a bounded time, and say which one it was.

Every rank writes a line into the store of the process group once a second, from a thread of its own, and reads those
of the others. It ends when one

    is gone         its process has ended, or it says that it ends by an error
    is silent       nothing came from it for `silent` seconds: stopped, swapped out, its node lost
    is stuck        nothing has moved on any rank for `stuck` seconds; it is the one that is behind, or that does not
                    wait for others

Its status is that of the one that ended (75: to be gone on with), else 1.

Without this, the others would wait for the time limit of the process group, and nobody would know for whom.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import DistError, TCPStore

from grpo.config import RunError
from grpo.signals import SIGNALS, STOPPED, STOPPING

PERIOD = 1.0  # seconds between two looks
LAST = 2.0  # seconds that a rank leaves the others, or the store, when it ends
CLOSING = 60.0  # seconds for what a rank that ends by an error has open
ENDING = 5.0  # seconds after which a rank that ends by an error ends the others: until then it may be theirs as well
# What a rank is told by the libraries when another has gone.
LOST_PEER = re.compile(r"closed by peer|reset by peer|broken pipe|gloo|NCCL|socket|TCPStore", re.I)
LIBRARIES = (sysconfig.get_path("stdlib"), "site-packages", "<frozen")
COLLECTIVE = (os.path.join("torch", "distributed"), os.path.join("deepspeed", "comm"))
VERDICT = "grpo/watch/verdict"


@dataclass
class Sign:
    """What a rank says of itself."""

    host: str
    machine: str  # where its process id means something
    process: int
    beat: int = 0  # one more each time
    moved: int = 0  # one more with everything that its main thread begins
    busy: int = 0  # one more with everything that another thread has done
    at: str = ""  # what the main thread is at
    waits: bool = False  # for other ranks, in a collective
    ended: str | None = None  # why, where it ends before the others
    status: int = 1  # then, of the process


class Watch:
    """One a process: WATCH. Without other ranks it does nothing."""

    def __init__(self):
        self.step, self.stage, self.moves, self.deeds = 0, "start", 0, 0
        self._on = False

    def moved(self, stage: str | None = None) -> None:
        """The main thread begins something. All ranks call equally often: who has the fewest is behind."""
        self.moves += 1
        self.stage = stage or self.stage

    def busy(self) -> None:
        """Something was done, such as a completion scored, while the main thread may be waiting for it."""
        self.deeds += 1

    def start(self, rank: int, world: int, *, silent: float, stuck: float) -> None:
        """Begin to watch, once the process group is there; another call changes nothing."""
        if world == 1 or self._on:
            return
        self._on, self.rank, self.world, self.silent, self.stuck = True, rank, world, silent, stuck
        self._mine = Sign(socket.gethostname(), _machine(), os.getpid())
        self._lock, self._done, self._rounds = threading.Lock(), threading.Event(), 0
        self._alone = threading.Event()  # the others end, or say nothing any more
        # A connection of its own: another's may be held by a collective.
        self._store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                               timeout=timedelta(seconds=silent))  # fmt: skip
        self._write()
        self._threads = [threading.Thread(target=t, name="watch", daemon=True) for t in (self._run, self._guard)]
        for thread in self._threads:
            thread.start()
        self._hook, sys.excepthook = sys.excepthook, self._uncaught
        atexit.register(self._at_exit)

    def stop(self) -> None:
        """All ranks have come to the end: nobody misses this one from now on. The store may go once all have called."""
        if self._on:
            self._on, sys.excepthook = False, self._hook
            self._done.set()
            for thread in self._threads:
                thread.join(self.silent)
            self._end_with("")
            atexit.unregister(self._at_exit)

    def ending(self, error: BaseException) -> None:
        """This rank leaves its work by an error: it is not missed while it closes what it has open, and misses nobody.

        One that another rank's end brought about is first given the time to be explained.
        """
        if not self._on or self._mine.ended is not None:
            return
        if (type(error) is RuntimeError or isinstance(error, DistError)) and LOST_PEER.search(str(error)):
            self._done.wait(self.silent + ENDING + 3 * PERIOD)  # the watching thread ends this process meanwhile
        self._mine.at = f"step {self.step}, {self.stage}{_origin(error)}"
        self._mine.status = error.status if isinstance(error, RunError) else 1
        self._end_with(f"{type(error).__name__}: {error}".splitlines()[0])

    # ---------------------------------------------------------------- this rank

    def _write(self) -> None:
        """Say how this rank is. What was once said of its end stays."""
        with self._lock:
            mine, frame = self._mine, sys._current_frames().get(threading.main_thread().ident)
            mine.beat, mine.moved, mine.busy = mine.beat + 1, self.moves, self.deeds
            if mine.ended is None:
                mine.at = f"step {self.step}, {self.stage}{_place(frame)}"
            mine.waits = _waits(frame)
            self._store.set(_key(self.rank), json.dumps(asdict(mine)))

    def _end_with(self, reason: str) -> None:
        self._mine.ended, self._closing = reason, time.monotonic()
        _briefly(self._write)

    def _uncaught(self, kind, error, trace) -> None:
        self.ending(error)
        self._hook(kind, error, trace)

    def _at_exit(self) -> None:
        """The main thread has come to its end, and not by `stop`.

        The others may need this process, for the store and for what NCCL has under way, until they know why they end.
        """
        for number in SIGNALS:  # torchrun sends one to whoever is left
            signal.signal(number, signal.SIG_IGN)
        if self._mine.ended is None:
            self._mine.status = STOPPED if STOPPING else 1
            asked = f"{STOPPING.name} before anything was trained" if STOPPING and STOPPING.grace is None else ""
            self._end_with(asked if STOPPING else "its own message stands above")
        self._alone.wait(ENDING + 2 * LAST + 5 * PERIOD)
        self._done.set()
        for thread in self._threads:  # Python ends those that are left in the middle of C++, which aborts the process
            thread.join(LAST)

    # ---------------------------------------------------------------- the others

    def _run(self) -> None:
        now = time.monotonic()
        looked, moved = now, now
        heard, ends = dict.fromkeys(range(self.world), now), {}
        before: dict[int, Sign] = {}
        while not self._done.wait(PERIOD):
            try:
                self._write()
                if self._left() and self._store.check([VERDICT]):
                    self._end(*json.loads(self._store.get(VERDICT)))
                present = [r for r in range(self.world) if self._store.check([_key(r)])]
                signs = {r: Sign(**json.loads(self._store.get(_key(r)))) for r in present}
            except RuntimeError as error:
                if not self._done.is_set() and self._left():
                    self._end([0], self._lost(str(error).splitlines()[0][:100]))
                return self._alone.set()
            self._rounds += 1
            now, late = time.monotonic(), time.monotonic() - looked > self.silent / 2
            for rank in range(self.world):  # what this process slept through it cannot judge
                if late or (rank in signs and signs[rank] != before.get(rank)):
                    heard[rank] = now
                if rank in signs and signs[rank].ended:
                    ends.setdefault(rank, now)
            if late or any((signs[r].moved, signs[r].busy) != (before[r].moved, before[r].busy)
                           for r in signs.keys() & before.keys()):  # fmt: skip
                moved = now
            looked, before = now, signs
            alone = all(r in ends or now - heard[r] > LAST for r in range(self.world) if r != self.rank)
            (self._alone.set if alone else self._alone.clear)()
            over = {r for r, since in ends.items() if now - since > ENDING}
            if self._left() and (
                verdict := self._judge(signs, over, {r: now - t for r, t in heard.items()}, now - moved)
            ):
                self._end(*verdict, signs[min(over)].status if over else 1)

    def _left(self) -> bool:
        """Whether this rank is still to be ended from here: not while it ends by itself, within `CLOSING` seconds."""
        return self._mine.ended is None or time.monotonic() - self._closing > CLOSING

    def _guard(self) -> None:
        """The store may neither answer nor refuse: then the other thread waits in it for ever."""
        rounds, still = self._rounds, 0
        while not self._done.wait(PERIOD):  # counted in looks, not by the clock: a suspended job has none
            rounds, still = self._rounds, still + 1 if rounds == self._rounds else 0
            if still * PERIOD > self.silent + ENDING and self._left():
                self._end([0], self._lost(f"nothing for {still * PERIOD:.0f} s"))

    def _lost(self, why: str) -> str:
        return f"rank 0's node holds the store at {os.environ['MASTER_ADDR']}, which does not answer ({why})"

    def _judge(self, signs: dict[int, Sign], over: set[int], quiet: dict[int, float],
               still: float) -> tuple[list[int], str] | None:  # fmt: skip
        """(the ranks it was, what there is to say), or None.

        `over`: ranks that said long enough ago that they end by an error. `quiet`, `still`: seconds since a sign of
        each, and since a move of any.
        """
        for rank in sorted(over):
            return [rank], f"{self._named(rank, signs[rank])} ended at {signs[rank].at}: {signs[rank].ended}"
        there = {rank: sign for rank, sign in signs.items() if sign.ended is None}
        for rank, sign in there.items():
            if sign.machine == self._mine.machine and not _alive(sign.process):
                return [rank], (f"{self._named(rank, sign)} died without a word at {sign.at}: killed from outside, out "
                                f"of memory, or a crash")  # fmt: skip
        for rank, seconds in quiet.items():
            if seconds > self.silent and (rank not in signs or rank in there):
                last = f", last at {signs[rank].at}" if rank in signs else ""
                return [rank], (f"{self._named(rank, signs.get(rank))} has given no sign of life for {seconds:.0f} s"
                                f"{last}: stopped, or its node is lost")  # fmt: skip
        if still > self.stuck:
            behind = min(sign.moved for sign in there.values())
            stuck = [rank for rank, sign in there.items() if sign.moved == behind]
            stuck = [rank for rank in stuck if not there[rank].waits] or stuck
            if len(stuck) == len(there):
                stuck = []  # nobody to name
            who = "; ".join(f"{self._named(r, there[r])} is at {there[r].at}" for r in stuck or there)
            return stuck, f"no step forward for {still:.0f} s: {who}" + (", and the others wait" if stuck else "")
        return None

    def _named(self, rank: int, sign: Sign | None) -> str:
        return f"rank {rank}" + (f" (process {sign.process} on {sign.host})" if sign else "")

    def _end(self, culprits: list[int], what: str, status: int = 1) -> None:
        """End this process, and by a word in the store all others; the lowest rank that it was not says why."""
        _briefly(lambda: self._store.set(VERDICT, json.dumps([culprits, what, status])))
        if self.rank in culprits:
            _say(f"rank {self.rank} ends here:")
            faulthandler.dump_traceback(2)
        if self.rank == min(set(range(self.world)) - set(culprits)):
            _say(f"error: {what}. All ranks end; resume=true goes on from the last checkpoint")
            time.sleep(LAST)
        elif self.rank not in culprits:
            time.sleep(LAST / 2)
        os._exit(STOPPED if STOPPING else status)


WATCH = Watch()


def _key(rank: int) -> str:
    return f"grpo/watch/{rank}"


def _briefly(call: Callable[[], object]) -> None:
    """Call what uses the store, which may be gone or hang, and go on after `LAST` seconds at most."""

    def quietly():
        with suppress(RuntimeError):
            call()

    thread = threading.Thread(target=quietly, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no memory for another
        return quietly()
    thread.join(LAST)


def _machine() -> str:
    """Two processes with the same one see each other's process ids: host names may be the same on all nodes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # nobody's


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


def _origin(error: BaseException) -> str:
    """Innermost line of this project's or the user's own code that an error came through."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if not any(part in frame.f_code.co_filename for part in LIBRARIES):
            return f", {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
    return ""


def _place(frame: FrameType | None) -> str:
    """Innermost line of this project's or the user's own code."""
    for f in _frames(frame):
        if not any(part in f.f_code.co_filename for part in LIBRARIES):
            return f", {f.f_code.co_filename}:{f.f_lineno} in {f.f_code.co_name}"
    return ""
