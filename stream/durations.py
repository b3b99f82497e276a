"""Lengths of time for people."""

from __future__ import annotations

__all__ = ["duration"]


def duration(span_ms: float) -> str:
    """Three digits and a unit that suits them."""
    for unit, size_ms in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)):
        if span_ms >= size_ms:
            return f"{span_ms / size_ms:.3g} {unit}"
    return f"{span_ms:.0f} ms"
