"""A click that waits for the first label of its impression, as the join's state stores it.

Layout 5 of the state added `arrived_ms`. A value of an older layout has the click's event time alone.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = ["NOT_KNOWN_MS", "HeldClick", "pack_held", "unpack_held"]

# The arrival of a click that was matched before arrivals were kept.
NOT_KNOWN_MS = -1

_HELD = struct.Struct("<qq")  # event time, arrival
_TIME = struct.Struct("<q")


class HeldClick(NamedTuple):
    """The times of a click: the event's own, and its arrival in Kafka by the broker's timestamp."""

    click_ms: int
    arrived_ms: int = NOT_KNOWN_MS


def pack_held(click: HeldClick) -> bytes:
    """A click in the form of layout 5: 16 bytes."""
    return _HELD.pack(*click)


def unpack_held(packed: bytes) -> HeldClick:
    """A click that any layout has stored."""
    return HeldClick(*(_HELD if len(packed) == _HELD.size else _TIME).unpack(packed))
