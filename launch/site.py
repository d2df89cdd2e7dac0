"""The settings of a cluster: conf/cluster/NAME.yaml over conf/cluster/default.yaml, checked.

PyYAML (Hydra brings it) is the one thing here beyond the standard library: a home-made reader of "almost YAML" would
misread what a newcomer writes. Set-up and doctor, which must run where nothing is installed yet, do not import this.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "conf" / "cluster"

# sbatch reads its own lines by rules of its own: what goes there is of a form that needs no quotes.
PLAIN = re.compile(r"[A-Za-z0-9_.,:@%+/=\[\]*&|()-]+")
TIME = re.compile(r"\d+(:\d{2}){0,2}|\d+-\d{1,2}(:\d{2}){0,2}")


class SiteError(ValueError):
    """A mistake in the settings of a cluster or in what is to be submitted: names the file and the key."""


@dataclass(frozen=True)
class Site:
    """conf/cluster/default.yaml says what each of these means."""

    partition: str | None
    account: str | None
    qos: str | None
    nodes: int
    gpus_per_node: int
    ranks_per_node: int | None
    cpus_per_rank: int
    mem: str | None
    time: str
    lead: int
    requeue: int
    serve_gpus: int
    serve_nodes: int
    servers_per_node: int
    jobs: int
    offline: bool
    scratch: str | None
    interface: str | None
    container: list[str]
    modules: list[str]
    setup: list[str]
    sbatch: list[str]

    def __post_init__(self):
        for name in ("nodes", "cpus_per_rank", "servers_per_node", "jobs", "lead"):
            _want(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("gpus_per_node", "requeue", "serve_gpus", "serve_nodes"):
            _want(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("partition", "account", "qos", "mem", "interface"):
            value = getattr(self, name)
            _want(value is None or PLAIN.fullmatch(value), name, value, "a name without spaces or quotes")
        for name in ("modules", "sbatch"):
            for value in getattr(self, name):
                _want(PLAIN.fullmatch(value), name, value, "words without spaces or quotes")
        for value in self.sbatch:
            _want(value.startswith("--"), "sbatch", value, "options as --constraint=h100")
        _want(TIME.fullmatch(self.time), "time", self.time, 'a time limit in quotes, as "24:00:00" or "2-00:00:00"')
        _want(minutes(self.time) * 60 > self.lead, "lead", self.lead, f"less than the time limit, {self.time}")
        if self.serve_gpus and self.nodes > 1:
            raise SiteError("serve_gpus is for one node (nodes: 1): with more, let whole nodes serve (serve_nodes)")
        _want(self.ranks >= 1, "ranks_per_node", self.ranks_per_node, "at least 1")
        if self.gpus_per_node and self.ranks + self.serve_gpus > self.gpus_per_node:
            raise SiteError(f"{self.ranks} ranks and {self.serve_gpus} serving GPUs, but gpus_per_node is "
                            f"{self.gpus_per_node}: lower ranks_per_node or serve_gpus")  # fmt: skip

    @property
    def ranks(self) -> int:
        """Training processes of a node."""
        return self.ranks_per_node if self.ranks_per_node is not None else max(self.gpus_per_node - self.serve_gpus, 1)

    @property
    def home(self) -> Path:
        """Folder in which jobs start."""
        return Path(os.path.expanduser(self.scratch)).absolute() if self.scratch else ROOT

    def with_words(self, words: Sequence[str]) -> Site:
        """With `key=value` words put over it, values as in YAML. Raises SiteError."""
        changes = {}
        for word in words:
            key, sign, text = word.partition("=")
            if not sign:
                raise SiteError(f"{word}: key=value is wanted, with a key of {FOLDER.name}/default.yaml")
            changes[key] = text if _kind(key) is str and text != "null" else yaml.safe_load(text)
        return _site(asdict(self) | _checked(changes, "--set"), "--set")


def read(name: str) -> Site:
    """The settings called `name`, or in the file of that path: what it does not say is as in default.yaml."""
    path = Path(os.path.expanduser(name)) if name.endswith(".yaml") or "/" in name else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise SiteError(f"CLUSTER={name}: there is no {path}; known: {known}, or the path of a file")
    values = _load(FOLDER / "default.yaml") | _load(path)
    return _site(values, str(path))


def minutes(time: str) -> int:
    """SLURM's time limit in whole minutes, rounded up: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, mins, secs = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, secs = parts
    else:
        hours, mins, secs = 0, *[*parts, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + mins + (secs > 0)


def _load(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SiteError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SiteError(f"{path}: lines of `key: value` are wanted")
    return _checked(values, str(path))


def _checked(values: Mapping, where: str) -> dict:
    known = [f.name for f in fields(Site)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise SiteError(f"{where}: {key}: there is no such key; {hint}")
    return dict(values)


def _site(values: Mapping, where: str) -> Site:
    hints = get_type_hints(Site)
    for key, value in values.items():
        if not _fits(value, hints[key]):
            names = " or ".join("null" if t is type(None) else getattr(t, "__name__", str(t))
                                for t in get_args(hints[key]) or (hints[key],))  # fmt: skip
            names = "a list of words" if get_origin(hints[key]) is list else names
            more = ' (in quotes, as "24:00:00")' if key == "time" else ""
            raise SiteError(f"{where}: {key} must be {names}{more}, got {value!r}")
    try:
        return Site(**values)
    except SiteError as error:
        raise SiteError(f"{where}: {error}") from None


def _fits(value, hint) -> bool:
    if get_origin(hint) is list:
        return isinstance(value, list) and all(isinstance(v, str) and v.isprintable() for v in value)
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) and (not isinstance(value, str) or value.isprintable())


def _kind(key: str):
    hint = get_type_hints(Site).get(key)
    return str if hint in (str, str | None) else hint


def _want(true, key: str, value, what: str) -> None:
    if not true:
        raise SiteError(f"{key} must be {what}, got {value!r}")
