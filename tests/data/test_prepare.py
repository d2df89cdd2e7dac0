"""From AudSem's text and a folder of clips to a manifest: states, filters, files found, killed and resumed."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import check, manifest
from data.locate import Files, recording
from data.prepare import main

ROOT = Path(__file__).parents[2]
LONG = "It is a sound that goes on and on."


def tone(seconds=1.0, hz=16000, level=0.3):
    return (level * np.sin(np.arange(int(seconds * hz)) / 7)).astype(np.float32)


def row(clip, question="What is to be heard here?", thinking=LONG, answer="B. rain on a roof", **more):
    return {
        "file_name": clip,
        "question": question,
        "choices": '["a dog barks", "rain on a roof", "wind"]',
        "answer": answer,
        "thinking": thinking,
        "semantic_elements": LONG,
    } | more


def table(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def states(out):
    return [json.loads(line) for line in out.with_name(f"{out.stem}.states.jsonl").read_text().splitlines()]


def names(i):
    return f"vid{i:08d}"


def test_every_row_gets_its_state(tmp_path, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    broken = tone()
    broken[5] = np.nan
    sounds = {"ok": tone(), "silent": tone() * 0, "nan": broken, "too_short": tone(0.05), "too_long": tone(301, 1000)}
    for i, (_, wave) in enumerate(sounds.items()):
        soundfile.write(clips / f"{names(i)} (0-1).wav", wave, 1000 if len(wave) > 300_000 else 16000, subtype="FLOAT")
    (clips / f"{names(5)} (0-1).wav").write_bytes(b"<html>404</html>")
    (clips / f"{names(6)} (0-1).mp3").write_bytes(b"")
    rows = [row(f"{names(i)} (0-1)") for i in range(8)]  # 7 has no file
    rows += [row(f"{names(0)} (0-1)", question="And what is it now?"), row(f"{names(0)} (0-1)")]
    rows += [
        row(f"{names(0)} (0-1)", question="Short?"),
        row(f"{names(0)} (0-1)", thinking="As the Original Caption says, rain."),
        row(f"{names(0)} (0-1)", answer="D. snow on a roof"),
        row(""),
    ]
    out = tmp_path / "train.jsonl"
    arguments = [
        "audsem",
        str(table(tmp_path / "t.csv", rows)),
        "--audio",
        str(clips),
        "--out",
        str(out),
        "--workers",
        "0",
    ]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "11 of 14 present, 2 in " in said  # 7 has no file; the last two could not be read as questions
    found = states(out)
    assert [s["state"] for s in found] == [
        *sounds,
        "unreadable",
        "empty",
        "missing",
        "ok",
        "duplicate",
        "short_text",
        "leaked_caption",
        "answer_range",
        "missing_key",
    ]
    assert (found[0]["seconds"], found[0]["hz"], len(found[0]["sha256"])) == (1.0, 16000, 64)
    assert [q.id for q in manifest.read(out)] == [f"{names(0)} (0-1)_qa_0", f"{names(0)} (0-1)_qa_1"]
    assert check.main([str(out), "--max-seconds", "300"]) == 0
    capsys.readouterr()

    # The filters are options: what each one left out comes in without it (the leak is now the first row's double).
    assert (
        main([*arguments, "--min-text", "0", "--keep-leaks", "--min-seconds", "0.03", "--max-seconds", "400", "--json"])
        == 1
    )
    report = json.loads(capsys.readouterr().out)
    assert report["states"]["ok"] == 5, report
    assert not {"short_text", "leaked_caption", "too_short", "too_long"} & set(report["states"])
    assert report["gold"]["counts"] == {"B": 5} and "always B scores 100.0%" in report["gold"]["text"]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("abcdefghijk (12_5-17_5).flac", "abcdefghijk (12_5-17_5)"),
        ("deep/er/abcdefghijk (12.5-17.5).wav", "abcdefghijk (12_5-17_5)"),
        ("abcdefghijk_12.5.wav", "abcdefghijk (12.5-17.5)"),
        ("abcdefghijk_12500_17500.mp3", "abcdefghijk (12_5-17_5)"),
        ("[a_c-efghijk]-[30-40].wav", "a_c-efghijk (30-40)"),
        ("a/b.wav", "./a/b.wav"),
        ("b.wav", "/data/other/a/b.wav"),
        ("b.flac", "x/b.wav"),
        ("one/b.wav", "../../one/b.wav"),
    ],
)
def test_files_are_found_by_path_name_or_recording(tmp_path, file, name):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    for path in (file, "abcdefghijk_99.wav", "abcdefghijX (12_5-17_5).flac"):
        (tmp_path / path).touch()
    found = Files(tmp_path).find(name)
    assert (found.path, found.start) == ((tmp_path / file).resolve(), None)


def test_a_whole_video_is_cut_and_doubt_finds_nothing(tmp_path):
    for file in ("abcdefghijk.mp3", "a/x.wav", "b/x.wav", "note.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "link.wav").symlink_to("/etc/passwd")
    files = Files(tmp_path)
    found = files.find("abcdefghijk (12_5-17_5)")
    assert (found.path.name, found.start, found.end) == ("abcdefghijk.mp3", 12.5, 17.5)
    for name in ("x.wav", "link.wav", "note.txt", "", "..", "/", "abcdefghijX (1-2)"):
        assert files.find(name) is None, name
    assert recording("a dog") is None


def test_a_clip_of_the_same_video_is_not_taken_for_another(tmp_path):
    for file in ("abcdefghijk_30.wav", "one/abcdefghijk_60.wav", "two/abcdefghijk_60.wav", "abcdefghijk_90.wav",
                 "abcdefghijk_90_95.wav"):  # fmt: skip
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    files = Files(tmp_path)
    assert files.find("abcdefghijk (0-10)") is None  # the 30th second is no 30th millisecond
    assert files.find("abcdefghijk (30-40)").path.name == "abcdefghijk_30.wav"
    assert files.find("abcdefghijk (60-70)") is None  # two of equal right
    assert files.find("abcdefghijk (90-95)").path.name == "abcdefghijk_90_95.wav"  # start and end before start alone


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_any_point_and_resumed_the_manifest_is_the_same(tmp_path, workers):
    """A process that looks at clips is killed with SIGKILL after so many lines of its journal, once mid-line."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for i in range(40):
        soundfile.write(clips / f"{names(i)}.wav", tone(0.2 + i / 100, 44100, level=0.3 if i % 7 else 0.0), 44100)
    source = table(tmp_path / "t.csv", [row(f"{names(i)}") for i in range(44)])

    def arguments(folder):
        return [
            "audsem",
            str(source),
            "--audio",
            str(clips),
            "--out",
            str(tmp_path / folder / "m.jsonl"),
            "--workers",
            str(workers),
        ]

    assert main(arguments("whole")) == 1
    # After its second journal line the run kills itself: no time is waited for.
    script = (
        "import os, signal, sys, data.look as look, data.prepare as p\n"
        "def dying(*a, all=look._looks, **k):\n"
        "    for n, one in enumerate(all(*a, **k)):\n"
        "        if n == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield one\n"
        "if __name__ == '__main__':\n"
        "    look._looks = dying\n"
        "    p.main(sys.argv[1:])\n"
    )
    (tmp_path / "dying.py").write_text(script)
    for _ in range(2):
        dead = subprocess.run(
            [sys.executable, str(tmp_path / "dying.py"), *arguments("killed")],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
        )
        assert dead.returncode == -signal.SIGKILL, dead.stderr
        assert not (tmp_path / "killed" / "m.jsonl").exists()
    journal = tmp_path / "killed" / ".m.looks.jsonl"
    assert len(journal.read_text().splitlines()) == 10
    journal.write_bytes(journal.read_bytes()[:-20])  # a line cut in the middle
    assert main(arguments("killed")) == 1
    for name in ("m.jsonl", "m.states.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert journal.read_bytes().count(b"\n") == 40  # nothing was looked at twice


def test_a_changed_file_is_looked_at_again(tmp_path):
    clip = tmp_path / f"{names(0)}.wav"
    soundfile.write(clip, tone(1.0), 16000)
    arguments = [
        "audsem",
        str(table(tmp_path / "t.csv", [row(names(0))])),
        "--out",
        str(tmp_path / "m.jsonl"),
        "--workers",
        "0",
    ]
    assert main(arguments) == 0
    soundfile.write(clip, tone(2.0), 16000)
    assert main(arguments) == 0
    assert states(tmp_path / "m.jsonl")[0]["seconds"] == 2.0


def test_a_clip_that_kills_its_process_is_found_out_alone(tmp_path):
    """As a file does that brings the decoder down: data.look's functions die at the clips with a 7 in their names."""
    (tmp_path / "crash.py").write_text(
        "import os, signal\n"
        "from data import look\n"
        "def one(job, **limits):\n"
        "    if '7' in job.path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return look.Look('ok', job.path)\n"
        "if __name__ == '__main__':\n"
        "    look.look = one\n"
        "    seen = dict(look._looks([look.Job(f'clip{i}') for i in range(36)], 0.1, 300.0, 1))\n"
        "    print(len(seen), *sorted(job.path for job, s in seen.items() if s.state != 'ok'))\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "crash.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["36", "clip17", "clip27", "clip7"], done.stderr


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    (tmp_path / "t.txt").touch()
    (tmp_path / "empty").mkdir()
    for file, message in [("no.csv", "does not exist"), ("t.txt", "a table ends in"), ("empty", "files of one kind")]:
        assert main(["audsem", str(tmp_path / file), "--out", str(tmp_path / "m.jsonl")]) == 2
        assert message in capsys.readouterr().err
    out = tmp_path / "out" / "m.jsonl"
    assert main(["audsem", str(tmp_path / "empty"), "--audio", str(tmp_path / "no"), "--out", str(out)]) == 2
    assert "audio folder" in capsys.readouterr().err
    table = tmp_path / "rows.jsonl"
    table.write_text("{}")
    for files, out in [(table, table), (tmp_path, tmp_path / "m.jsonl")]:  # over its source, into what it reads
        assert main(["table", str(files), "--out", str(out)]) == 2
        assert "is read from" in capsys.readouterr().err
    assert table.read_text() == "{}" and not (tmp_path / "m.jsonl").exists()
    (tmp_path / "german.csv").write_text("audio;question;answer\nx.wav;?;a\n")
    assert main(["table", str(tmp_path / "german.csv"), "--out", str(tmp_path / "out" / "m.jsonl")]) == 2
    assert "between semicolons" in capsys.readouterr().err
