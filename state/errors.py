"""Errors of the package `state`.

StateError
├── JoinStateError      the join's RocksDB can't be opened or used
│   ├── StateDamaged     the data on the disk is damaged; the only error after which the folder is replaced
│   └── StateInUse       another process has the folder open
├── SnapshotError       a version can't be read or written
│   ├── SnapshotNotFound
│   ├── SnapshotExists
│   └── SnapshotCorrupt  a file is missing, or its SHA-256 differs from the manifest's
└── Refused             the rules of the registry don't allow a change
    └── StaleEpoch      another trainer has taken over
"""

from __future__ import annotations

__all__ = [
    "JoinStateError",
    "Refused",
    "SnapshotCorrupt",
    "SnapshotError",
    "SnapshotExists",
    "SnapshotNotFound",
    "StaleEpoch",
    "StateDamaged",
    "StateError",
    "StateInUse",
]


class StateError(Exception):
    """Base class of the errors of `state`."""


class JoinStateError(StateError):
    """The join's RocksDB can't be opened or used: permissions, open files, disk space. Its data may be intact."""


class StateDamaged(JoinStateError):
    """The data on the disk can't be right: a wrong checksum or a missing file. The folder may be replaced from the log."""


class StateInUse(JoinStateError):
    """Another process has the folder open."""


class SnapshotError(StateError):
    """A version can't be read or written."""


class SnapshotNotFound(SnapshotError):
    """The store doesn't have this version."""


class SnapshotExists(SnapshotError):
    """The store has this version already: another trainer wrote it."""


class SnapshotCorrupt(SnapshotError):
    """The files of a version differ from its manifest."""


class Refused(StateError):
    """The rules of the snapshot registry don't allow a change."""


class StaleEpoch(Refused):
    """A trainer announces a version after another trainer has taken over."""
