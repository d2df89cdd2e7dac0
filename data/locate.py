"""Which file is a clip's? Published names and YouTube times matched to the files that are there."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data.rows import AUDIO

SECONDS = 0.051  # times that differ by less are the same: captions and file names round
# "abcdefghijk (12_34-17_5)" as AudSem packs it, "abcdefghijk_30", "abcdefghijk_30_40", "[abcdefghijk]-[30-40]",
# "abcdefghijk_30000_40000" (AudioSet's milliseconds), "abcdefghijk"
PACKED = re.compile(r"([\w-]{11}) \((\d+(?:[._]\d+)?)-(\d+(?:[._]\d+)?)\)")
NAMED = re.compile(r"\[?([\w-]{11})\]?(?:[ _-]{1,3}[\[(]?(\d+(?:\.\d+)?)(?:[_-](\d+(?:\.\d+)?))?[\])]?)?")


@dataclass(frozen=True)
class Found:
    """A file, and the stretch of it where the name says so: a whole video, of which a caption is a part."""

    path: Path
    start: float | None = None
    end: float | None = None


def recording(name: str) -> tuple[str, float | None, float | None] | None:
    """(YouTube id, start, end) of a clip's name, None if it is no such name."""
    if match := PACKED.fullmatch(name):
        return match[1], *(float(t.replace("_", ".")) for t in match.groups()[1:])
    if match := NAMED.fullmatch(name):
        return match[1], *(None if t is None else float(t) for t in match.groups()[1:])
    return None


class Files:
    """The audio files under a folder, listed once, by path, name and recording. Links are not followed."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise FileNotFoundError(f"audio folder {folder} does not exist")
        self.folder = folder.resolve()
        self.paths: dict[str, Path] = {}
        self.names: dict[str, list[Path]] = {}  # "x.wav" and "x"
        self.videos: dict[str, list[tuple[float | None, float | None, Path]]] = {}
        for at, folders, files in os.walk(self.folder):
            folders.sort()
            for file in sorted(files):
                path = Path(at, file)
                if path.suffix[1:].lower() not in AUDIO or path.is_symlink():
                    continue
                self.paths[path.relative_to(self.folder).as_posix()] = path
                for name in {path.name, path.stem}:
                    self.names.setdefault(name, []).append(path)
                if found := recording(path.stem):
                    self.videos.setdefault(found[0], []).append((*found[1:], path))

    def find(self, name: str) -> Found | None:
        """The file of a published path ("./audio/x.wav"), the longest end of it that is there; of a bare name; or of a
        YouTube id and times. None if there is none, or several of equal right."""
        parts = [p for p in PurePosixPath(name.replace("\\", "/")).parts if p not in ("/", ".", "..")]
        for i in range(len(parts)):
            if path := self.paths.get("/".join(parts[i:])):
                return Found(path)
        if not parts:
            return None
        for key in (parts[-1], PurePosixPath(parts[-1]).stem if PurePosixPath(parts[-1]).suffix[1:] in AUDIO else ""):
            if len(paths := self.names.get(key, [])) == 1:
                return Found(paths[0])
        return self._by_recording(parts[-1])

    def _by_recording(self, name: str) -> Found | None:
        stem = re.sub(rf"\.({'|'.join(AUDIO)}|mp4|m4a|webm)$", "", name)
        if (wanted := recording(stem)) is None or not (candidates := self.videos.get(wanted[0])):
            return None
        _, start, end = wanted
        whole = [path for first, _, path in candidates if first is None]
        if start is None:
            return Found(whole[0]) if len(whole) == 1 else None
        for unit in (1.0, 1000.0):  # seconds, or AudioSet's milliseconds: a whole second at least, or none
            near = [(last is not None and end is not None, path) for first, last, path in candidates
                    if first is not None and (unit == 1 or first == 0 or first >= unit)
                    and abs(first / unit - start) < SECONDS
                    and (last is None or end is None or abs(last / unit - end) < SECONDS)]  # fmt: skip
            surest = [path for both, path in near if both] or [path for _, path in near]
            if surest:
                return Found(surest[0]) if len(surest) == 1 else None
        return Found(whole[0], start, end) if len(whole) == 1 else None
