"""The snapshot store: one folder for each version, with the manifest written last.

A version exists once its manifest does, and the manifest is written after all other files have reached the disk. So a writer
that dies at any point leaves either a whole version or a folder that no reader lists, whose number isn't used again.
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
    """Reads and writes versions. Every read of weights checks their size and SHA-256.

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
        """The store's address, for messages."""
        return self._blobs.url

    def versions(self) -> list[int]:
        """All whole versions, ascending."""
        return _numbers(self._blobs.folders_with(MANIFEST_FILE))

    def next_version(self) -> int:
        """One above the largest number in the store, whole or not. The registry also knows deleted versions: ask it too."""
        return max(_numbers(self._blobs.folders()), default=0) + 1

    def write(self, manifest: Manifest, serving: dict[str, torch.Tensor], trainer: dict[str, torch.Tensor] | None) -> Manifest:
        """Write a version, with the manifest last.

        Args:
            manifest: the manifest but for `files`.
            serving: CPU tensors that a scorer needs.
            trainer: CPU tensors that a trainer needs besides, or None.

        Returns:
            The manifest as written, with `files`.

        Raises:
            SnapshotExists: a file of this version exists already; existing files are left alone.
            SnapshotError: the store can't be reached or rejects a request; files written so far are removed.
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
            # Files of an incomplete version would never be read, and would keep a full disk full.
            with contextlib.suppress(SnapshotError):
                self._remove(folder, list(files))
            raise
        return whole

    def manifest(self, version: int) -> Manifest:
        """Read a version's manifest.

        Raises:
            SnapshotNotFound: the version doesn't exist or isn't whole.
            SnapshotCorrupt: the manifest can't be read, or is that of another version.
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
                f"Folders of the store were renamed or copied; delete {self._blobs.path(folder)}."
            )
        return manifest

    def serving(self, version: int) -> dict[str, torch.Tensor]:
        """The weights that scorers need.

        Raises:
            SnapshotNotFound: the version doesn't exist or isn't whole.
            SnapshotCorrupt: a file is missing or differs from the manifest.
        """
        return self._tensors(version, SERVING_FILE)

    def trainer(self, version: int) -> dict[str, torch.Tensor]:
        """The tensors that a trainer needs besides. Raises as `serving` does; SnapshotCorrupt for a version without them."""
        return self._tensors(version, TRAINER_FILE)

    def verify(self, version: int, *, hashes: bool = True) -> list[str]:
        """The problems of a version; empty if it is whole.

        Args:
            hashes: read and hash every file. Otherwise only names and sizes are compared, by one listing.

        Raises:
            SnapshotNotFound: the store has no file of this version.
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
        """Remove a version, its manifest first. Does nothing for what is gone already.

        Raises:
            SnapshotError: the store can't be reached or rejects a request. Once the manifest is gone, no reader finds the
                version; delete it again.
        """
        folder = _folder(version)
        self._remove(folder, sorted(self._blobs.files(folder), key=lambda name: name != MANIFEST_FILE))

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
                "A version without this file can't be used here; choose another one: `headrace snapshot list`."
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
            f"Version {version} is damaged; go back to another one: `headrace snapshot rollback`."
        )

    def _not_found(self, version: int) -> SnapshotNotFound:
        versions = self.versions()
        shown = f"{len(versions)} versions, the newest {versions[-1]}" if versions else "no version"
        state = "one that isn't whole" if self._blobs.files(_folder(version)) else "nothing"
        return SnapshotNotFound(
            f"version {version}: expected a whole version in {self._blobs.url}, found {state} (the store has {shown}). "
            "`headrace snapshot list` shows the versions that exist."
        )


def _folder(version: int) -> str:
    return f"v{version:010d}"


def _numbers(folders: list[str]) -> list[int]:
    found = (_FOLDER.fullmatch(name) for name in folders)
    return sorted(int(match[1]) for match in found if match)
