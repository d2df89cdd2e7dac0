"""Every published format -> manifest -> official file, with nothing lost."""

import csv
import datetime
import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from data import manifest, submission
from data.prepare import main
from data.scoring import official
from data.sources import sources
from data.submission import Prediction

ABCD = ["A dog", "rain & <b>wind</b>", "=SUM(A1)", "Glocke ü"]
LETTERED = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), ABCD, strict=True))
PUBLISHED = {
    "mmau_mini": [
        {
            "id": "u-1",
            "audio_id": "./test-mini-audios/one.wav",
            "question": "What?",
            "choices": ABCD,
            "answer": "rain & <b>wind</b>",
            "dataset": "AudioSet",
            "task": "sound",
            "split": "test-mini",
            "category": "Reasoning",
            "sub-category": "x",
            "difficulty": "hard",
        },
        {
            "id": "u-2",
            "audio_id": "./test-mini-audios/gone.wav",
            "question": "Twice?",
            "choices": ["up", "up"],
            "answer": "up",
            "dataset": "Clotho",
            "task": "speech",
            "split": "test-mini",
            "category": ["Reasoning"],
            "sub-category": "y",
            "difficulty": "easy",
        },
    ],
    "mmau_test": [
        {"id": "t-1", "audio_id": "one.wav", "question": "?", "choices": ABCD, "answer": "", "task": "music"}
    ],
    "mmar": [
        {
            "id": "qx8hrhBZJ98_00-01-32_00-02-02",
            "audio_path": "./audio/one.wav",
            "question": "?",
            "choices": [*ABCD, ""],
            "answer": "Glocke ü",
            "modality": "mix-sound-speech",
            "category": "Signal Layer",
            "sub-category": "z",
            "language": None,
            "source": "youtube",
            "url": "https://www.youtube.com/watch?v=qx8hrhBZJ98&list=R",
            "timestamp": "00:01:32,00:02:02",
            "thinking": "t",
            "cue": ["a", "b"],
            "rubric": [{"name": "n", "scoring_point": 1.5, "note": None}],
        },
    ],
    "mmsu": [
        {
            "id": "m-1",
            "audio_path": "one.wav",
            "question": "?",
            **LETTERED,
            "answer_gt": "=SUM(A1)",
            "task_name": "t",
            "category": "Perception",
            "sub-category": "s",
            "sub-sub-category": "u",
            "linguistics_sub_discipline": "l",
        }
    ],
    "air_bench": [
        {
            "path": "one.wav",
            "question": "?",
            **LETTERED,
            "answer_gt": "A dog",
            "task_name": "Audio_Grounding",
            "dataset_name": "AudioGrounding",
            "uniq_id": 7,
        }
    ],
    "dcase2025": [
        {
            "id": "bio_1",
            "audio_url": "https://host/a/one.wav",
            "question": "?",
            "choice": ["A. whale", "B. seal"],
            "answer": "B. seal",
            "question_type": "species",
        }
    ],
    "dcase2026": [
        {"id": "d-1", "audio_path": "dev/one.wav", "question_text": "?", "multi_choice": ABCD, "answer": "Glocke ü"}
    ],
    "muchomusic": [
        {
            "id": "one",
            "prompt": "Question: Mood?\n Options: (A) sad (B) gay \n The correct answer is: ",
            "answers": ["sad", "gay"],
            "answer_orders": [1, 0],
            "dataset": "sdd",
            "genre": "pop",
            "reasoning": ["mood"],
            "knowledge": [],
            "audio_path": "one.wav",
        }
    ],
}
TRAINING = {
    "audsem": [
        {
            "file_name": "abcdefghijk (12_5-17_5)",
            "question": "What is to be heard here?\nChoices:\nA. A dog\nB. rain\nC. a small bell\nD. wind",
            "choices": {"A": "A dog", "B": "rain", "C": "a small bell", "D": "wind"},
            "answer": "C. a small bell",
            "thinking": "It rings in the distance.",
            "semantic_elements": "Agents: a bell ringer.",
        }
    ],
    "avqa": [
        {
            "id": 3,
            "video_name": "abcdefghijk_12500_17500",
            "question_text": "?",
            "multi_choice": ["A dog", "rain", "a bell", "wind"],
            "answer": 2,
            "dataset_name": "AVQA",
            "audio_path": "somewhere/abcdefghijk_12500_17500.wav",
        }
    ],
    "swift": [
        {
            "messages": [{"role": "user", "content": "<audio>What?\nChoices:\nA. A dog\nB. rain\nC. a bell\nD. wind"}],
            "audios": ["x/one.wav"],
            "solution": "<think>hm</think><answer>C. a bell</answer>",
        }
    ],
    "table": [
        {
            "file": "one.wav",
            "question": "What?",
            "A": "A dog",
            "B": "rain",
            "C": "a bell",
            "D": "wind",
            "answer": "C",
            "start": "0.5",
        }
    ],
    "hf": [
        {
            "audio": {"path": "one.wav", "bytes": None},
            "question": "What?",
            "choices": ["A dog", "rain", "a bell", "wind"],
            "answer": 2,
        }
    ],
}


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    (folder / "Audio_Grounding_AudioGrounding").mkdir(parents=True)
    wave = 0.3 * np.sin(np.arange(32000) / 9)
    for name in ("one.wav", "Audio_Grounding_AudioGrounding/one.wav", "abcdefghijk_12500_17500.wav"):
        soundfile.write(folder / name, wave, 16000)
    return folder


def write(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines), encoding="utf-8")
    return path


def prepare(tmp_path, clips, name, table, *more):
    out = tmp_path / "out" / f"{name}.jsonl"
    code = main([name, str(table), "--audio", str(clips), "--out", str(out), "--workers", "0", "--json", *more])
    return code, manifest.read(out, root=clips, hidden=True)


def test_every_source_is_tried_here():
    assert set(sources()) == set(PUBLISHED) | set(TRAINING)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_benchmark_to_manifest_to_official_file(tmp_path, clips, capsys, name, suffix):
    """Rows come out as they went in, the answer where the official scorer looks, every row, audio or none."""
    rows = PUBLISHED[name]
    code, read = prepare(tmp_path, clips, name, write(tmp_path / f"published{suffix}", rows))
    assert not read.problems and len(read) == len(rows) and code == int(name == "mmau_mini")  # one has no audio
    assert json.loads(capsys.readouterr().out)["present"] == len(rows) - int(name == "mmau_mini")

    said = {q.id: Prediction(q.answer if q.answer is not None else 1, "said", "thought") for q in read}
    file = tmp_path / "official"
    submission.write(file, read.questions, said)
    for (row, answer, thinking), q, given in zip(submission.read(file, name), read, rows, strict=True):
        if name == "dcase2025":
            assert (row, answer) == ({"question": given["id"]}, given["answer"])
        else:
            assert row == given
        assert thinking == ("thought" if name == "mmar" else "")
        if q.answer is not None:
            assert official(answer, q.choices, q.answer, name)
        assert q.benchmark == name and list(q.choices) and (q.answer is None) == (name == "mmau_test")


def test_an_official_file_holds_every_question_answered_or_not(tmp_path, clips):
    _, read = prepare(tmp_path, clips, "mmau_mini", write(tmp_path / "p.json", PUBLISHED["mmau_mini"]))
    submission.write(tmp_path / "o.json", read.questions, {"u-1": Prediction(None, "no option")})
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [row["model_output"] for row in rows] == ["no option", ""]  # null would crash the scorer, none flatter it
    with pytest.raises(ValueError, match="prediction for 'stranger'"):
        submission.write(tmp_path / "o.json", read.questions, {"stranger": Prediction(0)})
    with pytest.raises(ValueError, match="one of mmau_mini"):
        submission.write(tmp_path / "o.json", [], {})


def test_a_formula_never_reaches_a_spreadsheet(tmp_path, clips):
    row = PUBLISHED["dcase2025"][0] | {"id": "=HYPERLINK(1)"}
    _, read = prepare(tmp_path, clips, "dcase2025", write(tmp_path / "p.json", [row]))
    with pytest.raises(ValueError, match="run this id as a formula"):
        submission.write(tmp_path / "o.csv", read.questions, {})


def test_muchomusic_from_its_csv_becomes_the_evaluation_json(tmp_path, clips):
    columns = [
        "question",
        "correct_answer",
        "distractor_1_answer",
        "distractor_2_answer",
        "distractor_3_answer",
        "dataset",
        "dataset_identifier",
        "genre",
        "music_knowledge",
        "music_reasoning",
    ]
    with (tmp_path / "m.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for i in range(40):
            table.writerow([f"Mood {i}?", "gay", "sad", "mad", "bad", "sdd", "one.json", "pop", "['tempo', 'key']", ""])
    _, read = prepare(tmp_path, clips, "muchomusic", tmp_path / "m.csv")
    assert {q.gold for q in read} == {"gay"} and {q.answer for q in read} == {0, 1, 2, 3}
    submission.write(tmp_path / "o.json", read.questions, {q.id: Prediction(q.answer) for q in read})
    for item, q in zip(json.loads((tmp_path / "o.json").read_text()), read, strict=True):
        assert item["answers"] == list(q.choices) and item["answer_orders"].index(0) == q.answer
        assert (item["knowledge"], item["reasoning"]) == (["tempo", "key"], [])
        assert item["model_output"] == "ABCD"[q.answer]


@pytest.mark.parametrize("name", TRAINING)
def test_training_sources(tmp_path, clips, name):
    code, read = prepare(tmp_path, clips, name, write(tmp_path / "t.jsonl", TRAINING[name]))
    (q,) = read
    bell = "a small bell" if name == "audsem" else "a bell"
    assert (code, q.choices, q.answer) == (0, ("A dog", "rain", bell, "wind"), 2)
    assert q.audio.is_file() and "\nChoices" not in q.question and q.sha256 and len(q.sha256) == 64
    assert q.start == (0.5 if name == "table" else None)
    if name == "audsem":
        assert (q.id, q.thinking) == ("abcdefghijk (12_5-17_5)_qa_0", "It rings in the distance.")
        assert q.audio.name == "abcdefghijk_12500_17500.wav" and q.license == "CC-BY-NC-SA-4.0"
    if name == "swift":
        assert q.thinking == "hm"


def test_audsem_as_csv_with_other_column_names_and_as_shards_is_the_same(tmp_path, clips):
    row = TRAINING["audsem"][0]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["datei", *list(row)[1:]])
        table.writerow([row["file_name"], row["question"], str(row["choices"]), *list(row.values())[3:]])
    with tarfile.open(tmp_path / "0000.tar", "w") as tar:
        for kind, data in (("json", json.dumps(row).encode()), ("flac", flac(clips / "one.wav"))):
            member = tarfile.TarInfo(f"{row['file_name']}_qa_0.{kind}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    _, from_csv = prepare(tmp_path, clips, "audsem", tmp_path / "t.csv", "--column", "file_name=datei")
    out = tmp_path / "shards.jsonl"
    assert main(["audsem", str(tmp_path / "0000.tar"), "--out", str(out), "--workers", "0"]) == 0
    (a,), (b,) = from_csv, manifest.read(out)
    assert b.span and b.audio.name == "0000.tar"
    for key in ("id", "question", "choices", "answer", "thinking", "semantic_elements", "clip"):
        assert getattr(a, key) == getattr(b, key), key


def flac(path):
    buffer = io.BytesIO()
    soundfile.write(buffer, *soundfile.read(path), format="FLAC")
    return buffer.getvalue()


def test_parquet_with_sound_inside(tmp_path):
    import pyarrow
    from pyarrow import parquet

    soundfile.write(tmp_path / "x.wav", 0.3 * np.sin(np.arange(16000) / 9), 16000)
    sound = {"bytes": (tmp_path / "x.wav").read_bytes(), "path": "x.wav"}
    rows = [
        {
            "id": str(i),
            "context": sound,
            "question": f"{i}?",
            "choices": ["a b", "c"],
            "answer": "c",
            "category": ["Reasoning"],
            "released": datetime.date(2020, 1, 31),
            "cover": {"images": [b"\x89PNG"]},
        }
        for i in range(2)
    ]
    (tmp_path / "p").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p" / "t.parquet")
    out = tmp_path / "out" / "m.jsonl"
    assert main(["mmau_mini", str(tmp_path / "p" / "t.parquet"), "--out", str(out), "--workers", "0"]) == 0
    one, two = manifest.read(out)
    assert one.audio == two.audio and one.audio.read_bytes() == sound["bytes"]  # kept once
    assert one.meta["row"]["context"] == {"path": "x.wav"}
    assert (one.meta["row"]["released"], one.meta["row"]["cover"]) == ("2020-01-31", {"images": [None]})


def test_without_pyarrow_parquet_is_one_clear_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.lib", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    assert main(["hf", str(tmp_path / "t.parquet"), "--out", str(tmp_path / "m.jsonl")]) == 2
    assert "needs `pip install pyarrow`" in capsys.readouterr().err
