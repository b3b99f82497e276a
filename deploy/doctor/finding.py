"""What a finding is."""

from __future__ import annotations

import msgspec

__all__ = ["Finding"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is wrong: which check says so, about what, what it expected and found, and what mends it."""

    check: str
    what: str
    expected: str
    found: str
    cure: str
