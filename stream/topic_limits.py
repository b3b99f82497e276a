"""How large a record a topic takes.

Workers ask once, when they start. A worker that runs into a limit lowered since then ends, and asks again.
"""

from __future__ import annotations

import logging

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from stream.clients import aiokafka_options
from stream.settings import KafkaSettings
from stream.topic_contract import OUTPUT_MARGIN_BYTES

__all__ = ["DEFAULT_MAX_MESSAGE_BYTES", "letter_limit", "max_message_bytes"]

log = logging.getLogger(__name__)

DEFAULT_MAX_MESSAGE_BYTES = 1_048_588  # Kafka's own, for a worker that may not read the topic's configuration


async def max_message_bytes(kafka: KafkaSettings, topic: str) -> int:
    """The largest batch that a topic takes.

    Asked for before anything is sent: a record refused by the broker would break the idempotent producer's sequence.
    """
    admin = AIOKafkaAdminClient(**aiokafka_options(kafka))
    try:
        await admin.start()
        answers = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    finally:
        await admin.close()
    try:
        entries = {entry[0]: entry[1] for answer in answers for resource in answer.resources for entry in resource[4]}
        return int(entries["max.message.bytes"])
    except (KafkaError, KeyError, IndexError, ValueError):
        log.warning("%s: its max.message.bytes can't be read, taking Kafka's default", topic)
        return DEFAULT_MAX_MESSAGE_BYTES


async def letter_limit(kafka: KafkaSettings, topic: str) -> int:
    """The largest batch that `dead-letters` or `examples` takes, for deciding which records are left out.

    The contract gives both at least 64 KiB. A topic that takes less is set wrongly: writing to it fails, as it should, instead
    of leaving out every record.
    """
    return max(await max_message_bytes(kafka, topic), OUTPUT_MARGIN_BYTES)
