"""Reads `deltas`, `snapshots` and the store by itself, and computes the weights at every point that they lead to.

It shares no code with the product: Kafka is read with kafka-python, records and files are parsed here, and deltas are put into
dictionaries one row at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from crc32c import crc32c
from kafka import KafkaConsumer, TopicPartition

from tests.faults.snapshots.weights import Array, Point, Weights, digest

__all__ = ["Announced", "Logged", "Replay", "announced_in", "deltas_in", "read_topic", "replay", "version_in"]

PREFIX = struct.Struct("<4sHHqIqIII")
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "I8": "i1", "BOOL": "?"}


class Announced(NamedTuple):
    """A version as the registry has it."""

    version: int
    point: Point | None
    digest: str
    created_at_ms: int


@dataclass(frozen=True)
class Logged:
    """A delta that is whole in the log."""

    point: Point
    parent: Point
    digest: str
    rate: float
    rebase: bool
    keys: list[int]
    rows: list[bytes]
    gone: list[int]
    dense: dict[str, Array] | None

    def put_into(self, before: Weights) -> Weights:
        gone = set(self.gone)
        rows = {key: row for key, row in before.rows.items() if key not in gone}
        rows |= zip(self.keys, self.rows, strict=True)
        return Weights(rows, before.dense if self.dense is None else self.dense, self.rate)


@dataclass
class Replay:
    """Weights by point; which points follow a point; what differs from what it should be."""

    points: dict[Point, Weights] = field(default_factory=dict)
    next: dict[Point, set[Point]] = field(default_factory=lambda: defaultdict(set))
    versions: dict[int, Announced] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def read_topic(servers: str, topic: str) -> list[Any]:
    """All committed records of a topic's one partition; none when there is no such topic."""
    consumer = KafkaConsumer(
        bootstrap_servers=servers.split(","),
        isolation_level="read_committed",
        enable_auto_commit=False,
        fetch_max_wait_ms=50,
        max_poll_records=10_000,
        check_crcs=False,  # a batch that was damaged on the broker's disk; a delta has a checksum of its own
        allow_auto_create_topics=False,
    )
    try:
        if not consumer.partitions_for_topic(topic):
            return []
        partition, records = TopicPartition(topic, 0), []
        consumer.assign([partition])
        consumer.seek_to_beginning(partition)
        end = consumer.end_offsets([partition])[partition]
        while consumer.position(partition) < end:
            for found in consumer.poll(timeout_ms=100).values():
                records += found
        return records
    finally:
        consumer.close(autocommit=False)


def announced_in(records: Iterable[Any]) -> dict[int, Announced]:
    """The versions of the registry, those that were taken away later included."""
    found: dict[int, Announced] = {}
    for record in records:
        if not record.key or not record.key.startswith(b"version/") or not record.value:
            continue
        try:
            each = json.loads(record.value)
            point = None if each.get("sequence") is None else Point(each["chain"], each["sequence"])
            entry = Announced(each["version"], point, each.get("digest", ""), each.get("created_at_ms", 0))
        except (ValueError, KeyError, TypeError):
            continue
        found[entry.version] = entry
    return found


def deltas_in(records: Iterable[Any]) -> list[Logged]:
    """The deltas of which every piece is in the log, whole and in order."""
    found: list[Logged] = []
    pieces: list[bytes] = []
    last: tuple[Any, ...] = ()
    for record in records:
        value = record.value
        if not value or len(value) < PREFIX.size + 4 or value[:4] != b"HRDL":
            continue  # a stranger's
        magic, kind, _, epoch, ordinal, sequence, piece, count, header_bytes = PREFIX.unpack_from(value)
        (crc,) = struct.unpack_from("<I", value, PREFIX.size)
        if magic != b"HRDL" or kind != 1 or crc32c(value[PREFIX.size + 4 :], crc32c(value[: PREFIX.size])) != crc:
            pieces, last = [], ()
            continue
        name = (epoch, ordinal, sequence, count)
        if piece == 0:
            pieces, last, size = [], name, header_bytes
        if name != last or piece != len(pieces):
            pieces, last = [], ()
            continue
        pieces.append(value[PREFIX.size + 4 :])
        if len(pieces) == count:
            with contextlib.suppress(ValueError, KeyError):  # what it says of itself doesn't fit what it holds
                delta = _delta(b"".join(pieces), size)
                if delta is not None:
                    found.append(delta)
            pieces, last = [], ()
    return found


def _delta(content: bytes, header_bytes: int) -> Logged | None:
    header, body = json.loads(content[:header_bytes]), content[header_bytes:]
    if crc32c(body) != header["body_crc32c"]:
        return None
    at, width, count, dim = 0, "<f4" if header.get("dtype", "float32") == "float32" else "<f2", header["rows"], header["dim"]

    def column(kind: str, *shape: int) -> Array:
        nonlocal at
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        found = np.frombuffer(body[at : at + size], kind).reshape(shape)
        at += -(-size // 8) * 8
        return found

    keys, embedding, first = column("<i8", count), column(width, count, dim), column(width, count)
    gone = column("<i8", header.get("gone", 0))
    joined = np.column_stack([embedding, first]).astype("<f4")
    dense = header.get("dense")
    tensors = None if dense is None else {each["name"]: column("<f4", *each["shape"]).copy() for each in dense}
    parent = Point(header["parent"]["chain"], header["parent"]["sequence"])
    return Logged(
        Point(header["chain"], header["sequence"]),
        parent,
        header["digest"],
        header["negative_rate"],
        header.get("rebase", False),
        keys.tolist(),
        [row.tobytes() for row in joined],
        gone.tolist(),
        tensors,
    )


def version_in(store: Path, announced: Announced) -> Weights | None:
    """The weights of a version; None if it isn't whole in the store, or is another one."""
    folder = store / f"v{announced.version:010d}"
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if (manifest["version"], manifest["created_at_ms"]) != (announced.version, announced.created_at_ms):
            return None
        tensors: dict[str, list[Array]] = defaultdict(list)
        for name, entry in sorted(manifest["files"].items()):
            if not name.startswith(("serving", "dense")):
                continue
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                return None
            for tensor, found in _tensors(data).items():
                tensors[tensor].append(found)
        joined = {name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in tensors.items()}
        return Weights.of(joined, manifest["negative_rate"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tensors(data: bytes) -> dict[str, Array]:
    size = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            found[name] = np.frombuffer(data[8 + size + start : 8 + size + end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def replay(records: Iterable[Any], announced: dict[int, Announced], store: Path) -> Replay:
    """The weights at every point that versions and deltas lead to.

    A delta whose result hasn't the digest that it names leads nowhere. A version whose weights haven't the digest that its
    record names is reported as wrong: the trainer has written other weights than it had.
    """
    done = Replay(versions=announced)
    for each in announced.values():
        weights = None if each.point is None else version_in(store, each)
        if weights is None or each.point is None:
            continue
        if digest(weights) != each.digest:
            done.wrong.append(f"version {each.version}: files of the digest {digest(weights)}, announced as {each.digest}")
        done.points.setdefault(each.point, weights)
    for delta in deltas_in(records):
        before = done.points.get(delta.parent)
        in_order = delta.rebase or delta.point == Point(delta.parent.chain, delta.parent.sequence + 1)
        if before is None or not in_order or any(len(row) != before.width for row in delta.rows):
            continue
        after = delta.put_into(before)
        if digest(after) != delta.digest:
            continue
        known = done.points.setdefault(delta.point, after)
        if digest(known) != delta.digest:
            done.wrong.append(f"{delta.point}: {digest(known)} by a version, {delta.digest} by the log")
        done.next[delta.parent].add(delta.point)
    return done
