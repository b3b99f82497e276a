"""Connects aiokafka's clients in fewer round trips, for operations that somebody waits for.

Before an aiokafka client can read or write a topic, it takes three requests on one connection, closes that, opens another to
the same broker, and asks twice more for metadata: once for all topics, once for the topic that it needs. Where the topic isn't
known yet, its consumer also waits for 0.1 s. On a machine whose cores are all busy, each request costs a turn of the client
and one of the broker.

`started_quickly` makes a client ask for its topics in its first request for metadata, and keep the connection if its address is
the broker's. So it takes two requests, that for the broker's API versions included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.errors import KafkaConnectionError, KafkaError
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.util import create_task

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

__all__ = ["started_quickly"]

C = TypeVar("C", "AIOKafkaConsumer", "AIOKafkaProducer")


async def started_quickly(client: C, topics: Iterable[str]) -> C:
    """Start a consumer or producer. It knows these topics then; a topic that doesn't exist isn't created.

    ```python
    consumer = await started_quickly(AIOKafkaConsumer(**aiokafka_options(kafka)), [names.snapshots])
    consumer.partitions_for_topic(names.snapshots)  # None if there is no such topic
    ```

    Raises:
        aiokafka.errors.KafkaError: as the client's `start` raises. It must be stopped also then.
    """
    inner: AIOKafkaClient = client.client if hasattr(client, "client") else client._client
    inner.bootstrap = partial(_bootstrap, inner, inner.bootstrap, frozenset(topics))
    await client.start()
    await asyncio.sleep(0)  # the client's tasks have begun then. One that has not yet makes `stop` fail half-way
    return client


async def _bootstrap(client: AIOKafkaClient, usual: Callable[[], Awaitable[None]], topics: frozenset[str]) -> None:
    """In the place of `AIOKafkaClient.bootstrap`."""
    problem = "no address"
    for host, port, _ in client.hosts:
        try:
            connection = await _connection(client, host, port)
        except (OSError, KafkaError, TimeoutError) as error:
            problem = f"{host}:{port}: {error!r}"
            continue
        try:
            metadata = await connection.send(MetadataRequest(sorted(topics), allow_auto_topic_creation=False))
        except (KafkaError, TimeoutError) as error:
            problem = f"{host}:{port}: {error!r}"
            connection.close()
            continue
        if not metadata.brokers:  # of a cluster that is just starting
            connection.close()
            await usual()
            return
        client.cluster.update_metadata(metadata)
        client._topics = set(topics)
        _keep(client, connection)
        client._sync_task = create_task(client._md_synchronizer())
        return
    raise KafkaConnectionError(f"Unable to bootstrap from {client.hosts}, {problem}")


async def _connection(client: AIOKafkaClient, host: str, port: int) -> AIOKafkaConnection:
    return await create_conn(
        host,
        port,
        client_id=client._client_id,
        request_timeout_ms=client._request_timeout_ms,
        ssl_context=client._ssl_context,
        security_protocol=client._security_protocol,
        on_close=client._on_connection_closed,
        max_idle_ms=client._connections_max_idle_ms,
        sasl_mechanism=client._sasl_mechanism,
        sasl_plain_username=client._sasl_plain_username,
        sasl_plain_password=client._sasl_plain_password,
        sasl_kerberos_service_name=client._sasl_kerberos_service_name,
        sasl_kerberos_domain_name=client._sasl_kerberos_domain_name,
        sasl_oauth_token_provider=client._sasl_oauth_token_provider,
    )


def _keep(client: AIOKafkaClient, connection: AIOKafkaConnection) -> None:
    """Go on using a connection for the broker whose address it has."""
    for broker in client.cluster.brokers():
        if (broker.host, broker.port) == (connection.host, connection.port):
            client._conns[broker.nodeId, ConnectionGroup.DEFAULT] = connection
            return
    connection.close()
