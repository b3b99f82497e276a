"""What each scorer says of itself: which version it serves and how far it has read the registry.

A heartbeat is one record on `scorers`, keyed by worker id; a tombstone says that the worker stopped by itself. Each heartbeat
carries the interval at which its worker sends them, and a worker whose last one is older than three of its own intervals
(`live_limit_ms`) is taken for dead. Ages are told by the records' own timestamps (the broker's clock), so that a reader whose
clock is off doesn't take the living for dead.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import msgspec

from stream.errors import NoAnswer, TopicError
from stream.kafka.clients import STOP_S, aiokafka_options, answer, no_answer, quietly_stopped, started
from stream.records.heartbeat import (
    DEFAULT_HEARTBEAT_MS,
    Heartbeat,
    encode_heartbeat,
    live_limit_ms,
    read_heartbeat,
    worker_of,
)
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["Confirmation", "HeartbeatReader", "HeartbeatSender"]

# Looking starts this many records before the end of each partition: at one a second from each of 100 scorers that is more
# than a minute, several times any sensible lease, and it reads in a fraction of a second however long the topic is.
TAIL_RECORDS = 10_000
# A fetch with nothing to bring is answered after this long; records are brought at once.
FETCH_WAIT_MS = 100
# Characters of a reason, which quotes paths and errors: a heartbeat goes out every second.
MAX_REASON = 300


class Confirmation(msgspec.Struct, frozen=True, kw_only=True):
    """A scorer that serves the version asked for; `after_ms` since the wait began."""

    worker: str
    after_ms: float


class HeartbeatSender:
    """A scorer's own heartbeats. `send` when something changed, and every `scorer.heartbeat_ms` besides."""

    def __init__(
        self,
        kafka: KafkaSettings,
        names: TopicNames,
        *,
        worker: str,
        host: str | None = None,
        heartbeat_ms: int = DEFAULT_HEARTBEAT_MS,
    ) -> None:
        self._kafka = kafka
        self._topic = names.scorers
        self._worker, self._heartbeat_ms = worker, heartbeat_ms
        self._host = host or socket.gethostname()
        self._producer: Any = None

    async def start(self) -> None:
        """Connect.

        Raises:
            NoAnswer: Kafka can't be reached.
        """
        from aiokafka import AIOKafkaProducer
        from aiokafka.errors import KafkaError

        producer = AIOKafkaProducer(**aiokafka_options(self._kafka), acks="all", enable_idempotence=True)
        try:
            self._producer = await started(self._kafka, producer, "a producer of heartbeats")
        except (KafkaError, NoAnswer) as error:
            raise no_answer(self._kafka, "the scorers", error) from error

    async def send(
        self,
        version: int,
        since_ms: int,
        registry_offset: int,
        *,
        stale: bool = False,
        fallback_of: int | None = None,
        fallback_reason: str = "",
    ) -> None:
        """Say what is served now; returns when the brokers have it.

        Raises:
            aiokafka.errors.KafkaError: it didn't get there; the next one may.
            NoAnswer: likewise.
        """
        if self._producer is None:  # closed: the worker ends
            return
        beat = Heartbeat(
            worker=self._worker,
            version=version,
            since_ms=since_ms,
            host=self._host,
            registry_offset=registry_offset,
            at_ms=_now_ms(),
            stale=stale,
            heartbeat_ms=self._heartbeat_ms,
            fallback_of=fallback_of,
            fallback_reason=fallback_reason[:MAX_REASON],
        )
        key, value = encode_heartbeat(beat)
        sent = self._producer.send_and_wait(self._topic, key=key, value=value)
        await answer(self._kafka, sent, "a heartbeat")

    async def close(self) -> None:
        """Leave a tombstone, so that nobody waits for this worker, and disconnect."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        try:
            sent = producer.send_and_wait(self._topic, key=self._worker.encode(), value=None)
            await answer(self._kafka, sent, "a tombstone", within_s=STOP_S)
        finally:
            await quietly_stopped(producer.stop)


class HeartbeatReader:
    """All scorers' heartbeats. Looking writes nothing.

    ```python
    async with HeartbeatReader(settings.kafka, names) as scorers:
        live = await scorers.live()
    ```
    """

    def __init__(self, kafka: KafkaSettings, names: TopicNames) -> None:
        self._kafka = kafka
        self._topic = names.scorers
        self._consumer: Any = None
        self._partitions: list[Any] = []
        self._last: dict[str, tuple[int, Heartbeat | None]] = {}  # worker → record timestamp, None for a clean stop

    async def __aenter__(self) -> HeartbeatReader:
        from aiokafka import AIOKafkaConsumer, TopicPartition
        from aiokafka.errors import KafkaError

        consumer = AIOKafkaConsumer(
            **aiokafka_options(self._kafka),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=FETCH_WAIT_MS,
        )
        try:
            await consumer.start()
            # The public `topics()` is this same call, but drops the partitions' numbers.
            numbers = (await consumer._client.fetch_all_metadata()).partitions_for_topic(self._topic)
            if not numbers:
                raise TopicError(
                    f"topic {self._topic}: expected at {self._kafka.bootstrap_servers}, found none of that name. "
                    "`headrace topics create` makes it; topics.prefix is part of the name."
                )
            partitions = [TopicPartition(self._topic, number) for number in sorted(numbers)]
            first = await consumer.beginning_offsets(partitions)
            end = await consumer.end_offsets(partitions)
            consumer.assign(partitions)
            for partition in partitions:
                consumer.seek(partition, max(first[partition], end[partition] - TAIL_RECORDS))
            self._consumer, self._partitions = consumer, partitions
            await self._read_to(end)
        except KafkaError as error:
            await consumer.stop()
            raise no_answer(self._kafka, "the scorers", error) from error
        except BaseException:
            await consumer.stop()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        consumer, self._consumer = self._consumer, None
        await consumer.stop()

    async def live(self, *, now_ms: int | None = None) -> list[Heartbeat]:
        """The scorers that are alive at `now_ms` on the broker's clock (default: this machine's), by worker id."""
        await self._read_to(await self._consumer.end_offsets(self._partitions))
        return self._alive(_now_ms() if now_ms is None else now_ms)

    async def wait_for_confirmations(
        self, registry_offset: int, version: int, timeout_ms: int, *, now_ms: int | None = None
    ) -> tuple[list[Confirmation], list[Heartbeat]]:
        """Wait until every live scorer has read the registry to `registry_offset` and serves `version`.

        Args:
            registry_offset: the position after the change (`Written.position`), so that no older heartbeat confirms it.
            now_ms: the broker's clock at the change (`Written.at_ms`): who was alive then must confirm, and who comes
                later too. A scorer that leaves a tombstone meanwhile is no longer waited for.

        Returns:
            Who confirmed and when, and the last heartbeat of who did not.
        """
        began = time.monotonic()
        began_ms = _now_ms() if now_ms is None else now_ms
        # Who started since this reader was opened must be waited for too. The scorers are swapping meanwhile.
        await self.live()
        confirmed: dict[str, Confirmation] = {}
        while True:
            elapsed_ms = (time.monotonic() - began) * 1_000
            # Judged by the moment of the change: a scorer that dies while we wait stays unconfirmed, not forgotten.
            alive = {beat.worker: beat for beat in self._alive(began_ms)}
            for worker, beat in alive.items():
                if beat.registry_offset >= registry_offset and beat.version == version and not beat.stale:
                    confirmed.setdefault(worker, Confirmation(worker=worker, after_ms=round(elapsed_ms, 1)))
            missing = [beat for worker, beat in alive.items() if worker not in confirmed]
            if not missing or elapsed_ms >= timeout_ms:
                return list(confirmed.values()), missing
            await self._poll(min(100, max(1, int(timeout_ms - elapsed_ms))))

    def _alive(self, now_ms: int) -> list[Heartbeat]:
        beats = [(at_ms, beat) for at_ms, beat in self._last.values() if beat is not None]
        alive = (beat for at_ms, beat in beats if now_ms - at_ms <= live_limit_ms(beat))
        return sorted(alive, key=lambda beat: beat.worker)

    async def _read_to(self, end: dict[Any, int]) -> None:
        while any([await self._consumer.position(each) < end[each] for each in self._partitions]):
            await self._poll(10)

    async def _poll(self, timeout_ms: int) -> None:
        batches = await self._consumer.getmany(*self._partitions, timeout_ms=timeout_ms)
        for records in batches.values():
            for record in records:
                worker = worker_of(record)
                try:
                    beat = read_heartbeat(record)
                except ValueError:
                    continue  # a newer or foreign writer's; the worker counts by its last readable one
                self._last[worker] = (record.timestamp, beat)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
