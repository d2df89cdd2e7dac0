"""Is a benchmark's sound in the training data? `python -m data.overlap TRAIN BENCH`, two manifests.

Three looks, each finds what the one before cannot: `source` (the same YouTube id, or the same name of a recording),
`bytes` and `samples` (the same file; the same sound at 16 kHz), `sound` (data.fingerprint: re-encoded, resampled,
louder, cut). Exit 0: none found, 1: some, 2: cannot be read. `--clean OUT` writes TRAIN without what was found.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from data.audio import ClipError, decode, resample
from data.fingerprint import HZ, Fingerprint, Index, fingerprint
from data.locate import recording
from data.look import file_hash
from data.manifest import read, write
from data.pool import LOST, each
from data.question import Question

MEMORY = 16 * 2**30  # bytes of address space of a process that listens: torch's libraries take much of it
Key = tuple  # Question.stretch


@dataclass(frozen=True)
class Overlap:
    """A clip of the benchmark that is in the training data: how it was found, ids of one question on each side."""

    kind: str  # source | bytes | samples | sound
    train: str
    bench: str
    evidence: str


@dataclass(frozen=True, eq=False)
class Heard:
    """What is compared of one clip; `error` where it could not be read."""

    bytes: str | None = None
    samples: str | None = None
    print: Fingerprint | None = None
    error: str | None = None


def overlaps(train: Sequence[Question], bench: Sequence[Question], *, workers: int = 0,
             progress: Callable = lambda done, total: None) -> tuple[list[Overlap], list[str]]:  # fmt: skip
    """Every pair of clips found by any look, the surest first; and what could not be compared, one line each."""
    found, silent = [], []
    sources = {name: q for q in reversed(bench) for name in source_names(q)}
    for q in _clips(train).values():
        found += [Overlap("source", q.id, sources[n].id, n) for n in sorted(source_names(q)) if n in sources]
    theirs, ours = _clips(bench), _clips(train)
    heard = []
    place = {q.id: i for i, q in enumerate(theirs.values())}
    for q, one in sorted(_hear(theirs, workers), key=lambda heard: place[heard[0].id]):
        if one.error:
            silent.append(f"benchmark {q.id}: {one.error}")
        heard.append((q, one))
    readable = [(q, one) for q, one in reversed(heard) if not one.error]
    by_hash = {kind: {getattr(one, kind): q for q, one in readable} for kind in ("bytes", "samples")}
    nothing = fingerprint(np.zeros(0, np.float32))
    index = Index([one.print or nothing for _, one in heard])
    for number, (q, one) in enumerate(_hear(ours, workers), start=1):
        progress(number, len(ours))
        if one.error:
            silent.append(f"training {q.id}: {one.error}")
            continue
        if (same := by_hash["bytes"].get(one.bytes)) is not None:
            found.append(Overlap("bytes", q.id, same.id, f"SHA-256 {one.bytes[:12]}"))
        elif (same := by_hash["samples"].get(one.samples)) is not None:
            found.append(Overlap("samples", q.id, same.id, f"the same samples, SHA-256 {one.samples[:12]}"))
        for owner, score in index.matches(one.print):
            other = heard[owner][0]
            if same is None or other.id != same.id:
                found.append(Overlap("sound", q.id, other.id, f"{score:.0%} of the fingerprint"))
    order = {"source": 0, "bytes": 1, "samples": 2, "sound": 3}
    return sorted(found, key=lambda o: (order[o.kind], o.train, o.bench)), sorted(silent)


def source_names(q: Question) -> set[str]:
    """What a recording is called: a YouTube id where there is one, else its clip's name, within its source."""
    names = set()
    row = (q.meta or {}).get("row") or {}
    for text in (q.clip, q.audio.stem if q.audio else None):
        if text and (found := recording(text)):
            names.add(f"youtube {found[0]}")
        elif text == q.clip and text:
            names.add(f"{q.source} {text}")
    for text in (row.get("url"), (q.meta or {}).get("url")):
        if isinstance(text, str) and (found := re.search(r"(?:[?&]v=|youtu\.be/|/shorts/)([\w-]{11})(?![\w-])", text)):
            names.add(f"youtube {found[1]}")
    return {n for n in names if _is_told_apart(n)}


def _is_told_apart(name: str) -> bool:
    """Eleven small letters, or digits, are a word or a number and no YouTube id: "description" is a file's name."""
    kind, _, rest = name.partition(" ")
    return kind != "youtube" or not (rest.isdecimal() or (rest.isalpha() and rest.islower()))


def _clips(questions: Sequence[Question]) -> dict[Key, Question]:
    """The first question on each clip."""
    clips: dict[Key, Question] = {}
    for q in questions:
        clips.setdefault(q.stretch, q)
    return clips


def _hear(clips: dict[Key, Question], workers: int) -> Iterator[tuple[Question, Heard]]:
    questions = list(clips.values())
    for place, one in each(hear, list(clips), workers, _lost, memory=MEMORY):
        yield questions[place], one


def _lost(key: Key) -> Heard:
    return Heard(error=f"{key[0]}: {LOST}")


def hear(key: Key) -> Heard:
    """Read one clip and take its hashes."""
    audio, span, start, end = key
    try:
        clip, _ = decode(audio, span=span, start=start, end=end, max_seconds=3600.0)
        at_16k = resample(clip, 16000)
        return Heard(f"{file_hash(audio, span)} {start} {end}", at_16k.sha256, fingerprint(resample(clip, HZ).samples))
    except ClipError as error:
        return Heard(error=str(error))
    except (MemoryError, RuntimeError) as error:  # RuntimeError: torch's word for no memory
        return Heard(error=f"{audio}: cannot be heard whole ({str(error)[:200] or 'no memory'})")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m data.overlap", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("train", type=Path)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--train-root", type=Path, help="folder of TRAIN's audio (default: the manifest's)")
    parser.add_argument("--bench-root", type=Path, help="folder of BENCH's audio (default: the manifest's)")
    parser.add_argument("--clean", type=Path, metavar="OUT", help="write TRAIN without the clips found, beside it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that listen; 0: none")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(arguments)
    try:
        train = read(args.train, root=args.train_root, hidden=True)
        bench = read(args.bench, root=args.bench_root, hidden=True)
    except (OSError, ValueError) as error:
        print(f"cannot read: {error}", file=sys.stderr)
        return 2
    with Console(stderr=True).status("listening") as status:
        say = partial(_say, status)
        found, silent = overlaps(train.questions, bench.questions, workers=max(0, args.workers), progress=say)
    clips = len(_clips(bench.questions)), len(_clips(train.questions))
    report = {"bench_clips": clips[0], "train_clips": clips[1], "found": [asdict(o) for o in found], "unread": silent,
              "bench_found": len({o.bench for o in found}), "by": dict(Counter(o.kind for o in found))}  # fmt: skip
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        for o in found:
            print("".join(c if c.isprintable() else "?" for c in f"{o.kind:<8} {o.train}  {o.bench}  {o.evidence}"))
        print(f"{report['bench_found']} of {clips[0]} benchmark clips are among {clips[1]} training clips"
              + "".join(f"; {kind} {n}" for kind, n in report["by"].items()))  # fmt: skip
        if silent:
            print(f"{len(silent)} clips could not be compared but by source, such as {silent[0]}")
    if args.clean:
        dirty = {q.stretch for q in train if q.id in {o.train for o in found}}
        kept = [q for q in train if q.stretch not in dirty]
        write(args.clean, kept, (args.train_root or args.train.parent).resolve())
        print(f"{len(kept)} of {len(train)} questions in {args.clean}", file=sys.stderr)
    return 1 if found else 0


def _say(status, done: int, total: int) -> None:
    status.update(f"listening to {done} of {total} training clips")


if __name__ == "__main__":
    sys.exit(main())
