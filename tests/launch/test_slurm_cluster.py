"""On a real SLURM of two nodes: what is submitted runs, is told to stop, is queued again, and goes on to the same end.

`make test-slurm`. The stand-in needs nothing but the contract (exit code 75, resume=true); the runs of grpo.train at
the end need the whole trainer.
"""

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.grpo.killed import WORDS
from tests.launch.cluster import Cluster, missing

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def stand(cluster, tmp_path):
    """A folder of jobs in which `python -m grpo.train` is the stand-in: the working directory comes first."""
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("standin.py"), tmp_path / "grpo" / "train.py")
    return tmp_path


def launch(cluster, home, *words, command="train", ok=True, **changes):
    """`python -m launch.slurm` on the CPU cluster, jobs starting in `home`."""
    changes = {"scratch": home, "interface": "lo", "lead": 30} | changes
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run([sys.executable, "-m", "launch.slurm", command, "--cluster", "cpu", *sets, *words], cwd=ROOT,
                          env=cluster.env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)  # fmt: skip
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


def submit(cluster, home, *words, **changes) -> str:
    return launch(cluster, home, *words, **changes).split()[1]


def states(home, name):
    return [json.loads(p.read_text()) for p in sorted((home / "outputs" / name).glob("state-*.json"))]


def output(home):
    return "".join(p.read_text() for p in sorted((home / "slurm").glob("*.out")))


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """What the ranks end with when nothing happens: 300 steps on two nodes."""
    home = tmp_path_factory.mktemp("calm")
    (home / "grpo").mkdir()
    (home / "grpo" / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("standin.py"), home / "grpo" / "train.py")
    job = submit(cluster, home, "steps=300", "name=calm", nodes=2)
    assert cluster.ended(job)["JobState"] == "COMPLETED", output(home)
    return states(home, "calm")


def running(cluster, home, name, step):
    """Wait until every rank of a run has a state past `step`."""
    cluster.until(lambda: len(s := states(home, name)) == 2 and min(x["step"] for x in s) > step, 180, f"step {step}")


def same_end(home, name, undisturbed):
    assert [s["hash"] for s in states(home, name)] == [s["hash"] for s in undisturbed], output(home)
    assert min(s["legs"] for s in states(home, name)) > 1 and all(s["legs"] == 1 for s in undisturbed)


def test_the_ranks_meet_and_the_words_arrive_as_they_were_given(cluster, stand):
    hostile = ["a=$(touch pwned)", "b=`touch pwned`", "c='\" $HOME ; & | * \\", "d=a\nb", "e=@HOME@ @COMMAND@"]
    job = submit(cluster, stand, "steps=1", *hostile, nodes=2, ranks_per_node=2, partition="main")
    assert cluster.ended(job)["JobState"] == "COMPLETED", output(stand)
    about = [json.loads(p.read_text()) for p in sorted((stand / "outputs" / f"train-{job}").glob("about-*.json"))]
    assert [a["env"]["RANK"] for a in about] == ["0", "1", "2", "3"]
    assert [a["env"]["LOCAL_RANK"] for a in about] == ["0", "1", "0", "1"]
    assert [a["env"]["SLURMD_NODENAME"] for a in about] == ["n1", "n1", "n2", "n2"]
    assert {(a["env"]["WORLD_SIZE"], a["env"]["MASTER_ADDR"]) for a in about} == {("4", "127.0.0.1")}
    assert {a["env"]["HF_HUB_OFFLINE"] + a["env"]["WANDB_MODE"] for a in about} == {"1offline"}
    assert about[0]["words"] == ["steps=1", *hostile, f"name=train-{job}"]
    assert not list(stand.rglob("pwned")) and "job" in launch(cluster, stand, job, command="logs")


def test_what_dry_prints_slurm_would_take(cluster):
    make = ["make", "-n", "--no-print-directory", "slurm-train", "EXPERIMENT=audsemthinker_qa_grpo", "DRY=1"]
    env = cluster.env | {"MAKEFLAGS": ""}
    line = subprocess.run(make, cwd=ROOT, env=env, capture_output=True, text=True).stdout.splitlines()[-1]
    command = [sys.executable, *shlex.split(line)[1:]]  # the first is .venv/bin/python
    dry = subprocess.run(command, cwd=ROOT, env=cluster.env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    taken = subprocess.run(["sbatch", "--test-only"], input=dry.stdout, env=cluster.env, capture_output=True, text=True)
    assert taken.returncode == 0 and "to start at" in taken.stderr, taken.stderr
    assert not cluster.run("squeue", "-h")


def test_before_the_time_limit_it_stops_is_queued_again_and_goes_on(cluster, stand, undisturbed):
    # SLURM looks each 30 s which limits come near: 10 to 40 s after the start it tells a run that takes 45.
    job = submit(cluster, stand, "steps=300", "pace=0.15", "name=limit", nodes=2, time="00:02:00", lead=80)
    assert cluster.ended(job, 400)["JobState"] == "COMPLETED", output(stand)
    assert "told by USR1 to stop" in output(stand) and "ended with 75: queued again" in output(stand)
    same_end(stand, "limit", undisturbed)


def test_scontrol_requeue(cluster, stand, undisturbed):
    job = submit(cluster, stand, "steps=300", "name=again", nodes=2)
    running(cluster, stand, "again", 20)
    cluster.run("scontrol", "requeue", job)
    assert cluster.ended(job)["JobState"] == "COMPLETED", output(stand)
    same_end(stand, "again", undisturbed)


def test_preempted_by_a_higher_partition(cluster, stand, undisturbed):
    job = submit(cluster, stand, "steps=300", "name=low", nodes=2, sbatch="[--exclusive]")
    running(cluster, stand, "low", 20)
    other = submit(cluster, stand, "steps=10", "name=high", nodes=2, partition="high", sbatch="[--exclusive]")
    assert cluster.ended(other)["JobState"] == "COMPLETED", output(stand)
    assert cluster.ended(job)["JobState"] == "COMPLETED", output(stand)
    same_end(stand, "low", undisturbed)


def test_a_node_is_lost(cluster, stand, undisturbed):
    job = submit(cluster, stand, "steps=300", "name=lost", nodes=2)
    running(cluster, stand, "lost", 20)
    cluster.kill("n2")
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    cluster.start("n2")
    cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME", ok=False)
    assert cluster.ended(job)["JobState"] == "COMPLETED", output(stand)
    same_end(stand, "lost", undisturbed)


def test_a_cancelled_job_stays_cancelled(cluster, stand):
    job = submit(cluster, stand, "steps=3000", "name=enough", nodes=2)
    running(cluster, stand, "enough", 10)
    assert f"cancelled {job} enough" in launch(cluster, stand, "enough", command="cancel")
    cluster.until(lambda: "EndTime" in cluster.job(job) and not cluster.run("squeue", "-h"), 60, "end")
    assert cluster.state(job) == "CANCELLED", output(stand)


def test_a_fault_is_not_tried_again_and_a_run_that_never_ends_is_not_queued_for_ever(cluster, stand):
    job = submit(cluster, stand, "steps=1", "name=broken", "fail=3")
    end = cluster.ended(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "3:0", "0"), output(stand)
    job = submit(cluster, stand, "steps=1", "name=endless", "fail=75", requeue=2)
    assert cluster.ended(job)["Restarts"] == "2" and "enough" in output(stand)


def test_status_and_mistakes(cluster, stand):
    job = submit(cluster, stand, "steps=3000", "name=seen")
    table = launch(cluster, stand, command="status")
    assert job in table and "seen" in table
    assert "none of your jobs" in launch(cluster, stand, "nobody", command="cancel", ok=False)
    cluster.until(lambda: list((stand / "slurm").glob("*.out")), 60, "output of the job")
    assert "seen" in launch(cluster, stand, "nobody", command="logs", ok=False)
    launch(cluster, stand, job, command="cancel")
    assert "invalid partition" in launch(cluster, stand, "steps=1", partition="nowhere", ok=False)


# ---------------------------------------------------------------- the trainer itself

TINY = ["questions=4", "generations=4", "micro_tokens=400", "eval.batch=16", "data.train.count=64",
        "data.eval.count=16", "model.tiny.warm_start.steps=5", "model.tiny.build.audio_hidden=64", "max_tokens=16",
        "tracking=none", "eval.every=100", next(w for w in WORDS if "vowels" in w)]  # fmt: skip


STEPS = 100  # SLURM takes seconds to pre-empt: as many steps are left after the second


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of jobs of the real trainer; the tiny model is made once, by whoever comes first."""
    return tmp_path_factory.mktemp("trainer")


def weights(folder) -> str:
    """Hash of the adapter of a run's last checkpoint."""
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return hashlib.sha256((last / "adapter_model.safetensors").read_bytes()).hexdigest()


def saved(folder) -> int:
    """The step of a run's last checkpoint, of which it keeps but a few; 0 before the first."""
    return max((int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*") if p.name[5:].isdigit()), default=0)


def moved(folder) -> str:
    """The same, of a run that taught something: else every run would end with it."""
    assert sum(json.loads(line).get("grad_norm") or 0 for line in (folder / "metrics.jsonl").open()) > 0.01
    return weights(folder)


def steps_of(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_zero3_over_two_nodes_ends_the_same_when_it_loses_one(cluster, home):
    words = [*TINY, "engine=zero3", "steps=4", "checkpoint.every=1"]
    job = submit(cluster, home, *words, "name=zero3", nodes=2)
    assert cluster.ended(job, 300)["JobState"] == "COMPLETED", output(home)
    calm, run = home / "outputs" / "zero3", home / "outputs" / "zero3-lost"
    facts = json.loads((calm / "provenance.json").read_text())
    assert facts["ranks"] == 2 and steps_of(calm) == [0, 1, 2, 3, 4]
    job = submit(cluster, home, *words, "name=zero3-lost", nodes=2)
    cluster.until(lambda: saved(run) >= 2, 300, "second step")
    cluster.kill("n2")
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    cluster.start("n2")
    cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME", ok=False)
    end = cluster.ended(job, 400)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), output(home)
    assert weights(run) == moved(calm) and steps_of(run) == steps_of(calm)


# From its second step on the last rank of a run has no memory for its whole share at once.
TIGHT = ["questions=32", "generations=8", "micro_tokens=null", "model.lora.dropout=0", "max_tokens=40", "steps=3",
         "checkpoint.every=1", "loss.surrogate._target_=tests.grpo.test_memory.tight"]  # fmt: skip


def test_out_of_memory_on_one_of_two_nodes_is_queued_again_with_less(cluster, home):
    job = submit(cluster, home, *TINY, *TIGHT, "engine=zero3", "name=tight", nodes=2)
    end = cluster.ended(job, 400)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), output(home)
    assert "rank 1 ran out of memory in step 2 (micro_tokens=null)" in output(home)
    assert steps_of(home / "outputs" / "tight") == [0, 1, 2, 3]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_servers_on_a_node_of_their_own(cluster, home):
    words = ["rollout=vllm_server", "rollout.max_model_len=512", "rollout.kv_cache_gib=0.1", "steps=1", "name=served"]
    job = submit(cluster, home, *TINY, *words, nodes=1, serve_nodes=1)
    assert cluster.ended(job, 500)["JobState"] == "COMPLETED", output(home)
    assert "serving " in output(home) and steps_of(home / "outputs" / "served") == [0, 1]
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(home) in reading(p) and "vllm" in reading(p)]
    saved = (home / "outputs" / "served" / "config.yaml").read_text()
    assert "GRPO_SERVER_TOKEN" not in saved and "start: false" in saved


def reading(path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


@pytest.fixture(scope="module")
def calm(cluster, home):
    """Weights at the end of an undisturbed run."""
    job = submit(cluster, home, *TINY, f"steps={STEPS}", "checkpoint.every=1", "name=undisturbed")
    assert cluster.ended(job, 400)["JobState"] == "COMPLETED", output(home)
    return moved(home / "outputs" / "undisturbed")


@pytest.mark.parametrize("how", ["signal", "requeue", "preempted", "lost"])
def test_an_interrupted_run_ends_with_the_weights_of_an_undisturbed_one(cluster, home, calm, how):
    run = home / "outputs" / how
    job = submit(
        cluster, home, *TINY, f"steps={STEPS}", "checkpoint.every=1", f"name={how}", nodes=1, sbatch="[--exclusive]"
    )
    cluster.until(lambda: saved(run) >= 2, 300, f"second step of {how}")
    if how == "signal":  # as before a time limit, which SLURM counts in minutes
        cluster.run("scancel", "--batch", "--signal=USR1", job)
    elif how == "requeue":
        cluster.run("scontrol", "requeue", job)
    elif how == "preempted":
        options = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
        assert cluster.ended(cluster.run("sbatch", "--parsable", *options).strip())["JobState"] == "COMPLETED"
    else:
        node = cluster.job(job)["NodeList"]
        cluster.kill(node)
        cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        cluster.start(node)
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", ok=False)
    end = cluster.ended(job, 400)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), output(home)
    assert weights(run) == calm and steps_of(run) == list(range(STEPS + 1))


def sweep(cluster, home, tmp_path, *words):
    """`python -m grpo.train -m hydra/launcher=slurm` on the CPU cluster, two jobs at a time; a process that waits."""
    pytest.importorskip("submitit", reason="pip install hydra-submitit-launcher (the extra slurm)")
    site = tmp_path / "two.yaml"
    site.write_text("gpus_per_node: 0\nranks_per_node: 1\ncpus_per_rank: 1\ntime: '00:20:00'\njobs: 2\n")
    env = cluster.env | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "CLUSTER": str(site)}
    line = [sys.executable, "-m", "grpo.train", "-m", "hydra/launcher=slurm", *TINY, *words]
    return subprocess.Popen(line, cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def said_by(process, folder) -> str:
    logs = [p.read_text()[-2000:] for p in folder.glob(".submitit/**/*.out")]
    return process.stdout.read()[-3000:] + "".join(logs)


def test_a_sweep_is_an_array_of_jobs_with_a_limit(cluster, home, tmp_path):
    process = sweep(cluster, home, tmp_path, "name=six", "steps=1", "seed=0,1,2", "loss=grpo,dapo")
    most, tasks, folder = 0, set(), home / "multirun" / "six"
    while process.poll() is None:
        rows = cluster.run("squeue", "-h", "-r", "-t", "RUNNING,COMPLETING", "-o", "%i %t").splitlines()
        most, tasks = max(most, len([r for r in rows if r.endswith(" R")])), tasks | {r.split()[0] for r in rows}
        time.sleep(0.1)
    assert process.returncode == 0, said_by(process, folder)
    assert most == 2 and len(tasks) == 6 and len({t.split("_")[0] for t in tasks}) == 1, tasks
    runs = sorted(p.parent.name for p in folder.glob("*/summary.json"))
    assert runs == sorted(f"loss={loss},seed={seed}" for seed in (0, 1, 2) for loss in ("grpo", "dapo"))


def test_a_job_of_a_sweep_that_runs_out_of_memory_goes_on_with_less(cluster, home, tmp_path):
    process = sweep(cluster, home, tmp_path, "name=tight", *TIGHT, "engine=zero2", "seed=0,1")
    process.wait(400)
    folder = home / "multirun" / "tight"
    assert process.returncode == 0, said_by(process, folder)
    for run in (folder / "seed=0", folder / "seed=1"):
        assert steps_of(run) == [0, 1, 2, 3] and not (run / "failure.json").exists()
        assert (run / "out_of_memory" / "rank-0.json").exists()


def test_jobs_of_a_sweep_that_are_told_to_stop_go_on(cluster, home, calm, tmp_path):
    """USR2, by which submitit announces the time limit, and TERM, by which SLURM announces a pre-emption."""
    process = sweep(cluster, home, tmp_path, "name=two", f"steps={STEPS}", "checkpoint.every=1", "loss=grpo,dapo")
    folder = home / "multirun" / "two"
    begun = [folder / f"loss={loss}" / "checkpoints" / "last.json" for loss in ("grpo", "dapo")]
    told: dict[int, str] = {}

    def both_told() -> bool:
        for number, how in enumerate(("USR2", "TERM")):
            if number not in told and begun[number].exists():
                array = cluster.run("squeue", "-h", "-o", "%F").split()[0]
                cluster.run("scancel", f"--signal={how}", f"{array}_{number}")
                told[number] = array
        return len(told) == 2

    cluster.until(both_told, 300, "first checkpoint of both")
    array = told[0]
    process.wait(400)
    assert process.returncode == 0, said_by(process, folder)
    assert {cluster.job(f"{array}_{i}")["Restarts"] for i in (0, 1)} == {"1"}, said_by(process, folder)
    assert weights(folder / "loss=grpo") == calm
    assert steps_of(folder / "loss=grpo") == steps_of(folder / "loss=dapo") == list(range(STEPS + 1))
