"""What SECURITY.md promises and no other test holds: what the source may not do, and what a stranger's files cannot."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from grpo.config import ConfigError
from grpo.export import weight_files
from grpo.load import find
from tests.test_imports import PACKAGES, ROOT, files, tops

SOURCES = files(*PACKAGES)
# Each reads a pickle, runs a text, or hands one to a shell.
UNSAFE = {"eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
          "torch.jit.load", "torch.hub.load", "numpy.load", "np.load"}  # fmt: skip
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Who turns a config's `_target_` into a call. Each is given a config composed from conf/ and --config-dir.
INSTANTIATE = {"grpo/config.py", "grpo/run.py", "grpo/evaluate.py", "grpo/lossdocs.py", "grpo/optuna_sweep.py"}


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_unpickles_evaluates_or_asks_a_shell(path):
    assert not tops(path) & PICKLES
    for name, call in calls(path):
        words = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert name not in UNSAFE, f"{path}:{call.lineno}: {name}"
        assert words.get("shell", "False") == "False", f"{path}:{call.lineno}: a shell"
        assert words.get("allow_pickle", "False") == "False", f"{path}:{call.lineno}"
        if name == "yaml.load":
            from grpo.report.read import LOADER

            assert name_of(path) == "grpo/report/read.py" and issubclass(LOADER, (yaml.SafeLoader, yaml.CSafeLoader))
        if name == "torch.load":
            assert words.get("weights_only") == "True", f"{path}:{call.lineno}"


def test_the_scan_sees_what_it_looks_for(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import os, torch\nos.system('x')\ntorch.load('f')\n")
    assert [name for name, _ in calls(bad)] == ["os.system", "torch.load"]


def test_only_a_few_modules_instantiate():
    users = {name_of(p) for p in SOURCES if any(n.split(".")[-1] in ("instantiate", "get_object") for n, _ in calls(p))}
    assert users <= INSTANTIATE


def test_a_run_from_a_stranger_is_data(tmp_path):
    """Its config names code, its prompt is not taken, nothing is called."""
    step = tmp_path / "checkpoints" / "step-000001"
    step.mkdir(parents=True)
    (tmp_path / "checkpoints" / "last.json").write_text('{"folder": "step-000001"}')
    (step / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/name"}))
    bomb = {"_target_": "pathlib.Path.touch", "_args_": [str(tmp_path / "touched")]}
    config = {"prompt": bomb, "loss": bomb, "max_tokens": 8, "model": {"dtype": "float32"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert find(tmp_path).prompt is None and not (tmp_path / "touched").exists()
    (tmp_path / "config.yaml").write_text(f"prompt: !!python/object/apply:os.mkdir ['{tmp_path}/touched']")
    with pytest.raises(yaml.YAMLError):
        find(tmp_path)
    assert not (tmp_path / "touched").exists()


def test_a_checkpoints_index_stays_in_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ConfigError, match="lies in another folder"):
        weight_files(tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=name_of)
def test_no_config_has_a_place_for_a_secret(path):
    def keys(node):
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in children:
            yield str(key)
            yield from keys(child)

    assert [
        k for k in keys(yaml.safe_load(path.read_text())) if re.search(r"(?i)secret|password|api_?key|^token$", k)
    ] == []


def test_every_promise_names_tests_that_exist():
    said = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(said) > 15
    for file, test in said:
        assert f"def {test or 'test_'}" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


@pytest.mark.parametrize(
    ("tool", "code", "says"),
    [
        ("echo 'Found 1 known vulnerability'; exit 1", 1, "Found 1 known vulnerability"),
        ("echo 'No known vulnerabilities found'", 0, "no known vulnerability"),
        ("echo 'requests.exceptions.ConnectionError: no route' >&2; exit 1", 3, "NOT AUDITED"),
        (None, 3, "NOT AUDITED"),
    ],
)
def test_an_audit_that_could_not_be_made_is_not_a_clean_one(tmp_path, tool, code, says):
    if tool:
        (tmp_path / "pip-audit").write_text(f"#!/bin/sh\n{tool}\n")
        (tmp_path / "pip-audit").chmod(0o755)
    command = [sys.executable, str(ROOT / "launch/audit.py"), "requirements/cpu.txt"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": f"{tmp_path}:/bin"}, capture_output=True, text=True)
    assert done.returncode == code and says in done.stdout + done.stderr
