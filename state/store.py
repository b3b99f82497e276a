"""Where versions are kept: one folder a version, its manifest written last.

A version is there when its manifest is, and the manifest is written after everything else has reached the disk. So a
writer that dies at any point leaves either a whole version or a folder that no reader lists, whose number isn't used
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from typing import TYPE_CHECKING

import msgspec

from state.blobs import blobs_at
from state.errors import SnapshotCorrupt, SnapshotError, SnapshotExists, SnapshotNotFound
from state.manifest import MANIFEST_FILE, SERVING_FILE, TRAINER_FILE, FileEntry, Manifest
from state.settings import SnapshotSettings

if TYPE_CHECKING:
    import torch

__all__ = ["SnapshotStore"]

_FOLDER = re.compile(r"v(\d{10,})")


class SnapshotStore:
    """Reads and writes versions; every read of weights checks their size and SHA-256.

    ```python
    store = SnapshotStore(settings.snapshots)
    manifest = store.write(Manifest(version=store.next_version(), …), serving, trainer)
    serving = store.serving(manifest.version)
    ```
    """

    def __init__(self, settings: SnapshotSettings) -> None:
        self._blobs = blobs_at(settings.url)

    @property
    def url(self) -> str:
        """Where it is, as messages name it."""
        return self._blobs.url

    def versions(self) -> list[int]:
        """All whole versions, ascending."""
        return _numbers(self._blobs.folders_with(MANIFEST_FILE))

    def next_version(self) -> int:
        """One above everything there, whole or not. The registry remembers deleted versions: ask it too."""
        return max(_numbers(self._blobs.folders()), default=0) + 1

    def write(self, manifest: Manifest, serving: dict[str, torch.Tensor], trainer: dict[str, torch.Tensor] | None) -> Manifest:
        """Write a version, manifest last.

        Args:
            manifest: `files` is filled in here.
            serving: CPU tensors that a scorer needs.
            trainer: CPU tensors that a trainer needs besides, or None.

        Returns:
            The manifest as written.

        Raises:
            SnapshotExists: something of this version is there already; what is there is left alone.
            SnapshotError: the store refuses or can't be reached; what was written is taken away again.
        """
        from safetensors.torch import save

        folder = _folder(manifest.version)
        parts = {SERVING_FILE: serving} | ({} if trainer is None else {TRAINER_FILE: trainer})
        files: dict[str, FileEntry] = {}
        try:
            for name, tensors in parts.items():
                data = save(tensors)
                self._blobs.create(folder, name, data)
                files[name] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
            whole = msgspec.structs.replace(manifest, files=files)
            self._blobs.create(folder, MANIFEST_FILE, whole.encode())
        except FileExistsError as error:
            raise SnapshotExists(
                f"version {manifest.version}: expected nothing at {self._blobs.path(folder)}, found "
                f"{error.args[0].rsplit('/', 1)[-1]}: another trainer wrote it, or one died writing it. "
                f"Take the next free number, {self.next_version()}."
            ) from error
        except SnapshotError:
            # A full disk must not fill further with parts that nobody will read.
            with contextlib.suppress(SnapshotError):
                self._remove(folder, list(files))
            raise
        return whole

    def manifest(self, version: int) -> Manifest:
        """Read a version's manifest.

        Raises:
            SnapshotNotFound: no such version, or it isn't whole.
            SnapshotCorrupt: the manifest can't be read, or is another version's.
        """
        folder = _folder(version)
        try:
            data = self._blobs.read(folder, MANIFEST_FILE)
        except FileNotFoundError as error:
            raise self._not_found(version) from error
        path = self._blobs.path(folder, MANIFEST_FILE)
        manifest = Manifest.decode(data, where=path)
        if manifest.version != version:
            raise SnapshotCorrupt(
                f"{path}: expected the manifest of version {version}, found that of version {manifest.version}. "
                f"Somebody moved folders about; delete {self._blobs.path(folder)}."
            )
        return manifest

    def serving(self, version: int) -> dict[str, torch.Tensor]:
        """The weights that scorers need, checked.

        Raises:
            SnapshotNotFound: no such version.
            SnapshotCorrupt: a file is missing or isn't what the manifest says.
        """
        return self._tensors(version, SERVING_FILE)

    def trainer(self, version: int) -> dict[str, torch.Tensor]:
        """The trainer's state, checked; raises as `serving` does, also for a version without one."""
        return self._tensors(version, TRAINER_FILE)

    def verify(self, version: int, *, hashes: bool = True) -> list[str]:
        """What is wrong with a version; empty when nothing is.

        Args:
            hashes: read and hash every file; without it only names and sizes are compared, which is one listing.

        Raises:
            SnapshotNotFound: nothing at all is there.
        """
        folder = _folder(version)
        sizes = self._blobs.files(folder)
        if not sizes:
            raise self._not_found(version)
        try:
            manifest = self.manifest(version)
        except (SnapshotNotFound, SnapshotCorrupt) as error:
            return [str(error)]
        problems = []
        if SERVING_FILE not in manifest.files:
            problems.append(f"{self._blobs.path(folder, MANIFEST_FILE)}: expected an entry for {SERVING_FILE}, found none.")
        for name, entry in manifest.files.items():
            try:
                if hashes:
                    self._checked(version, name, entry)
                elif sizes.get(name) != entry.size:
                    raise self._wrong(version, name, f"{entry.size} bytes", f"{sizes.get(name, 'no file')}")
            except SnapshotCorrupt as error:
                problems.append(str(error))
        return problems

    def delete(self, version: int) -> None:
        """Remove a version: its manifest first, so that no reader finds half of one.

        Raises:
            SnapshotNotFound: nothing is there.
        """
        folder = _folder(version)
        names = self._blobs.files(folder)
        if not names:
            raise self._not_found(version)
        self._remove(folder, sorted(names, key=lambda name: name != MANIFEST_FILE))

    def _remove(self, folder: str, names: list[str]) -> None:
        for name in names:
            self._blobs.delete(folder, name)
        self._blobs.delete_folder(folder)

    def _tensors(self, version: int, name: str) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        entry = self.manifest(version).files.get(name)
        if entry is None:
            raise SnapshotCorrupt(
                f"version {version}: expected {name} in its manifest, found none. "
                "A version without it can't be used for this; take another: `headrace snapshot list`."
            )
        data = self._checked(version, name, entry)
        try:
            return load(data)
        except SafetensorError as error:
            raise self._wrong(version, name, "a safetensors file", str(error)) from error

    def _checked(self, version: int, name: str, entry: FileEntry) -> bytes:
        try:
            data = self._blobs.read(_folder(version), name)
        except FileNotFoundError as error:
            raise self._wrong(version, name, f"{entry.size} bytes", "no file") from error
        if len(data) != entry.size:
            raise self._wrong(version, name, f"{entry.size} bytes", f"{len(data)}")
        found = hashlib.sha256(data).hexdigest()
        if found != entry.sha256:
            raise self._wrong(version, name, f"SHA-256 {entry.sha256}", found)
        return data

    def _wrong(self, version: int, name: str, expected: str, found: str) -> SnapshotCorrupt:
        return SnapshotCorrupt(
            f"{self._blobs.path(_folder(version), name)}: expected {expected}, found {found}. "
            f"Version {version} is broken; go back to another: `headrace snapshot rollback`."
        )

    def _not_found(self, version: int) -> SnapshotNotFound:
        there = self.versions()
        shown = f"{len(there)} versions, the newest {there[-1]}" if there else "none"
        state = "one that isn't whole" if self._blobs.files(_folder(version)) else "nothing"
        return SnapshotNotFound(
            f"version {version}: expected a whole version in {self._blobs.url}, found {state} (there: {shown}). "
            "`headrace snapshot list` shows what can be named."
        )


def _folder(version: int) -> str:
    return f"v{version:010d}"


def _numbers(folders: list[str]) -> list[int]:
    found = (_FOLDER.fullmatch(name) for name in folders)
    return sorted(int(match[1]) for match in found if match)
