"""Wrong arguments and options end in an error of the client's own, in one line, at once; closed and copied clients too."""

from __future__ import annotations

import copy
import math
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from deploy.settings import Settings
from headrace import Client, DeliveryError, HeadraceError, InvalidEvent, InvalidOption, UnusableClient

NOWHERE = "127.0.0.1:1"


@pytest.mark.parametrize(
    "servers",
    [
        *[None, "", ",", [], [None], 9092, b"127.0.0.1:9092", {"127.0.0.1:9092": 1}, "127.0.0.1:9092,"],
        *["host", "host:", "host:port", "host:port:x", "host:0", "host:70000", "PLAINTEXT://host:9092", "::1:9092"],
    ],
)
def test_addresses_that_are_none(servers: Any) -> None:
    with pytest.raises(InvalidOption) as caught:
        Client(servers)
    message = str(caught.value)
    assert message.startswith("bootstrap_servers: expected host:port, several in a list or separated by commas, found ")
    assert message.endswith("Pass the address of a broker, such as 127.0.0.1:9092.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topic_prefx": "x-"}, "topic_prefx: expected an option of kafka-python's connections, found none of that name."),
        ({"topics_prefix": "x-"}, "Did you mean topic_prefix?"),
        ({"sasl_mechanisms": "PLAIN"}, "Did you mean sasl_mechanism?"),
        ({"acks": 1}, "acks: expected no such option, found it. The client sets it itself: leave it out."),
        ({"partitioner": hash}, "partitioner: expected no such option"),
        ({"value_deserializer": str}, "value_deserializer: expected no such option"),
        ({"group_id": "g"}, "group_id: expected no such option"),
        ({"topic_prefix": None}, "topic_prefix: expected at most 235 ASCII letters, digits, '.', '_' and '-', found None."),
        ({"topic_prefix": "a b"}, "found 'a b'. Pass the pipeline's topics.prefix."),
        ({"topic_prefix": "é"}, "found 'é'."),
        ({"topic_prefix": "x" * 236}, "expected at most 235"),
        ({"source": 7}, "source: expected the name of this producer as text, found 7. Pass a string."),
        ({"source": "\ud83d"}, "source: expected the name of this producer as text, found '\\ud83d'."),
        ({"linger_ms": "20"}, "linger_ms: expected milliseconds, from 0 to 864000000 (ten days), found '20'. Pass a number."),
        ({"linger_ms": -1}, "linger_ms: expected milliseconds"),
        (
            {"security_protocol": "TLS"},
            "security_protocol: expected one of PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL, found",
        ),
        ({"ssl_cafile": "/nowhere.pem"}, "ssl_cafile: expected a file that can be read, found none at '/nowhere.pem'."),
        ({"compression_type": "brotli"}, "kafka-python"),
        ({"bootstrap_timeout_ms": "1s"}, "bootstrap_timeout_ms: expected milliseconds, from 0 to 86400000, found '1s'."),
        ({"bootstrap_timeout_ms": None}, "bootstrap_timeout_ms: expected milliseconds, from 0 to 86400000, found None."),
        ({"request_timeout_ms": -5}, "request_timeout_ms: expected milliseconds, from 0 to 86400000, found -5."),
        ({"retry_backoff_ms": "x"}, "retry_backoff_ms: expected milliseconds"),
        ({"ssl_cafile": 5.5}, "ssl_cafile: expected a file that can be read, found none at 5.5."),
        ({"sasl_mechanism": "NONE"}, "sasl_mechanism: expected one of PLAIN, SCRAM-SHA-256"),
        ({"security_protocol": "SASL_SSL"}, "sasl_mechanism: expected one beside security_protocol SASL_SSL, found none."),
        ({"sasl_mechanism": "PLAIN"}, "sasl_plain_username: expected text beside sasl_mechanism PLAIN, found none."),
    ],
)
@pytest.mark.kafka
def test_options_that_are_none(kafka: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        Client(kafka.bootstrap_servers, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_broker_is_said_within_the_time_out() -> None:
    began = time.monotonic()
    with pytest.raises(DeliveryError, match=r"bootstrap_servers 127.0.0.1:1: expected a Kafka broker, found none that answers"):
        Client(NOWHERE, bootstrap_timeout_ms=500)
    assert time.monotonic() - began < 5


@pytest.fixture
def client(topics: Settings) -> Iterator[Client]:
    with Client(topics.kafka.bootstrap_servers, topic_prefix=topics.topics.prefix) as opened:
        yield opened


def _failing() -> Iterator[Any]:
    yield ("a", {})
    raise OSError("the caller's own")


Call = Callable[[Client], Any]
WRONG: list[tuple[Call, type[HeadraceError], str]] = [
    (lambda c: c.send_impression(7, features={}), InvalidEvent, "$.impression_id: expected a non-empty string, found 7 (int)."),
    (lambda c: c.send_impression(b"i", features={}), InvalidEvent, "For bytes, pass value.decode()."),
    (lambda c: c.send_impression(None, features={}), InvalidEvent, "$.impression_id"),
    (lambda c: c.send_impression("i", features=(x for x in "ab")), InvalidEvent, "$.features: expected a mapping"),
    (lambda c: c.send_impression("i", features={b"x": 1}), InvalidEvent, "$.features: expected names"),
    (lambda c: c.send_click(1.5), InvalidEvent, "$.impression_id"),
    (lambda c: c.send_click("i", timestamp_ms="now"), InvalidEvent, "$.timestamp"),
    (lambda c: c.send_click("i", timestamp_ms=1), InvalidEvent, "at most 40 years ago"),
    (lambda c: c.send_watermark("now"), InvalidEvent, "watermark_ms"),
    (lambda c: c.send_watermark(lateness_ms="1h"), InvalidEvent, "lateness_ms: expected whole milliseconds"),
    (lambda c: c.send_watermark(lateness_ms=True), InvalidEvent, "lateness_ms: expected whole milliseconds"),
    (lambda c: c.request_scores({}, None), InvalidEvent, "$.candidates: expected pairs (id, features), found None"),
    (lambda c: c.request_scores({}, 3), InvalidEvent, "$.candidates: expected pairs (id, features), found 3 (int)."),
    (lambda c: c.request_scores({}, "ab"), InvalidEvent, "$.candidates[0]: expected a pair (id, features), found 'a' (str)."),
    (lambda c: c.request_scores({}, {"a": {}}), InvalidEvent, "$.candidates[0]"),
    (lambda c: c.request_scores({}, [("a", {})], request_id=7), InvalidEvent, "$.request_id"),
    (lambda c: c.request_scores({}, [("a", {})], deadline_ms="soon"), InvalidEvent, "$.deadline_ms"),
    (lambda c: c.ask({}, [("a", None)]), InvalidEvent, "$.candidates[0].features"),
    (lambda c: c.ask({}, [("a", {})], timeout_ms="1s"), InvalidOption, "timeout_ms: expected milliseconds, from 0 to"),
    (lambda c: c.ask({}, [("a", {})], timeout_ms=-1), InvalidOption, "found -1. Pass a number."),
    (lambda c: c.ask({}, [("a", {})], timeout_ms=math.nan), InvalidOption, "found nan"),
    (lambda c: c.ask({}, [("a", {})], timeout_ms=2**70), InvalidOption, "timeout_ms"),
    (lambda c: c.ask_later(None, [("a", {})]), InvalidEvent, "$.context"),
    (lambda c: c.send_raw(None, None, b""), InvalidOption, "topic: expected a topic's full name, found None."),
    (lambda c: c.send_raw("a b", None, b""), InvalidOption, "topic: expected a topic's full name, found 'a b'."),
    (lambda c: c.send_raw("t", "k", b""), InvalidOption, "key: expected bytes, found str. Encode it first."),
    (lambda c: c.send_raw("t", b"k", "v"), InvalidOption, "value: expected bytes, found str."),
    (lambda c: c.send_raw("t", b"k", None), InvalidOption, "value: expected bytes, found NoneType."),
    (lambda c: c.send_raw("t", b"k", b"", {"h": b"1"}), InvalidOption, "headers: expected pairs (name, bytes)"),
    (lambda c: c.send_raw("t", b"k", b"", [("h", "1")]), InvalidOption, "headers: expected pairs (name, bytes)"),
    (lambda c: c.send_raw("t", b"k", b"", None), InvalidOption, "headers: expected pairs (name, bytes)"),
    (lambda c: c.flush("60s"), InvalidOption, "timeout_ms"),
    (lambda c: c.close(-1), InvalidOption, "timeout_ms"),
]


@pytest.mark.kafka
def test_wrong_arguments_of_every_method(client: Client) -> None:
    for call, kind, message in WRONG:
        with pytest.raises(kind) as caught:
            call(client)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="the caller's own"):
        client.ask({}, _failing())
    client.send_impression("i", features={})  # and the client is as good as before
    client.flush(10_000)


@pytest.mark.kafka
def test_numpy_values_everywhere(client: Client) -> None:
    client.send_impression(
        np.str_("i"), features={np.str_("f"): np.float32(0.5)}, timestamp_ms=np.int64(1_700_000_000_000), score=np.float32(0.5)
    )
    assert client.request_scores({"n": np.int64(1)}, [(np.str_("a"), {})], request_id=np.str_("r")) == "r"
    client.flush(np.int64(10_000))


USES: dict[str, Call] = {
    "send_impression": lambda c: c.send_impression("i", features={}),
    "send_click": lambda c: c.send_click("i"),
    "send_watermark": lambda c: c.send_watermark(),
    "request_scores": lambda c: c.request_scores({}, [("a", {})]),
    "ask_later": lambda c: c.ask_later({}, [("a", {})]),
    "ask": lambda c: c.ask({}, [("a", {})]),
    "subscribe_scores": lambda c: c.subscribe_scores(),
    "send_raw": lambda c: c.send_raw("t", b"k", b"v"),
    "flush": lambda c: c.flush(),
}


def test_the_list_of_uses_is_whole() -> None:
    assert set(USES) | {"close"} == {name for name in vars(Client) if not name.startswith("_")}


@pytest.mark.kafka
def test_a_closed_client_says_so(topics: Settings) -> None:
    client = Client(topics.kafka.bootstrap_servers, topic_prefix=topics.topics.prefix)
    stream = client.subscribe_scores()
    client.close()
    client.close()
    for use in USES.values():
        with pytest.raises(UnusableClient, match=r"^client: expected it open, found it closed\. Make a Client\.$"):
            use(client)
    assert stream.poll(0) == []  # a stream has a connection of its own
    stream.close()
    stream.close()
    assert list(stream) == []
    with pytest.raises(UnusableClient, match=r"^scores: expected it open, found it closed\. Subscribe again\.$"):
        stream.poll()


@pytest.mark.kafka
def test_clients_and_streams_do_not_travel(client: Client) -> None:
    with client.subscribe_scores() as stream:
        for what, name in ((client, "client"), (stream, "scores")):
            for travel in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(UnusableClient, match=rf"^{name}: expected it to stay in the process that made it"):
                    travel(what)
