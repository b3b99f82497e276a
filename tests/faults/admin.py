"""Requests of faults to the brokers, about quotas, coordinators and topics. Every method blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from kafka import TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.protocol.admin import AlterClientQuotasRequest
from kafka.protocol.metadata import CoordinatorType

from deploy.settings import Settings

__all__ = ["Admin"]


class Admin:
    """Requests over one admin client, which is closed at the end of the block."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @classmethod
    @contextlib.contextmanager
    def of(cls, settings: Settings) -> Iterator[Admin]:
        client = KafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers.split(","))
        try:
            yield cls(client)
        finally:
            client.close()

    def quota(self, client_id: str, limits: dict[str, float | None]) -> None:
        """Set quotas of a client by Kafka's names; None removes a quota."""
        entry = AlterClientQuotasRequest.EntryData
        ops = [entry.OpData(key=key, value=value or 0.0, remove=value is None) for key, value in limits.items()]
        entity = entry.EntityData(entity_type="client-id", entity_name=client_id)
        request = AlterClientQuotasRequest(entries=[entry(entity=[entity], ops=ops)], validate_only=False)
        answer = self._client._manager.run(self._client._manager.send, request)
        assert all(entry.error_code == 0 for entry in answer.entries), answer

    def coordinator(self, name: str, *, of_transactions: bool) -> int:
        """The id of the broker that coordinates a group or a transactional id."""
        kind = CoordinatorType.TRANSACTION if of_transactions else CoordinatorType.GROUP
        found = self._client._manager.run(lambda: self._client._find_coordinator_ids([name], key_type=kind))
        return int(found[name])

    def members(self, group: str) -> set[str]:
        """Ids of the members of a group, as its coordinator has them."""
        return {member["member_id"] for member in self._client.describe_groups([group])[group]["members"]}

    def configure(self, topic: str, **values: object) -> None:
        """Set configs of a topic; names have _ instead of dots."""
        configs = {name.replace("_", "."): str(value) for name, value in values.items()}
        self._client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs=configs)])

    def truncate(self, topic: str, before: dict[int, int]) -> None:
        """Delete the records of each partition that are before an offset."""
        self._client.delete_records({TopicPartition(topic, number): offset for number, offset in before.items()})

    def delete(self, topic: str) -> None:
        self._client.delete_topics([topic])

    def topics(self) -> set[str]:
        return set(self._client.list_topics())
