"""The folder of a partition's state: which RocksDB errors mean that its data is damaged, and moving a folder aside.

A folder is only replaced if its data can't be right. Running out of file descriptors, a full disk or a wrong owner say nothing
about the data, and the log may no longer have it, because of retention.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

from state.errors import JoinStateError, StateDamaged, StateInUse

__all__ = ["set_aside", "state_error"]

# How many folders of a partition that were moved aside are kept. Each is as large as a state folder in use.
KEPT_ASIDE = 2

# Words of RocksDB → the cause and what to do. After all of these errors the folder is left as it is.
_NOT_DAMAGE = {
    "Too many open files": "the process has no file descriptor left: raise its limit (`ulimit -n`, LimitNOFILE= of a systemd "
    "unit, `ulimits: nofile` of compose)",
    "Permission denied": "this user may not read and write there: fix the owner of state_dir and of all that is in it",
    "Read-only file system": "the file system is mounted read-only: mount it for writing, or set another state_dir",
    "No space left on device": "the disk is full: free space, and start the worker again; nothing is lost",
    "Disk quota exceeded": "the quota of the disk is used up: free space, and start the worker again; nothing is lost",
    "Input/output error": "the disk fails: look at the machine's log. In an empty state_dir on another disk the state is "
    "rebuilt from the log",
    "Column families not opened": "a newer version of Headrace has written the folder: run that version, or set another "
    "state_dir to rebuild from the log",
}


def state_error(path: Path, what: str, error: Exception) -> JoinStateError:
    """The JoinStateError for an error of rocksdict, which is a plain Exception with RocksDB's message.

    Args:
        what: the attempt that failed, as "could not open it".
    """
    text = str(error)
    head = f"{path}: expected a RocksDB of the join, {what}: {text}"
    if any(mark in text for mark in ("While lock file", "lock hold by")):
        return StateInUse(f"{head}. Another process has it open.")
    for words, advice in _NOT_DAMAGE.items():
        if words in text:
            return JoinStateError(f"{head}. The folder is left as it is. Most likely {advice}.")
    # A file that is missing from an existing database: RocksDB reports an IO error for the manifest, corruption for all others.
    if text.startswith("Corruption") or "No such file or directory" in text:
        return StateDamaged(f"{head}. It is damaged.")
    return JoinStateError(
        f"{head}. The folder is left as it is. If nothing else helps, move it away: the state is then rebuilt from the log, as "
        "far back as retention reaches."
    )


def set_aside(path: Path, why: str) -> Path:
    """See `JoinState.set_aside`."""
    aside = path.with_name(f"{path.name}.{why}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    path.rename(aside)
    aside.touch()  # folders are ordered by the time of moving, not by the last write into them
    others = [folder for folder in path.parent.glob(f"{path.name}.*-*") if folder.is_dir()]
    for old in sorted(others, key=lambda folder: folder.stat().st_mtime_ns)[:-KEPT_ASIDE]:
        shutil.rmtree(old, ignore_errors=True)
    return aside
