"""One sound in every container, rate and number of channels is one waveform to the loader."""

import numpy as np
import pytest
import soundfile

from data.audio import load
from data.fingerprint import HZ, Index, fingerprint

SECONDS = 2.0
RATES = (8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000)
# The loudest difference allowed, of a sound with a peak of 0.5, 50 ms from either end: lossless containers differ by
# the resampler's ripple, lossy ones by what they leave out.
TOLERANCE = {"wav": 2e-3, "flac": 2e-3, "ogg": 0.05, "mp3": 0.05}
LOSSY_ERROR = 0.02  # root mean square


def sound(time):
    """Tones up to 2.9 kHz, below the band edge of all rates, with a slow swell."""
    tones = sum(np.sin(2 * np.pi * hz * time + hz) / k for k, hz in enumerate((220, 554, 1320, 2900), 1))
    return 0.24 * tones * (0.6 + 0.4 * np.sin(2 * np.pi * 1.5 * time))


def written(path, hz, channels):
    time = np.arange(int(SECONDS * hz)) / hz
    wave = sound(time)
    if channels == 2:  # the mean of the two is the sound
        wave = np.stack([wave + 0.1 * np.sin(300 * time), wave - 0.1 * np.sin(300 * time)], axis=1)
    soundfile.write(path, wave, hz, format=path.suffix[1:].upper())
    return path


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("hz", RATES)
@pytest.mark.parametrize("kind", TOLERANCE)
def test_the_same_waveform(tmp_path, kind, hz, channels):
    if kind == "mp3" and hz > 48000:
        pytest.skip("MP3 has no rate above 48 kHz")
    clip = load(written(tmp_path / f"x.{kind}", hz, channels))
    wanted = sound(np.arange(int(SECONDS * 16000)) / 16000)
    assert clip.hz == 16000 and abs(len(clip.samples) - len(wanted)) <= (1 if kind != "mp3" else 1200)
    inner = slice(800, len(wanted) - 2000)
    ours = clip.samples[: len(wanted)]
    difference = ours[inner] - wanted[inner]
    assert np.abs(difference).max() < TOLERANCE[kind]
    assert np.sqrt(np.mean(difference**2)) < (LOSSY_ERROR if kind in ("ogg", "mp3") else 1e-3)


@pytest.mark.parametrize("start", [None, 1.0, 3.456])
def test_an_mp3_is_the_same_in_blocks_and_from_the_middle(tmp_path, start):
    """At 24 kHz, where the blocks end within a frame whose bits lie in the frames before."""
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "x.mp3", 0.1 * rng.standard_normal(24000 * 12), 24000, format="MP3")
    at_once = soundfile.read(tmp_path / "x.mp3", dtype="float32")[0]
    first = round((start or 0) * 24000)
    samples = load(tmp_path / "x.mp3", start=start, hz=24000).samples
    assert np.abs(samples - at_once[first:]).max() < 1e-6


def test_a_stretch_of_a_file_is_that_stretch_of_the_waveform(tmp_path):
    for kind in ("wav", "flac", "ogg"):
        path = written(tmp_path / f"x.{kind}", 16000, 1)
        whole, part = load(path).samples, load(path, start=0.5, end=1.25).samples
        assert np.abs(part - whole[8000:20000]).max() < 1e-4


def test_the_bytes_of_a_shard_are_the_file(tmp_path):
    path = written(tmp_path / "x.ogg", 44100, 2)
    data = path.read_bytes()
    (tmp_path / "shard.tar").write_bytes(b"x" * 1000 + data + b"y" * 1000)
    inside = load(tmp_path / "shard.tar", span=(1000, len(data)))
    assert inside.sha256 == load(path).sha256
    assert Index([fingerprint(load(path, hz=HZ).samples)]).sizes.tolist() == [
        len(np.unique(fingerprint(load(tmp_path / "shard.tar", span=(1000, len(data)), hz=HZ).samples).hashes))
    ]
