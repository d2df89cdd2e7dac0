"""Jobs on a SLURM cluster: `python -m launch.slurm train|eval|status|cancel|logs`, or `make slurm-train ...`.

    train  WORDS       python -m grpo.train WORDS as a job (nodes, ranks and servers as conf/cluster says)
    eval   WORDS       python -m grpo.evaluate WORDS on one GPU
    status [NAME|ID]   the jobs, and how far their runs are
    cancel NAME|ID     end jobs; a run keeps its last checkpoint
    logs   NAME|ID     the last lines of a job's output; -f follows it

--cluster NAME takes conf/cluster/NAME.yaml, --set KEY=VALUE changes a key of it, --dry prints what would be submitted,
itself a script for sbatch; these come before the words, which reach the job exactly as given: no shell reads them
again. How a job is told to stop, is queued again and goes on: launch/templates/job.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.site import ROOT, Site, SiteError, minutes, read

TEMPLATES = Path(__file__).resolve().parent / "templates"
PROGRAMS = {"train": "grpo.train", "eval": "grpo.evaluate"}
FOLDERS = {"train": "outputs", "eval": "evaluations"}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=,-]*")


def render(kind: str, site: Site, words: Sequence[str], name: str) -> str:
    """The batch script of a job: `words` are the program's, `name` the job's. Raises SiteError."""
    check_words(words, site)
    if not NAME.fullmatch(name):
        raise SiteError(f"name={name}: letters, digits and _ . = , - are wanted")
    if not re.fullmatch(r"/[^\"'\\%$`\n]*", str(site.home)):
        raise SiteError(f"scratch: the folder of jobs must be without quotes, % and $, got {site.home}")
    python = "python" if site.container else sys.executable
    command = [quote(python, "-m", PROGRAMS[kind], *words)]
    if value_of("name", words) is None:  # the same after it was queued again
        command.append(f'name={name}-"$SLURM_JOB_ID"')
    filled = {
        "SBATCH": "\n".join(f"#SBATCH {option}" for option in options(site, name)),
        "HOME": quote(str(site.home)), "ROOT": quote(str(ROOT)), "BIN": quote(str(Path(sys.executable).parent)),
        "SETUP": "\n".join([*(f"module load {quote(m)}" for m in site.modules), *site.setup]),
        "ENVIRONMENT": "\n".join(environment(site)),
        "COMMAND": " ".join(command), "PYTHON": quote(python), "WORDS": quote(*words),
        "CONTAINER": "".join(f"{quote(word)} " for word in site.container),
        "NODES": site.nodes, "RANKS": site.ranks, "NTASKS": site.nodes * site.ranks, "CPUS": site.cpus_per_rank,
        "THREADS": site.cpus_per_rank, "REQUEUE": site.requeue, "SERVE_NODES": site.serve_nodes,
        "SERVERS_PER_NODE": site.servers_per_node, "SERVE_CPUS": site.cpus_per_rank * site.ranks,
    }  # fmt: skip
    script = (TEMPLATES / "job.sh").read_text()
    servers = (TEMPLATES / "servers.sh").read_text() if site.serve_nodes else ""
    script = script.replace("@SERVERS@\n", servers)  # first: it has places to fill as well
    # One pass: what is filled in is not looked at again.
    return re.sub(r"@([A-Z_]+)@", lambda place: str(filled[place[1]]), script)


def options(site: Site, name: str) -> list[str]:
    """sbatch's options, as lines of its script."""
    log = f"{site.home}/slurm/{name}-%j.out"
    given = [
        f"--job-name={name}", f'--output="{log}"' if " " in log else f"--output={log}", "--open-mode=append",
        f"--nodes={site.nodes + site.serve_nodes}", f"--ntasks-per-node={site.ranks}",
        f"--cpus-per-task={site.cpus_per_rank}", f"--time={site.time}", f"--signal=B:USR1@{site.lead}",
        "--requeue" if site.requeue else "--no-requeue",
    ]  # fmt: skip
    given += [f"--gpus-per-node={site.gpus_per_node}"] if site.gpus_per_node else []
    wishes = {"partition": site.partition, "account": site.account, "qos": site.qos, "mem": site.mem}
    return given + [f"--{key}={value}" for key, value in wishes.items() if value is not None] + site.sbatch


def environment(site: Site) -> list[str]:
    lines = []
    if site.offline:
        lines += ["# no network: models come from the cache that make fetch filled"]
        lines += ["export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline"]
    if site.interface:
        lines += [f"export NCCL_SOCKET_IFNAME={quote(site.interface)} GLOO_SOCKET_IFNAME={quote(site.interface)}"]
    if not site.gpus_per_node:
        lines += ["export TORCHDYNAMO_DISABLE=1  # on a CPU compiling costs more than it wins"]
    return lines


def sweep(key: str):
    """A value of conf/hydra/launcher/slurm.yaml, from the site that CLUSTER in the environment names.

    A job of a sweep asks for one process on one GPU. It knows by itself how far it is (grpo.multirun.todo).
    """
    site = read(os.environ.get("CLUSTER") or "default")
    if site.container:
        raise SiteError("container: jobs of a sweep run without one: start them one by one, make slurm-train")
    again = (f"[ $? -eq 75 ] && [ $((SLURM_RESTART_COUNT)) -lt {site.requeue} ] && "
             f'scontrol show job "$SLURM_JOB_ID" -o | grep -q " JobState=RUNNING " && '
             f'scontrol requeue "$SLURM_JOB_ID" && sleep 60')  # fmt: skip
    path = f"export PYTHONPATH={quote(str(ROOT))}:$PYTHONPATH OMP_NUM_THREADS={site.cpus_per_rank}"
    setup = [*(f"module load {quote(m)}" for m in site.modules), *site.setup, path, *environment(site),
             f"trap {quote(again)} EXIT"]  # fmt: skip
    more = {word.removeprefix("--").partition("=")[0]: word.partition("=")[2] or True for word in site.sbatch}
    return {
        "partition": site.partition, "account": site.account, "qos": site.qos, "minutes": minutes(site.time),
        "cpus_per_rank": site.cpus_per_rank, "gpu": 1 if site.gpus_per_node else None, "jobs": site.jobs,
        "lead": site.lead, "requeue": site.requeue,
        "options": more | {"requeue" if site.requeue else "no-requeue": True},
        "setup": [line.replace("${", "\\${") for line in setup],  # of the shell, and not for OmegaConf
    }[key]  # fmt: skip


def check_words(words: Sequence[str], site: Site) -> None:
    """Refuse what cannot work in a job. Raises SiteError."""
    if set(words) & {"-m", "--multirun"}:
        raise SiteError("many runs are another command: make slurm-sweep, or python -m grpo.train -m "
                        "hydra/launcher=slurm ...")  # fmt: skip
    if site.offline and "tracking=wandb" in words:
        raise SiteError("tracking=wandb goes online, and the nodes are offline (offline: true in conf/cluster): leave "
                        "it out, and `wandb sync` the run's folder from here afterwards")  # fmt: skip
    if value_of("resume", words) not in (None, "false") and value_of("name", words) is None:
        raise SiteError("resume=true needs the name=... of the run to go on with")
    if (site.serve_nodes or site.serve_gpus) and "rollout=vllm_server" not in words:
        raise SiteError("serve_nodes and serve_gpus are for servers of rollouts: add rollout=vllm_server, or set them "
                        "to 0")  # fmt: skip


def value_of(key: str, words: Sequence[str]) -> str | None:
    """The value that words give a key last."""
    return next((w.partition("=")[2] for w in reversed(words) if w.partition("=")[0] == key and "=" in w), None)


def quote(*words: str) -> str:
    return shlex.join(words)


def job_name(kind: str, words: Sequence[str]) -> str:
    return value_of("name", words) or (value_of("experiment", words) or kind).replace("/", "-")


def serving(site: Site, words: Sequence[str]) -> list[str]:
    """The words, and which GPUs are the servers' where some of the one node's are."""
    if not site.serve_gpus or value_of("rollout.gpus", words):
        return list(words)
    first = site.gpus_per_node - site.serve_gpus
    return [*words, f"rollout.gpus='{','.join(map(str, range(first, site.gpus_per_node)))}'"]


def compose(kind: str, words: Sequence[str], cwd: Path) -> None:
    """Raise SiteError with the program's own line if its config does not compose: now, not hours later in a queue."""
    asked = [sys.executable, "-m", PROGRAMS[kind], *words, "--cfg", "job"]
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(asked, cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SiteError((done.stderr.strip().splitlines() or ["it does not compose"])[-1].removeprefix("error: "))


def submit(kind: str, site: Site, words: Sequence[str], *, dry: bool) -> str:
    """Submit a job, or say what would be; returns what is to be printed. Raises SiteError."""
    words, name = serving(site, words), job_name(kind, words)
    script, file = render(kind, site, words, name), site.home / "slurm" / f"{name}.sbatch"
    compose(kind, words, site.home if site.home.is_dir() else ROOT)
    command = ["sbatch", "--parsable", str(file)]
    if dry:
        return f"{script}\n# this script would be submitted by: {quote(*command)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(script)
    job = slurm(*command).strip().split(";")[0]
    run = value_of("name", words) or f"{name}-{job}"
    return (f"job {job} submitted: {file}\n  output  {site.home}/slurm/{name}-{job}.out (make slurm-logs JOB={job})\n"
            f"  run     {site.home}/{FOLDERS[kind]}/{run}")  # fmt: skip


def slurm(*command: str) -> str:
    """What a command of SLURM prints. Raises SiteError with what it complains of."""
    if shutil.which(command[0]) is None:
        raise SiteError(f"{command[0]} is not on PATH: this is for the login node of a SLURM cluster; --dry shows the "
                        f"script anywhere")  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SiteError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def jobs(wanted: str | None = None) -> list[dict[str, str]]:
    """My jobs that SLURM still knows as waiting or running, all or those of a name or number."""
    columns = {"id": "%i", "name": "%j", "state": "%T", "time": "%M", "limit": "%l", "nodes": "%D", "why": "%R"}
    user = os.environ.get("USER") or str(os.getuid())
    text = slurm("squeue", "--noheader", f"--user={user}", f"--format={'|'.join(columns.values())}")
    rows = [dict(zip(columns, line.split("|", len(columns) - 1), strict=True)) for line in text.splitlines() if line]
    return [row for row in rows if wanted in (None, row["id"], row["id"].split("_")[0], row["name"])]


def status(site: Site, wanted: str | None) -> str:
    rows = jobs(wanted)
    for row in rows:
        row["step"] = progress(site.home, row["name"], row["id"])
    if not rows:
        return "no jobs"
    keys = ["id", "name", "state", "time", "limit", "nodes", "step", "why"]
    table = [keys, *([row[key] for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)


def progress(home: Path, name: str, job: str) -> str:
    """The last step in the metrics of a job's run, `-` before there is one."""
    for run in (f"{name}-{job}", name):
        try:
            last = (home / "outputs" / run / "metrics.jsonl").read_bytes().splitlines()[-1]
            return str(json.loads(last)["step"])
        except (OSError, IndexError, ValueError, KeyError):
            continue
    return "-"


def cancel(wanted: str) -> str:
    found = jobs(wanted)
    if not found:
        raise SiteError(f"none of your jobs is called {wanted}, or has that number: python -m launch.slurm status")
    slurm("scancel", *(row["id"] for row in found))
    return "\n".join(f"cancelled {row['id']} {row['name']}" for row in found)


def logs(site: Site, wanted: str, *, follow: bool) -> None:
    """Show the end of a job's output; does not return where it follows it."""
    folder = site.home / "slurm"
    found = [p for p in folder.glob("*.out") if wanted in (p.stem.rpartition("-")[0], p.stem.rpartition("-")[2])]
    if not found:
        there = ", ".join(sorted(p.stem for p in folder.glob("*.out"))) or "nothing yet"
        raise SiteError(f"{folder} has no output of {wanted}: {there}. A job that waits has none")
    newest = max(found, key=lambda p: p.stat().st_mtime)
    command = ["tail", "-n", "50", *(["-F"] if follow else []), "--", str(newest)]
    print(f"{newest}:", flush=True)
    os.execvp(command[0], command)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|eval|status|cancel|logs")
    for name in ("train", "eval", "status", "cancel", "logs"):
        sub = commands.add_parser(name)
        sub.add_argument("--cluster", default=os.environ.get("CLUSTER") or "default", metavar="NAME")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
        if name in PROGRAMS:
            sub.add_argument("--dry", action="store_true", help="print what would be submitted")
            sub.add_argument("words", nargs=argparse.REMAINDER, help="as for python -m " + PROGRAMS[name])
        else:
            sub.add_argument("job", nargs="?" if name == "status" else None, help="name or number of a job")
        if name == "logs":
            sub.add_argument("-f", action="store_true", dest="follow", help="go on as more is written")
    given = parser.parse_args(arguments)
    try:
        site = read(given.cluster)
        if given.command == "eval":  # unless asked otherwise
            few = {"nodes": 1, "gpus_per_node": min(site.gpus_per_node, 1), "ranks_per_node": 1, "serve_gpus": 0,
                   "serve_nodes": 0}  # fmt: skip
            given.changes = [*(f"{key}={value}" for key, value in few.items()), *given.changes]
        site = site.with_words(given.changes)
        if given.command in PROGRAMS:
            print(submit(given.command, site, given.words, dry=given.dry))
        elif given.command == "status":
            print(status(site, given.job))
        elif given.command == "cancel":
            print(cancel(given.job))
        else:
            logs(site, given.job, follow=given.follow)
    except SiteError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
