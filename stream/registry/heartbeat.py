"""Heartbeats: each scorer reports which version it serves and how far it has read the registry.

A heartbeat is one record on `scorers`, keyed by worker id. A tombstone means that the worker stopped by itself. Each heartbeat
carries the interval at which its worker sends them. A worker whose last heartbeat is older than three of its own intervals and
two seconds (`live_limit_ms`) counts as dead. Ages go by the records' timestamps and by Kafka's time
(`stream.registry.kafka_clock`): neither a scorer's clock nor that of the machine that asks decides who is alive.

A scorer may also stand still for longer than that, and go on: a machine that was paused, a process that was stopped. Nobody
waits for it, but for `SILENT_MS` it is named (`silent`). Before it answers again it reads the registry
(`stream.scorer.standstill`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec.structs import replace

from state.tracks import MAIN
from stream.errors import NoAnswer
from stream.kafka.clients import STOP_S, aiokafka_options, answer, quietly_stopped, started, unreachable
from stream.kafka.cluster import missing_topic
from stream.kafka.quick import started_quickly
from stream.kafka.read_log import Positions, read_to
from stream.records.heartbeat import (
    DEFAULT_HEARTBEAT_MS,
    Heartbeat,
    Mark,
    ShadowBeat,
    encode_heartbeat,
    live_limit_ms,
    read_heartbeat,
    worker_of,
)
from stream.records.record import Record
from stream.records.times import duration
from stream.registry.kafka_clock import KafkaClock
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

__all__ = ["Confirmation", "Confirmations", "HeartbeatReader", "HeartbeatSender", "Silent", "Weights"]

logger = logging.getLogger(__name__)

# What was asked for, in the error of a Kafka that can't be reached.
ANSWER = "an answer about the scorers"
# Reading starts this many records before the end of each partition. With 100 scorers and one heartbeat a second from each, that
# is 100 s: several times any sensible lease. It takes a fraction of a second, however long the topic is.
TAIL_RECORDS = 10_000
# Size of one answer: a heartbeat has at most some 800 bytes, so the tail of a partition is one answer.
FETCH_BYTES = 8 << 20
# The broker answers a fetch without new records after this time, a fetch with records at once. A request for the end of the
# topic waits for that answer, since it uses the same connection.
FETCH_WAIT_MS = 20
# Longest single wait for records: while reading to a known end, and while waiting for confirmations.
READ_MS, CONFIRM_MS = 10, 100
# How long a scorer that neither sends heartbeats nor has said goodbye is named. A paused machine or a lost connection is back
# within minutes. A scorer that was killed never is, and would otherwise be named for ever.
SILENT_MS = 300_000
# Longest wait for a heartbeat that shows Kafka's time, where this machine's clock is in doubt. Beyond DOUBT_MS its clock is
# believed: time zones are at most 26 h apart, and heartbeats of scorers that were killed stay in the topic.
HEAR_MS, DOUBT_MS = 3_000, 26 * 3_600_000
# Difference of clocks that is reported. Clocks that are kept by NTP differ by less.
CLOCK_MS = 2_000
# Characters of a reason. Reasons quote paths and errors, and a heartbeat is sent every second.
MAX_REASON = 300


class Confirmation(msgspec.Struct, frozen=True, kw_only=True):
    """A scorer that serves the wanted version. `after_ms` counts from the beginning of the wait."""

    worker: str
    after_ms: float


class Silent(NamedTuple):
    """A scorer that stands still or was killed: its last heartbeat, and how long ago that was, by Kafka's clock."""

    beat: Heartbeat
    for_ms: int


class Confirmations(NamedTuple):
    """How a wait for the scorers ended: who confirmed, and the last heartbeat of each scorer that did not."""

    confirmed: list[Confirmation]
    missing: list[Heartbeat]


class Weights(NamedTuple):
    """What a heartbeat says of the weights that answer, besides their version. The fields are those of `Heartbeat`."""

    following: bool = False
    chain: str = ""
    digest: str = ""
    delta: int = 0
    age_ms: int | None = None
    marks: tuple[Mark, ...] = ()
    problem: str = ""


class _Last(NamedTuple):
    """A worker's last record that can be read: its timestamp (the broker's clock), and the heartbeat; None for a tombstone."""

    at_ms: int
    beat: Heartbeat | None


class HeartbeatSender:
    """Sends one scorer's heartbeats. Call `send` when something has changed, and every `scorer.heartbeat_ms`."""

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
        self._producer: AIOKafkaProducer = None

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
            raise unreachable(self._kafka, ANSWER, error) from error

    async def send(
        self,
        version: int,
        since_ms: int,
        registry_offset: int,
        *,
        stale: bool = False,
        fallback_of: int | None = None,
        fallback_reason: str = "",
        weights: Weights | None = None,
        candidate: int | None = None,
        candidate_problem: str = "",
        track: str = MAIN,
        main_offset: int = 0,
        shadows: tuple[ShadowBeat, ...] = (),
    ) -> None:
        """Send one heartbeat. Returns when the brokers have it; does nothing after `close`.

        Raises:
            aiokafka.errors.KafkaError: it wasn't written. The next one may be.
            NoAnswer: likewise.
        """
        if self._producer is None:
            return
        weights = weights or Weights()
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
            following=weights.following,
            chain=weights.chain,
            sequence=weights.marks[-1].sequence if weights.marks else None,
            digest=weights.digest,
            delta=weights.delta,
            weights_age_ms=weights.age_ms,
            marks=weights.marks,
            problem=weights.problem[:MAX_REASON],
            candidate=candidate,
            candidate_problem=candidate_problem[:MAX_REASON],
            track=track,
            main_offset=main_offset,
            shadows=tuple(replace(each, problem=each.problem[:MAX_REASON]) for each in shadows),
        )
        key, value = encode_heartbeat(beat)
        sent = self._producer.send_and_wait(self._topic, key=key, value=value)
        await answer(self._kafka, sent, "a heartbeat")

    async def close(self) -> None:
        """Send a tombstone, so that nobody waits for this worker, and disconnect."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        try:
            sent = producer.send_and_wait(self._topic, key=self._worker.encode(), value=None)
            await answer(self._kafka, sent, "a tombstone", within_s=STOP_S)
        finally:
            await quietly_stopped(producer.stop)


class HeartbeatReader:
    """Reads the heartbeats of the scorers that answer with a track. Writes nothing.

    ```python
    async with HeartbeatReader(settings.kafka, names) as scorers:
        live = await scorers.live()
    ```

    Args:
        names: of the track.
        every_track: read those of all scorers, whatever they answer with.
    """

    def __init__(self, kafka: KafkaSettings, names: TopicNames, *, every_track: bool = False) -> None:
        self._kafka = kafka
        self._track = None if every_track else names.track
        self._topic = names.scorers
        self._consumer: AIOKafkaConsumer = None
        self._partitions: list[TopicPartition] = []
        self._last: dict[str, _Last] = {}  # by worker
        self._clock = KafkaClock()
        self._has_warned = False

    async def __aenter__(self) -> HeartbeatReader:
        from aiokafka import AIOKafkaConsumer, TopicPartition
        from aiokafka.errors import KafkaError

        consumer = AIOKafkaConsumer(
            **aiokafka_options(self._kafka),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=FETCH_WAIT_MS,
            max_partition_fetch_bytes=FETCH_BYTES,
        )
        try:
            await started_quickly(consumer, [self._topic])
            numbers = consumer.partitions_for_topic(self._topic)
            if not numbers:
                raise missing_topic(self._kafka, self._topic)
            partitions = [TopicPartition(self._topic, number) for number in sorted(numbers)]
            first, end = await asyncio.gather(consumer.beginning_offsets(partitions), consumer.end_offsets(partitions))
            consumer.assign(partitions)
            for partition in partitions:
                consumer.seek(partition, max(first[partition], end[partition] - TAIL_RECORDS))
            self._consumer, self._partitions = consumer, partitions
            await self._read_to(end)
        except KafkaError as error:
            await consumer.stop()
            raise unreachable(self._kafka, ANSWER, error) from error
        except BaseException:
            await consumer.stop()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        consumer, self._consumer = self._consumer, None
        await consumer.stop()

    async def live(self, *, now_ms: int | None = None) -> list[Heartbeat]:
        """The last heartbeats of the scorers that are alive, ordered by worker id.

        Args:
            now_ms: now by the broker's clock, where it is known.
        """
        await self._read_to(await self._consumer.end_offsets(self._partitions))
        return self._alive(await self.now_ms() if now_ms is None else now_ms)

    def silent(self, now_ms: int | None = None) -> list[Silent]:
        """Scorers that send no heartbeats and haven't said goodbye, ordered by worker id. Reads nothing.

        Args:
            now_ms: as for `live`; scorers that have sent one since then aren't silent.
        """
        now_ms = self._clock.now_ms() if now_ms is None else now_ms
        found = [
            Silent(last.beat, now_ms - last.at_ms)
            for last in self._last.values()
            if last.beat is not None
            and live_limit_ms(last.beat) < now_ms - last.at_ms <= SILENT_MS
            and self._track in (None, last.beat.track)
        ]
        return sorted(found, key=lambda each: each.beat.worker)

    async def now_ms(self) -> int:
        """Kafka's time. Where this machine's clock may be ahead of it, waits for a heartbeat, which shows it."""
        local_ms = _now_ms()
        beating = [
            last.beat.heartbeat_ms for last in self._last.values() if last.beat is not None and local_ms - last.at_ms < DOUBT_MS
        ]
        if beating and self._clock.is_doubtful(min(beating)):
            within_ms = min(2 * min(beating), HEAR_MS)
            fetched = await self._consumer.getmany(*self._partitions, timeout_ms=within_ms)
            for records in fetched.values():
                self._note(records, prompt=True)
        off_ms = _now_ms() - self._clock.now_ms()
        if abs(off_ms) > CLOCK_MS and not self._has_warned:
            self._has_warned = True
            how = "ahead of" if off_ms > 0 else "behind"
            logger.warning("this machine's clock is %s %s Kafka's. Kafka's is used", duration(abs(off_ms)), how)
        return self._clock.now_ms()

    async def wait_for_confirmations(
        self,
        registry_offset: int,
        version: int,
        timeout_ms: int,
        *,
        follows: bool = False,
        alone: bool = False,
        now_ms: int | None = None,
    ) -> Confirmations:
        """Wait until every live scorer has read the registry to `registry_offset` and serves `version`.

        Args:
            registry_offset: the position after the change (`Written.position`), so that no older heartbeat confirms the change.
            timeout_ms: longest wait.
            follows: a scorer that follows the chain of `version` confirms too, whatever version its weights are named by.
            alone: a scorer that has a candidate beside it doesn't confirm yet.
            now_ms: the broker's clock at the change (`Written.at_ms`). Scorers that were alive then must confirm, and so must
                those that start later. A scorer that sends a tombstone during the wait is no longer waited for.
        """
        began = time.monotonic()
        # Scorers that have started since this reader was opened must confirm too.
        await self.live(now_ms=now_ms)
        began_ms = await self.now_ms() if now_ms is None else now_ms
        confirmed: dict[str, Confirmation] = {}
        while True:
            elapsed_ms = (time.monotonic() - began) * 1_000
            # Alive at the moment of the change: a scorer that dies during the wait is listed as missing, not left out.
            alive = {beat.worker: beat for beat in self._alive(began_ms)}
            for worker, beat in alive.items():
                serves = beat.following if follows and beat.following else beat.version == version and not beat.following
                serves = serves and not (alone and beat.candidate is not None)
                if beat.registry_offset >= registry_offset and serves and not beat.stale:
                    confirmed.setdefault(worker, Confirmation(worker=worker, after_ms=round(elapsed_ms, 1)))
            missing = [beat for worker, beat in alive.items() if worker not in confirmed]
            if not missing or elapsed_ms >= timeout_ms:
                return Confirmations(list(confirmed.values()), missing)
            fetched = await self._consumer.getmany(
                *self._partitions, timeout_ms=min(CONFIRM_MS, max(1, int(timeout_ms - elapsed_ms)))
            )
            for records in fetched.values():
                self._note(records)

    def _alive(self, now_ms: int) -> list[Heartbeat]:
        alive = (
            last.beat
            for last in self._last.values()
            if last.beat is not None
            and now_ms - last.at_ms <= live_limit_ms(last.beat)
            and self._track in (None, last.beat.track)
        )
        return sorted(alive, key=lambda beat: beat.worker)

    async def _read_to(self, ends: Positions) -> None:
        async for _, records in read_to(self._consumer, ends, poll_ms=READ_MS):
            self._note(records)

    def _note(self, records: Sequence[Record], *, prompt: bool = False) -> None:
        if records:
            self._clock.note(max(record.timestamp for record in records), prompt=prompt)
        # Backwards, since only the last one of each worker counts: most of the tail needn't be decoded.
        seen: set[bytes | None] = set()
        for record in reversed(records):
            if record.key in seen:
                continue
            try:
                beat = read_heartbeat(record)
            except ValueError:
                continue  # from a newer or foreign writer. The worker's last readable heartbeat counts
            seen.add(record.key)
            self._last[worker_of(record)] = _Last(record.timestamp, beat)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
