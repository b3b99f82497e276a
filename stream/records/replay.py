"""The records that a replay of dead letters writes: the original record once more, and a receipt.

The original goes back to its source topic with its own key, value and headers, and the header `headrace-replay-of`, which names
the letter as TOPIC/PARTITION/OFFSET.

A receipt goes to `dead-letters`. It has no key, the header `replayed` (the number of letters), and a JSON value:
`{"who": …, "replayed": [[topic, partition, offset], …]}` with the origins of the letters that it stands for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import msgspec

from stream.records.dead_letter import Letter, Origin
from stream.records.example import replayed_example
from stream.records.record import Header, Outgoing, Record

__all__ = ["is_replayed", "read_receipt", "receipt", "replayed_record"]

# On a record that `headrace dead-letters replay` has sent again.
REPLAY_HEADER = "headrace-replay-of"
# On a receipt, and on nothing else in `dead-letters`.
RECEIPT_HEADER = "replayed"


class _Receipt(msgspec.Struct, frozen=True):
    who: str
    replayed: list[Origin]


_decode = msgspec.json.Decoder(_Receipt).decode


def replayed_record(letter: Letter, letters_topic: str, *, is_example: bool) -> Outgoing:
    """The record that a letter was made from, to be sent to its source topic again.

    Args:
        letters_topic: full name of `dead-letters`.
        is_example: whether the source topic is `examples`.
    """
    headers: Iterable[Header] = [(name, value) for name, value in letter.headers if name != REPLAY_HEADER]
    if is_example:
        headers = replayed_example(headers)
    return letter.key, letter.value, [*headers, (REPLAY_HEADER, f"{letters_topic}/{letter.name}".encode())]


def is_replayed(record: Record) -> bool:
    """Whether a replay has sent this record again."""
    return any(name == REPLAY_HEADER for name, _ in record.headers)


def receipt(origins: Sequence[Origin], who: str) -> Outgoing:
    """The record on `dead-letters` that says: the letters of these origins were replayed."""
    return None, msgspec.json.encode(_Receipt(who, list(origins))), [(RECEIPT_HEADER, b"%d" % len(origins))]


def read_receipt(record: Record) -> list[Origin]:
    """The origins that a record of `dead-letters` is a receipt for; an empty list when it is no receipt."""
    if not record.headers:
        return []
    name, _ = record.headers[0]
    if name == RECEIPT_HEADER:
        with contextlib.suppress(msgspec.DecodeError):
            return _decode(record.value or b"").replayed
    return []
