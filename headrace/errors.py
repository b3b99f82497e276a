"""Errors of the client.

HeadraceError
├── InvalidEvent     an event that the pipeline would reject; `path` says where
├── InvalidOption    an argument of the client, or an option of its connections, is wrong
├── InvalidAnswer    a record of `scores` is not an answer
├── UnusableClient   the client was closed, or was made before this process was forked
├── DeliveryError    Kafka could not be reached, or did not acknowledge a record
└── NoAnswer         no answer to a score request came in time
"""

from __future__ import annotations

__all__ = ["DeliveryError", "HeadraceError", "InvalidAnswer", "InvalidEvent", "InvalidOption", "NoAnswer", "UnusableClient"]


class HeadraceError(Exception):
    """Root of the client's errors."""


class InvalidEvent(HeadraceError):
    """An event that the pipeline would reject; `path` says where (`$.features.price`)."""

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class InvalidOption(HeadraceError):
    """An argument of the client, or an option of its connections, is wrong."""


class InvalidAnswer(HeadraceError):
    """A record of the topic `scores` is not an answer as the contract defines it."""


class UnusableClient(HeadraceError):
    """The client, or the stream of answers, was closed or belongs to another process."""


class DeliveryError(HeadraceError):
    """Kafka could not be reached, or did not acknowledge a record in time."""


class NoAnswer(HeadraceError):
    """No answer to a score request came in time."""
