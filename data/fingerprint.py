"""Do two recordings hold the same sound? Pairs of spectral peaks, after A. Wang, "An industrial-strength audio search
algorithm" (ISMIR 2003), in numpy.

1. Spectrum: 8 kHz, frames of 512 samples (64 ms) every 128 (16 ms), Hann window, log magnitude.
2. Peaks: cells that are the largest within +-6 frames and +-8 bins and above the clip's median; 32 a second at most.
3. Pairs: each peak with the next 8 peaks at 2 to 63 frames behind and up to 63 bins away; hash = (bin, bin difference,
   frame difference), in 64 ms x 16 Hz cells as they are.
4. Match: different hashes that two clips share, counted by the time shift they ask for. The score is the largest count
   within two neighbouring shifts, as a share of the smaller clip's different hashes.

Gain changes nothing (peaks are relative), a cut shifts all pairs alike, re-encoding and resampling move some peaks. A
steady tone or a digital beep has no peaks in time to tell it by: two of one pitch are the same sound here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HZ, FRAME, HOP = 8000, 512, 128
NEAR_FRAMES, NEAR_BINS = 6, 8
PEAKS_A_SECOND = 32
FAN, MIN_GAP, MAX_GAP, MAX_BINS = 8, 2, 63, 63
SHIFTS = 2**20  # frames that two clips may be apart, both ways together: 2 h
SHARE, LEAST = 0.06, 10  # a match: this share of the smaller clip's hashes agrees on one shift, and so many at least


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Hashes [H] uint32, sorted, and the frame each begins at [H] int32."""

    hashes: np.ndarray
    frames: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)


def fingerprint(samples: np.ndarray) -> Fingerprint:
    """Of mono samples [S] at 8 kHz. Shorter than a frame, or without a peak: no hashes, which match nothing."""
    if len(samples) < FRAME:
        samples = np.pad(samples, (0, FRAME - len(samples)))
    windows = np.lib.stride_tricks.sliding_window_view(samples, FRAME)[::HOP]
    spectrum = np.log(np.abs(np.fft.rfft(windows * np.hanning(FRAME).astype(np.float32), axis=1)) + 1e-6)
    frames, bins = _peaks(spectrum)
    first, second = [], []
    for step in range(1, 4 * FAN + 1):
        gap = frames[step:] - frames[:-step]
        near = np.abs(bins[step:] - bins[:-step]) <= MAX_BINS
        ok = np.flatnonzero((gap >= MIN_GAP) & (gap <= MAX_GAP) & near)
        first.append(ok)
        second.append(ok + step)
    first, second = np.concatenate(first), np.concatenate(second)
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    rank = np.arange(len(first)) - np.searchsorted(first, first)  # the how manieth partner of its first peak
    first, second = first[rank < FAN], second[rank < FAN]
    jump, gap = bins[second] - bins[first] + MAX_BINS, frames[second] - frames[first]
    hashes = bins[first] << 13 | jump << 6 | gap
    order = np.argsort(hashes, kind="stable")
    return Fingerprint(hashes[order].astype(np.uint32), frames[first][order].astype(np.int32))


class Index:
    """Fingerprints of many clips to look others up in."""

    def __init__(self, prints: list[Fingerprint]):
        hashes = np.concatenate([p.hashes for p in prints] or [np.zeros(0, np.uint32)])
        order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[order]
        self.frames = np.concatenate([p.frames for p in prints] or [np.zeros(0, np.int32)])[order]
        self.owners = np.repeat(np.arange(len(prints)), [len(p) for p in prints])[order]
        self.sizes = np.array([len(np.unique(p.hashes)) for p in prints], np.int64)

    def matches(self, clip: Fingerprint) -> list[tuple[int, float]]:
        """(number of the clip, score) of all that share enough with `clip`, best first."""
        low, high = (np.searchsorted(self.hashes, clip.hashes, side) for side in ("left", "right"))
        counts = high - low
        if not (total := int(counts.sum())):
            return []
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        place = np.repeat(low - first, counts) + np.arange(total)
        kinds, kind = np.unique(clip.hashes, return_inverse=True)
        source = np.repeat(np.arange(len(clip)), counts)
        shifts = self.frames[place] - clip.frames[source] + SHIFTS // 2
        # (owner, shift, hash): each hash once, or a tone that repeats itself outvotes all; at a shift and the next one,
        # for half a frame may fall to either side.
        votes = (self.owners[place] * SHIFTS + shifts) << 20 | kind[source]
        cells, count = np.unique(np.unique(np.concatenate([votes, votes + (1 << 20)])) >> 20, return_counts=True)
        owners, most = np.unique(cells // SHIFTS), np.zeros(len(self.sizes), np.int64)
        np.maximum.at(most, cells // SHIFTS, count)
        scores = np.minimum(1.0, most[owners] / np.minimum(self.sizes[owners], len(kinds)).clip(1))
        best = [(int(o), float(s)) for o, s in zip(owners, scores, strict=True) if most[o] >= LEAST and s >= SHARE]
        return sorted(best, key=lambda found: (-found[1], found[0]))


def _peaks(spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(frames, bins) of the peaks, in order of time."""
    largest = _sliding_max(_sliding_max(spectrum, NEAR_FRAMES, 0), NEAR_BINS, 1)
    frames, bins = np.nonzero((spectrum == largest) & (spectrum > np.median(spectrum)))
    most = max(8, int(PEAKS_A_SECOND * len(spectrum) * HOP / HZ))
    if len(frames) > most:
        keep = np.sort(np.argsort(-spectrum[frames, bins], kind="stable")[:most])
        frames, bins = frames[keep], bins[keep]
    return frames.astype(np.int64), bins.astype(np.int64)


def _sliding_max(x: np.ndarray, reach: int, axis: int) -> np.ndarray:
    pad = [(0, 0), (0, 0)]
    pad[axis] = (reach, reach)
    return np.lib.stride_tricks.sliding_window_view(np.pad(x, pad, mode="edge"), 2 * reach + 1, axis=axis).max(axis=-1)
