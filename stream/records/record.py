"""A record as it is read from Kafka, whichever client or test made the object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Header", "Record"]

# Name and value. Kafka allows headers without a value, and several of one name.
Header = tuple[str, bytes | None]


class Record(Protocol):
    """What Headrace reads of a record.

    `stream.kafka.fetched.LogRecord` and aiokafka's `ConsumerRecord` both have these attributes. `timestamp` is in ms since the
    epoch: the broker's clock at the arrival, or what the producer set, as the topic's `message.timestamp.type` says.
    """

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[Header]: ...
