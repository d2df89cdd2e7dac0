"""The doctor's checks, each with a fault provoked, and the whole of it as a command."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from launch import doctor
from launch.site import ROOT

GPU = {"torch": "2.13.0", "cuda": "13.0", "there": True, "nccl": "2.28.9", "gpus": ["NVIDIA H100"] * 4}
CPU = {"torch": "2.13.0+cpu", "cuda": None, "there": False, "nccl": None, "gpus": []}


def seen(finding):
    return finding.state, finding.said


def test_python():
    assert doctor.check_python((3, 11)).state == "ok"
    bad = doctor.check_python((3, 12))
    assert bad.state == "fault" and "3.12" in bad.said and "make setup" in bad.remedy


def test_packages_against_the_lock():
    lock = "torch==2.13.0+cpu \\\n    --hash=sha256:0\nnumpy[x]==2.4.6 \\\n    --hash=sha256:1\n# note==1\n"
    have = {"torch": "2.13.0", "numpy": "2.4.6"}

    def installed(name):
        if name not in have:
            raise PackageNotFoundError(name)
        return have[name]

    assert seen(doctor.check_packages(lock, installed)) == ("ok", "2 as locked")
    have["numpy"] = "2.4.5"
    assert seen(doctor.check_packages(lock, installed)) == ("warning", "numpy 2.4.5 instead of 2.4.6")
    del have["numpy"]
    assert seen(doctor.check_packages(lock, installed)) == ("fault", "missing: numpy")


@pytest.mark.parametrize(
    ("smi", "torch", "state", "said"),
    [
        ("NVIDIA H100, 580.65.06", GPU, "ok", "4 x NVIDIA H100, driver 580.65.06, CUDA 13.0, NCCL 2.28.9"),
        ("NVIDIA H100, 580.65.06", CPU, "fault", "built without CUDA"),
        ("NVIDIA H100, 470.1", GPU | {"there": False}, "fault", "finds no GPU"),
        (None, GPU | {"there": False}, "warning", "nvidia-smi lists none"),
        (None, CPU, "ok", "CUDA and NCCL not looked at"),
    ],
)
def test_driver_cuda_and_nccl(smi, torch, state, said):
    finding = doctor.check_gpu(smi, torch)
    assert finding.state == state and said in finding.said and (state == "ok" or finding.remedy)


def test_two_processes_that_cannot_meet_are_a_fault(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'RuntimeError: no interface lo' >&2; exit 1\n")
    python.chmod(0o755)
    (finding,) = doctor.check_torch(None, str(python))
    assert seen(finding) == ("fault", "RuntimeError: no interface lo") and "loopback" in finding.remedy
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1\n")
    assert doctor.check_torch(None, str(python))[0].remedy == "make setup"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    (finding,) = doctor.check_torch(None, str(python), seconds=0.2)
    assert seen(finding) == ("fault", "no sum within 0.2 s")


def test_ports(monkeypatch):
    assert doctor.check_ports().state == "ok"

    def refuse(*_, **__):
        raise OSError("no sockets left")

    monkeypatch.setattr("socket.create_server", refuse)
    assert seen(doctor.check_ports()) == ("fault", "no sockets left")


def test_space_and_writing(tmp_path):
    assert doctor.check_space("runs", tmp_path / "not" / "yet", 0, 0, "free some").state == "ok"
    full = doctor.check_space("runs", tmp_path, 10**6, 10**7, "free some")
    assert full.state == "fault" and full.remedy == "free some"
    assert doctor.check_space("runs", tmp_path, 0, 10**7, "free some").state == "warning"
    assert doctor.check_writing("runs", tmp_path, mib=1, slow=0).state == "ok" and not list(tmp_path.iterdir())
    assert doctor.check_writing("runs", tmp_path, mib=1, slow=10**9).state == "warning"
    nowhere = doctor.check_writing("runs", doctor.Path("/proc/self"), mib=1)  # not even root writes there
    assert nowhere.state == "fault" and nowhere.remedy


@pytest.mark.parametrize(
    ("finding", "state"),
    [
        (doctor.check_memory("MemTotal: 9 kB\nMemAvailable:   25165824 kB\n"), "ok"),
        (doctor.check_memory("MemAvailable:   1048576 kB\n"), "fault"),
        (doctor.check_memory(""), "warning"),
        (doctor.check_cores(64, 64, None), "ok"),
        (doctor.check_cores(64, 8, "8"), "ok"),
        (doctor.check_cores(64, 1, None), "warning"),
        (doctor.check_cores(64, 8, "64"), "warning"),
        (doctor.check_files(4096, 4096), "ok"),
        (doctor.check_files(256, 4096), "warning"),
        (doctor.check_files(256, 512), "fault"),
        (doctor.check_wandb({}), "ok"),
        (doctor.check_wandb({"WANDB_MODE": "offline"}), "ok"),
        (doctor.check_wandb({"WANDB_MODE": "online", "HOME": "/nowhere"}), "warning"),
        (doctor.check_wandb({"WANDB_MODE": "online", "WANDB_API_KEY": "k"}), "ok"),
    ],
)
def test_limits(finding, state):
    assert finding.state == state and (state != "fault" or finding.remedy)


def test_slurm_and_the_hub(tmp_path):
    assert (
        "in job 7 on n[1-2], 2 task(s)"
        in doctor.check_slurm({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}).said
    )
    assert "none here" in doctor.check_slurm({}, path=str(tmp_path)).said
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    empty = doctor.check_hub(env)
    assert empty.state == "warning" and "make fetch" in empty.remedy
    (tmp_path / "hub" / "models--Qwen--Qwen2.5-Omni-7B" / "snapshots" / "abc").mkdir(parents=True)
    assert doctor.check_hub(env).state == "ok" and "Qwen/Qwen2.5-Omni-7B" in doctor.check_hub(env).said


@pytest.mark.slow  # two processes import torch
def test_the_whole_of_it(tmp_path):
    command = [sys.executable, "-m", "launch.doctor", "--json", f"--runs={tmp_path}", f"--cache={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    found = json.loads(done.stdout)
    assert {f["what"] for f in found} >= {"python", "packages", "cores", "memory", "files", "shared", "runs", "cache",
                                         "slurm", "hub", "wandb", "ports", "gpu", "gloo"}  # fmt: skip
    faults = [f for f in found if f["state"] == "fault"]
    assert done.returncode == (1 if faults else 0) and all(f["remedy"] for f in faults), faults
    assert next(f for f in found if f["what"] == "gloo")["state"] == "ok"
