"""Errors of the room `stream`.

StreamError
├── SecurityError    no client can use the connection settings
├── NoAnswer         Kafka can't be reached, or doesn't answer in time
│   └── Unsettled    and it is unknown whether what was sent is written
├── TopicError       a topic is missing, or differs from its contract
├── RegistryError    the rules don't allow a change of the registry of versions
│   └── Fenced       another process changed it at the same time; run the operation again
├── DeltaDamaged     a delta can't be used (`stream.records.delta`)
│   └── UnknownFormat
├── DeltaTooLarge    the topic's limit is smaller than a record of a delta
├── Replaced         another worker with the same instance id is in the group
├── LostLead         a trainer led, and another one may lead now
├── PositionError    the log doesn't fit the committed offsets
└── Abandoned        a partition went to another worker while it was being taken over
"""

from __future__ import annotations

__all__ = [
    "Abandoned",
    "DeltaTooLarge",
    "Fenced",
    "LostLead",
    "NoAnswer",
    "PositionError",
    "RegistryError",
    "Replaced",
    "SecurityError",
    "StreamError",
    "TopicError",
    "Unsettled",
]


class StreamError(Exception):
    """Root of the errors of `stream`."""


class SecurityError(StreamError):
    """Addresses, TLS files or SASL credentials that no client can use."""


class NoAnswer(StreamError):
    """Kafka can't be reached, or doesn't answer in time. The message names what was asked for."""


class Unsettled(NoAnswer):
    """Kafka can't be reached since something was sent. It may be written; the writer finds out with its next operation."""


class TopicError(StreamError):
    """A topic is missing, or differs from its contract."""


class RegistryError(StreamError):
    """The rules don't allow a change of the registry of versions."""


class Fenced(RegistryError):
    """Another process changed the registry of versions at the same time."""


class DeltaTooLarge(StreamError):
    """A record of a delta is larger than the topic takes. Nothing was written; encode the delta again for the smaller limit."""


class Replaced(StreamError):
    """Another worker with the same instance id has replaced this one in the group."""


class LostLead(StreamError):
    """A trainer led, and the group of trainers has chosen another one or may do so."""


class PositionError(StreamError):
    """The log doesn't fit the committed offsets: it begins after them, ends before them, or is another topic's."""


class Abandoned(StreamError):
    """A partition went to another worker while it was being taken over. The next rebalance decides who gets it."""
