"""Is this machine fit to train? `python -m launch.doctor [--json]`, `make doctor`; on a node: `srun make doctor`.

A line for each thing: ok, warning or fault, and what to do. Exit 1 with a fault. Takes seconds, needs no network, and
only the standard library: it also says what is wrong where nothing is installed. What needs torch is asked in a process
of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30

# Two ranks that add up a tensor over the loopback; the first then says what torch knows of GPUs.
TORCH = """
import json, sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
total = torch.ones(1000) * (dist.get_rank() + 1)
dist.all_reduce(total)
assert total.eq(3).all(), total
if dist.get_rank() == 0:
    there = torch.cuda.is_available()
    print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "there": there,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if there else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}), flush=True)
dist.barrier()
dist.destroy_process_group()  # a gloo thread alive at exit may abort its process
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `state`: ok, warning, fault. `remedy`: what to do about it."""

    what: str
    state: str
    said: str
    remedy: str = ""


def check_python(found: tuple[int, ...] = tuple(sys.version_info[:2])) -> Finding:
    said = f"{found[0]}.{found[1]} at {sys.executable}"
    if found != (3, 11):
        return Finding("python", "fault", said, "Python 3.11 is wanted: make setup, and .venv/bin/python")
    return Finding("python", "ok", said)


def check_packages(lock: str, installed: Callable[[str], str] = version) -> Finding:
    """The lock's versions against what is installed. A build's tag (+cpu, +cu130) is not a difference."""
    wanted = dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", lock, re.M))
    other, absent = [], []
    for name, want in wanted.items():
        try:
            have = installed(name)
        except PackageNotFoundError:
            absent.append(name)
            continue
        if have.partition("+")[0] != want.partition("+")[0]:
            other.append(f"{name} {have} instead of {want}")
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        return Finding("packages", "fault", f"missing: {', '.join(absent[:5])}{more}", "make setup")
    if other:
        return Finding("packages", "warning", "; ".join(other[:5]), "make setup brings the locked ones")
    return Finding("packages", "ok", f"{len(wanted)} as locked")


def check_gpu(smi: str | None, torch: Mapping) -> Finding:
    """Driver, CUDA and NCCL. smi: what nvidia-smi lists, None for nothing; torch: what TORCH above prints."""
    if not smi:
        if torch["cuda"]:
            return Finding("gpu", "warning", f"none (nvidia-smi lists none); torch is built for CUDA {torch['cuda']}",
                            "on a node with GPUs: ask SLURM for them (--gpus-per-node)")  # fmt: skip
        return Finding("gpu", "ok", f"none here, and torch {torch['torch']} wants none: CUDA and NCCL not looked at")
    driver = smi.splitlines()[0].rpartition(",")[2].strip()
    if not torch["cuda"]:
        return Finding("gpu", "fault", f"driver {driver}, but torch {torch['torch']} is built without CUDA",
                        "make setup EXTRA=gpu")  # fmt: skip
    if not torch["there"]:
        return Finding("gpu", "fault", f"driver {driver}, but torch for CUDA {torch['cuda']} finds no GPU",
                        "a newer driver, or CUDA_VISIBLE_DEVICES hides them (nvidia-smi shows its CUDA)")  # fmt: skip
    return Finding("gpu", "ok", f"{len(torch['gpus'])} x {torch['gpus'][0]}, driver {driver}, CUDA {torch['cuda']}, "
                    f"NCCL {torch['nccl']}")  # fmt: skip


def check_torch(smi: str | None, python: str = sys.executable, seconds: float = 120) -> list[Finding]:
    """Two processes import torch and add up a tensor over the loopback; what the first says of its GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        command = [python, "-W", "ignore", "-c", TORCH]
        ranks = [subprocess.Popen([*command, str(rank), f"{folder}/meet"], env=env, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE) for rank in (0, 1)]  # fmt: skip
        end, why, told = time.monotonic() + seconds, "", ""
        for rank in ranks:
            try:
                out, said = rank.communicate(timeout=max(end - time.monotonic(), 0.1))
                told = told or out
                why = why or (rank.returncode and (said.strip().splitlines() or ["no word"])[-1]) or ""
            except subprocess.TimeoutExpired:
                why = why or f"no sum within {seconds:g} s"
        for rank in ranks:
            rank.kill()
            rank.wait()
    if why:
        remedy = "make setup" if "Error: No module" in why else "two processes cannot talk over the loopback: is lo up?"
        return [Finding("gloo", "fault", why, remedy)]
    return [Finding("gloo", "ok", "two processes added up a tensor over the loopback"),
            check_gpu(smi, json.loads(told.splitlines()[-1]))]  # fmt: skip


def check_ports(count: int = 8) -> Finding:
    """Free ports to listen on, and that they can be reached."""
    try:
        listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        for server in listening:
            socket.create_connection(server.getsockname(), timeout=2).close()
            server.close()
    except OSError as error:
        return Finding("ports", "fault", str(error), "ranks and servers need ports on 127.0.0.1: look at the firewall")
    return Finding("ports", "ok", f"{count} free ones listen and answer on 127.0.0.1")


def check_space(what: str, folder: Path, fault: float, warning: float, remedy: str) -> Finding:
    """Free space of the disk on which `folder` is or would be; limits in GiB."""
    there = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(there).free / GIB
    state = "fault" if free < fault else "warning" if free < warning else "ok"
    return Finding(what, state, f"{free:.1f} GiB free at {there}", "" if state == "ok" else remedy)


def check_writing(what: str, folder: Path, mib: int = 64, slow: float = 50) -> Finding:
    """Write and sync `mib` MiB in `folder` (or where it would be made). Warns below `slow` MiB/s."""
    there = next(p for p in [folder, *folder.parents] if p.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-") as file:
            start, block = time.perf_counter(), os.urandom(2**20)
            for _ in range(mib):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = mib / (time.perf_counter() - start)
    except OSError as error:
        return Finding(what, "fault", f"{there}: {error.strerror}", "runs cannot write there: another folder (scratch)")
    said = f"{speed:.0f} MiB/s written at {there}"
    if speed < slow:
        return Finding(what, "warning", said, "checkpoints will be slow: a faster disk (scratch in conf/cluster)")
    return Finding(what, "ok", said)


def check_memory(meminfo: str) -> Finding:
    """What /proc/meminfo says is available."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.M)
    if not found:
        return Finding("memory", "warning", "/proc/meminfo does not say", "")
    free = int(found[1]) / 2**20
    if free < 2:
        return Finding("memory", "fault", f"{free:.1f} GiB available", "even the tiny model's run takes 1.3 GiB")
    return Finding("memory", "ok", f"{free:.1f} GiB available")


def check_cores(count: int | None, usable: int, threads: str | None) -> Finding:
    """Cores of the machine against those this process may use, and OMP_NUM_THREADS against both."""
    said = f"{usable} of {count} usable"
    if threads and threads.isdigit() and int(threads) > usable:
        return Finding("cores", "warning", f"{said}, OMP_NUM_THREADS={threads}",
                       "threads that share cores get into each other's way: export OMP_NUM_THREADS=1")  # fmt: skip
    if count and usable < count:
        return Finding("cores", "warning" if usable == 1 else "ok", said,
                       "in a job: more cpus_per_rank in conf/cluster" if usable == 1 else "")  # fmt: skip
    return Finding("cores", "ok", said)


def check_files(soft: int, hard: int) -> Finding:
    """The limit of open files: loaders, shards and sockets each take some."""
    said = f"{soft} open files (at most {hard})"
    if soft < 1024:
        return Finding(
            "files", "fault" if hard < 1024 else "warning", said, "ulimit -n 4096, in `setup` of conf/cluster"
        )
    return Finding("files", "ok", said)


def check_slurm(env: Mapping[str, str], path: str | None = None) -> Finding:
    if "SLURM_JOB_ID" in env:
        return Finding("slurm", "ok", f"in job {env['SLURM_JOB_ID']} on {env.get('SLURM_JOB_NODELIST', '?')}, "
                       f"{env.get('SLURM_NTASKS', '?')} task(s)")  # fmt: skip
    if shutil.which("sbatch", path=path):
        return Finding("slurm", "ok", "sbatch is here; not inside a job")
    return Finding("slurm", "ok", "none here: make slurm-* is for the login node of a cluster")


def check_hub(env: Mapping[str, str]) -> Finding:
    """The hub's cache, which a job without network lives on."""
    home = Path(env.get("HF_HOME") or Path(env.get("HOME", "~")).expanduser() / ".cache" / "huggingface")
    cache = Path(env.get("HF_HUB_CACHE") or home / "hub")
    offline = env.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE", "yes", "ON")
    models = sorted({p.parents[1].name.removeprefix("models--").replace("--", "/")
                     for p in cache.glob("models--*/snapshots/*")})  # fmt: skip
    said = f"{cache}: {', '.join(models) if models else 'no model'}, HF_HUB_OFFLINE={env.get('HF_HUB_OFFLINE', '')}"
    if offline and not models:
        return Finding("hub", "warning", said, "for a model of the hub: make fetch EXPERIMENT=..., with network")
    return Finding("hub", "ok", said)


def check_wandb(env: Mapping[str, str]) -> Finding:
    mode = env.get("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        return Finding("wandb", "ok", f"WANDB_MODE={mode}")
    if "SLURM_JOB_ID" in env and mode != "online":
        return Finding("wandb", "ok", "tracking=offline is the default of a run; WANDB_MODE is not set")
    if mode == "online" and not (env.get("WANDB_API_KEY") or (Path(env.get("HOME", "/")) / ".netrc").exists()):
        return Finding("wandb", "warning", "WANDB_MODE=online without a key", "wandb login, or WANDB_MODE=offline")
    return Finding("wandb", "ok", f"WANDB_MODE={mode or 'not set'}: runs write offline unless tracking=wandb")


def nvidia_smi() -> str | None:
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], text=True,
                              capture_output=True, timeout=30)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def examine(runs: Path, cache: Path) -> Iterable[Finding]:
    """All of it, cheapest first."""
    env, smi = os.environ, nvidia_smi()
    yield Finding(
        "machine", "ok", f"{socket.gethostname()}, {platform.system()} {platform.release()}, {platform.machine()}"
    )
    yield check_python()
    yield check_packages((ROOT / "requirements" / f"{'gpu' if smi else 'cpu'}.txt").read_text())
    yield check_cores(os.cpu_count(), len(os.sched_getaffinity(0)), env.get("OMP_NUM_THREADS"))
    yield check_memory(Path("/proc/meminfo").read_text())
    yield check_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield check_space("shared", Path("/dev/shm"), 0.1, 1, "NCCL, and weights on their way to servers, lie there: a "
                      "larger /dev/shm (in a container --shm-size or --ipc=host)")  # fmt: skip
    for what, folder in (("runs", runs), ("cache", cache)):
        yield check_space(what, folder, 1, 20, "free some, or another folder (scratch in conf/cluster)")
        yield check_writing(what, folder)
    yield check_slurm(env)
    yield check_hub(env)
    yield check_wandb(env)
    yield check_ports()
    yield from check_torch(smi)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="a JSON list instead of lines")
    parser.add_argument("--runs", type=Path, default=Path("outputs"), help="where runs are written")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where data and models are made")
    given = parser.parse_args()
    found = []
    for finding in examine(given.runs.absolute(), given.cache.absolute()):
        found.append(finding)
        if not given.json:
            remedy = f"\n{' ' * 18}-> {finding.remedy}" if finding.remedy else ""
            print(f"{finding.state:<7} {finding.what:<9} {finding.said}{remedy}", flush=True)
    if given.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    sys.exit(1 if any(finding.state == "fault" for finding in found) else 0)


if __name__ == "__main__":
    main()
