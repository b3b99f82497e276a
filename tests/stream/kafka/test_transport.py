"""What the run transport promises, on the real Kafka: no record left out, none twice, bounded memory, nothing committed."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import defaultdict
from types import SimpleNamespace

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.consumer.fetcher import READ_COMMITTED
from aiokafka.errors import NoOffsetForPartitionError
from aiokafka.structs import OffsetAndMetadata, TopicPartition
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from stream.kafka import transport
from stream.kafka.batches import BATCH_BYTES, send_batches
from stream.kafka.clients import aiokafka_options
from stream.kafka.transport import (
    FETCH_MAX_BYTES,
    FETCH_MAX_WAIT_MS,
    FETCH_TOTAL_BYTES,
    LogEnd,
    Run,
    _ConsumerThread,
)
from stream.topics.names import TopicNames
from tests.stream.kafka.probe import assert_contiguous, log_ends, probing, producing, send


def test_a_batch_that_is_full_says_so_and_nothing_is_left_out(topics):
    async def check() -> None:
        topic, keys = TopicNames.of(topics.topics).impressions, [b"%d" % index for index in range(5)]
        async with producing(topics) as producer:
            builder = producer.create_batch()
            records = [(key, b"x" * (BATCH_BYTES // 2), []) for key in keys]
            taken = [builder.append(timestamp=0, key=key, value=value, headers=[]) is not None for key, value, _ in records]
            assert taken == [True, False, False, False, False]
            futures = await send_batches(producer, topic, 0, records)
            assert [(await future).offset for future in futures] == [0, 1, 2, 3, 4]
        async with probing(topics) as probe:
            await probe.until(lambda: probe.wanted[TP(topic, 0)] == 5)
            assert probe.keys(0) == keys

    asyncio.run(check())


def test_fetches_read_committed_and_wait_as_set(topics):
    async def check() -> None:
        async with probing(topics) as probe:
            consumer = probe.app.consumer._thread._ensure_consumer()
            fetcher = consumer._fetcher
            assert fetcher._isolation_level == READ_COMMITTED
            assert fetcher._fetch_max_wait_ms == FETCH_MAX_WAIT_MS
            assert fetcher._max_partition_fetch_bytes == FETCH_MAX_BYTES
            assert fetcher._fetch_max_bytes == FETCH_TOTAL_BYTES
            assert consumer._enable_auto_commit is False

    asyncio.run(check())


def test_runs_are_contiguous_over_markers_and_aborted_transactions(topics):
    async def check() -> None:
        random_ = random.Random(5)
        committed: dict[int, list[bytes]] = {0: [], 1: []}
        async with probing(topics) as probe, producing(topics, f"{topics.topics.prefix}t") as producer:
            for batch in range(60):
                keys = [b"%d-%d" % (batch, index) for index in range(random_.randint(1, 300))]
                abort = random_.random() < 0.4
                await producer.begin_transaction()
                for number in random_.choice([(0,), (1,), (0, 1)]):
                    await send(producer, probe.topic, number, keys)
                    if not abort:
                        committed[number] += keys
                await (producer.abort_transaction() if abort else producer.commit_transaction())
            # The log ends with something that no record will show.
            await producer.begin_transaction()
            for number in (0, 1):
                await send(producer, probe.topic, number, [b"never seen"])
            await producer.abort_transaction()
            ends = await log_ends(topics, probe.topic)
            await probe.until(lambda: all(probe.wanted[TP(probe.topic, number)] == ends[number] for number in (0, 1)))
            for number in (0, 1):
                assert_contiguous(probe.of(number))
                assert probe.keys(number) == committed[number]
                assert ends[number] > len(committed[number])  # there were gaps to get over
                end = probe.app.consumer.log_end(TP(probe.topic, number))
                assert isinstance(end, LogEnd)
                assert end.offset == ends[number]
                assert abs(end.seen_at_ms - time.time() * 1000) < 10_000

    asyncio.run(check())


def test_an_open_transaction_holds_back_what_is_behind_it(topics):
    async def check() -> None:
        prefix = topics.topics.prefix
        async with probing(topics) as probe, producing(topics, f"{prefix}a") as slow, producing(topics, f"{prefix}b") as quick:
            await slow.begin_transaction()
            await send(slow, probe.topic, 0, [b"slow"])
            await quick.begin_transaction()
            await send(quick, probe.topic, 0, [b"quick"])
            await quick.commit_transaction()
            await asyncio.sleep(4 * FETCH_MAX_WAIT_MS / 1000)
            assert probe.keys(0) == []
            await slow.commit_transaction()
            await probe.until(lambda: len(probe.keys(0)) == 2)
            assert probe.keys(0) == [b"slow", b"quick"]

    asyncio.run(check())


def test_a_seek_drops_what_was_fetched_before_it(topics):
    """Back and forth in the middle of traffic: after each seek comes the run that begins there, and none older."""

    async def check() -> None:
        random_ = random.Random(11)
        keys = [b"%d" % index for index in range(30_000)]
        async with producing(topics) as producer:
            for start in range(0, len(keys), 1_000):
                await send(producer, TopicNames.of(topics.topics).impressions, 0, keys[start : start + 1_000])
        async with probing(topics) as probe:
            tp, seeks = TP(probe.topic, 0), 12
            places: list[int] = []

            async def jump(run: Run) -> None:
                if len(places) < seeks and random_.random() < 0.7:
                    places.append(random_.randrange(len(keys)))
                    probe.runs.clear()
                    probe.wanted[tp] = places[-1]
                    await probe.app.consumer.seek_runs({tp: places[-1]})

            probe.after_run = jump
            while len(places) < seeks:
                await probe.until(lambda: len(places) == seeks or probe.wanted[tp] == len(keys))
                if len(places) < seeks:
                    probe.wanted[tp] = 0
                    await probe.app.consumer.seek_runs({tp: 0})
            await probe.until(lambda: probe.wanted[tp] == len(keys))
            assert_contiguous(probe.of(0), places[-1])
            assert probe.keys(0) == keys[places[-1] :]

    asyncio.run(check())


def test_the_last_partition_is_paused_as_a_fetch_begins(topics):
    """Asked for no partition aiokafka takes records of all, which nobody would be handed."""

    async def check() -> None:
        async with probing(topics) as probe, producing(topics) as producer:
            consumer = probe.app.consumer
            await probe.until(lambda: consumer._active_partitions is not None)
            consumer.pause_partitions(set(probe.wanted))
            await asyncio.sleep(1.5)  # the fetch that was under way ends
            await send(producer, probe.topic, 0, [b"0", b"1"])
            thread = consumer._thread
            await probe.until(lambda: bool(thread._ensure_consumer()._fetcher._records))
            assert await thread.call_thread(thread._fetch_records, thread._ensure_consumer(), set(), 0.1) == {}
            await send(producer, probe.topic, 0, [b"2"])
            consumer.resume_partitions(set(probe.wanted))
            await probe.until(lambda: probe.wanted[TP(probe.topic, 0)] == 3)
            assert probe.keys(0) == [b"0", b"1", b"2"]

    asyncio.run(check())


def test_a_partition_that_is_not_sought_yet_is_no_error(monkeypatch):
    """A group that has committed nothing rebalances: aiokafka asks for a position before the seek, and finds none."""

    async def nothing_committed(*arguments: object) -> dict[TP, list[object]]:
        raise NoOffsetForPartitionError(TP("impressions", 1))

    monkeypatch.setattr(driver.AIOKafkaConsumerThread, "_fetch_records", nothing_committed)
    thread = object.__new__(_ConsumerThread)
    thread.run_bytes, thread._unsought_since = SimpleNamespace(have_room=lambda: True), None
    assert asyncio.run(thread._fetch_records(None, {TP("impressions", 1)})) == {}
    thread._unsought_since -= transport.SEEK_PATIENCE_S + 1
    with pytest.raises(NoOffsetForPartitionError):
        asyncio.run(thread._fetch_records(None, {TP("impressions", 1)}))


def test_pausing_in_the_middle_of_traffic_loses_nothing(topics):
    """Also where a fetch is under way for the partition, or its run is fetched and not handed over yet."""

    async def check() -> None:
        random_ = random.Random(3)
        sent: dict[int, list[bytes]] = defaultdict(list)
        pauses = 0
        async with probing(topics) as probe, producing(topics) as producer:

            def pause(number: int) -> None:
                nonlocal pauses
                tp = TP(probe.topic, number)
                if tp in probe.app.consumer._active_partitions:
                    pauses += 1
                    probe.app.consumer.pause_partitions({tp})
                    asyncio.get_running_loop().call_later(
                        random_.uniform(0.0, 0.03), lambda: probe.app.consumer.resume_partitions({tp})
                    )

            async def pause_the_other(run: Run) -> None:
                pause(1 - run.partition)

            async def pause_at_random() -> None:
                while True:
                    await asyncio.sleep(random_.uniform(0.0, 0.02))
                    pause(random_.randrange(2))

            await probe.until(lambda: probe.app.consumer._active_partitions is not None)
            probe.after_run = pause_the_other
            pausing = asyncio.ensure_future(pause_at_random())
            for batch in range(600):
                number = random_.randrange(2)
                keys = [b"%d-%d" % (batch, index) for index in range(random_.randint(1, 100))]
                await send(producer, probe.topic, number, keys)
                sent[number] += keys
                await asyncio.sleep(random_.uniform(0.0, 0.008))
            pausing.cancel()
            probe.after_run = None
            await probe.until(lambda: all(probe.wanted[TP(probe.topic, number)] == len(sent[number]) for number in (0, 1)))
            assert pauses > 100
            for number in (0, 1):
                assert_contiguous(probe.of(number))
                assert probe.keys(number) == sent[number]
            # Had a run been lost, the next one would not have been the one expected: no seek mended anything.
            assert probe.refused == 0

    asyncio.run(check())


def test_faust_commits_nothing(topics):
    """A commit of Faust's would replace our offsets, and erase their metadata."""

    async def check() -> None:
        probe_topic, group = TopicNames.of(topics.topics).impressions, f"{topics.topics.prefix}probe"
        places = [TopicPartition(probe_topic, number) for number in (0, 1)]
        ours = {place: OffsetAndMetadata(3 + place.partition, f"ours {place.partition}") for place in places}
        async with (
            producing(topics) as producer,
            AIOKafkaConsumer(**aiokafka_options(topics.kafka), group_id=group, enable_auto_commit=False) as owner,
        ):
            for number in (0, 1):
                await send(producer, probe_topic, number, [b"%d" % index for index in range(100)])
            owner.assign(places)
            await owner.commit(ours)
            async with probing(topics) as probe:
                probe.app.consumer.commit_interval = 0.1
                await probe.until(lambda: all(len(probe.keys(number)) == 100 for number in (0, 1)))
                for number in (0, 1):
                    await send(producer, probe_topic, number, [b"more"])
                await probe.until(lambda: all(len(probe.keys(number)) == 101 for number in (0, 1)))
                await probe.app.consumer.commit()
                await asyncio.sleep(0.5)
        admin = AIOKafkaAdminClient(**aiokafka_options(topics.kafka))
        await admin.start()
        try:
            found = await admin.list_consumer_group_offsets(group, partitions=places)
        finally:
            await admin.close()
        assert {place: (found[place].offset, found[place].metadata) for place in places} == {
            place: tuple(offset) for place, offset in ours.items()
        }

    asyncio.run(check())


def test_a_backlog_is_bounded_by_bytes(topics, monkeypatch):
    """30 MB wait in the log for an agent that stands still: what is in memory stays below the bounds, and nothing is lost."""
    monkeypatch.setattr(transport, "FETCH_MAX_BYTES", fetch := 200_000)
    monkeypatch.setattr(transport, "FETCH_TOTAL_BYTES", 2 * fetch)
    monkeypatch.setattr(transport, "RUNS_MAX_BYTES", most := 1_000_000)

    async def check() -> None:
        topic, value = TopicNames.of(topics.topics).impressions, b"v" * 20_000
        keys = [b"%d" % index for index in range(750)]
        async with producing(topics) as producer:
            for number in (0, 1):
                for start in range(0, len(keys), 5):
                    rows = [(key, value, []) for key in keys[start : start + 5]]
                    for future in await send_batches(producer, topic, number, rows):
                        await future
        async with probing(topics) as probe:
            thread, held = probe.app.consumer._thread, [0]
            go_on = asyncio.Event()

            async def wait(run: Run) -> None:
                await go_on.wait()
                held.append(thread.run_bytes.alive)
                seen[run.partition] += [record.key for record in run.records]
                probe.runs.clear()

            seen: dict[int, list[bytes]] = {0: [], 1: []}
            probe.after_run = wait
            await probe.until(lambda: bool(probe.runs))
            for _ in range(20):
                await asyncio.sleep(0.05)
                held.append(thread.run_bytes.alive)
            assert probe.runs  # it stands still
            go_on.set()
            await probe.until(lambda: all(probe.wanted[TP(topic, number)] == len(keys) for number in (0, 1)))
            await probe.until(lambda: seen == {0: keys, 1: keys})
            # A fetch has at least one batch of each partition, whatever its bound.
            assert max(held) <= most + 2 * fetch + 2 * 5 * len(value)
            assert max(held) >= fetch
            await probe.until(lambda: thread.run_bytes.alive < fetch)  # what was let go of is counted off

    asyncio.run(check())


def test_a_partition_that_was_paused_stays_so_when_the_queue_has_room_again(topics):
    async def check() -> None:
        async with probing(topics) as probe:
            consumer, tp = probe.app.consumer, TP(probe.topic, 0)
            await probe.until(lambda: tp in consumer._get_active_partitions())
            consumer.on_buffer_full(tp)
            consumer.pause_partitions({tp})
            consumer.on_buffer_drop(tp)
            assert tp not in consumer._get_active_partitions()
            consumer.resume_partitions({tp})
            assert tp in consumer._get_active_partitions()

    asyncio.run(check())


def test_delivering_runs_makes_no_cycles(topics, monkeypatch):
    """So that their bytes go when they are let go of, and the cyclic garbage collector may run seldom."""
    monkeypatch.setattr(transport, "FETCH_MAX_BYTES", 20_000)

    async def check() -> None:
        topic, keys = TopicNames.of(topics.topics).impressions, [b"%d" % index for index in range(3_000)]
        async with producing(topics) as producer:
            for start in range(0, len(keys), 15):
                rows = [(key, b"v" * 1_000, []) for key in keys[start : start + 15]]
                for future in await send_batches(producer, topic, 0, rows):
                    await future
        async with probing(topics) as probe:
            await probe.until(lambda: probe.wanted[TP(topic, 0)] > 500)
            gc.collect()
            gc.disable()
            try:
                before = len(probe.runs)
                await probe.until(lambda: probe.wanted[TP(topic, 0)] == len(keys))
                found, runs = gc.collect(), len(probe.runs) - before
            finally:
                gc.enable()
            assert runs >= 50
            assert found < 3 * runs  # not the runs, which are lists of tuples: what tasks of Faust and aiokafka leave
            assert sum(len(run.records) for run in probe.runs) == len(keys)

    asyncio.run(check())
