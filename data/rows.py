"""Rows of any published file: CSV, TSV, JSON, JSONL, Parquet, WebDataset tar shards, or a folder of one of them.

Files are data from strangers: nothing in them is executed or unpacked, and memory is bounded by one row.
"""

from __future__ import annotations

import csv
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from data.manifest import LONGEST_LINE, RowError, lines_of, parse

AUDIO = ("flac", "wav", "ogg", "mp3", "opus")
MEMBERS = ("json", *AUDIO)  # of a shard; the published loaders unpickle others
MAX_MEMBER = 2**28  # bytes of audio
KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".tar")


@dataclass(frozen=True)
class Member:
    """Audio within a tar shard: it is read where it lies, never unpacked."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Row:
    """One row and where it stands. `value` is None where `error` says why it cannot be used."""

    file: str
    number: int  # of the line, the item or the sample, from 1
    value: dict | None
    error: RowError | None = None


def read(path: Path) -> Iterator[Row]:
    """Rows of a file, or of a folder's files in the order of their names. A sample of a shard holds its JSON's keys,
    `__key__` and `__audio__` (a Member).

    Raises FileNotFoundError or ValueError for a file that is no table at all; a bad row is a Row with its error.
    """
    if path.is_dir():
        found = {kind: sorted(p for p in path.rglob(f"*{kind}") if p.is_file()) for kind in KINDS}
        found = {kind: files for kind, files in found.items() if files}
        if len(found) != 1:
            raise ValueError(f"{path}: a folder must hold files of one kind of {', '.join(KINDS)}, this one has "
                             f"{', '.join(found) or 'none'}: name the file")  # fmt: skip
        for file in next(iter(found.values())):
            yield from read(file)
        return
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    readers = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet, ".tar": _tar}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: a table ends in one of {', '.join(KINDS)}")
    yield from readers[path.suffix.lower()](path)


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.reader(_lines(file), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header, number = None, 0
        while True:
            try:
                cells = next(table, None)
            except (csv.Error, UnicodeDecodeError) as error:  # the rest cannot be told apart: a quote may be open
                yield Row(str(path), number + 1, None, RowError("bad_csv", f"line {table.line_num}: {error}"))
                return
            if cells is None:
                return
            if header is None:
                header = cells
                if len(header) == 1 and ";" in header[0]:
                    raise ValueError(f"{path}: columns stand between semicolons: save it with commas, or tabs as .tsv")
                if len(set(header)) < len(header):
                    raise ValueError(f"{path}: two columns have the same name: {', '.join(header)}"[:500])
            elif cells:
                number += 1
                if len(cells) == len(header):
                    yield Row(str(path), number, dict(zip(header, cells, strict=True)))
                else:
                    message = f"{len(cells)} cells under {len(header)} columns"
                    yield Row(str(path), number, None, RowError("bad_csv", message))


def _lines(file) -> Iterator[str]:
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise csv.Error(f"a line of more than {LONGEST_LINE} characters")
        yield line


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(lines_of(file), start=1):
            if raw.strip():
                try:
                    yield Row(str(path), number, parse(raw))
                except RowError as error:
                    yield Row(str(path), number, None, error)


def _json(path: Path) -> Iterator[Row]:
    """An array of objects, item by item, or one object; JSONL under the wrong name too."""
    decoder, number = json.JSONDecoder(), 0
    with path.open(encoding="utf-8-sig") as file:
        buffer, at, opened = "", 0, False
        while True:
            if len(buffer) - at < LONGEST_LINE:  # enough for a whole item, and memory for no more
                buffer, at = buffer[at:] + file.read(4 * LONGEST_LINE), 0
            while at < len(buffer) and (buffer[at].isspace() or (opened and buffer[at] == ",")):
                at += 1
            if not opened and buffer[at : at + 1] == "[":
                opened, at = True, at + 1
                continue
            if at >= len(buffer) or (opened and buffer[at] == "]"):
                return
            number += 1
            try:
                value, end = decoder.raw_decode(buffer, at)
                if end - at > LONGEST_LINE:
                    raise ValueError(f"an item of more than {LONGEST_LINE} characters")
            except (ValueError, RecursionError) as error:
                yield Row(str(path), number, None, RowError("bad_json", f"item {number}: {error}"))
                return
            at = end
            if isinstance(value, dict):
                yield Row(str(path), number, value)
            else:
                message = f"item {number} must be an object, got {type(value).__name__}"
                yield Row(str(path), number, None, RowError("bad_json", message))


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs `pip install pyarrow`, or save it as CSV or JSONL") from error
    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, value)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({error})"[:500]) from error


class _Capped:
    """A file that refuses to hand out much at once: tar headers of the pax kind say how long they are themselves."""

    def __init__(self, file):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LONGEST_LINE:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)


def _tar(path: Path) -> Iterator[Row]:
    """Samples of a WebDataset shard: members of one key stand together, one JSON and one audio."""
    number = 0
    with path.open("rb") as file:
        for key, members in groupby(_members(path, file), key=lambda found: found[0]):
            number, parts, error = number + 1, {}, None
            for _, kind, found in members:
                try:
                    if isinstance(found, RowError):
                        raise found
                    part = "json" if kind == "json" else "audio"
                    if part in parts:
                        raise RowError("bad_member", f"sample {key!r} has two members for {part}")
                    parts[part] = _json_member(file, found) if part == "json" else _audio_member(path, found)
                except RowError as wrong:
                    error = error or wrong
            if error is None and len(parts) < 2:
                error = RowError("bad_member", f"sample {key!r} has no {'audio' if 'json' in parts else 'json'}")
            row = None if error else {**parts["json"], "__key__": key, "__audio__": parts["audio"]}
            yield Row(str(path), number, row, error)
    if not number:
        yield Row(str(path), 1, None, RowError("bad_tar", "a tar without samples"))


def _members(path: Path, file) -> Iterator[tuple[str, str, tarfile.TarInfo | RowError]]:
    """(key, kind, member or what is wrong with it) of all members but folders."""
    size = path.stat().st_size
    try:
        with tarfile.open(fileobj=_Capped(file), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # else it remembers them all
                if member.size < 0:  # a pax header may say so: the next member would lie before this one, for ever
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                if member.isdir():
                    continue
                folder, name = os.path.split(member.name)
                name, _, kind = name.partition(".")
                key, kind = f"{folder}/{name}" if folder else name, kind.lower()
                yield key, kind, _refusal(member, kind, size) or member
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:  # headers about headers
        yield "", "", RowError("bad_tar", f"damaged here, the rest is lost: {error}"[:300])


def _json_member(file, member: tarfile.TarInfo) -> dict:
    file.seek(member.offset_data)
    return parse(file.read(min(member.size, LONGEST_LINE + 1)))


def _audio_member(path: Path, member: tarfile.TarInfo) -> Member:
    return Member(path, member.offset_data, member.size)


def _refusal(member: tarfile.TarInfo, kind: str, size: int) -> RowError | None:
    name = member.name[:200]
    if not member.isreg() or member.issparse():
        return RowError("bad_member", f"{name!r} is a link, a device or sparse: only plain files are read")
    if name.startswith("/") or ".." in Path(name).parts:
        return RowError("bad_member", f"{name!r} points out of the archive")
    if kind not in MEMBERS:
        return RowError("bad_member", f"{name!r} is not opened: members end in {', '.join(MEMBERS)}")
    if member.size > MAX_MEMBER or member.offset_data + member.size > size:
        return RowError("bad_member", f"{name!r} claims {member.size} bytes in a file of {size}")
    return None
