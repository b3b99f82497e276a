"""The folder of a partition's state: what an error of RocksDB says about it, and moving it aside.

A folder is given up only when what it holds can't be right. A process without file descriptors, a full disk, a wrong owner say
nothing about what it holds, and retention may have deleted from the log what it holds.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

from state.errors import JoinStateError, StateDamaged, StateInUse

__all__ = ["set_aside", "state_error"]

# Folders of a partition that were moved aside and are kept; each is as large as a state is.
KEPT_ASIDE = 2

# RocksDB's words → what they mean, and what to do. All of these leave what is on the disk as it is.
_NOT_DAMAGE = {
    "Too many open files": "the process has no file descriptor left: raise its limit (`ulimit -n`, LimitNOFILE= of a systemd "
    "unit, `ulimits: nofile` of compose)",
    "Permission denied": "this user may not read and write there: fix the owner of state_dir and of all in it",
    "Read-only file system": "it is mounted read-only: mount it for writing, or set another state_dir",
    "No space left on device": "the disk is full: free space, and start the worker again; nothing is lost",
    "Disk quota exceeded": "the quota of the disk is used up: free space, and start the worker again; nothing is lost",
    "Input/output error": "the disk fails: look at the machine's log; on another disk, with an empty state_dir, it is rebuilt "
    "from the log",
    "Column families not opened": "a newer version of Headrace has written it: run that version, or set another state_dir to "
    "rebuild from the log",
}


def state_error(path: Path, what: str, error: Exception) -> JoinStateError:
    """rocksdict's error (a plain Exception, with RocksDB's words) as one of ours."""
    text = str(error)
    head = f"{path}: expected a RocksDB of the join, {what}: {text}"
    if any(mark in text for mark in ("While lock file", "lock hold by")):
        return StateInUse(f"{head}. Another process has it open.")
    for words, advice in _NOT_DAMAGE.items():
        if words in text:
            return JoinStateError(f"{head}. The folder is left as it is. Most likely {advice}.")
    # A file that is missing from an existing database is an IO error in the manifest's case, and a corruption in all others.
    if text.startswith("Corruption") or "No such file or directory" in text:
        return StateDamaged(f"{head}. It is damaged.")
    return JoinStateError(
        f"{head}. The folder is left as it is. If nothing else helps, move it away: the log is read again, as far as retention "
        "reaches."
    )


def set_aside(path: Path, why: str) -> Path:
    """See `JoinState.set_aside`."""
    aside = path.with_name(f"{path.name}.{why}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    path.rename(aside)
    aside.touch()  # by the time of moving, not by that of the last write into it
    others = [each for each in path.parent.glob(f"{path.name}.*-*") if each.is_dir()]
    for old in sorted(others, key=lambda each: each.stat().st_mtime_ns)[:-KEPT_ASIDE]:
        shutil.rmtree(old, ignore_errors=True)
    return aside
