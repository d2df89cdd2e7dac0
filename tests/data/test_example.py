"""The example that the README starts from is a folder like a user's own."""

import csv

import pytest

from data import manifest
from data.example import main
from data.prepare import main as prepare


def test_the_spreadsheet_becomes_a_manifest_with_nothing_lost(tmp_path):
    main([str(tmp_path / "mine"), "--train", "9", "--test", "5"])
    for name, count in (("train", 9), ("test", 5)):
        table, out = tmp_path / "mine" / f"{name}.csv", tmp_path / f"{name}.jsonl"
        clips = ["--audio", str(tmp_path / "mine" / "clips"), "--out", str(out), "--workers", "0"]
        assert prepare(["table", str(table), *clips]) == 0
        rows = list(csv.DictReader(open(table, encoding="utf-8")))
        for q, row in zip(manifest.read(out), rows, strict=True):
            assert (q.audio.name, q.question, q.gold) == (row["file"], row["question"], row["answer"])
            assert list(q.choices) == [row[letter] for letter in "ABCD"]
        assert len(rows) == count


def test_nothing_of_the_users_is_overwritten(tmp_path):
    (tmp_path / "train.csv").write_text("mine")
    with pytest.raises(SystemExit, match="name another folder"):
        main([str(tmp_path)])
    assert (tmp_path / "train.csv").read_text() == "mine" and not (tmp_path / "clips").exists()
