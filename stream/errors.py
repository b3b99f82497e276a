"""Errors of the room `stream`.

    StreamError
    ├── TopicError       a topic is missing or not as the contract says
    ├── RegistryError    a change of the snapshot registry was refused
    │   └── Fenced       somebody else changed it at the same time; read again and retry
    └── PositionError    a run isn't the one expected next
"""

from __future__ import annotations

__all__ = ["Fenced", "PositionError", "RegistryError", "StreamError", "TopicError"]


class StreamError(Exception):
    """Root of the errors of `stream`."""


class TopicError(StreamError):
    """A topic is missing, or is not as the contract says."""


class RegistryError(StreamError):
    """A change of the snapshot registry was refused."""


class Fenced(RegistryError):
    """Another process changed the registry at the same time."""


class PositionError(StreamError):
    """A run of records isn't the one expected next."""
