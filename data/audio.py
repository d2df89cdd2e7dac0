"""The one audio loader: whatever reads a clip, for training or evaluation, reads it through `load`.

Not noticed: an MP3 without a length tag that was cut off. It carries no promise that it could break.
"""

from __future__ import annotations

import io
import math
import os
import re
from pathlib import Path

import numpy as np
import soundfile

from data.question import Clip

FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")  # libsndfile's names
MAX_CHANNELS = 32
MIN_HZ, MAX_HZ = 1000, 384_000
MAX_KERNEL = 8_000_000  # floats in the resampler's filter bank: 44.1 kHz takes 0.07 million, 44,101 Hz would take 700
SILENT_PEAK = 1e-3  # the published filter's threshold
UNSCALED_PEAK = 16.0  # +24 dB over full scale: nobody's recording, but integers stored as floats
UNKNOWN_LENGTH = 0x7FFF0000  # programs that write a WAV into a pipe put a length above this: not a promise
BLOCK = 2**16  # frames decoded at a time: memory follows the frames there are, as one channel, and not the header
MAX_SPAN = 2**28  # bytes of a clip within a shard


class ClipError(ValueError):
    """A clip that cannot be used. `reason` is a short code, the message names the file and what is wrong."""

    def __init__(self, reason: str, path: Path, message: str):
        super().__init__(f"{path}: {message}")
        self.reason = reason


def check_header(path: Path, *, span=None, start=None, end=None, hz=16000, min_seconds=0.03, max_seconds=300.0):
    """Judge a clip by its header, without decoding: existence, container, channels, rate, range, length, missing end.

    `span` is (offset, length) in bytes of a clip within a tar shard. Returns soundfile's info. Raises ClipError with a
    reason of missing, empty, unreadable, truncated, bad_range, too_short, too_long.
    """
    path = Path(path)
    return _judge(path, _open(path, span), start, end, hz, min_seconds, max_seconds)


def decode(path: Path, *, span=None, start=None, end=None, hz=16000, min_seconds=0.03,
           max_seconds=300.0) -> tuple[Clip, object]:  # fmt: skip
    """[start, end) seconds of a file as the mean of its channels, at the file's own rate; and soundfile's info.

    Raises ClipError with one of check_header's reasons, or nan, unscaled, silent. Never cuts or pads: an `end` up to
    50 ms behind the file's own end, the rounding of captions, means the file's end.
    """
    path = Path(path)
    source = _open(path, span)
    info = _judge(path, source, start, end, hz, min_seconds, max_seconds)
    first = round((start or 0.0) * info.samplerate)
    wanted = min(info.frames, round(end * info.samplerate) if end is not None else info.frames) - first
    if wanted < 1:
        raise ClipError("too_short", path, f"no sample between {start} and {end} s")
    mono, peak = _decode(path, source, first, wanted)
    # An MP3's header may only estimate its length; the other containers count.
    if len(mono) < (0.95 * wanted if info.format == "MP3" else wanted):
        raise ClipError("truncated", path, f"{len(mono)} frames decoded of the {wanted} that its header promises")
    if not math.isfinite(peak):
        raise ClipError("nan", path, "holds NaN or infinite samples")
    if peak > UNSCALED_PEAK:
        raise ClipError("unscaled", path, f"floats up to {peak:.0f}: divide by the integers' full scale")
    if np.abs(mono).max() < SILENT_PEAK:
        raise ClipError("silent", path, f"no sample above {SILENT_PEAK}, after averaging {info.channels} channels")
    return Clip(mono, info.samplerate), info


def load(path: Path, *, span=None, start=None, end=None, hz=16000, min_seconds=0.03, max_seconds=300.0) -> Clip:
    """Decode [start, end) seconds of a file, average its channels, resample to `hz`: float32 [S], about [-1, 1].

    Raises ClipError as `decode` does.
    """
    clip, _ = decode(path, span=span, start=start, end=end, hz=hz, min_seconds=min_seconds, max_seconds=max_seconds)
    return resample(clip, hz)


def resample(clip: Clip, hz: int) -> Clip:
    """The clip at another rate, by torchaudio's windowed sinc."""
    if clip.hz == hz:
        return clip
    import torch  # here, so that the processes that only look at clips start in no time
    import torchaudio

    samples = torchaudio.functional.resample(torch.from_numpy(clip.samples), clip.hz, hz).numpy()
    return Clip(np.ascontiguousarray(samples, dtype=np.float32), hz)


def _open(path: Path, span) -> str | io.BytesIO:
    """What soundfile reads: a file's name, or the bytes of `span`."""
    try:
        if not path.is_file():
            raise ClipError("missing", path, "no such file")
        size = path.stat().st_size
        if span is None and size:
            return str(path)
        offset, length = span or (0, 0)
        if length == 0:
            raise ClipError("empty", path, "the file has no bytes")
        if length > MAX_SPAN or offset + length > size:
            raise ClipError("truncated", path, f"no {length} bytes at {offset} of {size}: cut off or rewritten")
        with path.open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(length))
    except OSError as error:  # no permission, a name too long
        raise ClipError("unreadable", path, f"not readable ({error})") from error


def _judge(path: Path, source, start, end, hz: int, min_seconds: float, max_seconds: float):
    try:
        info = soundfile.info(_rewound(source))
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise ClipError("unreadable", path, f"not readable as audio ({error})") from error
    if info.format not in FORMATS:
        raise ClipError("unreadable", path, f"container {info.format} is not one of {', '.join(FORMATS)}: convert it")
    if not 1 <= info.channels <= MAX_CHANNELS:
        raise ClipError("unreadable", path, f"{info.channels} channels, at most {MAX_CHANNELS} are read")
    common = math.gcd(info.samplerate, hz)
    if not MIN_HZ <= info.samplerate <= MAX_HZ or info.samplerate // common * (hz // common) > MAX_KERNEL:
        raise ClipError("unreadable", path, f"a sample rate of {info.samplerate} Hz: convert it to {hz} Hz")
    if info.frames == 0:
        raise ClipError("empty", path, "a header without samples")
    if _is_cut_off(source, info):
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


class _Forward(soundfile.SoundFile):
    """Read from front to back. soundfile seeks to where it is after every read, and a seek in an MP3 loses the bits
    that a frame keeps in those before it: a click at each block."""

    def seekable(self) -> bool:
        return False


def _rewound(source):
    if not isinstance(source, str):
        source.seek(0)
    return source


def _is_cut_off(source, info) -> bool:
    """libsndfile makes do with what is left of a WAV or Ogg file and reports that as its length."""
    if info.format == "OGG":
        with open(source, "rb") if isinstance(source, str) else io.BytesIO(source.getbuffer()) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**17))  # a page has at most 65,307 bytes
            tail = file.read()
        flags = tail[tail.rfind(b"OggS") + 5 :][:1]
        return not flags or not flags[0] & 4  # 4: the last page of its stream
    data = re.search(r"^data : (\d+) \(should be (\d+)\)", info.extra_info, re.MULTILINE)
    return data is not None and int(data[2]) < int(data[1]) < UNKNOWN_LENGTH


def _decode(path: Path, source, first: int, wanted: int) -> tuple[np.ndarray, float]:
    """Frames [first, first + wanted) averaged over channels, float32 [frames], fewer if the file ends before; and the
    peak of all channels, NaN or infinite if one of them is."""
    blocks, peak, left = [np.zeros(0, np.float32)], 0.0, wanted
    try:
        with _Forward(_rewound(source)) as file:
            skip = first if file.format == "MP3" else file.seek(first) and 0
            while skip > 0 and (gone := len(file.read(min(skip, BLOCK), dtype="float32", always_2d=True))):
                skip -= gone
            # Not file.blocks(): where the data stops early it hands out its buffer with whatever was in that memory.
            while left > 0 and len(block := file.read(min(left, BLOCK), dtype="float32", always_2d=True)):
                with np.errstate(over="ignore", invalid="ignore"):
                    blocks.append(block.mean(axis=1, dtype=np.float32))
                peak = float(np.maximum(peak, np.abs(block).max()))
                left -= len(block)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ClipError("truncated", path, f"decodes only in part, cut off or corrupt ({error})") from error
    return np.concatenate(blocks), peak
