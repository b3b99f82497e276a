"""Errors of the room `state`.

StateError
├── JoinStateError      the join's RocksDB can't be opened or used
│   ├── StateDamaged     what is on the disk is damaged; only then the folder is given up
│   └── StateInUse       another process has it open
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
    """Root of the errors of `state`."""


class JoinStateError(StateError):
    """The join's RocksDB can't be opened or used: permissions, open files, space. What it holds may be good."""


class StateDamaged(JoinStateError):
    """What is on the disk can't be right: a checksum, a missing file. The folder can be given up, the log has what it held."""


class StateInUse(JoinStateError):
    """Another process has the folder open."""


class SnapshotError(StateError):
    """A version can't be read or written."""


class SnapshotNotFound(SnapshotError):
    """No such version in the store."""


class SnapshotExists(SnapshotError):
    """The version is already there: another trainer wrote it."""


class SnapshotCorrupt(SnapshotError):
    """A version isn't what its manifest says."""


class Refused(StateError):
    """The rules of the snapshot registry don't allow a change."""


class StaleEpoch(Refused):
    """A trainer that was thought dead announces after another one has taken over."""
