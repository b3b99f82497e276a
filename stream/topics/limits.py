"""How large a record a topic takes.

Workers ask once, when they start. A worker that runs into a limit lowered since then ends, and asks again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from stream.kafka.cluster import topic_configs
from stream.settings import KafkaSettings
from stream.topics.contract import OUTPUT_MARGIN_BYTES

__all__ = ["DEFAULT_MAX_MESSAGE_BYTES", "OutputLimits", "letter_limit", "max_message_bytes"]

log = logging.getLogger(__name__)

DEFAULT_MAX_MESSAGE_BYTES = 1_048_588  # Kafka's own, for a worker that may not read the topic's configuration


@dataclass(frozen=True, slots=True)
class OutputLimits:
    """What the join's output topics take: bytes of a batch, and how many partitions `dead-letters` has (None: enough)."""

    example_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    letter_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    letter_partitions: int | None = None

    def letter_partition(self, number: int) -> int:
        """Where the letters of a partition go: the same number, where `dead-letters` has it."""
        return number if self.letter_partitions is None else number % self.letter_partitions


async def max_message_bytes(kafka: KafkaSettings, topic: str) -> int:
    """The largest batch that a topic takes.

    Asked for before anything is sent: a record refused by the broker would break the idempotent producer's sequence.
    """
    found = (await topic_configs(kafka, (topic,), ("max.message.bytes",))).get(topic, {})
    try:
        return int(found["max.message.bytes"])
    except (KeyError, ValueError):
        log.warning("%s: its max.message.bytes can't be read, taking Kafka's default", topic)
        return DEFAULT_MAX_MESSAGE_BYTES


async def letter_limit(kafka: KafkaSettings, topic: str) -> int:
    """The largest batch that `dead-letters` or `examples` takes, for deciding which records are left out.

    The contract gives both at least 64 KiB. A topic that takes less is set wrongly: writing to it fails, as it should, instead
    of leaving out every record.
    """
    return max(await max_message_bytes(kafka, topic), OUTPUT_MARGIN_BYTES)
