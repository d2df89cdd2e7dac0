"""The same sound is found however it was saved; another sound is not."""

import io
import json

import numpy as np
import pytest
import soundfile

from data import manifest
from data.audio import resample
from data.fingerprint import HZ, Index, fingerprint
from data.overlap import main, overlaps, source_names
from data.question import Clip, Question
from data.synthetic import KINDS

RATE = 32000


def scene(seed, seconds=4.0):
    """Overlapping sounds of the synthetic kinds over faint noise, as a recording has them. [S] at RATE."""
    rng = np.random.default_rng(seed)
    wave = 0.01 * rng.standard_normal(int(seconds * RATE))
    for _ in range(int(2 * seconds) + 1):
        length = int(rng.uniform(0.2, 0.9) * RATE)
        at = rng.integers(0, len(wave) - length)
        sound = list(KINDS.values())[rng.integers(len(KINDS))](np.arange(length) / RATE, rng)
        wave[at : at + length] += rng.uniform(0.2, 0.6) * np.hanning(length) * sound / np.abs(sound).max()
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def hiss(seed, seconds=4.0):
    return (0.1 * np.random.default_rng([7, seed]).standard_normal(int(seconds * RATE))).astype(np.float32)


def coded(wave, kind, **how):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format=kind, **how)
    buffer.seek(0)
    return soundfile.read(buffer, dtype="float32")[0]


def at(wave, hz):
    return resample(Clip(wave, RATE), hz).samples


CHANGES = {
    "mp3": lambda w: at(coded(w, "MP3"), HZ),
    "ogg": lambda w: at(coded(w, "OGG", subtype="VORBIS"), HZ),
    "ogg, low quality": lambda w: at(coded(w, "OGG", subtype="VORBIS", compression_level=0.9), HZ),
    "quieter": lambda w: at(0.05 * w, HZ),
    "clipped": lambda w: at(np.clip(3 * w, -1, 1), HZ),
    "by way of 44.1 kHz": lambda w: resample(Clip(at(w, 44100), 44100), HZ).samples,
    "by way of 11 kHz": lambda w: resample(Clip(at(w, 11025), 11025), HZ).samples,
    "30 ms later": lambda w: at(np.concatenate([np.zeros(960, np.float32), w]), HZ),
    "63 ms cut off": lambda w: at(w[2003:], HZ),
    "the middle half": lambda w: at(w[len(w) // 4 : 3 * len(w) // 4], HZ),
}


@pytest.mark.parametrize("make", [scene, hiss])
@pytest.mark.parametrize("change", CHANGES)
def test_a_recording_is_known_again_and_only_it(make, change):
    waves = [make(seed) for seed in range(8)]
    index = Index([fingerprint(at(wave, HZ)) for wave in waves])
    for number, wave in enumerate(waves):
        assert [owner for owner, _ in index.matches(fingerprint(CHANGES[change](wave)))] == [number]


def test_no_false_alarms_among_sounds_of_one_kind():
    """Ten draws of each of the fourteen kinds, 1 to 3 s: 9,730 pairs of different sounds, none a match."""
    prints = []
    for k, kind in enumerate(KINDS.values()):
        for seed in range(10):
            rng = np.random.default_rng([seed, k])
            time = np.arange(int(rng.uniform(1, 3) * HZ)) / HZ
            wave = kind(time, rng)
            prints.append(
                fingerprint(
                    (wave / np.abs(wave).max() * 0.3 + 0.002 * rng.standard_normal(len(time))).astype(np.float32)
                )
            )
    index = Index(prints)
    assert all([owner for owner, _ in index.matches(p)] == [number] for number, p in enumerate(prints))


def test_nothing_matches_nothing():
    empty = [fingerprint(np.zeros(n, np.float32)) for n in (0, 100, 8000)]
    assert [len(p) for p in empty] == [0, 0, 0] and Index(empty).matches(fingerprint(at(scene(0), HZ))) == []
    assert Index([]).matches(empty[0]) == []


def question(name, audio, **more):
    return Question(name, audio, "?", ("a", "b"), 0, **more)


def test_what_a_recording_is_called():
    video = "dQw4w9WgXcQ"
    for q in [
        question("a", None, clip=f"{video} (12_5-17_5)"),
        question("a", None, clip=video),
        question("a", None, meta={"row": {"url": f"https://youtu.be/{video}?t=3"}}),
        question("a", None, meta={"row": {"url": f"https://www.youtube.com/watch?x=1&v={video}&list=2"}}),
    ]:
        assert source_names(q) == {f"youtube {video}"}
    assert source_names(question("a", None, clip="102.wav", source="clotho")) == {"clotho 102.wav"}
    assert source_names(question("a", None, clip="description")) == set()  # a word of eleven letters


def test_the_command_finds_each_kind_and_cleans(tmp_path, capsys):
    train, bench = tmp_path / "train", tmp_path / "bench"
    train.mkdir(), bench.mkdir()
    waves = [scene(seed, 2.0) for seed in range(6)]
    soundfile.write(train / "bytes.flac", waves[0], RATE)
    (bench / "x.flac").write_bytes((train / "bytes.flac").read_bytes())
    soundfile.write(train / "samples.flac", waves[1], RATE)
    soundfile.write(bench / "y.wav", *soundfile.read(train / "samples.flac", dtype="int16"))
    soundfile.write(train / "sound.mp3", waves[2], RATE)
    soundfile.write(bench / "z.ogg", 0.3 * waves[2], RATE)
    soundfile.write(train / "dQw4w9WgXcQ_30.wav", waves[3], RATE)
    soundfile.write(bench / "v.wav", waves[4], RATE)
    soundfile.write(train / "clean.wav", waves[5], RATE)
    (bench / "broken.wav").write_bytes(b"x")
    ours = [question(p.stem, p) for p in sorted(train.iterdir())] + [question("second on sound", train / "sound.mp3")]
    theirs = [question(p.stem, p, clip="dQw4w9WgXcQ" if p.stem == "v" else None) for p in sorted(bench.iterdir())]
    manifest.write(train / "m.jsonl", ours, train)
    manifest.write(bench / "m.jsonl", theirs, bench)
    arguments = [str(train / "m.jsonl"), str(bench / "m.jsonl"), "--workers", "0", "--json"]
    assert main([*arguments, "--clean", str(train / "c.jsonl")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [(o["kind"], o["train"], o["bench"]) for o in report["found"]] == [
        ("source", "dQw4w9WgXcQ_30", "v"),
        ("bytes", "bytes", "x"),
        ("samples", "samples", "y"),
        ("sound", "sound", "z"),
    ]
    assert len(report["unread"]) == 1 and "broken.wav" in report["unread"][0]
    assert [q.id for q in manifest.read(train / "c.jsonl")] == ["clean"]  # both questions on a clip that was found go
    assert main([str(train / "c.jsonl"), str(bench / "m.jsonl"), "--workers", "0"]) == 0
    assert "0 of 5 benchmark clips" in capsys.readouterr().out
    assert main([str(tmp_path / "no.jsonl"), str(bench / "m.jsonl")]) == 2


@pytest.mark.slow  # a process takes long to import torch
def test_processes_hear_the_same(tmp_path):
    waves = [scene(seed, 1.0) for seed in range(3)]
    for i, wave in enumerate(waves):
        soundfile.write(tmp_path / f"{i}.wav", wave, RATE)
    ours = [question(str(i), tmp_path / f"{i}.wav") for i in range(3)]
    assert overlaps(ours, ours[:2], workers=1) == overlaps(ours, ours[:2], workers=0)
