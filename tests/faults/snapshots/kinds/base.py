"""Helpers for writing kinds of faults."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

from crc32c import crc32c

from tests.faults.snapshots.play import Kind
from tests.faults.snapshots.replay import PREFIX
from tests.faults.snapshots.run import Run

__all__ = ["flipped", "kinds", "sealed"]

Play = Callable[[Run], Awaitable[None]]


def kinds(into: list[Kind]) -> Callable[..., Callable[[Play], Play]]:
    """A decorator that adds a function as a `Kind` to a list; its arguments are those of `Kind`."""

    def kind(name: str, **options: bool) -> Callable[[Play], Play]:
        def add(play: Play) -> Play:
            into.append(Kind(name, play, **options))
            return play

        return add

    return kind


def flipped(value: bytes, bit: int) -> bytes:
    """The same bytes with one bit changed."""
    changed = bytearray(value)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def sealed(piece: bytes, **changed: int) -> bytes:
    """A piece with other fields in its prefix and the checksum that belongs to them."""
    names = ("magic", "format", "zero", "epoch", "ordinal", "sequence", "piece", "pieces", "header_bytes")
    fields = dict(zip(names, PREFIX.unpack_from(piece), strict=True)) | changed
    prefix, content = PREFIX.pack(*fields.values()), piece[PREFIX.size + 4 :]
    return prefix + struct.pack("<I", crc32c(content, crc32c(prefix))) + content
