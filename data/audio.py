"""The one audio loader: whatever reads a clip, for training or evaluation, reads it through `load`.

Not noticed: an MP3 without a length tag that was cut off. It carries no promise that it could break.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

from data.question import Clip

FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")  # libsndfile's names
MAX_CHANNELS = 32
MIN_HZ, MAX_HZ = 1000, 384_000
MAX_KERNEL = 8_000_000  # floats in the resampler's filter bank: 44.1 kHz takes 0.07 million, 44,101 Hz would take 700
SILENT_PEAK = 1e-3  # the published filter's threshold
UNSCALED_PEAK = 16.0  # +24 dB over full scale: nobody's recording, but integers stored as floats
UNKNOWN_LENGTH = 0x7FFF0000  # programs that write a WAV into a pipe put a length above this: not a promise
BLOCK = 2**18  # frames decoded at a time, so that memory follows the bytes there are and not the header


class ClipError(ValueError):
    """A clip that cannot be used. `reason` is a short code, the message names the file and what is wrong."""

    def __init__(self, reason: str, path: Path, message: str):
        super().__init__(f"{path}: {message}")
        self.reason = reason


def check_header(path: Path, *, start=None, end=None, hz=16000, min_seconds=0.03, max_seconds=300.0):
    """Judge a clip by its header, without decoding: existence, container, channels, rate, range, length, missing end.

    Returns soundfile's info. Raises ClipError with a reason of missing, empty, unreadable, truncated, bad_range,
    too_short, too_long.
    """
    path = Path(path)
    info = _info(path)
    if info.format not in FORMATS:
        raise ClipError("unreadable", path, f"container {info.format} is not one of {', '.join(FORMATS)}: convert it")
    if not 1 <= info.channels <= MAX_CHANNELS:
        raise ClipError("unreadable", path, f"{info.channels} channels, at most {MAX_CHANNELS} are read")
    common = math.gcd(info.samplerate, hz)
    if not MIN_HZ <= info.samplerate <= MAX_HZ or info.samplerate // common * (hz // common) > MAX_KERNEL:
        raise ClipError("unreadable", path, f"a sample rate of {info.samplerate} Hz: convert it to {hz} Hz")
    if info.frames == 0:
        raise ClipError("empty", path, "a header without samples")
    if _is_cut_off(path, info):
        raise ClipError("truncated", path, "the file ends before its header says: fetch or convert it again")
    first, last = start or 0.0, info.duration if end is None else end
    if not (0 <= first < last and first < info.duration and last <= info.duration + 0.05):
        raise ClipError("bad_range", path, f"start {start} to end {end} s does not fit a file of {info.duration:.3f} s")
    seconds = min(last, info.duration) - first
    if seconds < min_seconds:
        raise ClipError("too_short", path, f"{seconds * 1000:.0f} ms, at least {min_seconds * 1000:.0f} are needed")
    if seconds > max_seconds:
        raise ClipError("too_long", path, f"{seconds:.1f} s, at most {max_seconds:g}: cut it, or give start and end")
    return info


def load(path: Path, *, start=None, end=None, hz=16000, min_seconds=0.03, max_seconds=300.0) -> Clip:
    """Decode [start, end) seconds of a file, average its channels, resample to `hz`: float32 [S], about [-1, 1].

    Raises ClipError with one of check_header's reasons, or nan, unscaled, silent. Never cuts or pads: an `end` up to
    50 ms behind the file's own end, the rounding of captions, means the file's end.
    """
    path = Path(path)
    info = check_header(path, start=start, end=end, hz=hz, min_seconds=min_seconds, max_seconds=max_seconds)
    first = round((start or 0.0) * info.samplerate)
    wanted = min(info.frames, round(end * info.samplerate) if end is not None else info.frames) - first
    samples = _decode(path, first, wanted)
    # An MP3's header may only estimate its length; the other containers count.
    if len(samples) < (0.95 * wanted if info.format == "MP3" else wanted):
        raise ClipError("truncated", path, f"{len(samples)} frames decoded of the {wanted} that its header promises")
    if not np.isfinite(samples).all():
        raise ClipError("nan", path, "holds NaN or infinite samples")
    if (peak := np.abs(samples).max()) > UNSCALED_PEAK:
        raise ClipError("unscaled", path, f"floats up to {peak:.0f}: divide by the integers' full scale")
    mono = samples.mean(axis=1, dtype=np.float32)
    if np.abs(mono).max() < SILENT_PEAK:
        raise ClipError("silent", path, f"no sample above {SILENT_PEAK}, after averaging {info.channels} channels")
    if info.samplerate != hz:
        mono = torchaudio.functional.resample(torch.from_numpy(mono), info.samplerate, hz).numpy()
    return Clip(np.ascontiguousarray(mono, dtype=np.float32), hz)


def _info(path: Path):
    try:
        if not path.is_file():
            raise ClipError("missing", path, "no such file")
        if path.stat().st_size == 0:
            raise ClipError("empty", path, "the file has no bytes")
        return soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:  # OSError: no permission, a name too long
        raise ClipError("unreadable", path, f"not readable as audio ({error})") from error


def _is_cut_off(path: Path, info) -> bool:
    """libsndfile makes do with what is left of a WAV or Ogg file and reports that as its length."""
    if info.format == "OGG":
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**17))  # a page has at most 65,307 bytes
            tail = file.read()
        flags = tail[tail.rfind(b"OggS") + 5 :][:1]
        return not flags or not flags[0] & 4  # 4: the last page of its stream
    data = re.search(r"^data : (\d+) \(should be (\d+)\)", info.extra_info, re.MULTILINE)
    return data is not None and int(data[2]) < int(data[1]) < UNKNOWN_LENGTH


def _decode(path: Path, first: int, wanted: int) -> np.ndarray:
    """Frames [first, first + wanted) as float32 [frames, channels], fewer if the file ends before."""
    blocks, left = [], wanted
    try:
        with soundfile.SoundFile(str(path)) as file:
            if first:
                file.seek(first)
            # Not file.blocks(): where the data stops early it hands out its buffer with whatever was in that memory.
            while left > 0 and len(block := file.read(min(left, BLOCK), dtype="float32", always_2d=True)):
                blocks.append(block)
                left -= len(block)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ClipError("truncated", path, f"decodes only in part, cut off or corrupt ({error})") from error
    return np.concatenate(blocks) if blocks else np.zeros((0, 1), np.float32)
