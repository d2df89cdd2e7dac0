"""Ranks that sum numbers until one does what its mode says: `python watch_worker.py FOLDER MODE ...`

Imports once and forks RANKS processes for each mode. Prints {mode: [[status, what it said], ... of each rank]}.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from grpo import watch
from grpo.config import Unfinished
from grpo.engine import stop_distributed
from grpo.rollout.serve import free_port
from grpo.watch import WATCH

RANKS, SILENT, STUCK, BAD, END = 3, 4.0, 4.0, 20, 40
WELL, EVERY = ("well", "slept"), ("nobody", "same")


def misbehave(mode):
    if mode in ("loop", "nobody"):
        while True:
            time.sleep(0.01)
    if mode == "raise":
        try:
            raise KeyError("a mistake of mine")
        except KeyError as error:
            WATCH.ending(error)
            time.sleep(2 * watch.ENDING)  # closes what it has open, longer than the others wait for it
            raise
    if mode == "same":
        raise ValueError("the same on all ranks")
    if mode == "unfinished":
        WATCH.ending(error := Unfinished("no room"))
        sys.exit(error.status)
    if mode in ("exit", "store-exit"):
        sys.exit("error: said by itself")
    os.kill(os.getpid(), getattr(signal, mode.removeprefix("store-")))


def rank_of(mode, rank):
    try:
        work(mode, rank)
    except ValueError as error:
        WATCH.ending(error)
        time.sleep(0.5 * RANKS - 0.5 * rank)  # closes what it has open, one longer than another
        print(f"rank {rank} is done")
        raise


def work(mode, rank):
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    # Where one exits its watching thread is mostly in the store: Python would end it there, and abort the process.
    watch.PERIOD, watch.LAST, watch.ENDING = 0.001 if mode == "exit" else 0.1, 2.0, 3.0
    WATCH.start(rank, RANKS, silent=SILENT, stuck=STUCK)
    for step in range(1, END):
        WATCH.step = step
        WATCH.moved("sum")
        time.sleep(0.03)
        if mode not in WELL and step == BAD and (mode in EVERY or rank == (0 if "store" in mode else 1)):
            misbehave(mode)
        dist.all_reduce(torch.ones(1))
        if mode == "slept" and step == BAD:
            os.kill(os.getpid(), signal.SIGSTOP)  # every rank; woken by whoever forked it
    stop_distributed()
    time.sleep(0.3 * rank)  # the first to leave is missed by nobody


def fork(folder, mode):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(RANKS))
    pids = []
    for rank in range(RANKS):
        if pid := os.fork():
            pids.append(pid)
            continue
        os.environ["RANK"] = str(rank)
        output = os.open(folder / f"{mode}-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        return rank, None  # a process of its own from here on, which ends as any Python does
    return None, pids


def main(folder, *modes):
    folder, found = Path(folder), {}
    for mode in modes:
        rank, pids = fork(folder, mode)
        if rank is not None:
            return rank_of(mode, rank)
        if mode == "slept":
            for pid in pids:
                os.waitpid(pid, os.WUNTRACED)
            time.sleep(2 * SILENT)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        ended = {}
        while len(ended) < RANKS:
            pid, status = os.waitpid(-1, 0)
            ended[pid] = os.waitstatus_to_exitcode(status)
            if "SIGSTOP" in mode and len(ended) == RANKS - 1:  # as torchrun ends what does not end
                os.kill(next(p for p in pids if p not in ended), signal.SIGKILL)
        found[mode] = [[ended[pid], (folder / f"{mode}-{r}").read_text()] for r, pid in enumerate(pids)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
