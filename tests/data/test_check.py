"""The command: exit codes, the table, the summary."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import check

ROOT = Path(check.__file__).parents[1]


@pytest.fixture
def manifest(tmp_path):
    """Two good rows (1 s and 0.25 s), a silent clip, a missing file, a row with a misspelt key."""
    noise = 0.1 * np.random.default_rng(0).standard_normal((48000, 2))
    soundfile.write(tmp_path / "good.wav", noise, 48000)
    soundfile.write(tmp_path / "silent.wav", 0 * noise, 48000)
    base = {"question": "?", "choices": ["a", "b"], "answer": 1}
    rows = [
        base | {"id": "g1", "audio": "good.wav"},
        base | {"id": "[red]s\x1b", "audio": "silent.wav"},
        base | {"id": "g2", "audio": "good.wav", "start": 0.5, "end": 0.75, "answer": 0},
        base | {"id": "t", "audio": "good.wav", "anwser": 1},
        base | {"id": "m", "audio": "no.wav"},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_problems_in_json(manifest, capsys):
    assert check.main([str(manifest), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    problems = [(p["line"], p["reason"]) for p in report["problems"]]
    assert problems == [(2, "silent"), (4, "unknown_key"), (5, "missing")]
    assert (report["rows"], report["ok"], report["seconds"]) == (5, 2, 1.25)
    assert (report["gold"]["counts"], report["rates"]) == ({"A": 1, "B": 1}, {"48000 Hz x 2": 2})


def test_problems_as_a_table(manifest, capsys):
    assert check.main([str(manifest)]) == 1
    out = capsys.readouterr().out
    assert "silent" in out and "did you mean" in out and "rows    5, ok 2, bad 3" in out
    assert "[red]s?" in out and "\x1b[" not in out  # text from the data is neither markup nor terminal codes


def test_fast_looks_at_headers_only(manifest, capsys):
    assert check.main([str(manifest), "--fast", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [p["reason"] for p in report["problems"]] == ["unknown_key", "missing"] and report["seconds"] == 2.25


def test_all_good_and_too_long(manifest, capsys):
    manifest.write_text(manifest.read_text().splitlines()[0])
    assert check.main([str(manifest)]) == 0
    assert check.main([str(manifest), "--max-seconds", "0.5", "--json"]) == 1
    assert '"too_long"' in capsys.readouterr().out


def test_withheld_answers_are_asked_for(manifest, capsys):
    row = json.loads(manifest.read_text().splitlines()[0]) | {"answer": None}
    manifest.write_text(json.dumps(row) + "\n")
    assert check.main([str(manifest)]) == 1 and "must be int, got None" in capsys.readouterr().out
    assert check.main([str(manifest), "--hidden"]) == 0 and "gold    none" in capsys.readouterr().out


def test_no_manifest_is_code_2(tmp_path, capsys):
    assert check.main([str(tmp_path / "no.jsonl")]) == 2
    assert "cannot read: manifest" in capsys.readouterr().err


def test_many_clips_go_to_processes_in_order(manifest, capsys, monkeypatch):
    one = json.loads(manifest.read_text().splitlines()[0])
    rows = [one | {"id": str(i), "audio": "no.wav" if i % 7 == 0 else "good.wav"} for i in range(40)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(check, "POOL_FROM", 1)
    assert check.main([str(manifest), "--workers", "2", "--json"]) == 1
    assert [p["id"] for p in json.loads(capsys.readouterr().out)["problems"]] == ["0", "7", "14", "21", "28", "35"]


def test_as_a_module(manifest):
    done = subprocess.run([sys.executable, "-m", "data.check", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--max-seconds" in done.stdout and "index of the" in done.stdout
