"""Files from strangers: each is a clear error or a quarantined row, never a crash, an escape or much memory."""

import io
import json
import struct
import tarfile
import time
import tracemalloc
from itertools import islice

import numpy as np
import pytest
import soundfile

from data import manifest
from data.audio import ClipError, load
from data.check import main as check
from data.manifest import RowError
from data.options import within
from data.prepare import main
from data.rows import read

CONTAINERS = {"wav": {}, "flac": {}, "ogg": {"subtype": "VORBIS"}, "mp3": {}}
WAVE = (0.3 * np.sin(np.arange(64000) / 9)).astype(np.float32)
QUESTION = {
    "file_name": "x",
    "question": "What is heard?",
    "choices": ["a dog", "rain"],
    "answer": "B. rain",
    "thinking": "t" * 10,
}


def sound(kind, wave=WAVE, hz=16000, **more):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, hz, format=kind.upper(), **CONTAINERS[kind] | more)
    return buffer.getvalue()


def refused(path, *reasons):
    tracemalloc.start()
    try:
        with pytest.raises(ClipError) as caught:
            load(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert caught.value.reason in reasons and str(path) in str(caught.value)
    assert peak < 50e6
    return caught.value


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_truncated_file(tmp_path, kind, share):
    data = sound(kind)
    (tmp_path / f"x.{kind}").write_bytes(data[: int(len(data) * share)])
    if kind == "mp3" and share > 0.1:
        # libsndfile's own MP3s carry no length tag (see data/audio.py): what is left is a whole, shorter clip.
        try:
            assert load(tmp_path / "x.mp3").seconds < 4
        except ClipError as error:
            assert error.reason in ("truncated", "unreadable")
        return
    refused(tmp_path / f"x.{kind}", "truncated", "unreadable", "empty", "too_short")


@pytest.mark.parametrize("kind", CONTAINERS)
def test_corrupt_bytes_never_crash(tmp_path, kind):
    """Every file with 1 to 200 random bytes in it either loads, finite and not endless, or is refused."""
    data = sound(kind)
    rng = np.random.default_rng(0)
    for trial in range(40):
        broken = np.frombuffer(data, np.uint8).copy()
        where = rng.integers(0 if trial % 2 else min(len(data) - 1, 200), len(data), 1 + trial * 5)
        broken[where] = rng.integers(0, 256, len(where))
        path = tmp_path / f"x.{kind}"
        path.write_bytes(broken.tobytes())
        try:
            clip = load(path)
        except ClipError:
            continue
        assert np.isfinite(clip.samples).all() and 0 < clip.seconds <= 300


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_wrong_extension_is_read_by_its_bytes(tmp_path, kind):
    for name in ("x.wav", "x.mp3", "x.txt"):
        (tmp_path / name).write_bytes(sound(kind))
        assert abs(load(tmp_path / name).seconds - 4) < 0.1


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 100, b"<html>404 not found</html>" * 50, b"%PDF-1.7" + b"x" * 999, b"RIFF", b"OggS" * 9]
)
def test_what_is_no_audio(tmp_path, data):
    (tmp_path / "x.wav").write_bytes(data)
    refused(tmp_path / "x.wav", "empty", "unreadable", "truncated")


def test_a_header_that_lies_about_a_gigabyte(tmp_path):
    """Memory follows the bytes there are: a WAV of 1 GB, a FLAC of 2^36 samples, both with a second of sound."""
    wav = bytearray(sound("wav"))
    wav[4:8], wav[40:44] = struct.pack("<I", 2**30 + 36), struct.pack("<I", 2**30)
    (tmp_path / "x.wav").write_bytes(wav)
    refused(tmp_path / "x.wav", "truncated")
    flac = bytearray(sound("flac"))
    flac[21] |= 0x0F  # the high bits of STREAMINFO's count of samples
    (tmp_path / "x.flac").write_bytes(flac)
    refused(tmp_path / "x.flac", "truncated", "too_long")
    flac[21], flac[22:26] = flac[21] & 0xF0, struct.pack(">I", 16000 * 290)  # below the limit: decoded until it ends
    (tmp_path / "x.flac").write_bytes(flac)
    refused(tmp_path / "x.flac", "truncated")


def test_silence_that_unpacks_to_much(tmp_path):
    """A FLAC of a few kB that holds four minutes of 8 channels: read as one channel, a block at a time."""
    with soundfile.SoundFile(tmp_path / "x.flac", "w", 48000, 8, format="FLAC") as file:
        for _ in range(240):
            file.write(np.zeros((48000, 8), np.float32))
    assert (tmp_path / "x.flac").stat().st_size < 1e6
    tracemalloc.start()
    with pytest.raises(ClipError) as caught:
        load(tmp_path / "x.flac")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.reason == "silent" and peak < 3 * 240 * 48000 * 4  # decoded whole it would be 8 channels


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("channel", [0, 1])
def test_samples_that_are_no_numbers(tmp_path, value, channel):
    wave = np.stack([WAVE, WAVE], axis=1)
    wave[-1, channel] = value  # in the last block
    soundfile.write(tmp_path / "x.wav", wave, 16000, subtype="FLOAT")
    refused(tmp_path / "x.wav", "nan", "unscaled")


def test_96_channels(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.tile(WAVE[:1600, None], 96), 16000)
    assert "96 channels" in str(refused(tmp_path / "x.wav", "unreadable"))


# ---- tables and archives ----


def archive(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data, *kind in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if kind:
                member.type, member.linkname, member.size = kind[0], "/etc/passwd", 0
            tar.addfile(member, io.BytesIO(data) if not kind else None)
    return path


def good(name="x"):
    return [(f"{name}.json", json.dumps(QUESTION).encode()), (f"{name}.flac", sound("flac"))]


HOSTILE = {
    "..": [("../../x.json", b"{}"), ("../../x.flac", b"")],
    "absolute": [("/etc/x.json", b"{}"), ("/etc/x.flac", b"")],
    "symbolic link": [("a.json", json.dumps(QUESTION).encode()), ("a.flac", b"", tarfile.SYMTYPE)],
    "hard link": [("a.json", json.dumps(QUESTION).encode()), ("a.flac", b"", tarfile.LNKTYPE)],
    "device": [("a.json", json.dumps(QUESTION).encode()), ("a.wav", b"", tarfile.CHRTYPE)],
    "pipe": [("a.json", b"", tarfile.FIFOTYPE), ("a.flac", b"")],
    "pickle": [("a.json", json.dumps(QUESTION).encode()), ("a.pkl", b"cos\nsystem\n(S'false'\ntR.")],
    "torch pickle": [("a.pth", b"PK"), ("a.json", b"{}")],
    "two questions": [("a.json", b"{}"), ("a.json", b"{}"), ("a.wav", b"x")],
    "no sound": [("a.json", json.dumps(QUESTION).encode())],
    "deep json": [("a.json", b"[" * 500_000), ("a.flac", b"x")],
    "huge json": [("a.json", b'{"a": "' + b"x" * 2**21 + b'"}'), ("a.flac", b"x")],
    "list json": [("a.json", b"[1, 2]"), ("a.flac", b"x")],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_member_is_quarantined_and_the_rest_read(tmp_path, case):
    path = archive(tmp_path / "0.tar", *good("first"), *HOSTILE[case], *good("last"))
    before = sorted(tmp_path.rglob("*"))
    first, *hostile, last = read(path)
    assert first.value["__key__"] == "first" and last.value["__key__"] == "last"
    assert hostile and all(row.value is None and row.error.reason in ("bad_member", "bad_json") for row in hostile)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked
    out = tmp_path / "m.jsonl"
    assert main(["audsem", str(path), "--out", str(out), "--workers", "0", "--min-text", "0"]) == 1
    assert len(manifest.read(out)) == 1  # the last is a duplicate of the first but for its key


def test_damaged_archives(tmp_path):
    whole = archive(tmp_path / "0.tar", *good("a"), *good("b")).read_bytes()
    for name, data in {
        "cut": whole[: len(whole) // 2],
        "not": b"x" * 5000,
        "empty": b"",
        "zeros": b"\0" * 10240,
        "header": whole[:1024] + b"\xff" * 512 + whole[1536:],
    }.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        rows = list(read(path))
        assert rows[-1].error is not None, name
        assert all(row.error.reason in ("bad_tar", "bad_member") for row in rows if row.error), name


def test_a_tar_header_of_a_gigabyte_is_not_read(tmp_path):
    """A pax header says how long it is; the file behind it is sparse, so that it would be there to read."""
    path = archive(tmp_path / "0.tar", *good("a"))
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2**30
    with path.open("r+b") as file:
        file.seek(-10240 if path.stat().st_size > 10240 else 0, 2)
        file.seek(0)
        data = file.read()
        end = len(data.rstrip(b"\0")) // 512 * 512 + 512
        file.seek(end)
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(end + 512 + 2**30 + 10240)
    tracemalloc.start()
    rows = list(read(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows[0].value is not None and rows[-1].error.reason == "bad_tar" and peak < 20e6


def test_a_member_that_leads_back_to_itself(tmp_path):
    """A pax header gives a negative size: the next member is the one before, for ever (CVE-2025-8194)."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.json")
        member.pax_headers = {"size": "-2048"}
        tar.addfile(member)
    rows = list(islice(read(path), 10))
    assert len(rows) == 1 and rows[0].error.reason == "bad_tar"


def test_headers_about_headers_about_headers(tmp_path):
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 2
    (tmp_path / "0.tar").write_bytes((long.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 5000)
    rows = list(read(tmp_path / "0.tar"))
    assert len(rows) == 1 and rows[0].error.reason == "bad_tar"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("deep.jsonl", b"[" * 2_000_000),
        ("deep.json", b"[" * 2_000_000),
        ("wide.jsonl", b"[" + b"[]," * 3_000_000 + b"[]]"),
        ("wide.json", b'[{"a": [' + b"[]," * 3_000_000 + b"[]]}]"),
        ("digits.jsonl", b'{"a": ' + b"9" * 100_000 + b"}"),
        ("digits.json", b'[{"a": ' + b"9" * 100_000 + b"}]"),
        ("line.jsonl", b'{"a": "' + b"x" * 50_000_000 + b'"}\n{"b": 1}'),
        ("cell.csv", b"a,b\n" + b"x" * 50_000_000 + b",1\n"),
        ("line.csv", b"a,b\n" + b"x," * 20_000_000),
        ("quote.csv", b'a,b\n"never closed,1\n' * 1000),
        ("bytes.csv", b"a,b\n\xff\xfe,1\n"),
        ("cells.csv", b"a,b\n1,2,3\n"),
        ("half.json", b'[{"a": 1}, {"a"'),
        ("text.json", b"hello"),
        ("item.json", b'[1, "x"]'),
    ],
)
def test_bombs_are_bad_rows_in_little_memory(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    tracemalloc.start()
    rows = list(read(tmp_path / name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows and any(row.error for row in rows) and peak < 120e6
    if name == "line.jsonl":
        assert rows[1].value == {"b": 1}  # the rest is read


@pytest.mark.parametrize("head", [" " * 19_900, "choose options " * 1300, "options :" * 2000, "\n" * 19_900])
def test_a_question_that_takes_long_to_read_takes_no_time(head):
    began = time.process_time()
    assert within(f"{head}What?\nA. x\nB. y")[1] == ["x", "y"]
    with pytest.raises(RowError):
        within("['" * 9_990)
    assert time.process_time() - began < 5  # one took minutes


@pytest.mark.parametrize(
    "value", [None, 5, [], {}, "", [1], {"a": {"b": 1}}, "x" * 30_000, "\0", "<|AUDIO|>", "\ud800"]
)
@pytest.mark.parametrize("source", ["audsem", "avqa", "mmau_mini", "mmsu", "dcase2025", "muchomusic", "swift", "table"])
def test_rows_of_wrong_types_are_quarantined(tmp_path, source, value, capsys):
    columns = [
        "id",
        "audio",
        "audio_id",
        "file_name",
        "question",
        "question_text",
        "choices",
        "choice",
        "multi_choice",
        "answer",
        "messages",
        "audios",
        "choice_a",
        "choice_b",
        "answer_gt",
        "answers",
        "answer_orders",
        "prompt",
    ]
    (tmp_path / "t.jsonl").write_text(json.dumps(dict.fromkeys(columns, value)))
    assert (
        main([source, str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "m.jsonl"), "--workers", "0", "--json"]) == 1
    )
    report = json.loads(capsys.readouterr().out)
    long_text = source == "mmsu" and value == "x" * 30_000  # a benchmark's question may be long
    assert report["kept"] == int(long_text) and sum(report["states"].values()) == 1


def test_ids_twice_formulas_and_html_stay_what_they_are(tmp_path, capsys):
    """Text is data: kept letter by letter in the manifest; a second row of one id is quarantined by name."""
    soundfile.write(tmp_path / "x.wav", WAVE, 16000)
    nasty = ["=HYPERLINK(1)", "<script>alert(1)</script>", "[red]@cmd|' /C calc'!A0[/red]", "\x1b[31mred"]
    rows = [
        {"id": "same", "audio": "x.wav", "question": f"<img src=x onerror=alert({i})>", "choices": nasty, "answer": 0}
        for i in range(2)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "m.jsonl"
    assert main(["table", str(tmp_path / "t.jsonl"), "--out", str(out), "--workers", "0"]) == 1
    (question,) = manifest.read(out)
    assert question.choices == tuple(nasty) and question.question == rows[0]["question"]
    states = [json.loads(line) for line in (tmp_path / "m.states.jsonl").read_text().splitlines()]
    assert [s["state"] for s in states] == ["ok", "duplicate"] and "'same' stands in row 1" in states[1]["message"]
    assert check([str(out)]) == 0
    assert "\x1b[31m" not in capsys.readouterr().out


def test_a_manifest_of_strangers(tmp_path):
    """Spans that lie, paths that leave, lines without end."""
    soundfile.write(tmp_path / "x.wav", WAVE, 16000)
    row = {"id": "a", "audio": "x.wav", "question": "?", "choices": ["a", "b"], "answer": 0}
    hostile = [row | {"span": span} for span in ([0], [-1, 5], [0, 2**70], ["0", 5], [0, True])] + [
        row | {"audio": "../x.wav"}
    ]
    lines = [json.dumps(r) for r in hostile] + ['{"a": "' + "x" * 2**21 + '"}', json.dumps(row)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    read_back = manifest.read(tmp_path / "m.jsonl")
    assert [p.reason for p in read_back.problems] == ["bad_range"] * 5 + ["path_escape", "bad_json"] and len(
        read_back
    ) == 1
    for span, reason in [
        ((0, 2**40), "truncated"),
        ((10**9, 5), "truncated"),
        ((0, 0), "empty"),
        ((100, 50), "unreadable"),
    ]:
        with pytest.raises(ClipError) as caught:
            load(tmp_path / "x.wav", span=span)
        assert caught.value.reason == reason
