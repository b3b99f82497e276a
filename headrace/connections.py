"""Opens kafka-python's clients: checks options, raises our own errors, and leaves nothing that could hang a forked process."""

from __future__ import annotations

import difflib
import os
import re
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from kafka.errors import BrokerResponseError, KafkaConfigurationError, KafkaError
from kafka.net.compat import KafkaNetClient

from headrace.errors import DeliveryError, InvalidOption
from headrace.events import shown

__all__ = ["OPEN_MS", "close_producer", "connect", "connection_options", "one_line"]

OPEN_MS = 15_000  # longest wait for a first broker, and for a topic's partitions: with Kafka up, both take milliseconds

# Options that the client sets itself, so that records are acknowledged, stay in order, are partitioned by murmur2, and are sent
# as the bytes that they are.
_OF_SENDING = {"acks", "batch_size", "enable_idempotence", "linger_ms", "max_block_ms", "partitioner", "transactional_id"}
_OF_READING = {"auto_commit_interval_ms", "auto_offset_reset", "consumer_timeout_ms", "enable_auto_commit", "group_id"}
_OF_BYTES = {"key_deserializer", "key_serializer", "value_deserializer", "value_serializer"}
_OURS = _OF_SENDING | _OF_READING | _OF_BYTES | {"allow_auto_create_topics", "group_instance_id", "kafka_client"}
# What `Client` takes besides.
_OF_CLIENT = {"topic_prefix", "source"}
_FORCED_S = 1.0  # longest wait for a producer's thread that is forced to end
_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI", "OAUTHBEARER", "AWS_MSK_IAM")
_WAITS = {
    *("bootstrap_timeout_ms", "request_timeout_ms", "metadata_max_age_ms", "retry_backoff_ms", "reconnect_backoff_ms"),
    *("reconnect_backoff_max_ms", "connections_max_idle_ms", "api_version_auto_timeout_ms", "delivery_timeout_ms"),
}
_LONGEST_MS = 86_400_000  # a day
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\],@]+):([0-9]{1,5})")

# Every client that was opened and may still be open. A child process must not touch any of them, not even when it ends.
_opened: weakref.WeakSet[Any] = weakref.WeakSet()


def connection_options(bootstrap_servers: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of every connection, from what the user gave.

    Raises:
        InvalidOption: an address, a name or a value is wrong, or the client sets that option itself.
    """
    known = (KafkaProducer.DEFAULT_CONFIG.keys() | KafkaConsumer.DEFAULT_CONFIG.keys()) - _OURS
    for name in options:
        if name in _OURS:
            raise InvalidOption(f"{name}: expected no such option, found it. The client sets it itself: leave it out.")
        if name not in known:
            near = difflib.get_close_matches(name, known | _OF_CLIENT, n=1)
            advice = f"Did you mean {near[0]}?" if near else "Leave it out; kafka-python documents the options that there are."
            raise InvalidOption(f"{name}: expected an option of kafka-python's connections, found none of that name. {advice}")
    # kafka-python retries with a wrong protocol or file, and in the end reports only that no broker answers.
    protocol = options.get("security_protocol", "PLAINTEXT")
    if protocol not in _PROTOCOLS:
        raise InvalidOption(
            f"security_protocol: expected one of {', '.join(_PROTOCOLS)}, found {shown(protocol)}. Pass one of them."
        )
    for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile", "ssl_crlfile"):
        file = options.get(name)
        if file is not None and not (isinstance(file, str | os.PathLike) and os.access(file, os.R_OK)):
            raise InvalidOption(f"{name}: expected a file that can be read, found none at {shown(file)}. Correct the path.")
    # kafka-python accepts any value of these, and then waits for ever, or fails later, where nobody sees the cause.
    for name, value in options.items():
        if name in _WAITS and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LONGEST_MS):
            raise InvalidOption(f"{name}: expected milliseconds, from 0 to {_LONGEST_MS}, found {shown(value)}. Pass a number.")
    _check_login(protocol, options)
    return {"bootstrap_servers": _servers(bootstrap_servers), "bootstrap_timeout_ms": OPEN_MS, **options}


def _check_login(protocol: str, options: Mapping[str, Any]) -> None:
    mechanism = options.get("sasl_mechanism")
    if mechanism is not None and mechanism not in _MECHANISMS:
        raise InvalidOption(
            f"sasl_mechanism: expected one of {', '.join(_MECHANISMS)}, found {shown(mechanism)}. Pass one of them."
        )
    if protocol.startswith("SASL") and mechanism is None:
        raise InvalidOption(f"sasl_mechanism: expected one beside security_protocol {protocol}, found none. Pass it.")
    if mechanism is not None and (mechanism == "PLAIN" or mechanism.startswith("SCRAM")):
        for name in ("sasl_plain_username", "sasl_plain_password"):
            if not isinstance(options.get(name), str):
                raise InvalidOption(f"{name}: expected text beside sasl_mechanism {mechanism}, found none. Pass it.")


def connect(kind: Any, options: Mapping[str, Any], **more: Any) -> Any:
    """A KafkaProducer or KafkaConsumer, with those of the user's options that this kind of client has, and with ours.

    kafka-python 3.0 leaves its sockets open when it can't connect; they are closed here. kafka-python also doesn't pass
    `allow_auto_create_topics` on to its metadata requests, so the option is set here: otherwise a mistyped prefix would create
    topics.

    Raises:
        DeliveryError: no broker answers.
        InvalidOption: kafka-python rejects the value of an option.
    """
    opened: list[KafkaNetClient] = []

    def client(**configs: Any) -> KafkaNetClient:
        made = KafkaNetClient(**configs)
        made.cluster.config["allow_auto_create_topics"] = False
        opened.append(made)
        return made

    own = {name: value for name, value in options.items() if name in kind.DEFAULT_CONFIG}
    try:
        made = kind(**own, **more, allow_auto_create_topics=False, kafka_client=client)
    except Exception as error:
        for left in opened:
            left.close()
        if isinstance(error, KafkaError) and not isinstance(error, KafkaConfigurationError):
            raise DeliveryError(
                f"bootstrap_servers {','.join(options['bootstrap_servers'])}: expected a Kafka broker, found none that answers "
                f"({one_line(error)}). Start one (`headrace kafka start`), or correct the address or the security options."
            ) from error
        raise InvalidOption(
            f"options of the connection: expected values that kafka-python takes, found that it refuses one: "
            f"{one_line(error)}. Correct that option."
        ) from error
    _opened.add(made)
    return made


def close_producer(producer: Any, timeout_s: float) -> None:
    """Close a KafkaProducer, even when records are outstanding.

    kafka-python's own `close` gives up at the first record that isn't acknowledged in time, and leaves its thread alive.
    """
    try:
        producer.close(timeout=timeout_s)
    except KafkaError:
        producer._sender.force_close()
        producer._sender.join(_FORCED_S)
        producer._closed = True


def one_line(error: Any) -> str:
    """An exception in one line: its text, after the name of its class where the text doesn't have it."""
    text = " ".join(str(error).split())
    # A broker's error has a code and a description, whose first sentence is enough.
    if isinstance(error, BrokerResponseError) and error.args in (
        (),
        (None,),
    ):
        text = str(error.description).split(". ")[0].rstrip(".")
    name = type(error).__name__
    return text if name in text else f"{name}: {text}" if text else name


def _servers(given: Any) -> list[str]:
    """The addresses, each `host:port`."""
    if isinstance(given, str):
        servers: list[Any] = [part.strip() for part in given.split(",")]
    elif isinstance(given, Iterable) and not isinstance(given, bytes | bytearray | Mapping):
        servers = list(given)
    else:
        servers = []
    for server in servers:
        match = _ADDRESS.fullmatch(server) if isinstance(server, str) else None
        if match is None or not 0 < int(match[2]) < 65_536:
            raise InvalidOption(_bad_servers(server))
    if not servers:
        raise InvalidOption(_bad_servers(given))
    return servers


def _bad_servers(found: Any) -> str:
    return (
        f"bootstrap_servers: expected host:port, several in a list or separated by commas, found {shown(found)}. Pass the "
        "address of a broker, such as 127.0.0.1:9092."
    )


def _forget_in_child() -> None:
    # A child's copies of the clients have no threads, and perhaps locks that a thread of the parent held. kafka-python closes a
    # client when the interpreter ends or the object is collected, and closing a copy would wait for ever. A copy that is marked
    # as closed does nothing.
    for made in _opened:
        made._closed = True
    _opened.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
