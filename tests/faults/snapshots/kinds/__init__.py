"""All kinds of faults of versions, deltas and replicas."""

from __future__ import annotations

from tests.faults.snapshots.kinds import contents, deltas, files, lives, logs, memory, rewinds
from tests.faults.snapshots.play import Kind

__all__ = ["KINDS", "kind_named"]

KINDS: list[Kind] = [*deltas.KINDS, *contents.KINDS, *files.KINDS, *memory.KINDS, *lives.KINDS, *logs.KINDS, *rewinds.KINDS]


def kind_named(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)
