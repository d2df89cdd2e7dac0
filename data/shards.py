"""Clips packed for speed: tar shards of FLAC and JSON, resampled once, beside a manifest that points into them.

    python -m data.shards TRAIN FOLDER       then train with data.train.path=FOLDER/manifest.jsonl

A sample is one clip, `000001.flac` at the model's rate with one channel, and `000001.json` with the questions on it;
no pickles, no links. The manifest's rows say at which byte their clip starts, so that any order can be read, and every
tool takes such a manifest. `stream` reads them in an order that is a function of (seed, position).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile

from data.audio import load
from data.manifest import Manifest, read, row_of
from data.question import Clip, Question

PLACE = ("audio", "span", "start", "end", "sha256")  # what says where a clip lies: it lies elsewhere now


def write(questions: Sequence[Question], folder: str | Path, *, per_shard: int = 1024, hz: int = 16000,
          max_seconds: float = 300.0, workers: int = 0, progress=lambda done, total: None) -> Manifest:  # fmt: skip
    """Pack the questions' clips, `per_shard` clips a shard, in `workers` processes (0: here).

    Shards that a killed run has finished are kept: they are named by a hash of what is in them. Raises ClipError for a
    clip that cannot be read: check the manifest first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clips: dict[tuple, list[Question]] = defaultdict(list)
    for q in questions:
        clips[q.stretch].append(q)
    groups = list(clips.values())
    parts = [groups[i : i + per_shard] for i in range(0, len(groups), per_shard)]
    pack = partial(_pack, folder=folder, hz=hz, max_seconds=max_seconds)
    rows: list[str] = []
    with ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn")) as pool:
        done = (pool.map if workers else map)(pack, range(len(parts)), parts)
        for number, lines in enumerate(done, start=1):
            rows += lines
            progress(number, len(parts))
    temporary = folder / f".manifest.{os.getpid()}"
    temporary.write_text("".join(rows), encoding="utf-8")
    temporary.replace(folder / "manifest.jsonl")
    return read(folder / "manifest.jsonl")


def stream(manifest: Manifest, *, seed: int, start: int = 0, rank: int = 0, world: int = 1, hz: int = 16000,
           max_seconds: float = 300.0) -> Iterator[tuple[int, Question, Clip]]:  # fmt: skip
    """(position, question, clip) for ever, from position `start`; position + 1 is where a stopped reader goes on.

    Position k is the k mod n'th of epoch k // n: shards in the order of (seed, epoch), questions shuffled within a
    shard, so that a shard is read while it is in memory. Of `world` readers each takes every world'th position.
    """
    n = len(manifest)
    shards: dict[Path, list[Question]] = defaultdict(list)
    for q in manifest:
        shards[q.audio].append(q)
    groups = list(shards.values())

    @lru_cache(maxsize=1)
    def order(epoch: int) -> list[Question]:
        rng = np.random.default_rng([seed, epoch])
        return [groups[s][i] for s in rng.permutation(len(groups)) for i in rng.permutation(len(groups[s]))]

    for position in range(start + (rank - start) % world, sys.maxsize, world):
        epoch, place = divmod(position, n)
        q = order(epoch)[place]
        yield position, q, load(q.audio, span=q.span, start=q.start, end=q.end, hz=hz, max_seconds=max_seconds)


def _pack(number: int, groups: list[list[Question]], *, folder: Path, hz: int, max_seconds: float) -> list[str]:
    """Write one shard, unless it is there; returns its manifest lines."""
    spec = [[[row_of(q, "/"), q.audio.stat().st_mtime_ns] for q in group] for group in groups]
    name = hashlib.sha256(json.dumps([spec, hz, max_seconds]).encode()).hexdigest()[:12]
    tar, lines = folder / f"shard-{number:05d}-{name}.tar", folder / f"shard-{number:05d}-{name}.jsonl"
    if not lines.exists():
        temporary = tar.with_name(f".{tar.name}.{os.getpid()}")
        rows = []
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as file:
            for i, group in enumerate(groups):
                sound, kind = _encode(_load(group[0], hz, max_seconds))
                asked = [{k: v for k, v in row_of(q, folder).items() if k not in PLACE} for q in group]
                _add(file, f"{i:06d}.json", json.dumps({"questions": asked}, ensure_ascii=False).encode())
                offset = _add(file, f"{i:06d}.{kind}", sound)
                where = {"audio": tar.name, "span": [offset, len(sound)], "sha256": hashlib.sha256(sound).hexdigest()}
                rows += [json.dumps(row | where, ensure_ascii=False) + "\n" for row in asked]
        temporary.replace(tar)
        half = lines.with_name(f".{lines.name}.{os.getpid()}")
        half.write_text("".join(rows), encoding="utf-8")
        half.replace(lines)  # last: where it is, the shard is whole
    return lines.read_text(encoding="utf-8").splitlines(keepends=True)


def _load(q: Question, hz: int, max_seconds: float) -> Clip:
    return load(q.audio, span=q.span, start=q.start, end=q.end, hz=hz, max_seconds=max_seconds)


def _encode(clip: Clip) -> tuple[bytes, str]:
    """24-bit FLAC, within 6e-8 of the samples; what goes beyond full scale, which FLAC would cut, as float WAV."""
    buffer, fits = io.BytesIO(), np.abs(clip.samples).max() < 1
    kind, subtype = ("FLAC", "PCM_24") if fits else ("WAV", "FLOAT")
    soundfile.write(buffer, clip.samples, clip.hz, format=kind, subtype=subtype)
    data = bytearray(buffer.getvalue())
    if (peak := data.find(b"PEAK", 0, 256)) >= 0:  # libsndfile dates it: the same clip must be the same bytes
        data[peak + 12 : peak + 16] = bytes(4)
    return bytes(data), kind.lower()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member with no date or owner; returns where its data start."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return offset


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m data.shards", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("manifest", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", type=Path, help="folder that audio paths start from (default: the manifest's)")
    parser.add_argument("--per-shard", type=int, default=1024, help="clips a shard")
    parser.add_argument("--hz", type=int, default=16000)
    parser.add_argument("--max-seconds", type=float, default=300.0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(arguments)
    try:
        manifest = read(args.manifest, root=args.root, hidden=True)
        if manifest.problems:
            p = manifest.problems[0]
            raise ValueError(f"{p.file}:{p.line} {p.message}: mend it, `python -m data.check` shows all")
        packed = write(manifest.questions, args.folder, per_shard=args.per_shard, hz=args.hz,
                       max_seconds=args.max_seconds, workers=args.workers)  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"cannot pack: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("cannot pack: a process died, of a clip or for want of memory; `python -m data.check` finds the clip, "
              "shards that were finished are kept", file=sys.stderr)  # fmt: skip
        return 2
    print(f"{len(packed)} questions in {packed.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
