"""The snapshot store: versions are whole or not seen, checked on every read and never written twice."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from state.blobs import Blobs, LocalBlobs
from state.errors import SnapshotCorrupt, SnapshotError, SnapshotExists, SnapshotNotFound
from state.manifest import Manifest
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from tests.state.made_version import FILES, ROWS, at, folder, serving, small_pieces, trainer, write


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)


def same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted
    )


@pytest.fixture(params=["folder", "file-url", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SnapshotStore:
    urls = {"folder": f"{tmp_path}/a/b", "file-url": f"file://{tmp_path}/a%20b", "memory": "memory:///"}
    return SnapshotStore(SnapshotSettings(url=urls[request.param]))


def test_what_is_written_is_read_back(store: SnapshotStore) -> None:
    assert store.versions() == [] and store.next_version() == 1
    manifest = Manifest(version=12, parent=11, epoch=3, offsets={"0": 5}, metrics={"window_log_loss": 0.5})
    written = store.write(manifest, serving(1.0), trainer(2.0))
    assert list(written.files) == FILES[:-1]
    assert (written.format, written.rows) == (2, ROWS)
    assert store.versions() == [12] and store.next_version() == 13
    assert store.manifest(12) == written
    assert same(store.serving(12), serving(1.0))
    assert same(store.trainer(12), trainer(2.0))
    assert store.verify(12) == [] and store.verify(12, hashes=False) == []


def test_a_version_without_trainer_state_says_so(store: SnapshotStore) -> None:
    store.write(Manifest(version=1), serving(1.0), None)
    assert store.verify(1) == []
    with pytest.raises(SnapshotCorrupt, match=r"version 1: expected trainer\.safetensors in its manifest, found none"):
        store.trainer(1)


def test_a_number_is_written_once(store: SnapshotStore) -> None:
    write(store, 1, 1.0)
    with pytest.raises(SnapshotExists, match=r"version 1: expected nothing at .*found dense\.safetensors.*number, 2"):
        write(store, 1, 2.0)
    assert same(store.serving(1), serving(1.0)) and store.verify(1) == []


def test_metrics_that_are_not_finite_survive(store: SnapshotStore) -> None:
    metrics = {"window_auc": math.nan, "window_log_loss": math.inf, "window_examples": 3.0}
    store.write(Manifest(version=1, metrics=metrics), serving(1.0), None)
    read = store.manifest(1).metrics
    assert math.isnan(read["window_auc"]) and math.isnan(read["window_log_loss"]) and read["window_examples"] == 3.0


@pytest.mark.parametrize("survivors", range(len(FILES)))
def test_a_version_that_is_not_whole_is_never_seen(tmp_path: Path, survivors: int) -> None:
    store = at(tmp_path)
    store.write(Manifest(version=1), serving(1.0), trainer(1.0))
    store.write(Manifest(version=2), serving(1.0), trainer(1.0))
    for name in FILES[survivors:]:
        (folder(tmp_path, 2) / name).unlink()
    assert store.versions() == [1]
    assert store.next_version() == 3
    with pytest.raises(SnapshotNotFound, match="the store has 1 versions, the newest 1"):
        store.manifest(2)
    if survivors:
        assert "isn't whole" in store.verify(2)[0]
        with pytest.raises(SnapshotExists):
            store.write(Manifest(version=2), serving(1.0), trainer(1.0))


# One process imports torch once and forks a child for each step N. The child kills itself before its N-th call that changes the
# disk. The loop ends with the first child that completes.
KILLED = """
import itertools, os, signal, sys
from pathlib import Path
import torch
from state.manifest import Manifest
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from state import pieces

pieces.PIECE_BYTES = 80
serving = {"keys": torch.arange(4), "embedding": torch.ones(4, 2), "first_order": torch.ones(4), "bias": torch.ones(1)}
trainer = {"adagrad.embedding": torch.ones(4, 2), "adam.step": torch.tensor(1)}
countdown = 0

def deadly(module, name):
    real = getattr(module, name)
    def step(*args, **kwargs):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(module, name, step)

for step in itertools.count(1):
    store = SnapshotStore(SnapshotSettings(url=f"{sys.argv[1]}/{step}"))
    store.write(Manifest(version=1), serving, None)
    child = os.fork()
    if child == 0:
        countdown = step
        for module, name in [(os, "fsync"), (os, "link"), (Path, "unlink"), (Path, "open"), (Path, "mkdir")]:
            deadly(module, name)
        store.write(Manifest(version=2), serving, trainer)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        print(step)
        break
"""


def test_kill_9_at_every_step_leaves_a_whole_version_or_none(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    steps = int(done.stdout)
    assert steps > 35  # there are seven files, each with at least a mkdir, an open, two fsyncs and a link
    outcomes = []
    for step in range(1, steps + 1):
        store = at(tmp_path / str(step))
        there = store.versions()
        assert there in ([1], [1, 2])
        for version in there:
            assert store.verify(version) == []
        number = store.next_version()
        assert number == there[-1] + 1 or there == [1]
        store.write(Manifest(version=number), serving(3.0), None)
        assert store.versions() == [*there, number]
        outcomes.append(len(there))
    assert outcomes == sorted(outcomes)  # version 2 exists from some step on
    assert outcomes[0] == 1 and outcomes[-2] == 2  # some step comes after the manifest has its name


@pytest.mark.parametrize("fails_at", range(len(FILES)))
def test_a_failing_write_leaves_no_files(tmp_path: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = at(tmp_path)
    calls = []
    real = os.link

    def full(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == fails_at + 1:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(SnapshotError, match=r"can't write .*v0000000001/.*No space left.*Free space there, or keep fewer"):
        store.write(Manifest(version=1), serving(1.0), trainer(1.0))
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_number_cannot_both_win(tmp_path: Path) -> None:
    import threading

    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def write(value: float) -> None:
        barrier.wait()
        try:
            at(tmp_path).write(Manifest(version=1, epoch=int(value)), serving(value), trainer(value))
            outcomes.append(f"won {value}")
        except SnapshotExists:
            outcomes.append("lost")

    threads = [threading.Thread(target=write, args=(float(number),)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if outcome != "lost"]
    assert len(winners) == 1 and len(outcomes) == 4
    store = at(tmp_path)
    value = float(store.manifest(1).epoch)
    assert winners == [f"won {value}"]
    assert same(store.serving(1), serving(value))
    assert same(store.trainer(1), trainer(value))


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(data[:-1])
    else:
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "short", "flipped bit"])
@pytest.mark.parametrize("name", FILES[:-1])
def test_damage_is_found_and_named(tmp_path: Path, how: str, name: str) -> None:
    store = at(tmp_path)
    entry = store.write(Manifest(version=1), serving(1.0), trainer(2.0)).files[name]
    damage(tmp_path / "v0000000001" / name, how)
    expected = {
        "missing": f"expected {entry.size} bytes, found no file",
        "short": f"expected {entry.size} bytes, found {entry.size - 1}",
        "flipped bit": f"expected SHA-256 {entry.sha256}, found ",
    }[how]
    problems = store.verify(1)
    assert len(problems) == 1
    assert f"v0000000001/{name}: {expected}" in problems[0]
    assert "headrace snapshot rollback" in problems[0]
    assert bool(store.verify(1, hashes=False)) == (how != "flipped bit")
    with pytest.raises(SnapshotCorrupt) as raised:
        (store.trainer if name.startswith("trainer") else store.serving)(1)
    assert str(raised.value) == problems[0]


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    store = at(tmp_path)
    store.write(Manifest(version=1), serving(1.0), None)
    manifest = tmp_path / "v0000000001" / "manifest.json"
    for content in [b"{", b"[]", b'{"version": "one"}', b"\xff", b'{"version": 1, "metrics": 3}']:
        manifest.write_bytes(content)
        with pytest.raises(SnapshotCorrupt, match=r"v0000000001/manifest\.json: expected a manifest, found"):
            store.manifest(1)
        assert len(store.verify(1)) == 1
    manifest.write_bytes(b'{"version": 7, "written_by_a_newer_one": [1]}')
    with pytest.raises(SnapshotCorrupt, match="expected the manifest of version 1, found that of version 7"):
        store.manifest(1)


def test_reading_creates_nothing(tmp_path: Path) -> None:
    store = at(tmp_path / "not-there")
    assert store.versions() == [] and store.next_version() == 1
    with pytest.raises(SnapshotNotFound, match="found nothing \\(the store has no version\\)"):
        store.manifest(3)
    with pytest.raises(SnapshotNotFound):
        store.verify(3)
    assert list(tmp_path.iterdir()) == []


def test_other_things_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "vnext").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "v0000000007").mkdir()  # as left by a writer that was killed at once
    assert at(tmp_path).versions() == []
    assert at(tmp_path).next_version() == 8


def test_an_unknown_kind_of_address_is_rejected() -> None:
    with pytest.raises(SnapshotError, match=r"snapshots\.url 'ftp://x/y': expected a folder, file://, s3://"):
        SnapshotStore(SnapshotSettings(url="ftp://x/y")).versions()


def test_create_rejects_a_name_that_exists(tmp_path: Path) -> None:
    blobs: Blobs
    for blobs in (LocalBlobs(tmp_path), Blobs("memory:///")):
        blobs.create("f", "a", [b"1"])
        with pytest.raises(FileExistsError):
            blobs.create("f", "a", [b"2"])
        assert blobs.read("f", "a") == b"1"
        assert {name: entry.size for name, entry in blobs.entries("f").items()} == {"a": 1}  # and no temporary file
