"""Records of Kafka in general: as any client or test gives them to be read, and as they are handed over to be sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Header", "Outgoing", "Record"]

# Name and value. Kafka allows headers without a value, and several of one name.
Header = tuple[str, bytes | None]

# Key, value and headers of a record to send. The headers are pairs, or packed by `stream.records.packing.pack_headers`.
Outgoing = tuple[bytes | None, bytes | None, Sequence[Header] | bytes]


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
