"""Rows: good ones come back as written, each kind of bad one becomes a Problem with its line and reason."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.manifest import read, scan, write
from data.question import Question

ROW = {"id": "a", "audio": "clips/a.wav", "question": "What barks?", "choices": ["dog", "rain"], "answer": 0}


def save(folder, *rows):
    path = folder / "m.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_round_trip(tmp_path):
    rows = [
        Question("a", tmp_path / "x" / "ä.wav", "Was ist zu hören?", ("Hund", "Regen", "雨"), 2),
        Question("b", tmp_path / "b.flac", "Which?\nListen.", ("1", "2"), 0, 0.5, 1.5, "kind", "me", "CC0-1.0"),
    ]
    write(tmp_path / "m.jsonl", rows, tmp_path)
    manifest = read(tmp_path / "m.jsonl")
    assert (list(manifest), manifest.problems, manifest.lines, len(manifest)) == (rows, [], {"a": 1, "b": 2}, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]  # nothing temporary stays
    assert manifest.questions[0].gold == "雨"


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"anwser": 1}, "unknown_key", "did you mean 'answer'"),
        ({"speaker": 1}, "unknown_key", "under 'meta'"),
        ({"question": None}, "bad_type", "question"),
        ({"answer": "0"}, "bad_type", "must be int"),
        ({"answer": True}, "bad_type", "must be int"),
        ({"start": "1"}, "bad_type", "must be float"),
        ({"meta": 1}, "bad_type", "must be dict"),
        ({"choices": ["a", 2]}, "bad_type", "choices"),
        ({"answer": 2}, "answer_range", "0 is the first"),
        ({"answer": -1}, "answer_range", "-1"),
        ({"choices": ["dog"]}, "num_choices", "2 to 26"),
        ({"choices": [f"n{i}" for i in range(27)]}, "num_choices", "27"),
        ({"choices": ["dog", "Dog "]}, "duplicate_choices", "same text"),
        ({"choices": ["A. dog", "B. rain"]}, "lettered_choices", "bare texts"),
        ({"choices": ["(A) dog", "(B) rain"]}, "lettered_choices", "bare texts"),
        ({"choices": ["dog", "cat\nB. rain"]}, "line_break", "two options"),
        ({"question": " "}, "empty_text", "question"),
        ({"choices": ["dog", ""]}, "empty_text", "choices"),
        ({"question": "What is <|AUDIO|>?"}, "special_token", "breaks the prompt"),
        ({"choices": ["dog", "x<|im_end|>"]}, "special_token", "im_end"),
        ({"question": "\ud800"}, "bad_text", "surrogate"),
        ({"category": "\ud800"}, "bad_text", "surrogate"),
        ({"meta": {"row": ["x\udfff"]}}, "bad_text", "surrogate"),
        ({"audio": "a\0b"}, "bad_text", "NUL"),
        ({"start": 2, "end": 1}, "bad_range", "start < end"),
        ({"start": float("nan")}, "bad_range", "seconds"),
        ({"audio": "../a.wav"}, "path_escape", "outside the data root"),
        ({"audio": "/etc/passwd"}, "path_escape", "outside the data root"),
        ({"audio": "x/../../a.wav"}, "path_escape", "outside the data root"),
    ],
)
def test_bad_row(tmp_path, change, reason, words):
    manifest = read(save(tmp_path, ROW | {"id": "good"}, ROW | change))
    assert [q.id for q in manifest] == ["good"]
    [problem] = manifest.problems
    assert (problem.line, problem.id, problem.reason) == (2, "a", reason)
    assert words in problem.message and problem.file.endswith("m.jsonl")


@pytest.mark.parametrize("key", ROW)
def test_missing_key(tmp_path, key):
    [problem] = read(save(tmp_path, {k: v for k, v in ROW.items() if k != key})).problems
    assert problem.reason == "missing_key" and repr(key) in problem.message


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"a": ' + "9" * 5000 + "}", "[" * 100_000, "\ufeff{}"])
def test_bad_json(tmp_path, line):
    [problem] = read(save(tmp_path, line)).problems
    assert (problem.line, problem.reason) == (1, "bad_json")


def test_wrong_encoding(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"id": "\xff"}\n')
    assert read(tmp_path / "m.jsonl").problems[0].reason == "bad_json"


def test_duplicate_id_names_the_first_line_and_blank_lines_count(tmp_path):
    questions, [problem] = scan(save(tmp_path, "", ROW, ROW))
    assert len(questions) == 1
    assert (problem.line, problem.reason) == (3, "duplicate_id") and "line 2" in problem.message


def test_a_link_out_of_the_root_is_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.wav").write_bytes(b"x")
    (root / "a.wav").symlink_to(tmp_path / "secret.wav")
    (root / "out").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    rows = [ROW | {"id": str(i), "audio": name} for i, name in enumerate(["a.wav", "out/secret.wav", "loop"])]
    manifest = read(save(root, *rows))
    assert [p.reason for p in manifest.problems] == ["path_escape"] * 3
    assert not read(save(root, ROW | {"audio": "root/a.wav"}), root=tmp_path).problems  # a wider root allows it


def test_a_link_to_the_root_itself_is_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    manifest = read(save(tmp_path / "real", ROW), root=tmp_path / "link")
    assert manifest.questions[0].audio == tmp_path.resolve() / "real" / "clips" / "a.wav"


def test_no_manifest_or_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.train\.path"):
        read(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match="no rows"):
        read(save(tmp_path, "", " "))


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(SCALAR, lambda x: st.lists(x, max_size=3))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*ROW, "start", "end", "task", "meta"]), JSON))
def test_no_row_raises(tmp_path_factory, change):
    folder = Path(tmp_path_factory.getbasetemp())
    manifest = read(save(folder, ROW | change))
    assert len(manifest) + len(manifest.problems) == 1


def test_every_field_comes_back(tmp_path):
    """Written and read, a question is the same question: nothing that a benchmark published is lost."""
    from data.manifest import OPTIONAL, read, write
    from data.question import Question

    texts = {k: f"{k} ü <b>" for k, kind in OPTIONAL.items() if kind is str}
    meta = {"row": {"id": "1", "nested": [{"a": None, "b": 1.5}], "category": ["Reasoning"]}}
    question = Question(
        "q", tmp_path / "x.wav", "?", ("a", ""), 1, start=0.25, end=1.0, span=(512, 99), meta=meta, **texts
    )
    assert all(getattr(question, k) is not None for k in OPTIONAL)
    write(tmp_path / "m.jsonl", [question], tmp_path)
    assert read(tmp_path / "m.jsonl").questions == [question]
    assert hash(question) == hash(read(tmp_path / "m.jsonl").questions[0])


def test_a_withheld_answer_must_be_asked_for(tmp_path):
    import json

    from data.dataset import DataError, Dataset
    from data.manifest import read

    row = {"id": "q", "audio": "x.wav", "question": "?", "choices": ["a", "b"], "answer": None}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    assert [p.reason for p in read(tmp_path / "m.jsonl").problems] == ["bad_type"]
    hidden = read(tmp_path / "m.jsonl", hidden=True)
    assert hidden.questions[0].answer is None
    with pytest.raises(DataError, match="its answer is withheld"):
        Dataset(hidden, hidden, verify="none")
