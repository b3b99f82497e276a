"""The largest record that a topic accepts.

A worker reads the limits once, when it starts. If a limit is lowered later, the worker ends at the first record that is too
large, is started again, and reads the new limit.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from stream.kafka.cluster import topic_configs
from stream.settings import KafkaSettings
from stream.topics.contract import OUTPUT_MARGIN_BYTES

__all__ = ["DEFAULT_MAX_MESSAGE_BYTES", "OutputLimits", "letter_limit", "max_message_bytes"]

log = logging.getLogger(__name__)

DEFAULT_MAX_MESSAGE_BYTES = 1_048_588  # Kafka's default, for a worker that may not read the topic's configuration


@dataclass(frozen=True, slots=True)
class OutputLimits:
    """Limits of the join's output topics: bytes of a batch, and the number of partitions of `dead-letters` (None: enough)."""

    example_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    letter_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    letter_partitions: int | None = None

    def letter_partition(self, number: int) -> int:
        """The partition of `dead-letters` for letters of a source partition: the same number, where that partition exists."""
        return number if self.letter_partitions is None else number % self.letter_partitions


async def max_message_bytes(kafka: KafkaSettings, topic: str) -> int:
    """The largest batch that a topic accepts.

    Read it before sending anything: a record that the broker rejects would break the idempotent producer's sequence.
    """
    found = (await topic_configs(kafka, (topic,), ("max.message.bytes",))).get(topic, {})
    try:
        return int(found["max.message.bytes"])
    except (KeyError, ValueError):
        log.warning("%s: its max.message.bytes can't be read, taking Kafka's default", topic)
        return DEFAULT_MAX_MESSAGE_BYTES


async def letter_limit(kafka: KafkaSettings, topic: str) -> int:
    """The largest batch that `dead-letters` or `examples` accepts, to decide which records are left out as too large.

    Never less than 64 KiB, since by the contract both topics accept that. A topic that accepts less is configured wrongly:
    writing to it then fails, which is better than leaving out every record.
    """
    return max(await max_message_bytes(kafka, topic), OUTPUT_MARGIN_BYTES)
