"""Asking about one clip and about many: parts of long clips, votes, resuming, mistakes."""

import json

import numpy as np
import pytest
import soundfile

from data import manifest
from data.audio import ClipError
from grpo.answer import Listener, ask, batch, main, parts, record, show
from grpo.config import ConfigError
from grpo.predict import Answer, read
from tests.conftest import make_clip, make_question


def write(path, seconds, seed=0):
    clip = make_clip(seed, seconds)
    soundfile.write(path, clip.samples, clip.hz)
    return path


def test_a_clip_that_fits_is_heard_whole_and_a_longer_one_in_equal_parts(tmp_path):
    q = ask(write(tmp_path / "a.wav", 7.0), "What?", ["a", "b"])
    assert parts(q, 7.0) == [q] and parts(q, 300) == [q]
    found = parts(q, 3.0)
    assert [(round(p.start, 3), round(p.end, 3)) for p in found] == [(0, 2.333), (2.333, 4.667), (4.667, 7)]
    with pytest.raises(ClipError, match="no such file"):
        parts(ask(tmp_path / "none.wav", "What?", ["a", "b"]), 3.0)
    with pytest.raises(ClipError, match="at least 30 are needed"):
        parts(ask(write(tmp_path / "b.wav", 0.01), "What?", ["a", "b"]), 3.0)


def test_an_hour_is_heard_part_by_part_in_bounded_memory(tmp_path, monkeypatch):
    """Twelve parts of an hour-long file; never more than one part is decoded at a time."""
    with soundfile.SoundFile(tmp_path / "hour.flac", "w", 8000, 1) as file:
        for _ in range(60):
            file.write((0.1 * np.sin(np.arange(8000 * 60) / 9)).astype(np.float32))
    q = ask(tmp_path / "hour.flac", "What?", ["a", "b"])
    found = parts(q, 300.0)
    assert len(found) == 12 and (found[0].start, found[-1].end) == (0, 3600)
    from data.audio import load

    assert load(found[7].audio, start=found[7].start, end=found[7].end).seconds == pytest.approx(300, abs=0.01)


def test_the_option_of_most_parts_is_the_answer(tmp_path):
    q = ask("x.wav", "What?", ["a", "b", "c"])

    def said(text, start):
        from dataclasses import replace

        return read(replace(q, start=start, end=start + 1), text)

    heard = [said("<answer>c</answer>", 0.0), said("<answer>b</answer>", 1.0), said("no", 2.0),
             said("<answer>B</answer>", 3.0)]  # fmt: skip
    row = record(q, heard)
    assert (row["option"], row["letter"], row["index"]) == ("b", "B", 1)
    assert [p["option"] for p in row["parts"]] == ["c", "b", None, "b"]
    assert record(q, heard[:2])["option"] == "c"  # a tie: the earlier
    assert "0 to 1 s: c" in show(row) and "2 to 3 s: no tag" in show(row)
    lost = record(q, [Answer(q, "audio error", problem="missing: x.wav")])
    assert lost["option"] is None and "missing: x.wav" in show(lost)


@pytest.mark.parametrize(
    ("text", "choices", "message"),
    [
        ("What?", ["a"], "2 to 26"),
        ("What?", ["a", " "], "none of them empty"),
        ("What?", ["a", "A"], "same text"),
        ("", ["a", "b"], "must not be empty"),
        ("<|AUDIO|>", ["a", "b"], "chat tokens"),
        ("What?", ["a\nb", "c"], "no line breaks"),
    ],
)
def test_questions_that_cannot_be_asked(text, choices, message):
    with pytest.raises(ConfigError, match=message):
        ask("x.wav", text, choices)


def test_a_manifest_is_resumed(policy, tmp_path, monkeypatch):
    questions = [make_question(f"q{i}", audio=write(tmp_path / f"{i}.wav", 0.4 + 0.3 * i, i)) for i in range(5)]
    questions[3].audio.unlink()
    manifest.write(tmp_path / "m.jsonl", questions, tmp_path)
    listener = Listener(policy, max_tokens=6, name="m", window=1.0, batch=2)
    assert batch(listener, tmp_path / "m.jsonl", tmp_path / "out.jsonl") == 5  # a random model names no option
    text = (tmp_path / "out.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [r["id"] for r in rows] == [f"q{i}" for i in range(5)]
    assert rows[3]["state"] == "audio error" and [len(r.get("parts", [1])) for r in rows] == [1, 1, 1, 1, 2]
    (tmp_path / "out.jsonl").write_text(text[: text.index('{"id": "q2"') + 20])
    asked = []
    monkeypatch.setattr(listener, "_encode", lambda p, real=listener._encode: asked.append(p.id) or real(p))
    batch(listener, tmp_path / "m.jsonl", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == text and asked == ["q2", "q4@0", "q4@1"]
    with pytest.raises(ConfigError, match="holds answers of m"):
        batch(Listener(policy, max_tokens=6, name="other"), tmp_path / "m.jsonl", tmp_path / "out.jsonl")


def test_the_command(checkpoint, tmp_path, capsys):
    clip = str(write(tmp_path / "a.wav", 0.5))
    words = [clip, "What?", "--choices", "dog", "rain", "--model", str(checkpoint), "--max-tokens", "4"]
    assert main([*words, "--prompt", "short", "--json"]) == 1
    row = json.loads(capsys.readouterr().out)
    assert row["state"] in ("truncated", "no tag") and len(row["prompt_hash"]) == 12
    assert main(words) == 2 and "does not say which prompt" in capsys.readouterr().err
    assert main([*words[:-4], "--model", "nowhere"]) == 2 and "no model nowhere" in capsys.readouterr().err
    words = ["--model", str(checkpoint), "--prompt", "short"]
    assert main([clip, "What?", "--choices", "dog", "rain", *words, "--dtype", "float31"]) == 2
    assert "'float31' must be float32" in capsys.readouterr().err
    (tmp_path / "m.jsonl").write_text("\n")
    for out, message in [("m.jsonl", "is the manifest itself"), ("out.jsonl", "has no rows")]:
        assert main(["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / out), *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([clip, "What?", "--choices", "dog", "rain", *words, "--window", "-1"])
