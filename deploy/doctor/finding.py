"""The result of a check."""

from __future__ import annotations

import msgspec

__all__ = ["Finding"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is wrong: the check, the object, what was expected, what was found, and how to fix it (`cure`)."""

    check: str
    what: str
    expected: str
    found: str
    cure: str
