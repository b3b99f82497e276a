"""Files of versions that this machine has read, so that scorers that start or heal needn't read them from the store again.

A file is named after the SHA-256 of its content. Whoever reads it compares the content with that name, so a file that is torn,
changed or another one is never used: it is deleted, and the store is asked. Therefore nothing is flushed, any number of
processes may share a folder, and a process may be killed at any moment. Whatever fails here is the same as a file that isn't
there, a full disk too.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from state.errors import SnapshotCorrupt
from state.manifest import DENSE_FILE, SERVING_FILE, Manifest
from state.pieces import piece_kind
from state.registry import VersionRecord

__all__ = ["VersionCache"]

log = logging.getLogger(__name__)

# How long nothing is written after a failure. A full disk stays full for a while, and each attempt writes up to 20 MB.
PAUSE_S = 60.0
# Age of a temporary file that its writer has left behind. A file of 20 MB is written in a second, on a slow disk in some.
LEFT_BEHIND_S = 600.0

_MANIFEST = re.compile(r"manifest-(\d+)-(-?\d+)-(\d+)-([0-9a-f]{64})")
_FILE = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.[^.]+\.\d+\.[0-9a-f]+\.tmp")


class _Kept(NamedTuple):
    """A file of the folder: when it was last read or written, and its bytes."""

    used_s: float
    size: int
    path: Path


class VersionCache:
    """A folder with at most about `limit_bytes` of files. When it is full, those that weren't used for the longest time go.

    ```python
    cache = VersionCache(Path(".headrace/cache"), 2_000_000_000)
    store = SnapshotStore(settings.snapshots, cache=cache)
    store.announced(record)   # the manifest of a version, from here or from the store
    store.read(...)           # likewise its files
    ```

    Several processes that write at the same moment can exceed the limit by what they write, until the next file is written. A
    version whose files exceed the limit together is not kept at all. Several threads can use it at once.

    Args:
        on_read: called with True for each file that is read from here, and with False for each that wasn't here.
    """

    def __init__(self, folder: Path, limit_bytes: int, *, on_read: Callable[[bool], None] = lambda here: None) -> None:
        self._folder, self._limit, self._on_read = folder, limit_bytes, on_read
        self._lock = threading.Lock()
        self._paused_until_s = 0.0

    def holds(self, size: int) -> bool:
        """Whether so many bytes fit."""
        return size <= self._limit

    def read(self, sha256: str, size: int) -> bytearray | None:
        """The file of this content; None if it isn't here whole."""
        data = self._read(sha256, sha256, size)
        self._on_read(data is not None)
        return data

    def keep(self, sha256: str, data: bytes | bytearray) -> None:
        """Keep a file that was read from the store and has this SHA-256."""
        self._write(sha256, data)

    def manifest(self, record: VersionRecord) -> Manifest | None:
        """The manifest of an announced version; None if it isn't here whole."""
        for name in self._names():
            found = _MANIFEST.fullmatch(name)
            if found and tuple(map(int, found.groups()[:3])) == (record.version, record.epoch, record.created_at_ms):
                data = self._read(name, found[4], None)
                with contextlib.suppress(SnapshotCorrupt):
                    manifest = None if data is None else Manifest.decode(data, where=str(self._folder / name))
                    # The digest of the weights ties a manifest to its record: a folder may be copied from elsewhere.
                    if manifest is not None and (manifest.version, manifest.digest) == (record.version, record.digest):
                        return manifest
        return None

    def keep_manifest(self, manifest: Manifest) -> None:
        """Keep a manifest that was read from the store."""
        data = manifest.encode()
        written = f"{manifest.version}-{manifest.epoch}-{manifest.created_at_ms}"
        self._write(f"manifest-{written}-{hashlib.sha256(data).hexdigest()}", data)

    def has(self, record: VersionRecord) -> bool:
        """Whether all that a scorer reads of an announced version seems to be here; contents are compared when it is read."""
        manifest = self.manifest(record)
        if manifest is None:
            return False
        names = set(self._names())
        wanted = [entry.sha256 for name, entry in manifest.files.items() if _is_served(name)]
        return bool(wanted) and names.issuperset(wanted)

    def _names(self) -> list[str]:
        try:
            return [path.name for path in self._folder.iterdir()]
        except OSError:
            return []

    def _read(self, name: str, sha256: str, size: int | None) -> bytearray | None:
        path = self._folder / name
        try:
            with path.open("rb", buffering=0) as file:
                data = bytearray(os.fstat(file.fileno()).st_size)
                taken = file.readinto(data) if size in (None, len(data)) else -1
        except OSError:
            return None
        if taken == len(data) and hashlib.sha256(data).hexdigest() == sha256:
            with contextlib.suppress(OSError):
                os.utime(path)
            return data
        log.warning("%s: expected the content that it is named after, found another: deleted, the store is read instead", path)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None

    def _write(self, name: str, data: bytes | bytearray) -> None:
        if not self.holds(len(data)) or time.monotonic() < self._paused_until_s:
            return
        temporary = self._folder / f".{name[:20]}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if (self._folder / name).exists():
                return
            with self._lock:
                self._make_room(len(data))
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                temporary.replace(self._folder / name)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            self._paused_until_s = time.monotonic() + PAUSE_S
            log.warning(
                "scorer.cache_dir %s: a file of %d bytes can't be kept: %s. The store is read instead. Free some space, or set "
                "scorer.cache_mb to 0",
                *(self._folder, len(data), error),
            )

    def _make_room(self, size: int) -> None:
        """Delete what wasn't used for the longest time until `size` more bytes fit, and what killed writers have left.

        Files with other names than the cache gives are somebody else's. They stay, and don't count.
        """
        kept, now_s = [], time.time()
        for path in self._folder.iterdir():
            is_temporary = _TEMPORARY.fullmatch(path.name) is not None
            if not (is_temporary or _FILE.fullmatch(path.name) or _MANIFEST.fullmatch(path.name)):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process deletes the same files
                stat = path.lstat()
                if is_temporary and now_s - stat.st_mtime > LEFT_BEHIND_S:
                    path.unlink()
                else:
                    kept.append(_Kept(stat.st_mtime, stat.st_size, path))
        over = sum(each.size for each in kept) + size - self._limit
        for each in sorted(kept, key=lambda each: each.used_s):
            if over <= 0:
                return
            each.path.unlink(missing_ok=True)
            over -= each.size


def _is_served(name: str) -> bool:
    """Whether a scorer reads this file of a version."""
    return name in (DENSE_FILE, SERVING_FILE) or piece_kind(name) == "serving"
