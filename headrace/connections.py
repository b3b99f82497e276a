"""Opening kafka-python's clients, and mending two things of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kafka.errors import KafkaError
from kafka.net.compat import KafkaNetClient

from headrace.errors import DeliveryError

__all__ = ["connect"]


def connect(kind: Any, options: Mapping[str, Any], **more: Any) -> Any:
    """A KafkaProducer or KafkaConsumer with the user's options and ours.

    kafka-python 3.0 leaves its sockets open when it can't connect, and doesn't hand `allow_auto_create_topics` down to its
    metadata requests: a mistyped prefix would make topics.

    Raises:
        DeliveryError: no broker answers.
    """
    opened: list[KafkaNetClient] = []

    def client(**configs: Any) -> KafkaNetClient:
        made = KafkaNetClient(**configs)
        made.cluster.config["allow_auto_create_topics"] = False
        opened.append(made)
        return made

    try:
        return kind(**options, **more, allow_auto_create_topics=False, kafka_client=client)
    except KafkaError as error:
        for made in opened:
            made.close()
        raise DeliveryError(
            f"bootstrap_servers {','.join(options['bootstrap_servers'])}: expected a Kafka broker, found none that answers "
            f"({error!r}). Start one (`headrace kafka start`), or mend the address or the security options."
        ) from error
