"""Errors of RocksDB: only damage makes the join replace a state folder, and a damaged folder is moved aside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from state.errors import JoinStateError, StateDamaged, StateInUse
from state.join_folder import KEPT_ASIDE, state_error
from state.join_state import JoinMeta, JoinState, StateBatch, StateOptions

PENDING = 2_000


def fill(path: Path) -> None:
    state = JoinState(path, StateOptions(8))
    batch = state.batch()
    batch.remember((b"%d" % index, (index, index, False)) for index in range(PENDING))
    batch.add_pending((index, index, b"%d" % index, b"value") for index in range(PENDING))
    meta = {"impressions_position": PENDING, "clicks_position": 0, "examples_position": 0, "watermark_ms": 0}
    batch.set_meta(JoinMeta(identity="i", impressions_seen_ms=0, clicks_seen_ms=0, **meta))
    batch.write()
    state.close()


def still_there(path: Path) -> bool:
    state = JoinState(path, StateOptions(8))
    try:
        meta = state.meta()
        return meta is not None and len(list(state.payloads.keys())) == PENDING
    finally:
        state.close()


# Run as another user, with a relative path, which needs no permission on the folders above.
OPENING = """
import os, resource, sys
from pathlib import Path
from state.errors import JoinStateError
from state.join_state import JoinState, StateOptions
options = StateOptions(8)
JoinState(Path("another"), options).close()  # so that late imports happen before the user changes
{before}
try:
    JoinState(Path("partition-0"), options)
except JoinStateError as error:
    print(type(error).__name__, error)
"""
AS_NOBODY = "os.getuid() or os.setuid(65534)"


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (
            "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 3,) * 2)",
            "Too many open files.*ulimit -n.*LimitNOFILE",
        ),
        (f"os.chmod('partition-0', 0); {AS_NOBODY}", "Permission denied.*owner of state_dir"),
        (f"os.chmod('partition-0', 0o555); {AS_NOBODY}", "Permission denied.*owner of state_dir"),
    ],
)
def test_a_folder_that_can_not_be_opened_is_left_as_it_is(tmp_path: Path, before: str, words: str) -> None:
    fill(tmp_path / "partition-0")
    tmp_path.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    program = [sys.executable, "-c", OPENING.format(before=before)]
    try:
        found = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    finally:
        (tmp_path / "partition-0").chmod(0o755)
    assert found.stdout.startswith("JoinStateError partition-0: expected a RocksDB of the join, could not open it: "), found
    assert "The folder is left as it is" in found.stdout
    assert re.search(words, found.stdout), found
    assert still_there(tmp_path / "partition-0")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Corruption: block checksum mismatch: stored = 1, computed = 2", StateDamaged),
        ("Corruption: Corruption: IO error: No such file or directory: While open a file for random read: 8.sst", StateDamaged),
        ("IO error: No such file or directory: While opening a file for sequentially reading: MANIFEST-5", StateDamaged),
        ("IO error: While lock file: p/LOCK: Resource temporarily unavailable", StateInUse),
        ("IO error: lock hold by current process, acquire time 1: p/LOCK: No locks available", StateInUse),
        ("IO error: No space left on device: While appending to file: p/9.sst", JoinStateError),
        (
            "Corruption: IO error: While open a file: p/9.sst: Too many open files The file MANIFEST may be corrupted",
            JoinStateError,
        ),
        ("IO error: While pread offset 0 len 9: p/9.sst: Input/output error", JoinStateError),
        ("Invalid argument: Column families not opened: more", JoinStateError),
        ("Something new", JoinStateError),
    ],
)
def test_the_error_for_a_message_of_rocksdb(text: str, kind: type[JoinStateError]) -> None:
    error = state_error(Path("p"), "could not open it", Exception(text))
    assert type(error) is kind
    assert str(error).startswith(f"p: expected a RocksDB of the join, could not open it: {text}")


def test_a_write_that_fails_names_the_folder_and_what_to_do() -> None:
    def write(*args: Any) -> None:
        raise Exception("IO error: No space left on device")

    batch = StateBatch(SimpleNamespace(path=Path("p"), db=SimpleNamespace(write=write), write_options=None))  # type: ignore[arg-type]
    with pytest.raises(JoinStateError, match=r"p: .*could not write to it: .*the disk is full: free space.*nothing is lost"):
        batch.write()


def test_a_folder_of_a_newer_version_is_rejected(tmp_path: Path) -> None:
    from rocksdict import AccessType, Rdict

    options = StateOptions(8)
    path = tmp_path / "partition-0"
    fill(path)
    names = [name for name in Rdict.list_cf(str(path), options.database()) if name != "default"]
    families = {name: options.family(write_buffer_mb=1) for name in (*names, "newer")}
    Rdict(str(path), options.database(), families, AccessType.read_write()).close()
    with pytest.raises(JoinStateError, match="a newer version of Headrace has written the folder") as error:
        JoinState(path, StateOptions(8))
    assert type(error.value) is JoinStateError


def test_of_the_folders_moved_aside_only_the_newest_are_kept(tmp_path: Path) -> None:
    path, others = tmp_path / "partition-1", [tmp_path / "partition-1.1", tmp_path / "partition-11.damaged-x"]
    for other in others:
        other.mkdir()
    moved = []
    for number in range(KEPT_ASIDE + 2):
        path.mkdir()
        (path / "number").write_text(str(number))
        moved.append(JoinState.set_aside(path, "damaged"))
        assert not path.exists()
    assert all(each.name.startswith("partition-1.damaged-") for each in moved)
    assert [each.exists() for each in moved] == [False] * 2 + [True] * KEPT_ASIDE
    assert (moved[-1] / "number").read_text() == str(KEPT_ASIDE + 1)
    assert all(other.exists() for other in others)
