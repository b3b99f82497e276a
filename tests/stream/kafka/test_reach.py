"""Whether Kafka can be reached: one limit, and what was found at each address."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

import pytest

from deploy.settings import Settings
from stream.errors import NoAnswer, SecurityError
from stream.kafka.reach import reach
from stream.settings import KafkaSettings


def fails(servers: str, **more: object) -> str:
    settings = KafkaSettings(bootstrap_servers=servers, connect_timeout_ms=400, **more)  # type: ignore[arg-type]  # of a test
    began = time.monotonic()
    with pytest.raises(NoAnswer) as told:
        asyncio.run(reach(settings))
    assert time.monotonic() - began < 3.0
    return str(told.value)


@pytest.mark.kafka
def test_a_kafka_that_answers(settings: Settings) -> None:
    asyncio.run(reach(settings.kafka))


@pytest.mark.kafka
def test_one_address_that_answers_is_enough(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        servers = f"127.0.0.1:{silent.getsockname()[1]},127.0.0.1:1,{settings.kafka.bootstrap_servers}"
        began = time.monotonic()
        asyncio.run(reach(settings.kafka.model_copy(update={"bootstrap_servers": servers})))
        assert time.monotonic() - began < 5.0


def test_each_address_says_what_was_found_there(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogger("aiokafka").level
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silently = f"127.0.0.1:{silent.getsockname()[1]}"
        told = fails(f"{silently},127.0.0.1:1")
    assert (
        f"expected a broker that answers within 0.4 s, found {silently}: a connection, but no answer of a Kafka broker; "
        in told
    )
    assert "; 127.0.0.1:1: Connection refused. Check that it runs" in told
    assert caplog.messages == []
    assert logging.getLogger("aiokafka").level == before, "quiet only while it looks"


@pytest.mark.kafka
def test_a_broker_with_another_security_protocol(settings: Settings) -> None:
    """TLS towards a plain listener, whose broker hangs up or says nothing."""
    told = fails(settings.kafka.bootstrap_servers, security_protocol="SSL")
    assert f"Kafka at {settings.kafka.bootstrap_servers} (SSL): expected a broker that answers within 0.4 s, found " in told


def test_settings_that_can_not_be_used() -> None:
    with pytest.raises(SecurityError, match="expected host:port"):
        asyncio.run(reach(KafkaSettings(bootstrap_servers="localhost")))
