"""Describing who sent some events of a sample: what these records have in common that the other records don't have.

Kafka doesn't keep which client wrote a record. Only the record itself is known: its partition, its key, its headers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Sent", "who_sent"]

SHOWN = 3  # ids
MAX_SHOWN = 40  # characters of an id, a prefix or a header's value
# A header or a prefix of the ids identifies a producer if it is on at least 90 % of these events, and on at most 50 % of the
# others.
ON_THESE, ON_OTHERS = 0.9, 0.5
# Fewer events may have a prefix in common by chance.
MIN_FOR_PREFIX = 3


@dataclass(frozen=True, slots=True)
class Sent:
    """One sampled record."""

    partition: int
    offset: int
    key: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


def who_sent(these: Sequence[Sent], others: Sequence[Sent]) -> str:
    """A sentence for people: shared headers, a shared prefix of the ids, and a few ids with partition/offset."""
    shared = [f"header {name} = {_text(content)}" for name, content in _headers(these, others)]
    prefix = _prefix(these, others)
    if prefix:
        shared.append(f"ids that begin with {_text(prefix)}")
    examples = ", ".join(f"{_text(sent.key or b'')} at {sent.partition}/{sent.offset}" for sent in these[:SHOWN])
    return f"They come from {', '.join(shared)}; such as {examples}" if shared else f"Some of them: {examples}"


def _headers(these: Sequence[Sent], others: Sequence[Sent]) -> list[tuple[str, bytes]]:
    counts = Counter(header for sent in these for header in set(sent.headers))
    found = []
    for (name, content), count in sorted(counts.items(), key=lambda item: item[0][0]):
        elsewhere = sum((name, content) in sent.headers for sent in others)
        if content is not None and count >= ON_THESE * len(these) and elsewhere <= ON_OTHERS * len(others):
            found.append((name, content))
    return found


def _prefix(these: Sequence[Sent], others: Sequence[Sent]) -> bytes:
    """The prefix that all ids have in common, without its last digits, which are often part of a counter."""
    if len(these) < MIN_FOR_PREFIX:
        return b""
    ids = [sent.key or b"" for sent in these]
    first, last = min(ids), max(ids)  # the prefix that these two have in common, all ids have
    length = next((index for index, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    common = first[:length].rstrip(b"0123456789")
    if not common:
        return b""
    elsewhere = sum((sent.key or b"").startswith(common) for sent in others)
    return common if elsewhere <= ON_OTHERS * len(others) else b""


def _text(data: bytes) -> str:
    return repr(data.decode(errors="backslashreplace")[:MAX_SHOWN])
