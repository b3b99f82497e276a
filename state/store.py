"""The snapshot store: one folder for each version, with the manifest written last.

A version exists once its manifest does, and the manifest is written after all other files have reached the disk. So a writer
that dies at any point leaves either a whole version or a folder that no reader lists, whose number isn't used again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from state.background import in_background
from state.blobs import LocalBlobs, blobs_at
from state.errors import SnapshotCorrupt, SnapshotExists, SnapshotNotFound
from state.manifest import MANIFEST_FILE, Manifest
from state.pieces import OPTIONAL_ROW_TENSORS, ROW_TENSORS, TRAINER_ROW_TENSORS, Piece, RowsWithState
from state.registry import VersionRecord
from state.settings import SnapshotSettings
from state.version_cache import VersionCache
from state.version_reader import VersionReader
from state.version_writer import write_files

if TYPE_CHECKING:
    import torch

__all__ = ["SnapshotStore"]

_FOLDER = re.compile(r"v(\d{10,})")


class SnapshotStore:
    """Reads and writes versions. Every read of weights checks their size and SHA-256.

    ```python
    store = SnapshotStore(settings.snapshots)
    manifest = store.write_version(Manifest(version=store.next_version(), …), dense=dense, small=small, pieces=pieces)
    for rows in store.read(manifest.version).rows():
        ...
    ```

    Args:
        cache: where files that are read are kept, and looked for first.
    """

    def __init__(self, settings: SnapshotSettings, *, cache: VersionCache | None = None) -> None:
        self._blobs = blobs_at(settings.store_url)
        self._cache = cache

    @property
    def is_local(self) -> bool:
        """Whether the store is a folder of this machine."""
        return isinstance(self._blobs, LocalBlobs)

    @property
    def url(self) -> str:
        """The store's address, for messages."""
        return self._blobs.url

    def versions(self) -> list[int]:
        """All whole versions, ascending."""
        return _numbers(self._blobs.folders_with(MANIFEST_FILE))

    def numbers(self) -> list[int]:
        """Numbers of all versions that the store has anything of, whole or not, ascending."""
        return _numbers(self._blobs.folders())

    def next_version(self) -> int:
        """One above the largest number in the store, whole or not. The registry also knows deleted versions: ask it too."""
        return max(self.numbers(), default=0) + 1

    def write_version(
        self,
        manifest: Manifest,
        *,
        dense: Mapping[str, torch.Tensor],
        small: Mapping[str, torch.Tensor] | None,
        pieces: Iterable[RowsWithState],
    ) -> Manifest:
        """Write a version piece by piece, with the manifest last, in a thread of low priority.

        The next piece is asked for once the last one is written, so that one is in memory at a time. A piece larger than
        `state.pieces.PIECE_BYTES` is cut.

        Args:
            manifest: the manifest but for `format`, `rows` and `files`.
            dense: CPU tensors that a scorer needs and that are no rows.
            small: CPU tensors that a trainer needs besides and that are no rows; None for a version without trainer state.
            pieces: all rows, each once.

        Returns:
            The manifest as written.

        Raises:
            SnapshotExists: a file of this version exists already; existing files are left alone.
            SnapshotError: the store can't be reached or rejects a request; files written so far are removed.
        """
        folder = _folder(manifest.version)

        def write() -> Manifest:
            return write_files(self._blobs, folder, manifest, dense=dense, small=small, pieces=pieces)

        try:
            return in_background(write)
        except FileExistsError as error:
            raise SnapshotExists(
                f"version {manifest.version}: expected nothing at {self._blobs.path(folder)}, found "
                f"{str(error.args[0]).rsplit('/', 1)[-1]}: another trainer wrote it, or one died writing it. "
                f"Take the next free number, {self.next_version()}."
            ) from error

    def write(
        self, manifest: Manifest, serving: Mapping[str, torch.Tensor], trainer: Mapping[str, torch.Tensor] | None
    ) -> Manifest:
        """Write a version whose tensors are all in memory. Raises as `write_version` does.

        Args:
            manifest: as of `write_version`.
            serving: CPU tensors that a scorer needs.
            trainer: CPU tensors that a trainer needs besides, or None.
        """
        from model.rows import Rows

        dense, small = dict(serving), None if trainer is None else dict(trainer)
        pieces = []
        if all(name in dense for name in ROW_TENSORS):
            rows = Rows(**{name: dense.pop(name) for name in (*ROW_TENSORS, *OPTIONAL_ROW_TENSORS) if name in dense})
            state = {name: small.pop(name) for name in TRAINER_ROW_TENSORS if name in small} if small else {}
            pieces.append(Piece(rows, state))
        return self.write_version(manifest, dense=dense, small=small, pieces=pieces)

    def delete(self, version: int) -> None:
        """Delete a version: its manifest first, so that at any time it is whole or doesn't exist; then the other files.

        A version that doesn't exist, or was deleted in part, is no error. Whoever reads it meanwhile gets SnapshotNotFound.

        Raises:
            SnapshotError: the store can't be reached or rejects a request. Delete it again: what is left is no version.
        """
        folder = _folder(version)
        self._blobs.delete(folder, MANIFEST_FILE)
        for name in self._blobs.entries(folder):
            self._blobs.delete(folder, name)
        self._blobs.delete_folder(folder, leftovers=True)

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

    def announced(self, record: VersionRecord) -> Manifest:
        """The manifest of an announced version, from the cache if it is there.

        Raises:
            SnapshotNotFound: the version doesn't exist or isn't whole.
            SnapshotCorrupt: the manifest can't be read, or is that of another version than the one announced.
        """
        if self._cache is not None and (kept := self._cache.manifest(record)) is not None:
            return kept
        manifest = self.manifest(record.version)
        if (record.created_at_ms, record.epoch) != (manifest.created_at_ms, manifest.epoch):
            raise SnapshotCorrupt(
                f"version {record.version}: expected the one announced (created at {record.created_at_ms}, epoch "
                f"{record.epoch}), found another of that number in {self.url} (created at {manifest.created_at_ms}, epoch "
                f"{manifest.epoch}). Is snapshots.url the trainer's?"
            )
        if self._cache is not None and self._cache.holds(manifest.serving_size):
            self._cache.keep_manifest(manifest)
        return manifest

    def has(self, record: VersionRecord) -> bool:
        """Whether the cache has all that a scorer reads of an announced version."""
        return self._cache is not None and self._cache.has(record)

    def read(self, version: int, manifest: Manifest | None = None) -> VersionReader:
        """Read a version piece by piece.

        Args:
            manifest: of this version, if it was read already.

        Raises:
            SnapshotNotFound: the version doesn't exist or isn't whole.
            SnapshotCorrupt: the manifest can't be read, or lacks files. The reader's methods raise for the files themselves.
        """
        known = self.manifest(version) if manifest is None else manifest
        return VersionReader(self._blobs, _folder(version), known, self._cache)

    def serving(self, version: int) -> dict[str, torch.Tensor]:
        """The weights that scorers need, all in memory.

        Raises:
            SnapshotNotFound: the version doesn't exist or isn't whole.
            SnapshotCorrupt: a file is missing or differs from the manifest.
        """
        reader = self.read(version)
        dense = reader.dense()
        return {**dense, **_joined((piece.parts() for piece in reader.rows()), reader.manifest.rows)}

    def trainer(self, version: int) -> dict[str, torch.Tensor]:
        """The tensors that a trainer needs besides. Raises as `serving` does; SnapshotCorrupt for a version without them."""
        reader = self.read(version)
        small = reader.small()
        return {**small, **_joined(reader.row_state(), reader.manifest.rows)}

    def verify(self, version: int, *, hashes: bool = True, serving_only: bool = False) -> list[str]:
        """The problems of a version; empty if it is whole.

        Args:
            hashes: read and hash every file. Otherwise only names and sizes are compared, by one listing.
            serving_only: with `hashes`, only the files that a scorer reads.

        Raises:
            SnapshotNotFound: the store has no file of this version.
        """
        folder = _folder(version)
        there = self._blobs.entries(folder)
        if not there:
            raise self._not_found(version)
        try:
            reader = self.read(version)
        except (SnapshotNotFound, SnapshotCorrupt) as error:
            return [str(error)]
        return reader.check(serving_only=serving_only) if hashes else reader.check_sizes(there)

    def _not_found(self, version: int) -> SnapshotNotFound:
        versions = self.versions()
        shown = f"{len(versions)} versions, the newest {versions[-1]}" if versions else "no version"
        state = "one that isn't whole" if self._blobs.entries(_folder(version)) else "nothing"
        return SnapshotNotFound(
            f"version {version}: expected a whole version in {self._blobs.url}, found {state} (the store has {shown}). "
            "`headrace snapshot list` shows the versions that exist."
        )


def _folder(version: int) -> str:
    return f"v{version:010d}"


def _numbers(folders: list[str]) -> list[int]:
    found = (_FOLDER.fullmatch(name) for name in folders)
    return sorted(int(match[1]) for match in found if match)


def _joined(pieces: Iterable[Mapping[str, torch.Tensor]], rows: int | None) -> dict[str, torch.Tensor]:
    """The tensors of all pieces, each allocated once. `rows` is the length of the whole; None: there is only one piece."""
    import torch

    whole: dict[str, torch.Tensor] = {}
    done = 0
    for piece in pieces:
        count = 0
        for name, tensor in piece.items():
            count = len(tensor)
            if rows in (count, None):
                whole[name] = tensor
                continue
            if name not in whole:
                whole[name] = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype)
            whole[name][done : done + count] = tensor
        done += count
    return whole
