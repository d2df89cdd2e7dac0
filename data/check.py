"""Check a manifest and its clips: `python -m data.check MANIFEST`. Exit 0: all good, 1: problems, 2: cannot be read."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from data.audio import ClipError, check_header, decode
from data.balance import balance
from data.manifest import Manifest, Problem, read
from data.pool import LOST, MEMORY, each
from data.question import Question

ROW = (
    "A row is a JSON object: id, audio (a path under the root), question, choices (bare texts), answer (index of the "
    "right one), and where wanted start, end (seconds), task, source, license, meta."
)
POOL_FROM = 300  # clips; below that starting processes takes longer than they save


@dataclass(frozen=True)
class Seen:
    """What was learned of one question's clip: `reason` and `message` if it cannot be used, else its measures."""

    reason: str | None = None
    message: str = ""
    seconds: float = 0.0
    hz: int = 0  # of the file
    channels: int = 0


def examine(question: Question, *, fast: bool, max_seconds: float) -> Seen:
    """Look at one clip: all of it, or only its header when `fast`."""
    stretch = {"span": question.span, "start": question.start, "end": question.end, "max_seconds": max_seconds}
    try:
        if fast:
            info = check_header(question.audio, **stretch)
            end = info.duration if question.end is None else min(question.end, info.duration)
            seconds = end - (question.start or 0.0)
        else:
            clip, info = decode(question.audio, **stretch)
            seconds = clip.seconds
        return Seen(seconds=seconds, hz=info.samplerate, channels=info.channels)
    except ClipError as error:
        return Seen(error.reason, str(error))
    except MemoryError:
        return Seen("unreadable", f"{question.audio}: takes more than {MEMORY >> 30} GiB to decode")


def examine_all(questions: list[Question], *, fast: bool, max_seconds: float, workers: int) -> Iterator[Seen]:
    """`examine` each question, in order; in `workers` processes where there are many clips to decode."""
    look = partial(examine, fast=fast, max_seconds=max_seconds)
    if fast or workers == 1 or len(questions) < POOL_FROM:
        yield from map(look, questions)
        return
    waiting: dict[int, Seen] = {}
    turn = 0
    for place, seen in each(look, questions, workers, _lost):
        waiting[place] = seen
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1


def _lost(question: Question) -> Seen:
    return Seen("unreadable", f"{question.audio}: {LOST}")


def summarise(manifest: Manifest, seen: list[Seen]) -> dict:
    """What is reported: problems in the file's order, counts, seconds, balance of gold places, rates."""
    problems = list(manifest.problems)
    good = []
    for question, one in zip(manifest.questions, seen, strict=True):
        if one.reason is None:
            good.append((question, one))
        else:
            line = manifest.lines[question.id]
            problems.append(Problem(str(manifest.path), line, question.id, one.reason, one.message))
    return {
        "manifest": str(manifest.path),
        "rows": len(manifest.questions) + len(manifest.problems),
        "ok": len(good),
        "seconds": round(sum(one.seconds for _, one in good), 3),
        "gold": balance([(q.answer, len(q.choices)) for q, _ in good if q.answer is not None]),
        "rates": {f"{hz} Hz x {channels}": n for (hz, channels), n in
                  sorted(Counter((one.hz, one.channels) for _, one in good).items())},
        "problems": [asdict(p) for p in sorted(problems, key=lambda p: p.line)],
    }  # fmt: skip


def show(report: dict, console: Console) -> None:
    """Print the table of problems, then four lines of summary."""
    if report["problems"]:
        table = Table("line", "id", "reason", "message", title=report["manifest"], title_justify="left")
        for p in report["problems"]:
            # Text of the data, never markup: an id such as [red] must be shown as it is.
            table.add_row(*(_plain(x) for x in (p["line"], p["id"] or "-", p["reason"], p["message"])))
        console.print(table)
        print(_counts("reasons", Counter(p["reason"] for p in report["problems"])))
    print(f"rows    {report['rows']}, ok {report['ok']}, bad {len(report['problems'])}")
    print(f"audio   {report['seconds']:.1f} s = {report['seconds'] / 3600:.2f} h")
    print(f"gold    {report['gold']['text']}")
    print(_counts("rates", report["rates"]))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m data.check", description=__doc__, epilog=ROW)
    parser.add_argument("manifest", type=Path, help="file of JSON lines")
    parser.add_argument("--root", type=Path, help="folder that audio paths start from (default: the manifest's)")
    parser.add_argument("--fast", action="store_true", help="headers only: misses NaN, silence and most damage")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="longest clip (default: 30, as in training)")
    parser.add_argument("--hidden", action="store_true", help="answers may be withheld (null), as benchmarks do")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(arguments)
    try:
        manifest = read(args.manifest, root=args.root, hidden=args.hidden)
    except (OSError, ValueError) as error:
        print(f"cannot read: {error}", file=sys.stderr)
        return 2
    seen: Iterable[Seen] = examine_all(
        manifest.questions, fast=args.fast, max_seconds=args.max_seconds, workers=max(1, args.workers)
    )
    if not args.json:
        seen = track(seen, "checking", total=len(manifest), console=Console(stderr=True), transient=True)
    report = summarise(manifest, list(seen))
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        show(report, Console())
    return 1 if report["problems"] else 0


def _plain(value) -> str:
    return escape("".join(c if c.isprintable() else "?" for c in str(value)))  # no terminal control codes from the data


def _counts(name: str, counts: dict) -> str:
    return f"{name:<7} " + ", ".join(f"{key}: {n}" for key, n in counts.items())


if __name__ == "__main__":
    sys.exit(main())
