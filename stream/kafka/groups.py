"""Who is in a consumer group."""

from __future__ import annotations

import asyncio
import time

from stream.errors import NoAnswer
from stream.kafka.clients import kafka_python_options, unreachable
from stream.settings import KafkaSettings

__all__ = ["group_members"]

# How long the request is repeated while the group has no coordinator, which takes some seconds in a new cluster.
COORDINATOR_S, RETRY_S = 10.0, 0.3


async def group_members(kafka: KafkaSettings, group: str) -> list[str]:
    """The hosts of a group's members, one for each member; empty for a group that nobody is in.

    By kafka-python, since aiokafka can't decode the members.

    Raises:
        NoAnswer: Kafka can't be reached, or doesn't say.
    """
    return await asyncio.to_thread(_members, kafka, group)


def _members(kafka: KafkaSettings, group: str) -> list[str]:
    from kafka.admin import KafkaAdminClient
    from kafka.errors import KafkaError

    deadline = time.monotonic() + COORDINATOR_S
    try:
        admin = KafkaAdminClient(**kafka_python_options(kafka))
    except KafkaError as error:
        raise unreachable(kafka, f"who is in the group {group}", error) from error
    try:
        while True:
            try:
                described = admin.describe_groups([group])
                return [str(member["client_host"]).lstrip("/") for member in described[group]["members"]]
            except KafkaError as error:
                if time.monotonic() > deadline:
                    raise NoAnswer(
                        f"Kafka at {kafka.bootstrap_servers}: expected to hear who is in the group {group} within "
                        f"{COORDINATOR_S:.0f} s, found: {error!r}. Check the brokers that hold __consumer_offsets."
                    ) from error
            time.sleep(RETRY_S)
    finally:
        admin.close()
