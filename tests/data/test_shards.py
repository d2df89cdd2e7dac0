"""Packed clips: the same sound and questions, any order, resumed exactly, killed and written again."""

import itertools
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from data import manifest, shards
from data.audio import ClipError, load
from data.dataset import Dataset
from data.question import Question
from data.rows import read as rows


@pytest.fixture
def questions(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(9):
        hz, channels = ((16000, 1), (44100, 2), (48000, 1))[i % 3]
        soundfile.write(folder / f"{i}.wav", 0.2 * rng.standard_normal((hz // 4 + i, channels)), hz)
    soundfile.write(folder / "8.wav", 1.5 * np.sin(np.arange(5000) / 5), 16000, subtype="FLOAT")  # beyond full scale
    return [
        Question(f"q{i}", folder / f"{i // 2}.wav", f"What is {i}?", ("a", "b"), i % 2, start=0.05 if i == 3 else None,
                 thinking="hm", meta={"row": {"x": i}}) for i in range(18)
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_comes_out_is_what_went_in(tmp_path, questions, workers):
    packed = shards.write(questions, tmp_path / "packed", per_shard=4, workers=workers)
    assert [q.id for q in packed] and {q.id for q in packed} == {q.id for q in questions}
    assert len({(q.audio, q.span) for q in packed}) == 10  # a clip is stored once; q3 asks of another stretch
    by_id = {q.id: q for q in packed}
    for q in questions:
        ours, theirs = load(q.audio, start=q.start, end=q.end), load(by_id[q.id].audio, span=by_id[q.id].span)
        assert ours.samples.shape == theirs.samples.shape
        assert np.abs(ours.samples - theirs.samples).max() < 2**-23
        assert replace(by_id[q.id], audio=q.audio, span=None, start=q.start, sha256=None) == q
    data = Dataset(packed, [replace(questions[0], id="held out")], verify="decode")
    assert not data.problems and data.clip(data.train[0]).hz == 16000


def test_shards_are_plain_webdataset_tars(tmp_path, questions):
    packed = shards.write(questions, tmp_path / "packed", per_shard=4)
    for path in sorted(tmp_path.glob("packed/*.tar")):
        with tarfile.open(path) as tar:
            assert all(m.isreg() and m.name.split(".")[1] in ("flac", "wav", "json") for m in tar)
        assert all(row.error is None for row in rows(path))
    q = packed.questions[0]
    assert next(rows(q.audio)).value["__audio__"].offset == q.span[0]


@pytest.mark.parametrize("stop", [0, 1, 17, 18, 25, 40])
def test_a_stopped_reader_goes_on_exactly(tmp_path, questions, stop):
    packed = shards.write(questions, tmp_path / "packed", per_shard=4)
    whole = [(k, q.id, clip.sha256) for k, q, clip in itertools.islice(shards.stream(packed, seed=5), 50)]
    resumed = itertools.islice(shards.stream(packed, seed=5, start=stop), 50 - stop)
    assert [(k, q.id, clip.sha256) for k, q, clip in resumed] == whole[stop:]
    for epoch in (0, 1):
        assert {name for _, name, _ in whole[18 * epoch : 18 * (epoch + 1)]} == {q.id for q in questions}
    assert [w[1] for w in whole[:18]] != [w[1] for w in whole[18:36]]
    readers = [itertools.islice(shards.stream(packed, seed=5, rank=r, world=3), 10) for r in range(3)]
    shared = sorted((k, q.id) for reader in readers for k, q, _ in reader)
    assert shared == [(k, name) for k, name, _ in whole[:30]]


def test_within_an_epoch_a_shard_is_read_to_its_end(tmp_path, questions):
    packed = shards.write(questions, tmp_path / "packed", per_shard=4)
    order = [q.audio for _, q, _ in itertools.islice(shards.stream(packed, seed=1), 18)]
    assert len([key for key, _ in itertools.groupby(order)]) == len(set(order)) == 3


def test_a_killed_writer_keeps_its_finished_shards(tmp_path, questions, monkeypatch):
    """It dies in the second shard; the next run writes that one and the last, and the manifest of a run unharmed."""
    shards.write(questions, tmp_path / "whole", per_shard=4)
    encode, count = shards._encode, itertools.count()

    def dying(clip):
        if next(count) == 5:
            raise KeyboardInterrupt
        return encode(clip)

    monkeypatch.setattr(shards, "_encode", dying)
    with pytest.raises(KeyboardInterrupt):
        shards.write(questions, tmp_path / "killed", per_shard=4)
    assert len(list(tmp_path.glob("killed/*.tar"))) == 1 and not (tmp_path / "killed/manifest.jsonl").exists()
    encoded = []
    monkeypatch.setattr(shards, "_encode", lambda clip: encoded.append(clip) or encode(clip))
    shards.write(questions, tmp_path / "killed", per_shard=4)
    assert len(encoded) == 6
    for path in sorted(tmp_path.glob("whole/*")):
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()


def test_the_command(tmp_path, questions, capsys):
    manifest.write(tmp_path / "m.jsonl", questions, tmp_path)
    assert shards.main([str(tmp_path / "m.jsonl"), str(tmp_path / "p"), "--workers", "0"]) == 0
    assert len(manifest.read(tmp_path / "p" / "manifest.jsonl")) == 18
    (tmp_path / "clips/3.wav").write_bytes(b"")
    assert shards.main([str(tmp_path / "m.jsonl"), str(tmp_path / "p2"), "--workers", "0"]) == 2
    assert "3.wav: the file has no bytes" in capsys.readouterr().err


def test_a_shard_that_was_cut_is_refused(tmp_path, questions):
    packed = shards.write(questions, tmp_path / "packed")
    q = packed.questions[-1]
    q.audio.write_bytes(q.audio.read_bytes()[: q.span[0] + 100])
    with pytest.raises(ClipError, match="cut off or rewritten"):
        load(q.audio, span=q.span)


def test_every_line_of_the_index_is_a_manifest_row(tmp_path, questions):
    shards.write(questions, tmp_path / "packed", per_shard=4)
    lines = (tmp_path / "packed/manifest.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) >= {"id", "audio", "span", "sha256", "meta"} for line in lines)
