"""A published data set as the one manifest: `python -m data.prepare SOURCE FILE --audio DIR --out train.jsonl`.

Beside the manifest: `train.states.jsonl` with one line a row (file, row, id, state, message, audio, seconds, hz,
channels, sha256) and `train.report.json`. Killed at any point and started again it goes on, to the same manifest.
Exit 0: every row is in, 1: some were left out, 2: it could not be read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import soundfile
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from data.balance import balance
from data.locate import Files, Found
from data.look import Job, Look, look_at_all
from data.manifest import RowError, question_of, row_of
from data.rows import Member, read
from data.sources import Source, sources

LEAKS = ("original caption", "original data", "original description", "original title")  # the reference's list
HEADS = {b"fLaC": "flac", b"RIFF": "wav", b"OggS": "ogg", b"ID3": "mp3"}


@dataclass(frozen=True)
class Wish:
    """What is asked for: where things lie, and what is left out.

    Limits in seconds; `min_text` characters of question, thinking, answer and semantic elements each (0: any).
    """

    files: list[Path]
    out: Path
    audio: Path
    root: Path
    rename: dict[str, str] = field(default_factory=dict)  # their column -> ours
    min_seconds: float = 0.1
    max_seconds: float = 300.0
    min_text: int = 0
    leaks: tuple[str, ...] = ()
    workers: int = 0


@dataclass(frozen=True)
class Draft:
    """A row on its way: converted, its file found or not."""

    file: str
    number: int
    row: dict | None  # of the manifest, without `audio` and `span`
    job: Job | None
    error: RowError | None = None
    audio: str = ""  # as published


def prepare(source: Source, wish: Wish, progress: Callable = lambda what, done, total: None) -> dict:
    """Write manifest, states and report; returns the report."""
    wish.out.parent.mkdir(parents=True, exist_ok=True)
    files = Files(wish.audio)
    jobs = {}
    for draft in drafts(source, wish, files):
        if draft.job is not None:
            jobs[draft.job] = None
        progress("rows", draft.number, None)
    looks = look_at_all(
        list(jobs), wish.out.with_name(f".{wish.out.stem}.looks.jsonl"), min_seconds=wish.min_seconds,
        max_seconds=wish.max_seconds, workers=wish.workers, progress=partial(progress, "clips")
    )  # fmt: skip
    return _write(source, wish, drafts(source, wish, files), looks)


def drafts(source: Source, wish: Wish, files: Files) -> Iterator[Draft]:
    """Every row of the published files, in order, with an id and its file; read anew each time: memory is one row."""
    counts: Counter = Counter()
    for path in wish.files:
        for given in read(path):
            if given.error is not None:
                yield Draft(given.file, given.number, None, None, given.error)
                continue
            value = {wish.rename.get(k, k): v for k, v in given.value.items()}
            try:
                row = source.convert(value)
                if source.benchmark:
                    row["meta"] = (row.get("meta") or {}) | {"row": _plain(given.value)}
            except RowError as error:
                yield Draft(given.file, given.number, None, None, error)
                continue
            except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:  # a list for a text, ...
                wrong = RowError("bad_type", f"not as {source.name} has it: {type(error).__name__} {error}"[:300])
                yield Draft(given.file, given.number, None, None, wrong)
                continue
            audio = row.pop("audio", None)
            name = audio.get("path") if isinstance(audio, dict) else audio
            name = name if isinstance(name, str) else ""
            if row.get("id") in (None, ""):
                base = row.get("clip") or PurePosixPath(name).stem or source.name
                row["id"] = f"{base}_qa_{counts[base]}"
                counts[base] += 1
            row["id"] = str(row["id"])
            row = {"license": source.license} | row
            row = {k: v for k, v in row.items() if v is not None or k == "answer"}
            yield Draft(given.file, given.number, row, _job(audio, row, wish, files), audio=name)


def _job(audio, row: dict, wish: Wish, files: Files) -> Job | None:
    times = row.get("start"), row.get("end")
    if isinstance(audio, Member):
        return Job(str(audio.path.resolve()), (audio.offset, audio.length), *times)
    if isinstance(audio, dict) and isinstance(audio.get("bytes"), bytes):
        return Job(str(_keep(audio["bytes"], wish)), None, *times)
    name = audio.get("path") if isinstance(audio, dict) else audio
    if not isinstance(name, str):
        return None
    found = files.find(name) or Found(Path())
    if found.path == Path():
        return None
    return Job(str(found.path), None, *(times if found.start is None else (found.start, found.end)))


def _keep(data: bytes, wish: Wish) -> Path:
    """Sound that came within a table as a file, named by its hash: the same sound is kept once."""
    kind = next((kind for head, kind in HEADS.items() if data.startswith(head)), "mp3")
    path = wish.out.resolve().parent / f"{wish.out.stem}_audio" / f"{hashlib.sha256(data).hexdigest()}.{kind}"
    if wish.root not in path.parents:
        raise ValueError(f"the sound in the table goes to {path.parent}: give a --root above it")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(data)
        temporary.replace(path)
    return path


def _write(source: Source, wish: Wish, rows: Iterator[Draft], looks: dict[Job, Look]) -> dict:
    states, reasons, golds, seconds, kept, present = Counter(), {}, [], 0.0, 0, 0
    seen: dict[str, str] = {}  # id, or sound and question -> where it stood first
    sounds: set[str | None] = set()
    names = [wish.out, wish.out.with_name(f"{wish.out.stem}.states.jsonl")]
    temporary = [p.with_name(f".{p.name}.{os.getpid()}") for p in names]
    written = partial(open, mode="w", encoding="utf-8", errors="backslashreplace")  # half a surrogate pair in an id
    with written(temporary[0]) as manifest, written(temporary[1]) as log:
        for draft in rows:
            seen_clip = Look("missing", f"no file for {draft.audio!r} under {wish.audio}"[:300])
            if draft.job is not None:
                seen_clip = looks[draft.job]
            question, state, message = None, seen_clip.state, seen_clip.message
            try:
                if draft.error is not None:
                    raise draft.error
                question = _question(draft, seen_clip, wish)
                if (where := seen.get(question.id)) is not None:
                    raise RowError("duplicate", f"id {question.id!r} stands in {where} already")
                asked = [seen_clip.sha256, question.start, question.end, question.question, sorted(question.choices)]
                same = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
                where = f"row {draft.number} of {draft.file}"
                if not source.benchmark and state == "ok" and same in seen:
                    raise RowError("duplicate", f"the same sound, question and options as {seen[same]}")
                seen |= {question.id: where, same: where} if state == "ok" else {question.id: where}
            except RowError as error:
                question, state, message = None, error.reason, str(error)
            if question is not None and (state == "ok" or source.benchmark):
                manifest.write(json.dumps(row_of(question, wish.root), ensure_ascii=False) + "\n")
                kept += 1
                if question.answer is not None:
                    golds.append((question.answer, len(question.choices)))
            if state == "ok":
                seconds += seen_clip.seconds or 0.0
                sounds.add(seen_clip.sha256)
            present += draft.job is not None
            states[state] += 1
            reasons.setdefault(state, message)
            line = {"file": draft.file, "row": draft.number, "id": (draft.row or {}).get("id"), "state": state,
                    "message": message, "audio": draft.job and os.path.relpath(draft.job.path, wish.root),
                    "seconds": seen_clip.seconds, "hz": seen_clip.hz, "channels": seen_clip.channels,
                    "sha256": seen_clip.sha256}  # fmt: skip
            log.write(json.dumps({k: v for k, v in line.items() if v is not None}, ensure_ascii=False) + "\n")
    report = {
        "source": source.name, "benchmark": source.benchmark, "manifest": str(wish.out), "root": str(wish.root),
        "rows": sum(states.values()), "present": present, "kept": kept, "states": dict(states.most_common()),
        "seconds": round(seconds, 3),
        "sounds": len(sounds), "gold": balance(golds), "examples": {k: v for k, v in reasons.items() if k != "ok"},
        "versions": {"soundfile": soundfile.__version__, "libsndfile": soundfile.__libsndfile_version__},
    }  # fmt: skip
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    wish.out.with_name(f"{wish.out.stem}.report.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    for here, there in zip(temporary[::-1], names[::-1], strict=True):  # the manifest last: where it is, all is
        here.replace(there)
    return report


def _question(draft: Draft, seen: Look, wish: Wish):
    row = draft.row
    if draft.job is None:  # a benchmark's row stays, under the name that its audio would have
        where = {"audio": "/".join(p for p in PurePosixPath(draft.audio).parts if p not in ("/", "..")) or "missing"}
    else:
        job = draft.job
        where = {"audio": os.path.relpath(job.path, wish.root), "span": list(job.span) if job.span else None,
                 "start": job.start, "end": job.end, "sha256": seen.sha256}  # fmt: skip
    question = question_of(row | {k: v for k, v in where.items() if v is not None}, wish.root, hidden=True)
    answer = "" if question.answer is None else f"A. {question.gold}"  # counted with its letter, as published
    texts = {"question": question.question, "answer": answer, "thinking": question.thinking,
             "semantic_elements": question.semantic_elements}  # fmt: skip
    for key, text in texts.items():
        if text is not None and len(text) < wish.min_text:
            raise RowError("short_text", f"{key} {text!r} has {len(text)} characters, fewer than {wish.min_text}")
        if key != "question" and (leak := next((x for x in wish.leaks if x in (text or "").lower()), None)):
            raise RowError("leaked_caption", f"{key} speaks of the {leak!r} it was made from")
    return question


def _plain(row: dict) -> dict:
    """A published row as JSON can hold it: without the sound's bytes, dates of a Parquet file as texts."""
    kept = {k: v for k, v in row.items() if not k.startswith("__")}
    kept = {k: {n: x for n, x in v.items() if n != "bytes"} if isinstance(v, dict) else v for k, v in kept.items()}
    try:
        return json.loads(json.dumps(kept, default=lambda value: None if isinstance(value, bytes) else str(value)))
    except (TypeError, ValueError, RecursionError) as error:  # keys that are no texts, a nest too deep
        raise RowError("bad_type", f"not to be kept as JSON: {error}"[:300]) from error


def show(report: dict) -> None:
    """What was found, in words."""
    print(f"{report['present']} of {report['rows']} present, {report['kept']} in {report['manifest']}"
          f" ({report['seconds'] / 3600:.2f} h, {report['sounds']} different sounds)")  # fmt: skip
    for state, count in report["states"].items():
        example = f"   such as {report['examples'][state]}" if state in report["examples"] else ""
        print("".join(c if c.isprintable() else "?" for c in f"  {state:<15}{count:>8}{example}"[:220]))
    print(f"gold    {report['gold']['text']}")
    if Path(report["manifest"]).resolve().parent != Path(report["root"]):
        key = f"evaluate with bench.{report['source']}" if report["benchmark"] else "train with data.train"
        print(f"audio   lies under {report['root']}: {key}.root={report['root']}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    known = sources()
    names = "\n".join(f"  {s.name:<12}{s.summary}" for s in known.values())
    parser = argparse.ArgumentParser("python -m data.prepare", description=f"{__doc__}\nsources:\n{names}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("source", choices=known, metavar="SOURCE")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="tables, shards, or folders of them")
    parser.add_argument("--audio", type=Path, help="folder of the clips, searched whole (default: the file's)")
    parser.add_argument("--out", type=Path, required=True, help="the manifest, such as data_audsem/train.jsonl")
    parser.add_argument("--root", type=Path, help="folder that audio paths start from (default: its own, or --audio)")
    parser.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="their name of a column")
    parser.add_argument("--min-seconds", type=float, default=0.1)
    parser.add_argument("--max-seconds", type=float, default=300.0)
    parser.add_argument("--min-text", type=int, help="fewest characters of a text (default: 10 for audsem, else 0)")
    parser.add_argument("--keep-leaks", action="store_true", help="keep texts that speak of their original caption")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode; 0: none")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    args = parser.parse_args(arguments)
    source = known[args.source]
    try:
        wish = _wish(args, source)
        with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True,
                      console=Console(stderr=True), disable=args.json) as bars:  # fmt: skip
            tasks = {}

            def progress(what: str, done: int, total: int | None) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total)

            report = prepare(source, wish, progress)
    except (OSError, ValueError) as error:
        print(f"cannot prepare: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(report))
    else:
        show(report)
    return 0 if report["states"].get("ok", 0) == report["rows"] else 1


def _wish(args: argparse.Namespace, source: Source) -> Wish:
    for path in args.files:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        # The second reading would find what the first has written.
        out = args.out.resolve()
        if out == path.resolve() or (path.is_dir() and path.resolve() in out.parents):
            raise ValueError(f"--out {args.out} lies where {path} is read from: give another folder")
    if wrong := [c for c in args.column if c.count("=") != 1]:
        raise ValueError(f"--column {wrong[0]!r}: OURS=THEIRS, such as question=Frage")
    first = args.files[0]
    audio = (args.audio or (first if first.is_dir() else first.parent)).resolve()
    home = args.out.resolve().parent
    # Parquet may bring its sound along, which goes beside the manifest.
    at_home = audio == home or home in audio.parents or (args.audio is None and list(first.parent.glob("*.parquet")))
    root = args.root.resolve() if args.root else home if at_home else audio
    return Wish(
        args.files, args.out, audio, root, rename=dict(reversed(c.split("=")) for c in args.column),
        min_seconds=args.min_seconds, max_seconds=args.max_seconds, workers=max(0, args.workers),
        min_text=(10 if source.filtered else 0) if args.min_text is None else args.min_text,
        leaks=LEAKS if source.filtered and not args.keep_leaks else (),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
