"""What is checked of a version before anybody is sent to it: bits that flipped, and a store that doesn't answer."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch

from state.errors import SnapshotCorrupt
from state.manifest import Manifest
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.registry import checking
from stream.registry.checking import check_store


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    store = SnapshotStore(SnapshotSettings(url=str(tmp_path / "store")))
    store.write(Manifest(version=1), {"bias": torch.ones(3)}, {"adam": torch.ones(3)})
    return store


def flip(store: SnapshotStore, name: str) -> None:
    file = Path(store.url.removeprefix("file://")) / "v0000000001" / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def check(store: SnapshotStore | None, *, hashes: bool = True) -> str:
    return asyncio.run(check_store(store, 1, hashes=hashes))


def test_a_bit_that_flipped_in_what_scorers_read_is_found_by_a_rollback(store: SnapshotStore) -> None:
    assert (check(store), check(store, hashes=False), check(None)) == ("hashes", "sizes", "nothing")
    flip(store, "trainer.safetensors")
    assert check(store) == "hashes", "scorers don't read it"
    flip(store, "dense.safetensors")
    assert check(store, hashes=False) == "sizes"
    with pytest.raises(SnapshotCorrupt, match=r"dense\.safetensors: expected SHA-256 .* Nothing was changed; --unchecked"):
        check(store)


def test_a_large_version_is_checked_by_sizes(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "CHECK_BYTES", 10)
    assert check(store) == "sizes"


def test_a_store_that_does_not_answer_is_passed_over(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(checking, "CHECK_S", 0.01)
    monkeypatch.setattr(store, "verify", lambda *args, **kwargs: answer.wait())
    assert check(store) == "nothing"
    assert "did not answer within 0.01 s, so its files are not checked" in caplog.text
    answer.set()
