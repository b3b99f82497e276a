"""All kinds of faults. Each happens to the join while events come in, and the join's outputs must be right in spite of it."""

from __future__ import annotations

from tests.faults.kinds import brokers, clocks, killed, logs, records, state, workers
from tests.faults.play import Kind

__all__ = ["KINDS", "kind_named"]

KINDS: list[Kind] = [
    *killed.KINDS,
    *workers.KINDS,
    *state.KINDS,
    *brokers.KINDS,
    *logs.KINDS,
    *records.KINDS,
    *clocks.KINDS,
]


def kind_named(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)
