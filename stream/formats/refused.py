"""Why a value could not be turned into the contract's JSON."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Refused", "RefusedError"]


class Refused(NamedTuple):
    """For the value's dead letter: a reason code of `stream.records.dead_letter`, a path in the value, and a text."""

    reason: str
    path: str
    message: str


class RefusedError(Exception):
    """Carries a `Refused` out of a decoder."""

    def __init__(self, reason: str, path: str, message: str) -> None:
        super().__init__(message)
        self.refused = Refused(reason, path, message)
