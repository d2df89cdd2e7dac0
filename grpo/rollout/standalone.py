"""vLLM servers of a run on a node of their own: `python -m grpo.rollout.standalone --host ADDRESS --port 8000 WORDS`.

WORDS are the run's (`model=... rollout.max_model_len=...`): the servers fit it because they are made from the same
config. The run then takes rollout.start=false rollout.urls=[...]. `launch/templates/servers.sh` starts this inside a
SLURM job; TERM ends the servers. The token is GRPO_SERVER_TOKEN in the environment.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from omegaconf import DictConfig

from grpo.config import ConfigError, build, composed, one_line_errors
from grpo.display import Display
from grpo.rollout.serve import Launch, Process, ServerError, choose_token
from grpo.rollout.server import gpus_of_each


def launches(cfg: DictConfig, model: str, *, host: str, port: int, count: int) -> list[Launch]:
    """How to start `count` servers for a composed run. Raises ServerError or ConfigError."""
    r = cfg.rollout
    if r.get("_target_") != "grpo.rollout.server.VLLMServer":
        raise ConfigError("servers are for rollout=vllm_server")
    if r.adapters:
        raise ConfigError(
            "sync=adapter needs servers that the run starts itself: with servers on other nodes sync=delta"
        )
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") if r.gpus is None else r.gpus
    shares = gpus_of_each(gpus or None, count, r.tensor_parallel)
    return [
        Launch(model=model, dtype=cfg.model.dtype, token=choose_token(host, None), host=host, port=port + i,
               max_model_len=r.max_model_len, max_num_seqs=r.max_num_seqs, kv_cache_gib=r.kv_cache_gib,
               gpu_memory=r.gpu_memory, gpus=share, tensor_parallel=r.tensor_parallel, arguments=tuple(r.arguments))
        for i, share in enumerate(shares)
    ]  # fmt: skip


def serve(cfg: DictConfig, *, host: str, port: int, count: int) -> str:
    """Serve until a server dies; returns why it did. Its end ends all."""
    from grpo.run import prepare_model

    dataset, prompt = build(cfg.data, "data"), build(cfg.prompt, "prompt")
    model = prepare_model(cfg, dataset, prompt, 0, 1, Display(0, cfg.log.every))
    with tempfile.TemporaryDirectory(prefix="grpo-servers-") as logs:
        servers = [Process(launch, Path(logs, f"{launch.port}.log"))
                   for launch in launches(cfg, model, host=host, port=port, count=count)]  # fmt: skip
        try:
            for server in servers:
                server.start()
            for server in servers:
                server.wait(cfg.rollout.start_timeout)
                print(f"serving {model} at {server.url}", flush=True)
            while all(server.alive for server in servers):
                time.sleep(1)
            dead = next(server for server in servers if not server.alive)
            return f"the server at {dead.url} ended: {dead.reason()}"
        finally:
            for server in servers:
                server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True, help="address of this node; not loopback wants GRPO_SERVER_TOKEN")
    parser.add_argument("--port", type=int, required=True, help="of the first server")
    parser.add_argument("--count", type=int, default=1, help="servers on this node")
    given, words = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # for the ranks: the servers stay until they are done
    with one_line_errors():
        try:
            sys.exit(f"error: {serve(composed(words), host=given.host, port=given.port, count=given.count)}")
        except ServerError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
