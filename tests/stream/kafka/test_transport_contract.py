"""What `stream` takes for granted of faust-streaming and aiokafka.

The tests hold names and shapes of private parts, so that another version fails here and not in a stalled worker.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import faust
import mode
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.subscription_state import Assignment, Subscription, SubscriptionState, TopicPartitionState
from faust.transport.consumer import Consumer
from faust.transport.drivers import aiokafka as driver
from faust.types import ConsumerMessage
from faust.types.transports import SchedulingStrategyT

from stream.kafka.transport import (
    RunSchema,
)
from stream.settings import KafkaSettings
from stream.worker.app import build_app


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_versions_are_the_pinned_ones():
    assert version("faust-streaming") == "0.15.3"
    assert version("aiokafka") == "0.14.0"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (driver.AIOKafkaConsumerThread._create_worker_consumer, ["self", "transport"]),
        (driver.AIOKafkaConsumerThread._fetch_records, ["self", "consumer", "active_partitions", "timeout", "max_records"]),
        (driver.AIOKafkaConsumerThread._ensure_consumer, ["self"]),
        (driver.AIOKafkaConsumerThread.call_thread, ["self", "fun", "args", "kwargs"]),
        (driver.AIOKafkaConsumerThread.commit, ["self", "offsets"]),
        (driver.Consumer._new_consumer_thread, ["self"]),
        (driver.Consumer._to_message, ["self", "tp", "record"]),
        (Consumer._wait_next_records, ["self", "timeout"]),
        (Consumer.perform_seek, ["self"]),
        (Consumer.on_buffer_drop, ["self", "tp"]),
        (Consumer.pause_partitions, ["self", "tps"]),
        (Consumer.resume_partitions, ["self", "tps"]),
        (SchedulingStrategyT.iterate, ["self", "records"]),
        (faust.App._new_transport, ["self"]),
        (faust.App.create_event, ["self", "key", "value", "headers", "message"]),
        (AIOKafkaConsumer.seek, ["self", "partition", "offset"]),
        (AIOKafkaProducer.create_batch, ["self"]),
        (AIOKafkaProducer.send_batch, ["self", "batch", "topic", "partition"]),
        (AIOKafkaProducer.send_offsets_to_transaction, ["self", "offsets", "group_id"]),
    ],
)
def test_methods_have_the_expected_parameters(function, expected):
    assert parameters(function) == expected


def test_messages_take_their_fields_in_the_order_given_to_them():
    assert parameters(ConsumerMessage)[:12] == [
        *("topic", "partition", "offset", "timestamp", "timestamp_type", "headers", "key", "value", "checksum"),
        *("serialized_key_size", "serialized_value_size", "tp"),
    ]
    assert "generation_id" in parameters(ConsumerMessage)


def test_the_consumer_gives_what_the_transport_replaced_to_its_fetcher():
    # `_create_worker_consumer` sets these on the consumer before its start makes the fetcher.
    source = inspect.getsource(AIOKafkaConsumer.start)
    for name in ("isolation_level", "fetch_max_wait_ms", "max_partition_fetch_bytes", "fetch_max_bytes"):
        assert f"{name}=self._{name}" in source
        assert name in parameters(Fetcher.__init__)
    assert "fetcher_timeout=self._consumer_timeout" in source


def test_positions_are_kept_where_the_transport_reads_them():
    assert "assignment" in vars(Subscription)
    assert isinstance(vars(SubscriptionState)["subscription"], property)
    assert parameters(Assignment.state_value) == ["self", "tp"]
    assert isinstance(vars(Assignment)["active"], property)

    async def check() -> None:
        state = TopicPartitionState(object())
        assert (state.highwater, state.lso, state.timestamp, state.has_valid_position) == (None, None, None, False)
        state.seek(7)
        assert (state.has_valid_position, state.position) == (True, 7)

    asyncio.run(check())


def test_fetched_records_are_taken_and_positions_moved_in_one_step():
    """A run is read between two awaits of the consumer's thread: that holds as long as Faust's own part adds none after it."""
    source = inspect.getsource(driver.AIOKafkaConsumerThread._fetch_records)
    assert source.count("await ") == 1
    assert "return await fetcher.fetched_records(" in source


def test_fetched_batches_are_kept_by_the_classes_that_are_replaced():
    # `stream.kafka.fetched.install` puts its own in the place of these two names.
    assert "self._records[tp] = FetchResult(" in inspect.getsource(Fetcher._proc_fetch_request)
    assert "partition_records = PartitionRecords(" in inspect.getsource(Fetcher._proc_fetch_request)
    assert "type(res_or_error) is FetchResult" in inspect.getsource(Fetcher.fetched_records)


def test_what_waits_for_an_agent_is_a_few_runs():
    """Faust drops `app.topic(maxsize=…)` and then queues 4,096 events; ours are runs of up to 4 MB."""

    async def check() -> None:
        kafka = KafkaSettings(bootstrap_servers="127.0.0.1:9")
        app = build_app("g", kafka, next_offset=lambda tp: None, session_timeout_ms=6_000)
        topic = app.topic("t", schema=RunSchema(), acks=False)
        assert topic.clone(is_iterator=True).queue.maxsize == 4

    asyncio.run(check())


def test_faust_delivers_only_what_wait_next_records_calls_active():
    # Why the transport adds the partitions of what it fetched.
    source = inspect.getsource(Consumer.getmany)
    assert "records, active_partitions = await self._wait_next_records(timeout)" in source
    assert "tp in active_partitions" in source


def test_a_crash_can_be_seen_from_outside():
    class Idle(mode.Service):  # type: ignore[misc]
        pass

    async def check() -> None:
        service = Idle()
        assert not service._crashed.is_set()
        await service.crash(error := RuntimeError("on purpose"))
        assert service._crashed.is_set()
        assert service.crash_reason is error

    asyncio.run(check())
