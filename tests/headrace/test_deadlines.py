"""With a broker that hangs, every call ends by the time that it documents, and a closed client leaves no thread."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from deploy.local_kafka.cluster import LocalKafka
from deploy.settings import Settings
from headrace import Client, DeliveryError, NoAnswer

pytestmark = pytest.mark.kafka


def took(call: Callable[[], Any], error: type[Exception] | None = None) -> float:
    began = time.monotonic()
    if error is None:
        call()
    else:
        with pytest.raises(error) as caught:
            call()
        assert "\n" not in str(caught.value)
    return time.monotonic() - began


def test_a_broker_that_hangs(kafka: LocalKafka, topics: Settings) -> None:
    servers, prefix = topics.kafka.bootstrap_servers, topics.topics.prefix
    before = set(threading.enumerate())
    client = Client(servers, topic_prefix=prefix, bootstrap_timeout_ms=500)
    client.send_click("i")
    with pytest.raises(NoAnswer):
        client.ask({}, [("a", {})], timeout_ms=100)  # opens what `ask` needs
    client.flush()
    stream = client.subscribe_scores()
    broker = kafka.pids[1]
    os.kill(broker, signal.SIGSTOP)
    try:
        assert took(lambda: client.send_click("i")) < 1
        assert took(lambda: client.flush(300), DeliveryError) < 2
        assert took(lambda: client.ask({}, [("a", {})], timeout_ms=300), NoAnswer) < 2
        assert took(lambda: stream.poll(300)) < 2
        assert took(lambda: Client(servers, bootstrap_timeout_ms=500), DeliveryError) < 3
        assert took(client.subscribe_scores, DeliveryError) < 3
        assert took(stream.close) < 3
        assert took(lambda: client.close(300), DeliveryError) < 5
    finally:
        os.kill(broker, signal.SIGCONT)
    assert set(threading.enumerate()) <= before
