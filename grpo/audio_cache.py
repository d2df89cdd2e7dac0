"""Embeddings of clips that were heard before: in memory, and on disk across runs if a folder is named.

A frozen audio tower makes the same embedding of a clip every time: of one step for rollout, policy, reference and all
updates, and again in the next epoch. Entries are named by the waveform's hash, within a folder named by the tower.
Everything here may be deleted at any time: what is missing, or cannot be read, is computed again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class AudioCache:
    """See the module. The least recently used entries go first, in memory as on disk.

    Args:
        memory_gib: bound in memory; ten seconds of sound are 1.8 MB for the 7B model.
        folder: where to keep embeddings across runs; None: nowhere. Several processes may share it.
        disk_gib: bound of the folder.
    """

    def __init__(self, *, memory_gib: float = 1.0, folder: str | Path | None = None, disk_gib: float = 20.0):
        if memory_gib < 0 or disk_gib <= 0:
            raise ValueError(f"audio_cache: memory_gib must be at least 0 and disk_gib above 0, got {memory_gib:g} and "
                             f"{disk_gib:g}")  # fmt: skip
        self.folder = Path(folder) if folder else None
        self.home: Path | None = None  # within the folder, of one tower
        self._limit, self._disk_limit = int(memory_gib * 2**30), int(disk_gib * 2**30)
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._size = self._written = 0
        self._lock = threading.Lock()  # with rollout.lag a rollout and an update ask at once

    def of(self, tower: str) -> None:
        """Keep on disk as well, under the name of the tower that makes the embeddings."""
        self.home = self.folder / tower
        self.home.mkdir(parents=True, exist_ok=True)

    def get(self, clip_sha256: str) -> Tensor | None:
        with self._lock:
            if clip_sha256 in self._kept:
                self._kept.move_to_end(clip_sha256)
                return self._kept[clip_sha256]
        if self.home is None:
            return None
        file = self._file(clip_sha256)
        try:
            embedding = load_file(file)["audio"]
            os.utime(file)  # used just now
        except (OSError, SafetensorError, KeyError):  # not there, half a file, or another's
            return None
        self._keep(clip_sha256, embedding)
        return embedding

    def put(self, clip_sha256: str, embedding: Tensor) -> None:
        """Keep an embedding [tokens, H]. A full disk costs time, not the run."""
        embedding = embedding.detach().cpu().contiguous()
        self._keep(clip_sha256, embedding)
        if self.home is None:
            return
        file = self._file(clip_sha256)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            file.parent.mkdir(exist_ok=True)
            save_file({"audio": embedding}, temporary)
            os.replace(temporary, file)
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                temporary.unlink()
            return
        self._written += embedding.nbytes
        if self._written > self._disk_limit // 20:  # now and then: looking through the folder takes a while
            self._written = 0
            self._trim()

    def clear(self) -> None:
        """Forget what is in memory."""
        with self._lock:
            self._kept.clear()
            self._size = 0

    def _file(self, clip_sha256: str) -> Path:
        return self.home / clip_sha256[:2] / f"{clip_sha256}.safetensors"

    def _keep(self, clip_sha256: str, embedding: Tensor) -> None:
        with self._lock:
            before = self._kept.pop(clip_sha256, None)
            self._size += embedding.nbytes - (0 if before is None else before.nbytes)
            self._kept[clip_sha256] = embedding
            while self._size > self._limit:
                self._size -= self._kept.popitem(last=False)[1].nbytes

    def _trim(self) -> None:
        """Delete the files longest unused, of all towers, until the folder is a tenth below its bound."""
        files = []
        for file in self.folder.rglob("*.safetensors"):
            with contextlib.suppress(OSError):
                stat = file.stat()
                files.append((stat.st_mtime, stat.st_size, file))
        total = sum(size for _, size, _ in files)
        if total <= self._disk_limit:
            return
        for _, size, file in sorted(files, key=lambda entry: entry[0]):
            if total <= 0.9 * self._disk_limit:
                return
            with contextlib.suppress(OSError):
                file.unlink()
            total -= size
