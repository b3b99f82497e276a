"""Errors of the room `stream`.

StreamError
├── SecurityError    the settings that reach Kafka can't be used
├── NoAnswer         Kafka didn't answer within a deadline
├── TopicError       a topic is missing or not as the contract says
├── RegistryError    a change of the snapshot registry was refused
│   └── Fenced       somebody else changed it at the same time; read again and retry
├── Replaced         another worker has taken this one's place in the group
├── PositionError    the log isn't where the committed offsets say
└── Abandoned        a partition went away while it was being taken over
"""

from __future__ import annotations

__all__ = [
    "Abandoned",
    "Fenced",
    "NoAnswer",
    "PositionError",
    "RegistryError",
    "Replaced",
    "SecurityError",
    "StreamError",
    "TopicError",
]


class StreamError(Exception):
    """Root of the errors of `stream`."""


class SecurityError(StreamError):
    """Addresses, TLS files or SASL credentials that no client could use."""


class NoAnswer(StreamError):
    """Kafka didn't answer within a deadline; the message names what was asked."""


class TopicError(StreamError):
    """A topic is missing, or is not as the contract says."""


class RegistryError(StreamError):
    """A change of the snapshot registry was refused."""


class Fenced(RegistryError):
    """Another process changed the registry at the same time."""


class Replaced(StreamError):
    """Another worker with the same instance id has taken this one's place in the group."""


class PositionError(StreamError):
    """The log isn't where the committed offsets say."""


class Abandoned(StreamError):
    """A partition went to another worker while it was being taken over; the next rebalance decides."""
