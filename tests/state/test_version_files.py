"""The files of a version: pieces as they are cut, written and read, and versions of 0.1.0."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from model.rows import Rows
from state.background import NICENESS, in_background
from state.errors import SnapshotCorrupt, SnapshotNotFound
from state.manifest import FileEntry, Manifest
from state.pieces import PIECE_BYTES, Piece, bounded, piece_rows
from state.store import SnapshotStore
from state.tensors import decode_tensors, encode_tensors
from tests.state.made_version import FILES, ROWS, at, folder, pieces, serving, small_pieces, trainer, write


def joined(found: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(found)


def same_rows(found: list[Rows], value: float, rows: int = ROWS) -> bool:
    wanted = serving(value, rows)
    return all(
        torch.equal(joined([getattr(piece, name) for piece in found]), wanted[name])
        for name in ("keys", "embedding", "first_order")
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32])
def test_the_library_reads_what_is_written_here(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "b": torch.arange(6).view(2, 3).to(dtype),
        "a/scalar": torch.tensor(3).to(dtype),
        "none": torch.empty(0, 4, dtype=dtype),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "a column of a matrix": torch.arange(6).view(2, 3).to(dtype)[:, 1],
    }
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"".join(encode_tensors(tensors, {"writer": "me"})))
    for found in (load_file(file), decode_tensors(bytearray(file.read_bytes()), where="x")):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_data_is_not_copied_to_be_written() -> None:
    tensor = torch.zeros(1000)
    header, data = encode_tensors({"x": tensor}, {})
    tensor[0] = 1.0
    assert bytes(data[:4]) == b"\x00\x00\x80\x3f" and len(header) % 8 == 0


def test_what_is_no_file_of_tensors_is_named() -> None:
    with pytest.raises(SnapshotCorrupt, match="here: expected a safetensors file, found 7 bytes"):
        decode_tensors(bytearray(b"nothing"), where="here")


def test_what_the_library_writes_is_read_here(tmp_path: Path) -> None:
    tensors = serving(1.0) | trainer(1.0)
    save_file(tensors, tmp_path / "x")
    found = decode_tensors(bytearray((tmp_path / "x").read_bytes()), where="x")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


@given(at=st.integers(0, 199), to=st.integers(0, 255))
def test_a_header_that_was_changed_is_read_as_the_library_reads_it_or_not_at_all(at: int, to: int) -> None:
    data = bytearray(b"".join(encode_tensors({"x": torch.arange(6).view(2, 3), "y": torch.ones(4)}, {})))
    data[at % (8 + int.from_bytes(data[:8], "little"))] = to
    try:
        found = decode_tensors(data, where="x")
    except SnapshotCorrupt:
        return
    try:
        wanted = load(bytes(data))
    except (SafetensorError, AttributeError):
        return  # the library is stricter: it wants no hole between two tensors, for one
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_pieces_that_are_too_large_are_cut_and_others_are_not() -> None:
    most = piece_rows(3)
    assert most * (4 * 3 + 32) <= PIECE_BYTES
    keys = torch.arange(2 * most + 3)
    large = Rows(keys, torch.zeros(len(keys), 3), torch.zeros(len(keys)))
    small = Rows(keys[:4], torch.zeros(4, 3), torch.zeros(4))
    state = {"adagrad.first_order": torch.arange(len(keys))}
    cut = list(bounded([Piece(large, state), Piece(small, {}), Piece(Rows(keys[:0], torch.zeros(0, 3), torch.zeros(0)), {})]))
    assert [len(piece.serving) for piece in cut] == [most, most, 3, 4, 0]
    assert torch.equal(joined([piece.serving.keys for piece in cut[:3]]), keys)
    assert torch.equal(joined([piece.trainer["adagrad.first_order"] for piece in cut[:3]]), keys)


@pytest.mark.parametrize("bounds", [(), (1,), (2, 3, 4), (5,)])
def test_a_version_is_read_piece_by_piece_as_it_was_written(tmp_path: Path, bounds: tuple[int, ...]) -> None:
    dense = {"bias": torch.tensor(2.0)}
    store = at(tmp_path)
    written = store.write_version(Manifest(version=1), dense=dense, small={}, pieces=pieces(2.0, *bounds))
    assert written.rows == ROWS and written.size == sum(file.stat().st_size for file in folder(tmp_path, 1).glob("*.safe*"))
    reader = store.read(1)
    assert reader.row_count == ROWS and reader.dense() == dense and reader.small() == {}
    found = list(reader.rows())
    assert len(found) == len(bounds) + 1 and same_rows(found, 2.0)
    with_state = list(reader.trainer_rows())
    assert same_rows([piece.serving for piece in with_state], 2.0)
    for name in ("adagrad.embedding", "adagrad.first_order", "deferred.owed", "deferred.since_ms"):
        assert torch.equal(joined([piece.trainer[name] for piece in with_state]), trainer(2.0)[name])
    assert store.trainer(1).keys() == with_state[0].trainer.keys()


def test_one_piece_is_asked_for_at_a_time(tmp_path: Path) -> None:
    """The writer must not hold the pieces: each is written before the next one is made."""
    seen: list[int] = []

    def watched() -> Iterator[Piece]:
        for piece in pieces(1.0, 1, 2, 3, 4):
            seen.append(len(list(folder(tmp_path, 1).glob("serving-*"))))
            yield piece

    at(tmp_path).write_version(Manifest(version=1), dense={}, small={}, pieces=watched())
    assert seen == [0, 1, 2, 3, 4]


def test_few_pieces_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, rows=1)
    store = at(tmp_path)
    store.write(Manifest(version=1), serving(1.0, 20), trainer(1.0, 20))
    asked: list[str] = []
    real = store._blobs.read

    def read(folder: str, name: str) -> bytearray:
        asked.append(name)
        return real(folder, name)

    monkeypatch.setattr(store._blobs, "read", read)
    rows = store.read(1).rows()
    asked.clear()
    for done in range(1, 6):
        next(rows)
        assert len(asked) <= done + 2
    rows.close()  # type: ignore[attr-defined]
    assert len(list(store.read(1).rows())) == 20


def test_an_error_while_pieces_are_made_leaves_no_files(tmp_path: Path) -> None:
    def broken() -> Iterator[Piece]:
        yield from pieces(1.0, 2)
        raise KeyError("the table is gone")

    with pytest.raises(KeyError, match="the table is gone"):
        at(tmp_path).write_version(Manifest(version=1), dense={}, small={}, pieces=broken())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_cleaned_up_meanwhile_makes_no_version(tmp_path: Path) -> None:
    def robbed() -> Iterator[Piece]:
        yield from pieces(1.0, 2)
        (folder(tmp_path, 1) / "serving-00000.safetensors").unlink()

    store = at(tmp_path)
    with pytest.raises(Exception, match=r"serving-00000\.safetensors: expected the \d+ bytes written a moment ago, found no"):
        store.write_version(Manifest(version=1), dense={}, small={}, pieces=robbed())
    assert store.numbers() == []


def test_writing_gives_way_to_other_threads(tmp_path: Path) -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    priorities: list[int] = []

    def watched() -> Iterator[Piece]:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        yield from pieces(1.0)

    at(tmp_path).write_version(Manifest(version=1), dense={}, small={}, pieces=watched())
    assert priorities == [max(before, NICENESS)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_where_priorities_cannot_be_set_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", no)
    assert in_background(lambda: 7) == 7


def old_version(root: Path, *, state: bool = True) -> SnapshotStore:
    """A version as 0.1.0 wrote it."""
    home = folder(root, 1)
    home.mkdir()
    files = {"serving.safetensors": serving(1.0)} | ({"trainer.safetensors": trainer(1.0)} if state else {})
    entries = {}
    for name, tensors in files.items():
        save_file(tensors, home / name)
        data = (home / name).read_bytes()
        entries[name] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    document = msgspec.to_builtins(Manifest(version=1, files=entries))
    for new in ("format", "rows", "chain", "sequence", "digest", "deltas_offset"):
        del document[new]
    (home / "manifest.json").write_bytes(msgspec.json.encode(document))
    return at(root)


def test_a_version_of_0_1_0_reads_as_one_piece(tmp_path: Path) -> None:
    store = old_version(tmp_path)
    assert store.versions() == [1] and store.verify(1) == [] and store.verify(1, hashes=False) == []
    manifest = store.manifest(1)
    assert (manifest.format, manifest.rows, manifest.chain, manifest.sequence) == (1, None, "", None)
    reader = store.read(1)
    assert reader.row_count == ROWS
    assert sorted(reader.dense()) == ["bias", "mlp.0.weight"] and sorted(reader.small()) == ["adam.step", "kept.gate.state"]
    assert same_rows(list(reader.rows()), 1.0)
    assert same_rows(list(reader.rows()), 1.0)  # once more
    (piece,) = reader.trainer_rows()
    assert same_rows([piece.serving], 1.0) and torch.equal(piece.trainer["deferred.owed"], trainer(1.0)["deferred.owed"])
    for found, wanted in ((store.serving(1), serving(1.0)), (store.trainer(1), trainer(1.0))):
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    store.delete(1)
    assert list(tmp_path.iterdir()) == []


def test_a_version_of_0_1_0_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = old_version(tmp_path)
    asked: list[str] = []
    real = store._blobs.read

    def read(folder: str, name: str) -> bytearray:
        asked.append(name)
        return real(folder, name)

    monkeypatch.setattr(store._blobs, "read", read)
    reader = store.read(1)
    reader.dense(), reader.small(), list(reader.trainer_rows())
    assert asked == ["manifest.json", "serving.safetensors", "trainer.safetensors"]


def test_a_version_of_0_1_0_without_trainer_state_says_so(tmp_path: Path) -> None:
    store = old_version(tmp_path, state=False)
    for attempt in (store.read(1).small, lambda: list(store.read(1).trainer_rows()), lambda: store.trainer(1)):
        with pytest.raises(SnapshotCorrupt, match=r"version 1: expected trainer\.safetensors in its manifest, found none"):
            attempt()


def changed(root: Path, **fields: object) -> SnapshotStore:
    """Version 1, whose manifest says something else than its files."""
    store = at(root)
    written = write(store, 1)
    file = folder(root, 1) / "manifest.json"
    file.write_bytes(msgspec.structs.replace(written, **fields).encode())
    return store


def test_a_newer_format_is_not_read(tmp_path: Path) -> None:
    store = changed(tmp_path, format=3)
    with pytest.raises(SnapshotCorrupt, match=r"expected files of format 2 or less, found format 3\. A newer release wrote it"):
        store.serving(1)
    assert "found format 3" in store.verify(1)[0]


@pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1])
def test_more_or_fewer_rows_than_the_manifest_says_are_damage(tmp_path: Path, rows: int) -> None:
    store = changed(tmp_path, rows=rows)
    for attempt in (store.serving, lambda version: list(store.read(version).trainer_rows())):
        with pytest.raises(SnapshotCorrupt, match=rf"manifest\.json: expected as many rows as its pieces .* 5, found {rows}"):
            attempt(1)


@pytest.mark.parametrize("missing", [name for name in FILES[:-1] if name != "trainer.safetensors"])
def test_a_manifest_that_lacks_a_piece_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    small_pieces(monkeypatch)
    store = at(tmp_path)
    written = write(store, 1)
    files = {name: entry for name, entry in written.files.items() if name != missing}
    (folder(tmp_path, 1) / "manifest.json").write_bytes(msgspec.structs.replace(written, files=files).encode())
    with pytest.raises(SnapshotCorrupt, match=r"numbered from 0 without a gap|expected dense\.safetensors|expected trainer"):
        store.read(1)
    assert store.verify(1) != []


def test_what_is_deleted_while_it_is_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, rows=1)
    store = at(tmp_path)
    store.write(Manifest(version=1), serving(1.0, 40), trainer(1.0, 40))
    rows = store.read(1).rows()
    next(rows)
    store.delete(1)
    with pytest.raises(SnapshotNotFound, match="version 1 was deleted while it was read"):
        list(rows)


@pytest.mark.parametrize("dies_before", range(len(FILES)))
def test_a_deletion_that_dies_leaves_no_version_and_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_before: int
) -> None:
    small_pieces(monkeypatch)
    store = at(tmp_path)
    write(store, 1)
    (folder(tmp_path, 1) / ".serving-00000.safetensors.123.abcd.tmp").touch()  # of a writer that was killed
    real, done = Path.unlink, [0]

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if done[0] == dies_before:
            raise KeyboardInterrupt
        done[0] += 1
        real(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            store.delete(1)
    assert store.versions() == ([1] if dies_before == 0 else []) and store.numbers() == [1]
    store.delete(1)
    assert list(tmp_path.iterdir()) == []
