"""Writing one version: file after file, each flushed and hashed, with the manifest last."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from state.blobs import Blobs
from state.errors import SnapshotError
from state.manifest import DENSE_FILE, MANIFEST_FILE, TRAINER_FILE, FileEntry, Manifest
from state.pieces import FORMAT, RowsWithState, bounded, serving_piece, trainer_piece
from state.tensors import encode_tensors

if TYPE_CHECKING:
    import torch

__all__ = ["write_files"]


def write_files(
    blobs: Blobs,
    folder: str,
    manifest: Manifest,
    *,
    dense: Mapping[str, torch.Tensor],
    small: Mapping[str, torch.Tensor] | None,
    pieces: Iterable[RowsWithState],
) -> Manifest:
    """Write the files of a version, with the manifest last. Returns the manifest as written.

    Whatever ends it early, an error of `pieces` too, the files that it wrote are removed. A writer that is killed leaves a
    folder without a manifest, which no reader takes for a version.

    Raises:
        FileExistsError: another writer has written one of the files.
        SnapshotError: the store can't be reached, rejects a request, or lost a file meanwhile.
    """
    writing = _Writing(blobs, folder)
    rows = 0
    try:
        writing.add(DENSE_FILE, dense)
        for index, piece in enumerate(bounded(pieces)):
            serving = piece.serving
            rows += len(serving)
            writing.add(serving_piece(index), serving.parts())
            if small is not None:
                writing.add(trainer_piece(index), piece.trainer)
        if small is not None:
            writing.add(TRAINER_FILE, small)
        whole = msgspec.structs.replace(manifest, format=FORMAT, rows=rows, files=dict(writing.files))
        writing.finish(whole.encode())
    except BaseException:
        writing.undo()
        raise
    return whole


class _Writing:
    """The files that one writer has written to a version's folder.

    Each file's header holds a random number of the writer, so that no two writers write the same bytes. A store that answers
    "it exists" to a repeated request is then told from one that has another writer's file (`Blobs.create`).
    """

    def __init__(self, blobs: Blobs, folder: str) -> None:
        self._blobs, self._folder = blobs, folder
        self._metadata = {"writer": secrets.token_hex(8)}
        self._tags: dict[str, str | None] = {}
        self._manifest_may_be_there = False
        self.files: dict[str, FileEntry] = {}

    def add(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one file of tensors."""
        parts = encode_tensors(tensors, self._metadata)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        self._tags[name] = self._blobs.create(self._folder, name, parts)
        self.files[name] = FileEntry(size=sum(map(len, parts)), sha256=digest.hexdigest())

    def finish(self, manifest: bytes) -> None:
        """Write the manifest, if all files are still there as they were written.

        Another process could have deleted some, and in a store without conditional writes another writer could have replaced
        some. One listing shows both.
        """
        mine = self._still_there()
        lost = [name for name in self.files if name not in mine]
        if lost:
            raise SnapshotError(
                f"{self._blobs.path(self._folder, lost[0])}: expected the {self.files[lost[0]].size} bytes written a moment "
                "ago, found no file or another writer's. The version is given up. Is another trainer, or a cleanup of the "
                "store, at work on this folder?"
            )
        self._manifest_may_be_there = True
        try:
            self._blobs.create(self._folder, MANIFEST_FILE, [manifest])
        except FileExistsError:
            self._manifest_may_be_there = False
            raise

    def undo(self) -> None:
        """Remove what was written, since files of an incomplete version are never read, and keep a full disk full.

        The manifest goes first: a store that didn't answer may have it all the same. The first file, by which a writer takes
        the number, goes last. What another writer has replaced stays. If the store fails again, the rest stays too, and
        `headrace snapshot gc` removes it.
        """
        with contextlib.suppress(SnapshotError):
            mine = self._still_there()
            if self._manifest_may_be_there and mine == list(self.files):
                self._blobs.delete(self._folder, MANIFEST_FILE)
            for name in reversed(mine):
                self._blobs.delete(self._folder, name)
            self._blobs.delete_folder(self._folder)

    def _still_there(self) -> list[str]:
        """The files that the store still has as they were written, in that order."""
        there = self._blobs.entries(self._folder)
        return [
            name
            for name, entry in self.files.items()
            if (found := there.get(name)) is not None
            and found.size == entry.size
            and (None in (found.tag, self._tags[name]) or found.tag == self._tags[name])
        ]
