"""`python -m MODULE ...` without ten seconds of imports: forked from a process that has made them all.

    done = forked("grpo.train", ["steps=2"], cwd=folder, env={"OMP_NUM_THREADS": "1"}, ranks=2)

It runs as the main module of a process of its own, in its own folder, and ends as any Python program does. What a
program reads from the environment while it is imported comes from the process that it is forked from: its first
environment. `ranks` processes join one group; as under torchrun, one that fails ends the others.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 30.0  # seconds that the other ranks have after one has failed
_server: subprocess.Popen | None = None


def forked(module: str, words: list[str], *, cwd: Path, env: dict[str, str], ranks: int = 1,
           timeout: float = 600) -> subprocess.CompletedProcess:  # fmt: skip
    """Status (of several ranks the first that failed), output and errors of `python -m module *words`."""
    global _server
    if _server is None or _server.poll() is not None:
        command = [sys.executable, "-m", "tests.forked"]
        _server = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(_server.stdin.close)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("out", "err")]
        order = {"module": module, "words": words, "cwd": str(cwd), "env": env, "ranks": ranks, "outputs": outputs}
        _server.stdin.write(json.dumps(order).encode() + b"\n")
        _server.stdin.flush()
        ready, _, _ = select.select([_server.stdout], [], [], timeout)
        status = _server.stdout.readline() if ready else b""
        out, err = (Path(p).read_text(encoding="utf-8", errors="replace") if Path(p).exists() else "" for p in outputs)
        if not status:
            os.killpg(_server.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired([module, *words], timeout, out, err)
    return subprocess.CompletedProcess([module, *words], int(status), out, err)


# ---------------------------------------------------------------- the process that is forked


def serve() -> None:
    import matplotlib.pyplot  # noqa: F401
    import transformers.models.qwen2_5_omni.modeling_qwen2_5_omni
    import transformers.models.qwen2_5_omni.processing_qwen2_5_omni  # noqa: F401

    import grpo.report
    import grpo.rollout.hf
    import grpo.run
    import grpo.tiny  # noqa: F401

    os.setpgid(0, 0)
    while line := sys.stdin.buffer.readline():
        order = json.loads(line)
        pids = start(order)
        if pids is None:
            return program(order)
        sys.__stdout__.buffer.write(f"{wait(pids)}\n".encode())
        sys.__stdout__.buffer.flush()


def start(order: dict) -> list[int] | None:
    """The process ids of the ranks; None within each of them."""
    from grpo.rollout.serve import free_port

    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pids = []
    for rank in range(order["ranks"]):
        if pid := os.fork():
            pids.append(pid)
            continue
        os.environ.update(order["env"])
        if order["ranks"] > 1:
            os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(order["ranks"]))
        return None
    return pids


def program(order: dict) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, fd in enumerate([nothing, *(os.open(p, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                                            for p in order["outputs"])]):  # fmt: skip
        os.dup2(fd, number)
    os.chdir(order["cwd"])
    sys.path.insert(0, order["cwd"])
    sys.argv = [order["module"], *order["words"]]
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


def wait(pids: list[int]) -> int:
    """The first status that is not 0."""
    left, status, until = set(pids), 0, None
    while left:
        pid, ended = os.waitpid(-1, os.WNOHANG)
        if pid in left:
            left.discard(pid)
            if not status and (status := os.waitstatus_to_exitcode(ended)):
                until = time.monotonic() + PATIENCE
        elif until and time.monotonic() > until:
            for other in left:
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return status


if __name__ == "__main__":
    serve()
