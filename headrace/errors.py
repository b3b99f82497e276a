"""Errors of the client.

HeadraceError
├── InvalidEvent     an event that the pipeline would refuse; `path` says where
├── DeliveryError    Kafka could not be reached, or did not acknowledge a record
└── NoAnswer         no answer to a score request came in time
"""

from __future__ import annotations

__all__ = ["DeliveryError", "HeadraceError", "InvalidEvent", "NoAnswer"]


class HeadraceError(Exception):
    """Root of the client's errors."""


class InvalidEvent(HeadraceError):
    """An event that the pipeline would refuse; `path` says where (`$.features.price`)."""

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class DeliveryError(HeadraceError):
    """Kafka could not be reached, or did not acknowledge a record in time."""


class NoAnswer(HeadraceError):
    """No answer to a score request came in time."""
