"""Arguments of the client, checked before anything is opened or sent. Every check raises InvalidOption."""

from __future__ import annotations

import re
import uuid
from typing import Any, NamedTuple

from headrace.errors import InvalidOption
from headrace.events import plain, shown

__all__ = ["Header", "RawRecord", "check_prefix", "check_raw", "check_wait", "encode_source", "request_id_or_new"]

_TOPIC = re.compile(r"[A-Za-z0-9._-]+")
_LONGEST_PREFIX = 249 - len("score-requests")  # Kafka's limit for a topic's name, less the longest of our names
_LONGEST_WAIT_MS = 10 * 24 * 3_600_000  # ten days: below what the system's timers take

Header = tuple[str, bytes]


class RawRecord(NamedTuple):
    """The arguments of `Client.send_raw`."""

    topic: str
    key: bytes | None
    value: bytes
    headers: list[Header]


def check_wait(value: Any, name: str) -> Any:
    """A time to wait, in milliseconds, as Python's own number."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LONGEST_WAIT_MS:
        raise InvalidOption(
            f"{name}: expected milliseconds, from 0 to {_LONGEST_WAIT_MS} (ten days), found {shown(value)}. Pass a number."
        )
    return value


def check_prefix(prefix: Any) -> str:
    """A prefix that leaves room for the longest topic name."""
    if not isinstance(prefix, str) or (prefix and not _TOPIC.fullmatch(prefix)) or len(prefix) > _LONGEST_PREFIX:
        raise InvalidOption(
            f"topic_prefix: expected at most {_LONGEST_PREFIX} ASCII letters, digits, '.', '_' and '-', found {prefix!r}. Pass "
            "the pipeline's topics.prefix."
        )
    return prefix


def encode_source(source: Any) -> bytes:
    """The producer's name as the header `source` carries it."""
    try:
        return str.encode(source)
    except (TypeError, UnicodeEncodeError):
        raise InvalidOption(
            f"source: expected the name of this producer as text, found {shown(source)}. Pass a string."
        ) from None


def request_id_or_new(request_id: Any) -> Any:
    """The id that was given, else a random one. `encode_request` checks it."""
    return uuid.uuid4().hex if request_id is None else request_id


def check_raw(topic: Any, key: Any, value: Any, headers: Any) -> RawRecord:
    """A record that is sent as it is: its types are checked, its bytes are not."""
    if not isinstance(topic, str) or not _TOPIC.fullmatch(topic):
        raise InvalidOption(f"topic: expected a topic's full name, found {shown(topic)}. Pass it with the prefix.")
    for name, found in (("key", key), ("value", value)):
        if not isinstance(found, bytes) and not (name == "key" and found is None):
            raise InvalidOption(f"{name}: expected bytes, found {type(found).__name__}. Encode it first.")
    try:
        pairs = [(name, content) for name, content in headers]
    except (TypeError, ValueError):
        pairs = [(None, None)]
    for name, content in pairs:
        if not isinstance(name, str) or not isinstance(content, bytes):
            raise InvalidOption("headers: expected pairs (name, bytes), found others. Pass [('name', b'value'), …].")
    return RawRecord(topic, key, value, pairs)
