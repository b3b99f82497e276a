"""Corrects times in records of the registry that a wrong clock has written."""

from __future__ import annotations

from typing import Any

__all__ = ["not_later"]

# Clocks that are kept by NTP differ by less. Records of one transaction may also be a few milliseconds ahead of their arrival,
# since no move of the champion has the time of the one before it.
TOLERANCE_MS = 1_000

_TIMES = frozenset(
    ("at_ms", "hold_at_ms", "ended_at_ms", "done_at_ms", "announced_at_ms", "good_at_ms", "champion_at_ms", "share_at_ms")
)
"""The fields that say when something was written. `created_at_ms` is a part of a version's name, and stays."""


def not_later(document: Any, arrived_ms: int | None) -> Any:
    """A record's value with no time after its arrival.

    Nothing was written after it arrived. A machine whose clock is ahead would otherwise be believed by all others: no move of
    the champion is earlier than the one before, so every later one would be in the future too, no version would be tagged
    good, and `rollback --back` would find nothing.

    Args:
        document: of a record, decoded from JSON.
        arrived_ms: by the broker's clock (ms since epoch); None: not known, and everything is believed.
    """
    if arrived_ms is None:
        return document
    if isinstance(document, list):
        return [not_later(each, arrived_ms) for each in document]
    if not isinstance(document, dict):
        return document
    return {
        name: _limited(value, arrived_ms) if name in _TIMES else not_later(value, arrived_ms)
        for name, value in document.items()
    }


def _limited(value: Any, arrived_ms: int) -> Any:
    if isinstance(value, list):
        return [_limited(each, arrived_ms) for each in value]
    is_late = isinstance(value, int) and value > arrived_ms + TOLERANCE_MS
    return arrived_ms if is_late else value
