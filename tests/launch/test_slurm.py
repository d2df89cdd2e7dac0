"""What is submitted: the script word for word, a cluster's settings, mistakes, words that a shell would like to run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import site, slurm
from launch.site import ROOT, SiteError, minutes, read

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def cluster(tmp_path):
    """Write a cluster's settings; returns its Site."""

    def write(**values):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(values))
        return read(str(path))

    return write


def test_every_site_of_the_repository_is_read():
    assert {p.stem for p in site.FOLDER.glob("*.yaml")} >= {"default", "cpu"}
    for path in site.FOLDER.glob("*.yaml"):
        read(path.stem)
    assert read("default").ranks == 4 and read("cpu").ranks == 1 and read("cpu").lead == read("default").lead


@pytest.mark.parametrize("name", ["one_node", "servers"])
def test_the_script_word_for_word(name, tmp_path):
    """GRPO_WRITE_GOLDEN=1 writes them anew, for the eye to compare."""
    mine = {
        "one_node": read("default").with_words(["partition=gpu", "account=me", "mem=200G", "time=2-00:00:00",
                                                "modules=[cuda/12.8]", "setup=[export A=1]"]),
        "servers": read("default").with_words(["nodes=2", "serve_nodes=1", "servers_per_node=4", "interface=ib0",
                                               "container=[apptainer, exec, --nv, /images/my image.sif]",
                                               "sbatch=[--constraint=h100]", "offline=false", "requeue=0"]),
    }[name]  # fmt: skip
    words = ["experiment=audsemthinker_qa_grpo", *(["rollout=vllm_server", "seed=1"] if name == "servers" else [])]
    script = slurm.render("train", mine.with_words(["scratch=/scratch/me"]), words, "golden")
    script = script.replace(sys.executable, "/venv/bin/python")  # before ROOT, in which it may lie
    script = script.replace(str(Path(sys.executable).parent), "/venv/bin").replace(str(ROOT), "/repository")
    if os.environ.get("GRPO_WRITE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / f"{name}.sbatch").write_text(script)
    assert script == (GOLDEN / f"{name}.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


# A shell that reads the script as SLURM would, with programs that only write down how they were called.
PROGRAMS = {
    "srun": "#!/bin/bash\nprintf '%s\\0' \"$@\" > \"$HERE/srun\"; exit ${CODE:-0}\n",
    "scontrol": "#!/bin/bash\ncase $1 in requeue) echo requeued $2 >> $HERE/requeued;; "
                "show) [[ $2 == job ]] && echo \"JobId=$3 JobState=${STATE:-RUNNING} x\" || echo n1;; esac\n",
    "sleep": "#!/bin/bash\n",
}  # fmt: skip


def execute(script, folder, programs=PROGRAMS, **env):
    """Run a batch script where srun and scontrol only write down how they were called. Returns (code, srun's words)."""
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    script = script.replace(f"PATH={slurm.quote(str(Path(sys.executable).parent))}:$PATH", "PATH=$PATH")
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "HERE": str(folder), "SLURM_JOB_ID": "7",
           "SLURM_JOB_NODELIST": "n1"} | env  # fmt: skip
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, (folder / "srun").read_text().split("\0")[:-1]


def arguments(words):
    """The program's own, of srun's words."""
    return words[words.index("grpo.train") + 1 :]


HOSTILE = ["a=$(touch pwned)", "b=`touch pwned`", "c=' ; touch pwned ; '", 'd=" && touch pwned "', "e=@HOME@", "f=\\",
           "g=x\ny", "h=$HOME", "i=*", "~j", "k={a: 1, b: [2]}", "!!"]  # fmt: skip


def test_no_shell_reads_the_words(tmp_path):
    mine = read("cpu").with_words([f"scratch={tmp_path}"])
    code, words = execute(slurm.render("train", mine, HOSTILE, "x"), tmp_path)
    assert code == 0 and arguments(words) == [*HOSTILE, "name=x-7"]
    assert not list(tmp_path.rglob("pwned"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"])), max_size=3))
def test_any_words_come_back_from_the_shell(words):
    line = slurm.quote(*words)
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {line or ''}"], capture_output=True).stdout.decode()
    assert shown.split("\0")[: len(words)] == words


@pytest.mark.parametrize(
    ("code", "env", "queued"),
    [
        (75, {}, True),
        (75, {"SLURM_RESTART_COUNT": "49"}, True),
        (75, {"SLURM_RESTART_COUNT": "50"}, False),
        (75, {"STATE": "CANCELLED"}, False),
        (75, {"STATE": "COMPLETING"}, False),
        (0, {}, False),
        (1, {}, False),
        (143, {}, False),  # killed, but not by us
    ],
)
def test_only_a_run_with_more_to_do_is_queued_again(tmp_path, code, env, queued):
    mine = read("cpu").with_words([f"scratch={tmp_path}"])
    ended, words = execute(slurm.render("train", mine, ["name=a"], "a"), tmp_path, CODE=str(code), **env)
    assert ended == code and (tmp_path / "requeued").exists() == queued
    assert arguments(words) == ["name=a", *(["resume=true"] if "SLURM_RESTART_COUNT" in env else [])]


def test_a_signal_while_the_ranks_are_being_started_is_not_lost(tmp_path):
    tell = "#!/bin/bash\n[[ -e $HERE/shell && ! -e $HERE/told ]] && touch $HERE/told && kill -USR1 $(< $HERE/shell)\n"
    wait = "#!/bin/bash\ntrap 'exit 75' USR1; while ((SECONDS < 20)); do /bin/sleep 0.1; done\n"
    mine = read("cpu").with_words([f"scratch={tmp_path}", "setup=['echo $$ > $HERE/shell']"])
    programs = PROGRAMS | {"date": tell, "srun": wait}  # it asks for the time right before it starts them
    ended, _ = execute(slurm.render("train", mine, [], "a"), tmp_path, programs)
    assert ended == 75 and (tmp_path / "told").exists() and (tmp_path / "requeued").exists()


@pytest.mark.parametrize("serve_nodes", [0, 1])
def test_a_signal_before_anything_is_started_is_not_lost(tmp_path, serve_nodes):
    mine = read("cpu").with_words([f"scratch={tmp_path}", f"serve_nodes={serve_nodes}", "setup=['kill -USR1 $$']"])
    words = ["rollout=vllm_server"] if serve_nodes else []
    ended, _ = execute(
        slurm.render("train", mine, words, "a"), tmp_path, PROGRAMS | {"srun": "#!/bin/bash\n>$HERE/ran\n"}
    )
    assert ended == 75 and (tmp_path / "requeued").exists() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"partion": "gpu"}, "partion: there is no such key; did you mean 'partition'?"),
        ({"time": 86400}, "time must be str"),
        ({"time": "a day"}, "time must be a time limit in quotes"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"nodes": True}, "nodes must be int"),
        ({"partition": "a b"}, "partition must be a name without spaces"),
        ({"account": "x\n#SBATCH --uid=0"}, "account must be"),
        ({"sbatch": ["constraint=h100"]}, "sbatch must be options"),
        ({"sbatch": ["--comment=$(id) `x`"]}, "sbatch must be words without spaces"),
        ({"setup": "export A=1"}, "setup must be a list of words"),
        ({"time": "00:01:00", "lead": 90}, "lead must be less than the time limit"),
        ({"serve_gpus": 1, "nodes": 2}, "whole nodes serve"),
        ({"serve_gpus": 4}, "lower ranks_per_node or serve_gpus"),
        ({"ranks_per_node": 5}, "lower ranks_per_node"),
    ],
)
def test_mistakes_in_a_cluster_name_the_key(cluster, values, said):
    with pytest.raises(SiteError, match=said.replace("?", r"\?").replace("'", ".")) as error:
        cluster(**values)
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value).replace("\\n", "")


def test_a_cluster_that_is_not_there():
    with pytest.raises(SiteError, match=r"CLUSTER=nowhere.*known: cpu, default"):
        read("nowhere")
    with pytest.raises(SiteError, match="--set: nods: there is no such key; did you mean 'nodes'"):
        read("cpu").with_words(["nods=2"])


@pytest.mark.parametrize(
    ("time", "wanted"),
    [("90", 90), ("1:30", 2), ("24:00:00", 1440), ("2-12", 3600), ("1-00:30", 1470), ("1-00:00:01", 1441)],
)
def test_time_limits_in_minutes(time, wanted):
    assert minutes(time) == wanted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "seed=0,1"], "slurm-sweep"),
        (["tracking=wandb"], "wandb sync"),
        (["resume=true"], "needs the name"),
        (["name=../x"], "letters, digits"),
        (["name=$(id)"], "letters, digits"),
    ],
)
def test_what_cannot_work_in_a_job(words, said):
    with pytest.raises(SiteError, match=said):
        slurm.submit("train", read("default"), words, dry=True)


def test_the_servers_gpus_are_the_last_of_the_node():
    mine = read("default").with_words(["serve_gpus=1"])
    assert mine.ranks == 3 and slurm.serving(mine, ["a=1"]) == ["a=1", "rollout.gpus='3'"]
    with pytest.raises(SiteError, match="add rollout=vllm_server"):
        slurm.render("train", mine, ["seed=1"], "x")


def command(*words, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(
        [sys.executable, "-m", "launch.slurm", *words], cwd=ROOT, env=clean, capture_output=True, text=True
    )


def test_a_config_that_does_not_compose_is_refused_before_it_waits_in_a_queue():
    done = command("train", "--dry", "seeed=1")
    assert done.returncode and done.stderr.strip() == "error: seeed: there is no such key; did you mean 'seed'?"


def test_without_slurm_the_error_says_so(tmp_path):
    done = command("status", PATH=str(tmp_path))
    assert done.returncode and "squeue is not on PATH" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("submitit") is not None, reason="submitit is installed")
def test_without_submitit_a_sweep_says_what_is_missing(tmp_path):
    line = [sys.executable, "-m", "grpo.train", "-m", "hydra/launcher=slurm", "seed=0,1"]
    done = subprocess.run(
        line, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode and done.stderr.startswith("error: hydra/launcher=slurm needs the package hydra-submitit")


def test_a_sweep_takes_the_same_settings(monkeypatch, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("partition: gpu\njobs: 3\ntime: '1:30:00'\nrequeue: 5\nsbatch: [--constraint=h100]\n")
    monkeypatch.setenv("CLUSTER", str(path))
    assert [slurm.sweep(key) for key in ("partition", "jobs", "minutes", "gpu", "lead")] == ["gpu", 3, 90, 1, 120]
    assert slurm.sweep("options") == {"constraint": "h100", "requeue": True}
    assert "export HF_HUB_OFFLINE=1" in "\n".join(slurm.sweep("setup"))
