"""Versions that this machine has read aren't read from the store again, and nothing that is wrong in the folder is used."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from state.blobs import LocalBlobs
from state.manifest import Manifest
from state.registry import VersionRecord
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from state.version_cache import LEFT_BEHIND_S, VersionCache
from tests.state.made_version import at, serving, small_pieces, trainer

LIMIT = 1_000_000


class Machine:
    """A store, and a folder of this machine. Reads of the store are counted."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        small_pieces(patch)
        self.root, self.folder = root, root / "cache"
        self.reads: list[str] = []
        original = LocalBlobs.read

        def read(blobs: LocalBlobs, folder: str, name: str) -> bytearray:
            self.reads.append(name)
            return original(blobs, folder, name)

        patch.setattr(LocalBlobs, "read", read)
        self.record = self.write(1)

    def write(self, version: int) -> VersionRecord:
        manifest = Manifest(version=version, created_at_ms=version, digest=f"{version:016x}")
        manifest = at(self.root / "store").write(manifest, serving(float(version)), trainer(float(version)))
        return VersionRecord.of(manifest, now_ms=9, who="t", gate="")

    def scorer(self, limit: int = LIMIT) -> SnapshotStore:
        """The store as a scorer opens it that starts."""
        settings = SnapshotSettings(url=str(self.root / "store"))
        return SnapshotStore(settings, cache=VersionCache(self.folder, limit))

    def load(self, record: VersionRecord | None = None, store: SnapshotStore | None = None) -> int:
        """Read a version as a scorer does, and return how many files were read from the store."""
        record, store = record or self.record, store or self.scorer()
        before = len(self.reads)
        reader = store.read(record.version, store.announced(record))
        dense, rows = reader.dense(), list(reader.rows())
        expected = serving(float(record.version))
        assert torch.equal(dense["bias"], expected["bias"])
        assert torch.equal(torch.cat([piece.embedding for piece in rows]), expected["embedding"])
        return len(self.reads) - before

    def kept(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if not path.name.startswith("manifest"))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_the_second_time_the_store_is_not_read(machine: Machine) -> None:
    store = machine.scorer()
    assert not store.has(machine.record)
    assert machine.load(store=store) == 5  # manifest, dense weights, three pieces
    assert store.has(machine.record)
    assert machine.load(store=store) == 0
    assert machine.load() == 0  # of a scorer that starts
    assert len(machine.kept()) == 4  # nothing of the trainer's
    assert not [name for name in machine.reads if name.startswith("trainer")]


def test_a_check_of_the_store_reads_the_store(machine: Machine) -> None:
    machine.load()
    before = len(machine.reads)
    assert machine.scorer().verify(1) == []
    assert len(machine.reads) - before == 9


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_whole_is_read_from_the_store_and_kept_anew(machine: Machine, damage: str) -> None:
    machine.load()
    for path in list(machine.folder.iterdir()):
        whole = path.read_bytes()
        DAMAGES[damage](path)
        assert machine.load() == 1
        assert path.read_bytes() == whole
        assert machine.load() == 0


def test_another_version_of_the_same_number_is_another(machine: Machine) -> None:
    machine.load()
    for changed in ({"created_at_ms": 8}, {"epoch": 3}, {"digest": "f" * 16}):
        assert not machine.scorer().has(msgspec.structs.replace(machine.record, **changed))


def test_what_was_not_used_for_the_longest_time_goes_first(machine: Machine) -> None:
    machine.load()
    size = sum(path.stat().st_size for path in machine.folder.iterdir())
    second, third = machine.write(2), machine.write(3)
    store = machine.scorer(int(size * 2.5))
    machine.load(second, store)
    for path in machine.folder.iterdir():
        os.utime(path, (1e9, 1e9))
    assert machine.load(machine.record, store) == 0  # now the second one is the older one
    assert machine.load(third, store) == 5
    assert sum(path.stat().st_size for path in machine.folder.iterdir()) <= size * 2.5
    assert store.has(machine.record)
    assert store.has(third)
    assert not store.has(second)


def test_a_version_that_does_not_fit_is_not_kept(machine: Machine) -> None:
    store = machine.scorer(limit=at(machine.root / "store").manifest(1).serving_size - 1)
    for _ in range(2):
        assert machine.load(store=store) == 5
    assert not machine.folder.exists()


class FullDisk:
    """A file on a disk that has room for ten bytes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_stops_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    original: Any = Path.open

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        file = original(path, mode, **options)
        return FullDisk(file) if mode == "xb" else file

    monkeypatch.setattr(Path, "open", opened)
    store = machine.scorer()
    for _ in range(2):
        assert machine.load(store=store) == 5
    assert list(machine.folder.iterdir()) == []
    [said] = [record.getMessage() for record in caplog.records]  # once, since nothing more is written for a while
    assert "can't be kept: [Errno 28] No space left on device. The store is read instead." in said


def test_a_folder_that_can_not_be_made_stops_nothing(machine: Machine) -> None:
    machine.folder.write_text("a file is in the way")
    assert machine.load() == 5


def test_what_killed_writers_left_goes_and_is_never_used(machine: Machine) -> None:
    machine.load()
    [*_, path] = machine.kept()
    half = path.read_bytes()[:20]
    path.unlink()
    old, new = machine.folder / f".{path.name[:20]}.1.0.tmp", machine.folder / f".{path.name[:20]}.2.0.tmp"
    for left in (old, new):
        left.write_bytes(half)
    os.utime(old, (old.stat().st_mtime - LEFT_BEHIND_S - 1,) * 2)
    assert machine.load() == 1
    assert not old.exists()
    assert new.exists()  # its writer may be at work


def test_files_of_others_in_the_folder_are_never_deleted(machine: Machine) -> None:
    machine.folder.mkdir()
    others = [machine.folder / name for name in ("notes.txt", "work.tmp", "a" * 63, "manifest-1")]
    (machine.folder / "folder").mkdir()
    for path in others:
        path.write_bytes(b"x" * 5_000)
        os.utime(path, (1, 1))
    limit = 6_000
    for version in (2, 3, 4):
        machine.load(machine.write(version), machine.scorer(limit))
    assert all(path.read_bytes() == b"x" * 5_000 for path in others)
    assert machine.load(machine.write(5), machine.scorer(limit)) > 0
    assert machine.load(VersionRecord(version=5, created_at_ms=5, digest=f"{5:016x}"), machine.scorer(limit)) == 0, "kept"


def test_several_scorers_at_once_in_a_folder_that_is_too_small(machine: Machine) -> None:
    records = [machine.record, *(machine.write(version) for version in range(2, 6))]
    limit = int(at(machine.root / "store").manifest(1).serving_size * 2.5)
    failed: list[BaseException] = []

    def scorer(first: int) -> None:
        store = machine.scorer(limit)
        try:
            for number in range(25):
                record = records[(first + number * number) % len(records)]
                reader = store.read(record.version, store.announced(record))
                assert torch.equal(reader.dense()["bias"], torch.tensor(float(record.version)))
                assert sum(len(rows) for rows in reader.rows()) == 5
        except BaseException as error:  # an assertion of a thread would be lost
            failed.append(error)

    threads = [threading.Thread(target=scorer, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failed == []
    assert not list(machine.folder.glob(".*.tmp"))
