"""Reading one version: file after file, each compared with the manifest, the next ones read while one is used."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from state.blobs import Blobs, Entry
from state.errors import SnapshotCorrupt, SnapshotNotFound
from state.manifest import DENSE_FILE, MANIFEST_FILE, SERVING_FILE, SERVING_NAMES, TRAINER_FILE, FileEntry, Manifest
from state.pieces import (
    FORMAT,
    ROW_TENSORS,
    TRAINER_ROW_TENSORS,
    Piece,
    piece_count,
    serving_piece,
    trainer_piece,
)
from state.tensors import decode_tensors
from state.version_cache import VersionCache

if TYPE_CHECKING:
    import torch

    from model.rows import Rows

__all__ = ["VersionReader"]

T = TypeVar("T")

# Pieces that are read and hashed beside the one in use. Two threads use both a disk and a processor: one reads while the other
# hashes. They hold 20 MB each (`state.pieces`), twice that for pieces with trainer state.
AHEAD = 2


class VersionReader:
    """The tensors of a version, piece by piece. Each file's size and SHA-256 are compared with the manifest before it is used.

        reader = store.read(version)
        predictor = Predictor(…, reader.dense(), expected_rows=reader.row_count)
        for rows in reader.rows():
            predictor.add(rows)

    All methods raise SnapshotCorrupt for a file that is missing or differs from the manifest, and SnapshotNotFound for a
    version that is deleted meanwhile. A version of format 1 is one piece, and is read whole.
    """

    def __init__(self, blobs: Blobs, folder: str, manifest: Manifest, cache: VersionCache | None = None) -> None:
        self._blobs, self._folder, self.manifest = blobs, folder, manifest
        self._cache = cache if cache is not None and cache.holds(manifest.serving_size) else None
        self._old: dict[str, dict[str, torch.Tensor]] = {}  # format 1: what is read of a file and not yet given out
        if manifest.format > FORMAT:
            raise SnapshotCorrupt(
                f"version {manifest.version}: expected files of format {FORMAT} or less, found format {manifest.format}. A "
                "newer release wrote it: update this one, or go back to another version: `headrace snapshot rollback`."
            )
        self._pieces = self._count_pieces()

    @property
    def row_count(self) -> int:
        """Rows of the serving weights. A version of format 1 is read for it."""
        if self.manifest.rows is not None:
            return self.manifest.rows
        return len(self._of_old(SERVING_FILE).get("keys", ()))

    def dense(self) -> dict[str, torch.Tensor]:
        """The serving tensors that are no rows."""
        if self.manifest.format > 1:
            return self._tensors(DENSE_FILE)
        return {name: tensor for name, tensor in self._of_old(SERVING_FILE).items() if name not in ROW_TENSORS}

    def small(self) -> dict[str, torch.Tensor]:
        """The trainer tensors that are no rows. SnapshotCorrupt for a version without trainer state."""
        if self.manifest.format > 1:
            return self._tensors(TRAINER_FILE)
        return {name: tensor for name, tensor in self._of_old(TRAINER_FILE).items() if name not in TRAINER_ROW_TENSORS}

    def rows(self, *, exact: bool = False) -> Iterator[Rows]:
        """All rows of the serving weights, some at a time: rounded as scorers have them, or `exact` as the trainer has them."""
        if self.manifest.format == 1:
            serving = self._old_rows()
            return iter(() if serving is None else (serving,))
        return self._counted(_ahead(self._rows if exact else self._serving_rows, range(self._pieces)), len)

    def trainer_rows(self) -> Iterator[Piece]:
        """All rows with what the trainer keeps for them. SnapshotCorrupt for a version without trainer state."""
        if self.manifest.format == 1:
            return self._old_pieces()
        self._entry(TRAINER_FILE)
        return self._counted(_ahead(self._piece, range(self._pieces)), lambda piece: len(piece.serving))

    def row_state(self) -> Iterator[dict[str, torch.Tensor]]:
        """What the trainer keeps for the rows, in the order of `rows`, without them."""
        if self.manifest.format == 1:
            return iter([_only(self._of_old(TRAINER_FILE), TRAINER_ROW_TENSORS)])
        return _ahead(lambda index: self._tensors(trainer_piece(index)), range(self._pieces))

    def check(self, *, serving_only: bool = False) -> list[str]:
        """The problems of the files, each read and hashed; empty if all are as they were written.

        Args:
            serving_only: look only at the files that a scorer reads.
        """
        problems = []
        for name, entry in self.manifest.files.items():
            if serving_only and not name.startswith(SERVING_NAMES):
                continue
            try:
                self._stored(name, entry)
            except SnapshotCorrupt as error:
                problems.append(str(error))
        return problems

    def check_sizes(self, there: Mapping[str, Entry]) -> list[str]:
        """The problems of the files by a listing of them: those that are missing, or of another size."""
        return [
            str(self._wrong(name, f"{entry.size} bytes", f"{there[name].size}" if name in there else "no file"))
            for name, entry in self.manifest.files.items()
            if name not in there or there[name].size != entry.size
        ]

    def _count_pieces(self) -> int:
        names = self.manifest.files
        if self.manifest.format == 1:
            self._entry(SERVING_FILE)
            return 1
        self._entry(DENSE_FILE)
        serving, trainer = piece_count(names, "serving"), piece_count(names, "trainer")
        if serving is None or trainer not in ((serving,) if TRAINER_FILE in names else (0,)):
            raise SnapshotCorrupt(
                f"{self._path(MANIFEST_FILE)}: expected pieces numbered from 0 without a gap, as many of the trainer's as of "
                f"the serving weights, found {sorted(names)}. Version {self.manifest.version} is damaged; go back to another "
                "one: `headrace snapshot rollback`."
            )
        return serving

    def _counted(self, pieces: Iterator[T], length: Callable[[T], int]) -> Iterator[T]:
        found, wanted = 0, self.row_count
        for piece in pieces:
            found += length(piece)
            if found > wanted:
                break
            yield piece
        if found != wanted:
            raise self._wrong(MANIFEST_FILE, f"as many rows as its pieces have, {found}", f"{wanted}")

    def _serving_rows(self, index: int) -> Rows:
        from model.rows import rounded

        return rounded(self._rows(index), self.manifest.row_precision)

    def _rows(self, index: int) -> Rows:
        return self._as_rows(serving_piece(index), self._tensors(serving_piece(index)))

    def _piece(self, index: int) -> Piece:
        rows, trainer = self._rows(index), self._tensors(trainer_piece(index))
        for name, tensor in trainer.items():
            if len(tensor) != len(rows):
                raise self._wrong(trainer_piece(index), f"{len(rows)} rows of {name}", f"{len(tensor)}")
        return Piece(rows, trainer)

    def _as_rows(self, file: str, tensors: dict[str, torch.Tensor]) -> Rows:
        from model.rows import Rows

        try:
            rows = Rows(**tensors)
        except TypeError:
            raise self._wrong(file, f"tensors {', '.join(ROW_TENSORS)}", ", ".join(tensors) or "none") from None
        lengths = [len(tensor) for tensor in tensors.values()]
        if len(set(lengths)) > 1:
            raise self._wrong(file, f"equal numbers of {', '.join(tensors)}", ", ".join(map(str, lengths)))
        return rows

    def _of_old(self, file: str) -> dict[str, torch.Tensor]:
        """A file of format 1. It is read once, though its tensors are given out by two methods."""
        if file not in self._old:
            self._old[file] = self._tensors(file)
        return self._old[file]

    def _old_rows(self) -> Rows | None:
        tensors = self._of_old(SERVING_FILE)
        found = _only(tensors, ROW_TENSORS)
        # What is given out is forgotten, so that it isn't held twice; it is read again for whoever asks again.
        del self._old[SERVING_FILE]
        return self._as_rows(SERVING_FILE, found) if found else None

    def _old_pieces(self) -> Iterator[Piece]:
        trainer = self._of_old(TRAINER_FILE)
        kept = _only(trainer, TRAINER_ROW_TENSORS)
        serving = self._old_rows()
        del self._old[TRAINER_FILE]
        if serving is not None:
            yield Piece(serving, kept)

    def _entry(self, name: str) -> FileEntry:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise SnapshotCorrupt(
                f"version {self.manifest.version}: expected {name} in its manifest, found none. "
                "A version without this file can't be used here; choose another one: `headrace snapshot list`."
            )
        return entry

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        return decode_tensors(self._checked(name, self._entry(name)), where=self._path(name))

    def _checked(self, name: str, entry: FileEntry) -> bytearray:
        """A file's content, from the cache if it is there."""
        data = None if self._cache is None else self._cache.read(entry.sha256, entry.size)
        if data is None:
            data = self._stored(name, entry)
            if self._cache is not None:
                self._cache.keep(entry.sha256, data)
        return data

    def _stored(self, name: str, entry: FileEntry) -> bytearray:
        try:
            data = self._blobs.read(self._folder, name)
        except FileNotFoundError as error:
            if MANIFEST_FILE not in self._blobs.entries(self._folder):
                raise SnapshotNotFound(
                    f"{self._path(name)}: expected {entry.size} bytes, found no file: version {self.manifest.version} was "
                    "deleted while it was read. `headrace snapshot list` shows the versions that exist."
                ) from error
            raise self._wrong(name, f"{entry.size} bytes", "no file") from error
        if len(data) != entry.size:
            raise self._wrong(name, f"{entry.size} bytes", f"{len(data)}")
        found = hashlib.sha256(data).hexdigest()
        if found != entry.sha256:
            raise self._wrong(name, f"SHA-256 {entry.sha256}", found)
        return data

    def _wrong(self, name: str, expected: str, found: str) -> SnapshotCorrupt:
        return SnapshotCorrupt(
            f"{self._path(name)}: expected {expected}, found {found}. "
            f"Version {self.manifest.version} is damaged; go back to another one: `headrace snapshot rollback`."
        )

    def _path(self, name: str) -> str:
        return self._blobs.path(self._folder, name)


def _only(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in names if name in tensors}


def _ahead(read: Callable[[int], T], indices: Iterable[int]) -> Iterator[T]:
    """`read(index)` of each index in order, with the next ones read in threads while one is used."""
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="version")
    try:
        for index in indices:
            waiting.append(pool.submit(read, index))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Without waiting: whoever stops early, after an error say, isn't held up by a slow store.
        pool.shutdown(wait=False, cancel_futures=True)
