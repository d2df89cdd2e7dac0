"""Who may import whom: the dependency rules of the design, as code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("grpo", "rewards", "data", "conf", "launch")
# library -> the only modules that may import it
DOORS = {
    "transformers": {"grpo/policy.py", "grpo/tiny.py"},
    "peft": {"grpo/policy.py"},
    "deepspeed": {"grpo/engine.py"},
    "vllm": {"grpo/rollout/vllm.py", "grpo/sync/worker.py"},
    "wandb": {"grpo/tracking.py"},
    "optuna": {"grpo/optuna_sweep.py"},
    "pyarrow": {"data/rows.py"},  # where it is installed
}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(*folders):
    paths = [ROOT / folder for folder in folders]
    found = [p for path in paths for p in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    assert found
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_its_door(library):
    # launch/setup.py imports them in a subprocess, as text: that is not an import.
    users = {str(p.relative_to(ROOT)) for p in files(*PACKAGES) if library in tops(p)}
    assert users <= DOORS[library]


STDLIB = set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("data", STDLIB | {"numpy", "soundfile", "torch", "torchaudio", "rich", "pyarrow", "data"}),
        ("data/scoring.py", STDLIB),
        ("data/submission.py", STDLIB | {"data"}),
        ("rewards", STDLIB | {"rewards"}),
        ("launch", STDLIB | {"launch", "yaml"}),
        ("launch/setup.py", STDLIB | {"launch"}),  # these two run where nothing is installed yet
        ("launch/doctor.py", STDLIB),
        ("grpo/loss", STDLIB | {"torch", "grpo"}),
    ],
)
def test_a_package_stays_within_its_walls(folder, allowed):
    for path in files(folder):
        assert tops(path) <= allowed, path


def test_the_maths_sees_tensors_and_batches_only():
    for path in [*files("grpo/loss"), ROOT / "grpo/advantage.py", ROOT / "grpo/logprob.py"]:
        ours = {name for name in imports(path) if name.startswith("grpo")}
        assert all(name.startswith(("grpo.batch", "grpo.loss")) for name in ours), path
        assert not any("distributed" in name for name in imports(path)), path


def test_the_loop_names_no_variant():
    ours = {
        name.rsplit(".", 1)[0]
        for name in imports(ROOT / "grpo/loop.py")
        if name.startswith(("grpo", "data", "rewards"))
    }
    assert ours <= {"grpo", "grpo.advantage", "grpo.batch", "grpo.collect", "grpo.metrics", "grpo.micro",
                     "grpo.rollout"}  # fmt: skip


def test_files_that_must_stay_short():
    for name, limit in [("grpo/train.py", 80), ("grpo/loop.py", 160)]:
        assert len((ROOT / name).read_text().splitlines()) <= limit


def test_no_remote_code_and_no_pickles():
    for path in files(*PACKAGES):
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code" not in text and "pickle" not in tops(path), path
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(call), path


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import rewards.weighted, launch, data.scoring", ["torch", "numpy"]),
        ("import launch.slurm, launch.health", ["torch", "hydra", "omegaconf", "grpo"]),
        ("import launch.doctor, launch.setup", ["torch", "yaml"]),
        ("import data.prepare", ["torch", "torchaudio", "pyarrow"]),
        ("import grpo.loss.objective", ["transformers", "deepspeed", "vllm", "hydra", "wandb"]),
        ("import grpo.train", ["torch", "transformers", "optuna"]),
    ],
)
def test_light_modules_stay_light(statement, absent):
    check = f"{statement}; import sys; print(sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
