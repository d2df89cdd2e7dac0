"""sync=full to a server on another GPU: rank 0 and the server's workers in a process group of their own.

The trainer's rank 0 broadcasts a layer at a time, from GPU to GPU by NCCL, between CPUs by gloo: nothing passes through
files or requests. Both ends use this module. What was broadcast is not kept, so a server that dies cannot be brought
back by repeating it: the run stops with a checkpoint, and `resume=true` begins with all weights.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

LIMIT = timedelta(minutes=10)  # that any of the two waits for the other


def store(address: str, port: int, ranks: int | None = None, *, master: bool = False) -> dist.TCPStore:
    """Where the members meet. The master's `port` may be 0, for any free one; it is then its `.port`.

    It listens on `address` only: torch's own would on every interface, without asking who comes.
    """
    listen = {}
    if master:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        own = socket.create_server((address, port), family=family)
        port, listen = own.getsockname()[1], {"master_listen_fd": own.detach()}
    return dist.TCPStore(address, port, ranks, is_master=master, timeout=LIMIT, wait_for_workers=False, **listen)


def join(meeting: dist.TCPStore, rank: int, ranks: int, device: str):
    """A process group beside those that torch.distributed knows of. Returns when every member has called."""
    if device == "cuda":
        group = dist.ProcessGroupNCCL(meeting, rank, ranks)
    else:
        group = dist.ProcessGroupGloo(meeting, rank, ranks, LIMIT)
    broadcast(group, torch.zeros(1, device=device))  # NCCL connects at the first use: here, where all are waited for
    return group


def broadcast(group, tensor: Tensor, others: Future | None = None) -> None:
    """From rank 0 to all of `group`, in place; returns when it has arrived here.

    Raises what `others`, their answer to the call that makes them listen, ended with before they had it all.
    """
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    work = group.broadcast([tensor], options)
    while others is not None and not work.is_completed():  # NCCL's wait would queue behind a peer that is gone
        if others.done() and (error := others.exception()):
            group.abort()
            raise error
        time.sleep(0.001)
    work.wait()


class Broadcast:
    """The trainer's end, on rank 0; the worker's is `Bridge.bridge_join` and `bridge_receive`.

    Raises ValueError unless the rollout engine is one server.
    """

    def __init__(self, engine, rollout, *, address: str, port: int | None):
        if rollout.every_rank or len(rollout.servers) != 1:
            raise ValueError("transport=broadcast is for rollout=vllm_server with one server; an engine in the "
                             "trainer's process is given the tensors themselves (transport=direct)")  # fmt: skip
        self.rollout, self.pool = rollout, ThreadPoolExecutor(1, "broadcast")
        if engine.rank == 0:
            ranks = 1 + len(rollout.call("bridge_version"))
            self.meeting = store(address, port or 0, ranks, master=True)
            place = {"address": address, "port": self.meeting.port, "ranks": ranks}
            joined = self.pool.submit(rollout.call, "bridge_join", once=True, **place)  # they wait for us, we for them
            self.group = join(self.meeting, 0, ranks, "cuda" if torch.cuda.is_available() else "cpu")
            joined.result()

    def send(self, method: str, tensors: Mapping[str, Tensor], version: int) -> list:
        """The counterpart of `rollout.send` for whole weights: every worker's answer."""
        shapes = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
        answers = self.pool.submit(self.rollout.call, method, once=True, weights=True, version=version,
                                   shapes=shapes)  # fmt: skip
        for tensor in tensors.values():
            broadcast(self.group, tensor.contiguous(), answers)
        return answers.result()
