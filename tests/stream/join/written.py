"""What a plan writes to `examples`, with headers that a test can read."""

from __future__ import annotations

from stream.join.outgoing import outgoing_records
from stream.join.plan import Plan
from stream.records.packing import unpack_headers
from stream.records.record import Header

__all__ = ["written"]


def written(plan: Plan, negative_rate: float = 1.0) -> list[tuple[bytes | None, bytes | None, list[Header]]]:
    """Key, value and headers of each record, in order."""
    return [
        (key, value, unpack_headers(headers) if isinstance(headers, bytes) else list(headers))
        for key, value, headers in outgoing_records(plan, negative_rate)
    ]
