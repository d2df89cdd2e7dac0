"""Where questions come from: one file here per family of formats, each with a list SOURCES; a new one is one file.

`python -m data.prepare NAME FILE` reads the file's rows (data.rows), gives each to the source's `convert`, finds its
audio, looks at it, and writes the manifest.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A published format.

    `convert(row)` gives a manifest row, in which `audio` may be a path as published, a clip's name, a data.rows.Member
    or Hugging Face's {"bytes", "path"}, and `id` may be absent. It raises RowError for a row it cannot use.
    A `benchmark` keeps every row, audio or none, and its published form under meta.row: its denominator is fixed.
    `filtered`: the reference's text filters are on by default.
    """

    name: str
    summary: str
    convert: Callable[[dict], dict]
    benchmark: bool = False
    filtered: bool = False
    license: str | None = None


def sources() -> dict[str, Source]:
    """All sources by name, found by listing this folder."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {s.name: s for module in modules for s in getattr(module, "SOURCES", [])}
