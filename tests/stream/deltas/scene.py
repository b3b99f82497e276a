"""Writers and readers of deltas on the real Kafka, and a producer that writes anything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.admin import NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from deploy.settings import Settings
from stream.deltas.pieces import DeltaProblem, FoundDelta
from stream.deltas.reader import DeltaReader, read_back
from stream.deltas.writer import DeltaWriter
from stream.kafka.clients import admin_client, aiokafka_options
from stream.kafka.cluster import topic_configs
from stream.registry.writer import RegistryWriter
from stream.topics.names import TopicNames

__all__ = ["Scene", "scene", "shown", "until"]

PATIENCE_S = 60.0


async def until(true: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        answer = true()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


class Scene:
    """Makes writers and readers of one prefix, and closes them."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.kafka = settings, settings.kafka
        self.names = TopicNames.of(settings.topics)
        self.opened: list[Any] = []

    async def epoch(self) -> int:
        """The next epoch, as a trainer takes it."""
        registry = RegistryWriter(self.kafka, self.names, who="trainer@here")
        try:
            return await registry.take_trainer_epoch()
        finally:
            await registry.close()

    async def writer(self, epoch: int | None = None) -> DeltaWriter:
        """An open writer, of the next epoch or of this one."""
        writer = DeltaWriter(self.kafka, self.names, epoch=await self.epoch() if epoch is None else epoch)
        self.opened.append(writer)
        await writer.open()
        return writer

    async def reader(self, start: int | None = 0) -> DeltaReader:
        reader = DeltaReader(self.kafka, self.names, start=start)
        self.opened.append(reader)
        await reader.open()
        return reader

    async def log(self, start: int = 0) -> list[Any]:
        """What stands in the log: (epoch, sequence) of each delta, the reason of each problem."""
        return [shown(found) async for found in read_back(self.kafka, self.names, start)]

    async def write(self, values: Sequence[bytes | None], **options: Any) -> None:
        """Write values as they are, without a transaction."""
        producer = AIOKafkaProducer(**aiokafka_options(self.kafka), max_request_size=2**24, **options)
        await producer.start()
        try:
            for value in values:
                await producer.send_and_wait(self.names.deltas, value, None if value is not None else b"key", partition=0)
        finally:
            await producer.stop()

    async def configure(self, **values: object) -> None:
        """Set configs of the topic, and wait until brokers show them. Names have _ instead of dots."""
        configs = {name.replace("_", "."): str(value) for name, value in values.items()}
        async with admin_client(self.kafka) as admin:
            await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, self.names.deltas, configs)])

        async def shows() -> bool:
            found = (await topic_configs(self.kafka, [self.names.deltas]))[self.names.deltas]
            return all(found.get(name) == value for name, value in configs.items())

        await until(shows)

    async def delete(self) -> None:
        async with admin_client(self.kafka) as admin:
            await admin.delete_topics([self.names.deltas])
            while self.names.deltas in await admin.list_topics():
                await asyncio.sleep(0.1)

    async def create(self) -> None:
        async with admin_client(self.kafka) as admin:
            await admin.create_topics([NewTopic(self.names.deltas, 1, 1)])

            async def there() -> bool:
                return self.names.deltas in await admin.list_topics()

            await until(there)


def shown(found: FoundDelta | DeltaProblem) -> Any:
    if isinstance(found, DeltaProblem):
        return found.reason
    return int(found.delta.header.chain.split("/")[1]), found.delta.header.sequence


@asynccontextmanager
async def scene(settings: Settings) -> AsyncIterator[Scene]:
    made = Scene(settings)
    try:
        yield made
    finally:
        for each in made.opened:
            await each.close()
