"""Questions to tensors, ahead of time: threads read, decode and transform the next step's clips while this one trains.

Threads, not processes: decoding and the Fourier transform let go of Python's lock, and nothing has to be copied.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from data.question import Question
from grpo.batch import Encoded


class Loader:
    """`loader(question)` is `make(question)`, made once while it is among the latest `keep`. What it raises is raised.

    Args:
        make: Question -> Encoded; called from threads.
        keep: encoded questions that stay in memory.
        workers: threads that work ahead; 0: nothing is made before it is asked for.
    """

    def __init__(self, make: Callable[[Question], Encoded], *, keep: int, workers: int):
        self.make, self.keep = make, keep
        self._made: OrderedDict[Question, Future] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers, "loader") if workers and keep else None

    def __call__(self, question: Question) -> Encoded:
        future, mine = self._place(question)
        if mine:
            self._fill(future, question)
        try:
            return future.result()
        except BaseException:  # a clip may be readable the next time
            with self._lock:
                if self._made.get(question) is future:
                    del self._made[question]
            raise

    def ahead(self, questions: Sequence[Question]) -> None:
        """Start on what will be asked for soon."""
        for question in questions if self._pool else ():
            future, mine = self._place(question)
            if mine:
                self._pool.submit(self._fill, future, question)

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _place(self, question: Question) -> tuple[Future, bool]:
        """The question's place, and whether the caller has to fill it."""
        with self._lock:
            if question in self._made:
                self._made.move_to_end(question)
                return self._made[question], False
            future: Future = Future()
            if self.keep:
                self._made[question] = future
            while len(self._made) > self.keep:
                self._made.popitem(last=False)
            return future, True

    def _fill(self, future: Future, question: Question) -> None:
        try:
            future.set_result(self.make(question))
        except BaseException as error:
            future.set_exception(error)
