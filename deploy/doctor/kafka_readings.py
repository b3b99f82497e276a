"""Reads what the doctor examines, from Kafka and the snapshot store. Never writes, commits nothing, joins no group.

The amount read of a topic is bounded: the newest `sample` records over all partitions, and single records at offsets of
interest, for their arrival times.

This file is long because one reader, with one consumer, reads it all.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from deploy.doctor.readings import Committed, LogReading, Partition, Readings, SampledLetter, Tail
from deploy.doctor.track_readings import read_challengers, read_tracks
from deploy.settings import Settings
from state.errors import SnapshotError
from state.registry import RegistryState
from state.store import SnapshotStore
from stream.errors import StreamError
from stream.join.commit_metadata import decode_progress
from stream.kafka.clients import kafka_python_options
from stream.kafka.offsets import committed_offsets
from stream.kafka.read_log import Span, first_records, high_watermarks, log_consumer, log_spans, read_spans
from stream.records.dead_letter import read_letter
from stream.records.delta import DeltaDamaged, read_piece
from stream.records.delta_assembly import DeltaAssembly
from stream.records.heartbeat import Heartbeat
from stream.records.record import Record
from stream.records.watermark import WATERMARK_HEADER
from stream.registry.heartbeat import HeartbeatReader
from stream.registry.log import read_registry
from stream.topics.admin import Found, differences, find_topics
from stream.topics.contract import topic_contracts
from stream.topics.names import TopicNames

if TYPE_CHECKING:
    from kafka.admin import KafkaAdminClient

__all__ = ["read_everything"]

# The topics whose logs are measured, by short name: the name of TopicNames' attribute, with dashes.
MEASURED = ("impressions", "clicks", "examples", "score-requests", "dead-letters", "deltas")
# Records at the end of `deltas` in which the newest delta is looked for: up to a megabyte each. A delta has two or three.
LAST_DELTAS = 16
STALL_S = 20.0  # longest wait in which no broker sends anything
FIRST_S = 10.0  # limit for single records; the arrival of a record that takes longer stays unknown
# A new cluster creates its groups' coordinators at the first request, which takes a while.
COORDINATOR_S, RETRY_S = 10.0, 0.3


class _Event(msgspec.Struct):
    """An event's time: any that 64 bits hold, also one that the join rejects, so that the doctor can show how far it is off."""

    timestamp: Annotated[int, msgspec.Meta(ge=0, le=2**62)]


_decoder = msgspec.json.Decoder(_Event)


async def read_everything(settings: Settings, *, sample: int) -> Readings:
    """Read the state of the system at this moment.

    Args:
        sample: records read from the ends of impressions, clicks and dead-letters each, over all partitions together.

    Raises:
        NoAnswer: Kafka can't be reached.
        TopicError: the configuration of a topic may not be read.
    """
    main = TopicNames.of(settings.topics)
    tracks = await read_tracks(settings.kafka, main)
    track = tracks.serving.track
    names = main.of_track(track)
    settings = settings.model_copy(update={"snapshots": settings.snapshots.on_track(track)})
    found = await asyncio.to_thread(find_topics, settings.kafka, settings.topics, track)
    shorts = {_full(names, short): short for short in MEASURED}
    there = {shorts[name]: topic for name, topic in found.items() if name in shorts}
    readings = Readings(
        now_ms=time.time_ns() // 1_000_000,
        join_settings=settings.join,
        snapshots=settings.snapshots,
        prefix=names.prefix,
        differences=differences(topic_contracts(settings.topics, track), found),
        track=track,
        challengers=await read_challengers(settings.kafka, main, tracks),
        partitions={short: topic.partitions for short, topic in there.items()},
        configs={short: topic.configs for short, topic in there.items()},
    )
    reader = _Reader(settings, names, there, set(found))
    try:
        return await reader.read(readings, sample)
    finally:
        await reader.close()


class _Reader:
    """Reads everything with one consumer. Keeps a list of what could not be read."""

    def __init__(self, settings: Settings, names: TopicNames, there: Mapping[str, Found], every: Set[str]) -> None:
        self._settings, self._names, self._all = settings, names, every
        self._partitions = [(short, number) for short, topic in there.items() for number in range(topic.partitions)]
        self._consumer: AIOKafkaConsumer = None
        self._unread: list[str] = []
        self._unread_positions: set[str] = set()

    async def read(self, readings: Readings, sample: int) -> Readings:
        self._consumer = log_consumer(self._settings.kafka)
        await self._consumer.start()
        logs = await self._logs()
        offsets_retention_ms, members = await asyncio.to_thread(self._admin)
        registry = await self._registry()
        readings = replace(
            readings,
            logs=logs,
            offsets_retention_ms=offsets_retention_ms,
            members=members,
            committed=await self._committed(),
            scorer=await self._scorer(),
            registry=registry or RegistryState(),
            scorers=await self._scorers(),
            trainer={} if registry is None else self._trainer(registry),
            learned=await self._learned(logs),
            tails=await self._tails(logs, sample),
            letters=await self._letters(logs, sample),
        )
        readings = replace(readings, learned=_further(readings.learned, readings.trainer))
        arrivals = await self._first_records(logs, _offsets_of_interest(readings))
        return replace(
            readings,
            arrivals=arrivals,
            open_since_ms=await self._open(logs),
            unread=self._unread,
            unread_positions=self._unread_positions,
        )

    async def close(self) -> None:
        if self._consumer is not None:
            await self._consumer.stop()

    def _tp(self, partition: Partition) -> TopicPartition:
        return TopicPartition(_full(self._names, partition[0]), partition[1])

    async def _logs(self) -> dict[Partition, LogReading]:
        partitions = {self._tp(partition): partition for partition in self._partitions}
        if not partitions:
            return {}
        logs = await log_spans(self._settings.kafka, self._consumer, list(partitions))
        ends = await high_watermarks(self._settings.kafka, list(partitions))
        return {partition: LogReading(logs[tp].start, logs[tp].end, ends[tp]) for tp, partition in partitions.items()}

    def _admin(self) -> tuple[int | None, dict[str, int]]:
        """How long brokers keep committed offsets (ms), and the number of members of each group.

        By kafka-python, since aiokafka can't decode the members.
        """
        from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
        from kafka.errors import KafkaError as AdminError

        admin = KafkaAdminClient(**kafka_python_options(self._settings.kafka))
        try:
            brokers = [str(broker["broker_id"]) for broker in admin.describe_cluster()["brokers"]]
            try:
                resource = ConfigResource(ConfigResourceType.BROKER, brokers[0])
                configs = admin.describe_configs([resource], config_filter="all")["broker"][brokers[0]]
                retention_ms = int(configs["offsets.retention.minutes"]["value"]) * 60_000
            except (AdminError, KeyError) as error:
                self._unread.append(f"the brokers' configuration: {error!r}")
                retention_ms = None
            return retention_ms, self._members(admin)
        finally:
            admin.close()

    def _members(self, admin: KafkaAdminClient) -> dict[str, int]:
        from kafka.errors import KafkaError as AdminError

        groups = {worker: self._group(worker) for worker in ("join", "trainer", "scorer")}
        deadline = time.monotonic() + COORDINATOR_S
        while True:
            try:
                described = admin.describe_groups(list(groups.values()))
                return {worker: len(described[group]["members"]) for worker, group in groups.items()}
            except AdminError as error:
                if time.monotonic() > deadline:
                    self._unread.append(f"who is in the consumer groups: {error!r}")
                    return {}
                time.sleep(RETRY_S)

    def _group(self, worker: str) -> str:
        suffix = self._names.suffix if worker == "trainer" else ""
        return f"{self._names.prefix}{getattr(self._settings, worker).group}{suffix}"

    async def _offsets(self, worker: str, shorts: Iterable[str]) -> dict[Partition, OffsetAndMetadata]:
        partitions = {self._tp(partition): partition for partition in self._partitions if partition[0] in shorts}
        if not partitions:
            return {}
        try:
            found = await committed_offsets(self._settings.kafka, self._group(worker), list(partitions))
        except (KafkaError, StreamError) as error:
            self._unread.append(f"what {self._group(worker)} has committed: {error!r}")
            self._unread_positions.add(worker)
            return {}
        return {partitions[tp]: at for tp, at in found.items()}

    async def _committed(self) -> dict[int, Committed]:
        found = await self._offsets("join", ("impressions", "clicks"))
        committed = {}
        for number in {number for _, number in found}:
            impressions, clicks = found.get(("impressions", number)), found.get(("clicks", number))
            progress = None
            if impressions is not None and impressions.metadata:
                try:
                    progress = decode_progress(impressions.metadata)
                except msgspec.DecodeError:
                    self._unread.append(f"the join's progress in partition {number}: {impressions.metadata[:80]!r}")
            committed[number] = Committed(_offset(impressions), _offset(clicks), progress)
        return committed

    async def _scorer(self) -> dict[int, int]:
        found = await self._offsets("scorer", ("score-requests",))
        return {number: at.offset for (_, number), at in found.items()}

    async def _registry(self) -> RegistryState | None:
        try:
            return await read_registry(self._settings.kafka, self._names)
        except (KafkaError, StreamError) as error:
            self._not_read("the registry of versions", error)
            self._unread_positions.add("trainer")
            return None

    async def _scorers(self) -> list[Heartbeat]:
        if self._names.scorers not in self._all:
            return []
        try:
            async with HeartbeatReader(self._settings.kafka, self._names, every_track=True) as scorers:
                return await scorers.live()
        except (KafkaError, StreamError) as error:
            self._not_read("the scorers' heartbeats", error)
            return []

    def _trainer(self, registry: RegistryState) -> dict[int, int]:
        """The offsets of the newest version that is announced and in the store. A trainer that starts goes on from there."""
        if not registry.versions:
            return {}
        try:
            store = SnapshotStore(self._settings.snapshots)
            there = registry.versions.keys() & set(store.versions())
            if not there:
                raise SnapshotError(f"none of the announced versions is in {store.url}")
            manifest = store.manifest(max(there))
        except SnapshotError as error:
            self._not_read("the trainer's offsets", error)
            self._unread_positions.add("trainer")
            return {}
        return {int(number): offset for number, offset in manifest.offsets.items()}

    async def _learned(self, logs: Mapping[Partition, LogReading]) -> dict[int, int]:
        """The offsets up to which the newest delta has learned; none where the last records of `deltas` begin no delta."""
        learned: dict[int, int] = {}
        for records in (await self._newest(logs, "deltas", LAST_DELTAS)).values():
            for record in records:
                try:
                    piece = read_piece(record.value)
                    header = DeltaAssembly(piece).header if piece.piece == 0 else None
                except DeltaDamaged:
                    continue
                if header is not None:
                    learned = {int(number): offset for number, offset in header.offsets.items()}
        return learned

    def _not_read(self, what: str, error: Exception) -> None:
        self._unread.append(f"{what}: {repr(error) if isinstance(error, KafkaError) else error}")

    async def _newest(self, logs: Mapping[Partition, LogReading], short: str, sample: int) -> dict[Partition, list[Record]]:
        """The last records of a topic, by partition."""
        partitions = {self._tp(partition): partition for partition in logs if partition[0] == short}
        share = max(sample // max(len(partitions), 1), 1)
        spans = {
            tp: Span(max(logs[partition].start, logs[partition].stable_end - share), logs[partition].stable_end)
            for tp, partition in partitions.items()
        }
        records: dict[Partition, list[Record]] = defaultdict(list)
        async for tp, run in read_spans(self._consumer, spans, stall_s=STALL_S):
            records[partitions[tp]] += run
        return {partition: records[partition] for partition in partitions.values()}

    async def _tails(self, logs: Mapping[Partition, LogReading], sample: int) -> dict[Partition, Tail]:
        tails = {}
        for short in ("impressions", "clicks"):
            for partition, records in (await self._newest(logs, short, sample)).items():
                events = [record for record in records if record.value or WATERMARK_HEADER not in dict(record.headers)]
                tails[partition] = Tail(
                    offsets=np.array([record.offset for record in events], np.int64),
                    keys=[record.key for record in events],
                    arrived_ms=np.array([record.timestamp for record in events], np.int64),
                    event_ms=np.array([_event_ms(record.value) for record in events], np.int64),
                    headers=[record.headers for record in events],
                )
        return tails

    async def _letters(self, logs: Mapping[Partition, LogReading], sample: int) -> list[SampledLetter]:
        shorts = {_full(self._names, short): short for short in MEASURED}
        letters = []
        for records in (await self._newest(logs, "dead-letters", sample)).values():
            for letter in filter(None, map(read_letter, records)):
                short = shorts.get(letter.origin.topic)
                if short is not None:
                    letters.append(SampledLetter(letter.reason, (short, letter.origin.partition), letter.origin.offset))
        return letters

    async def _first_records(
        self, logs: Mapping[Partition, LogReading], wanted: Mapping[Partition, set[int]]
    ) -> dict[tuple[str, int, int], int]:
        """The arrival of the first record at or after each offset. One round reads one offset of every partition."""
        arrivals = {}
        left = {partition: sorted(offsets) for partition, offsets in wanted.items()}
        while left:
            partitions = {self._tp(partition): partition for partition in left}
            for tp, record in (
                await self._first(
                    self._consumer,
                    {tp: Span(left[partition][0], logs[partition].stable_end) for tp, partition in partitions.items()},
                )
            ).items():
                arrivals[*partitions[tp], left[partitions[tp]][0]] = record.timestamp
            left = {partition: offsets[1:] for partition, offsets in left.items() if offsets[1:]}
        return arrivals

    async def _open(self, logs: Mapping[Partition, LogReading]) -> dict[Partition, int]:
        """For each log whose committed readers stop before its end: when the transaction began that they stop at."""
        stopped = {self._tp(partition): partition for partition, log in logs.items() if log.stable_end < log.end}
        if not stopped:
            return {}
        consumer = log_consumer(self._settings.kafka, committed=False)
        await consumer.start()
        try:
            first = await self._first(
                consumer, {tp: Span(logs[partition].stable_end, logs[partition].end) for tp, partition in stopped.items()}
            )
        finally:
            await consumer.stop()
        return {stopped[tp]: record.timestamp for tp, record in first.items()}

    async def _first(self, consumer: AIOKafkaConsumer, spans: Mapping[TopicPartition, Span]) -> dict[TopicPartition, Record]:
        """The first record of each span. Spans of markers only are left out, and partitions whose broker doesn't answer."""
        first = await first_records(consumer, spans, within_s=FIRST_S)
        for tp in sorted(spans.keys() - first.keys()):
            self._unread.append(f"{tp.topic}-{tp.partition} from offset {spans[tp][0]}: no answer within {FIRST_S:.0f} s")
        return {tp: record for tp, record in first.items() if record is not None}


def _offsets_of_interest(readings: Readings) -> dict[Partition, set[int]]:
    """Offsets for which the checks need a record's arrival. Only offsets before the end: no record is at the others."""
    wanted: dict[Partition, set[int]] = defaultdict(set)

    def add(topic: str, number: int, offset: int | None) -> None:
        log = readings.logs.get((topic, number))
        if log is not None:
            at = log.start if offset is None else max(offset, log.start)
            if at < log.stable_end:
                wanted[topic, number].add(at)

    for number in range(readings.partitions.get("impressions", 0)):
        committed = readings.committed.get(number, Committed(None, None, None))
        add("impressions", number, committed.impressions)
        add("clicks", number, committed.clicks)
        if committed.progress is not None:
            add("impressions", number, committed.progress.impressions_low)
            add("clicks", number, committed.progress.clicks_low)
            add("examples", number, committed.progress.examples_low)
    for number in range(readings.partitions.get("examples", 0)):
        add("examples", number, readings.trainer.get(number))
        add("examples", number, readings.learned.get(number))
    for number in range(readings.partitions.get("score-requests", 0)):
        add("score-requests", number, readings.scorer.get(number))
    return wanted


def _further(learned: Mapping[int, int], trainer: Mapping[int, int]) -> dict[int, int]:
    """The offsets of the newest delta, unless the newest version is further: deltas may be withheld, or of an older line."""
    further = all(offset >= trainer.get(number, 0) for number, offset in learned.items())
    return dict(learned) if further else {}


def _full(names: TopicNames, short: str) -> str:
    full = getattr(names, short.replace("-", "_"))
    assert isinstance(full, str)
    return full


def _offset(committed: OffsetAndMetadata | None) -> int | None:
    return None if committed is None else int(committed.offset)


def _event_ms(value: bytes | None) -> int:
    try:
        return _decoder.decode(value or b"").timestamp
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return -1
