"""docs/change-the-loss.md, performed: its two files in an empty folder, its commands, and the count of what it took."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "change-the-loss.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(\S+)`\n\n```(?:python|yaml)\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^python -m (.+)$", TEXT, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(folder, *words):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_one_python_file_and_one_yaml_in_under_30_lines():
    assert sorted(Path(name).suffix for name in FILES) == [".py", ".yaml"]
    assert sum(len(text.splitlines()) for text in FILES.values()) < 30


def test_losscheck_passes_it_as_the_page_says(folder):
    assert COMMANDS[0].startswith("grpo.losscheck ")
    out = run(folder, *COMMANDS[0].split())
    assert "A·tanh(2·(ρ-1))/2" in out and "all checks passed" in out
    assert (folder / "losscheck.png").stat().st_size > 1000


def test_it_trains_as_the_page_says(folder):
    assert COMMANDS[1].startswith("grpo.train ")
    program, *words = COMMANDS[1].split()
    out = run(folder, program, "debug=one_step", "tracking=none", "name=first", "max_tokens=16", *words)
    assert "A·tanh(2·(ρ-1))/2" in out
    assert (folder / "outputs" / "first" / "summary.json").exists()
