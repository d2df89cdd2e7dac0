"""The one audio loader: whatever reads a clip, for training or evaluation, reads it through `load`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

from data.question import Clip

FORMATS = {"WAV", "WAVEX", "FLAC", "OGG", "MP3", "MPEG"}
MAX_CHANNELS = 32
SILENT_PEAK = 1e-3  # the published filter's threshold


class ClipError(ValueError):
    """A clip that cannot be used. `reason` is a short code, the message names the file and what is wrong."""

    def __init__(self, reason: str, path: Path, message: str):
        super().__init__(f"{path}: {message}")
        self.reason = reason


def check_header(path: Path, *, start=None, end=None, min_seconds=0.03, max_seconds=300.0) -> soundfile._SoundFileInfo:
    """Judge a clip by its header alone, without decoding: existence, format, channels, rate, range, length.

    Raises ClipError. A header that lies about its length is caught by `load`, at no more cost than the bytes there are.
    """
    path = Path(path)
    if not path.is_file():
        raise ClipError("missing", path, "no such file")
    if path.stat().st_size == 0:
        raise ClipError("empty", path, "the file has no bytes")
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ClipError("unreadable", path, f"not readable as audio ({error})") from error
    if info.format not in FORMATS:
        raise ClipError("unreadable", path, f"container {info.format} is not one of {', '.join(sorted(FORMATS))}")
    if not 1 <= info.channels <= MAX_CHANNELS:
        raise ClipError("unreadable", path, f"{info.channels} channels, at most {MAX_CHANNELS} are read")
    if not 1000 <= info.samplerate <= 384_000:
        raise ClipError("unreadable", path, f"a sample rate of {info.samplerate} Hz")
    first, last = start or 0.0, info.duration if end is None else end
    if not (0 <= first < last and first < info.duration and last <= info.duration + 0.05):
        raise ClipError("bad_range", path, f"start {start} to end {end} s does not fit a file of {info.duration:.3f} s")
    seconds = min(last, info.duration) - first
    if seconds < min_seconds:
        raise ClipError("too_short", path, f"{seconds * 1000:.0f} ms, at least {min_seconds * 1000:.0f} are needed")
    if seconds > max_seconds:
        raise ClipError("too_long", path, f"{seconds:.1f} s, at most {max_seconds:.0f}: cut it, or give start and end")
    return info


@lru_cache(maxsize=16)
def _resampler(source: int, target: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(source, target)  # holds its filter: made once a rate, not once a clip


def load(path: Path, *, start=None, end=None, hz=16000, min_seconds=0.03, max_seconds=300.0) -> Clip:
    """Decode [start, end) seconds of a file, average its channels, resample to `hz`: float32 in about [-1, 1].

    Raises ClipError with one of the reasons missing, empty, unreadable, bad_range, too_short, too_long, truncated,
    not_finite, silent. Never cuts or pads.
    """
    path = Path(path)
    info = check_header(path, start=start, end=end, min_seconds=min_seconds, max_seconds=max_seconds)
    first = round((start or 0.0) * info.samplerate)
    wanted = min(info.frames, round(end * info.samplerate) if end is not None else info.frames) - first
    try:
        with soundfile.SoundFile(str(path)) as file:
            file.seek(first)
            blocks = [block for block in file.blocks(2**18, frames=wanted, dtype="float32", always_2d=True)]
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ClipError("unreadable", path, f"cannot be decoded ({error})") from error
    samples = np.concatenate(blocks) if blocks else np.zeros((0, 1), np.float32)
    if len(samples) < wanted:
        raise ClipError("truncated", path, f"{len(samples)} frames decoded of the {wanted} that its header promises")
    if not np.isfinite(samples).all():
        raise ClipError("not_finite", path, "holds NaN or infinite samples")
    mono = samples.mean(axis=1, dtype=np.float32)
    if np.abs(mono).max() < SILENT_PEAK:
        raise ClipError("silent", path, f"silent: no sample above {SILENT_PEAK}")
    if info.samplerate != hz:
        mono = _resampler(info.samplerate, hz)(torch.from_numpy(mono)).numpy()
    return Clip(np.ascontiguousarray(mono, dtype=np.float32), hz)
