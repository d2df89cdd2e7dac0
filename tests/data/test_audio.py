"""The loader: every reason code from a real file, and the samples of good ones."""

import numpy as np
import pytest
import soundfile

from data.audio import ClipError, check_header, load

RNG = np.random.default_rng(0)
NOISE = (0.3 * RNG.standard_normal(32000)).astype(np.float32)  # 2 s at 16 kHz


def tone(hz, seconds, pitch=1000.0):
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(hz * seconds)) / hz)).astype(np.float32)


def cut(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def make(path, samples=NOISE, hz=16000, **kind):
    soundfile.write(path, samples, hz, **kind)
    return path


def reason(path, **limits):
    with pytest.raises(ClipError) as caught:
        load(path, **limits)
    assert str(path) in str(caught.value)  # every message names its file
    return caught.value.reason


def test_missing(tmp_path):
    assert reason(tmp_path / "no.wav") == "missing"
    assert reason(tmp_path) == "missing"  # a folder


def test_name_too_long(tmp_path):
    assert reason(tmp_path / ("x" * 5000)) == "unreadable"


def test_empty(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    assert reason(tmp_path / "a.wav") == "empty"
    assert reason(make(tmp_path / "b.wav", NOISE[:0])) == "empty"


def test_text_called_wav(tmp_path):
    (tmp_path / "a.wav").write_text("<html>404 Not Found</html>" * 50)
    assert reason(tmp_path / "a.wav") == "unreadable"


def test_container_not_allowed(tmp_path):
    assert reason(make(tmp_path / "a.aiff")) == "unreadable"
    assert reason(make(tmp_path / "a.wav", format="AIFF")) == "unreadable"  # whatever its name


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_truncated(tmp_path, kind, keep):
    path = make(tmp_path / f"a.{kind}", np.tile(NOISE, 4))
    assert load(path).seconds == pytest.approx(8, abs=0.1)
    cut(path, keep)
    assert reason(path) == "truncated"


def test_wav_of_a_pipe_promises_nothing(tmp_path):
    path = make(tmp_path / "a.wav")
    data = bytearray(path.read_bytes())
    assert data[36:40] == b"data"
    data[40:44] = b"\xff" * 4
    path.write_bytes(data)
    assert load(path).seconds == 2.0


def test_header_that_lies_costs_no_memory(tmp_path):
    import tracemalloc

    path = make(tmp_path / "a.flac")
    data = bytearray(path.read_bytes())
    total = int.from_bytes(data[18:26], "big")  # STREAMINFO: its low 36 bits count the samples
    data[18:26] = ((total >> 36 << 36) | 10**9).to_bytes(8, "big")
    path.write_bytes(data)
    tracemalloc.start()
    assert reason(path) == "too_long"
    assert reason(path, max_seconds=1e6) == "truncated"
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan(tmp_path, value):
    samples = NOISE.copy()
    samples[777] = value
    assert reason(make(tmp_path / "a.wav", samples, subtype="FLOAT")) == "nan"


def test_unscaled(tmp_path):
    assert reason(make(tmp_path / "a.wav", NOISE * 32768, subtype="FLOAT")) == "unscaled"


def test_silent(tmp_path):
    assert reason(make(tmp_path / "a.flac", NOISE * 0)) == "silent"
    assert reason(make(tmp_path / "b.wav", np.stack([NOISE, -NOISE], 1), subtype="FLOAT")) == "silent"  # cancels out
    assert load(make(tmp_path / "c.wav", np.full(16000, 0.0011, np.float32), subtype="FLOAT")).seconds == 1.0


def test_length_limits(tmp_path):
    path = make(tmp_path / "a.wav")
    assert reason(path, max_seconds=1.999) == "too_long"
    assert reason(path, min_seconds=2.001) == "too_short"
    assert reason(path, start=1.98, end=2.0) == "too_short"
    assert load(path, min_seconds=2, max_seconds=2).seconds == 2.0
    assert reason(path, start=1.0, end=1.00001, min_seconds=0) == "too_short"


@pytest.mark.parametrize(
    ("start", "end"), [(-1, 1), (1, 1), (1.5, 1), (2.0, None), (0, 2.2), (float("nan"), 1), (0, float("inf"))]
)
def test_bad_range(tmp_path, start, end):
    assert reason(make(tmp_path / "a.wav"), start=start, end=end) == "bad_range"


def test_odd_rate_would_need_a_giant_filter(tmp_path):
    assert reason(make(tmp_path / "a.wav", hz=44101)) == "unreadable"
    assert reason(make(tmp_path / "b.wav", hz=999)) == "unreadable"


def test_too_many_channels(tmp_path):
    assert reason(make(tmp_path / "a.wav", np.tile(NOISE[:, None], 33))) == "unreadable"


def test_header_check_sees_what_the_header_says(tmp_path):
    assert check_header(make(tmp_path / "a.flac"), max_seconds=2.0).samplerate == 16000
    with pytest.raises(ClipError, match="at most 1: cut it"):
        check_header(tmp_path / "a.flac", max_seconds=1.0)


@pytest.mark.parametrize("hz", [44100, 48000, 22050, 8000])
def test_resampling_keeps_a_tone(tmp_path, hz):
    """Away from the edges, a 1 kHz tone comes out as if recorded at 16 kHz, to 0.2% of full scale."""
    stereo = np.stack([tone(hz, 1.0)] * 2, axis=1)
    clip = load(make(tmp_path / "a.wav", stereo, hz, subtype="FLOAT"))
    assert (clip.hz, clip.samples.dtype, clip.samples.shape) == (16000, np.float32, (16000,))
    assert np.abs(clip.samples - tone(16000, 1.0))[400:-400].max() < 2e-3


def test_a_tone_above_half_the_rate_is_removed(tmp_path):
    clip = load(make(tmp_path / "a.wav", tone(48000, 1.0, 12000.0) + 0.01 * tone(48000, 1.0), 48000, subtype="FLOAT"))
    assert np.abs(clip.samples[400:-400]).max() < 0.02  # an alias at 4 kHz would reach 0.5


def test_channels_are_averaged(tmp_path):
    left, right = NOISE, np.roll(NOISE, 5)
    clip = load(make(tmp_path / "a.wav", np.stack([left, right, 0 * left], 1), subtype="FLOAT"))
    np.testing.assert_allclose(clip.samples, (left + right) / 3, atol=1e-7)


def test_start_and_end_cut_by_samples(tmp_path):
    path = make(tmp_path / "a.wav", subtype="FLOAT")
    np.testing.assert_array_equal(load(path, start=0.5, end=1.25).samples, NOISE[8000:20000])
    np.testing.assert_array_equal(load(path, start=0.5).samples, NOISE[8000:])
    np.testing.assert_array_equal(load(path, end=2.04).samples, NOISE)  # a caption's rounding


def test_clip_sha256_is_of_the_samples(tmp_path):
    integers = (NOISE * 16000).astype(np.int16)  # each writer rounds floats in its own way
    a, b = load(make(tmp_path / "a.wav", integers)), load(make(tmp_path / "b.flac", integers))
    assert a.sha256 == b.sha256 != load(tmp_path / "a.wav", end=1.0).sha256
    assert a.seconds == 2.0
