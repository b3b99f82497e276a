"""A delta: what changed in the serving weights since the last one, as records on `deltas`.

A delta is cut into pieces, one Kafka record each, without a key, and all in one transaction:

| part of a record | content |
| --- | --- |
| prefix, 44 bytes | magic `HRDL`, format, zero, epoch, ordinal, sequence, piece (from 0), pieces, size of the header, CRC-32C |
| header, in piece 0 only | JSON, `DeltaHeader` |
| the rest | the next bytes of the body |

The body is the columns one after another, each padded with zeros to a multiple of 8 bytes:

| column | type and shape |
| --- | --- |
| keys | int64 (rows,) |
| embedding | the header's `dtype` (rows, dim) |
| first_order | the header's `dtype` (rows,) |
| history, in format 2 only | float32 (rows, 2): examples and clicks (`model.history`) |
| gone | int64 (gone,) |
| each tensor of the header's `dense` | float32, the header's shape |

All numbers are little-endian. The CRC-32C covers the whole record but itself. All pieces but the last have the same size, and
the last isn't larger. Deltas of models without row history have format 1, which older scorers read. In later formats the prefix
stays as it is, so that every reader finds the chain and the sequence in it.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from crc32c import crc32c

from model.rows import ModelDelta
from state.chain_name import ChainName
from stream.errors import StreamError

__all__ = [
    "DELTA_PROBLEMS",
    "FORMAT",
    "RECORD_OVERHEAD_BYTES",
    "DeltaDamaged",
    "DeltaHeader",
    "DenseTensor",
    "Piece",
    "Point",
    "UnknownFormat",
    "encode_delta",
    "padded_size",
    "read_piece",
]

FORMAT = 2  # the newest
_WITHOUT_HISTORY = 1
_MAGIC = b"HRDL"
_PREFIX = struct.Struct("<4sHHqIqIII")
_CRC = struct.Struct("<I")
_PREFIX_BYTES = _PREFIX.size + _CRC.size
_ALIGNMENT = 8  # bytes: the largest type of a column is int64
# The most that Kafka adds to a record without key and headers that is alone in its batch: 61 bytes for the batch and 26 for the
# record.
RECORD_OVERHEAD_BYTES = 96

# Why a delta can't be used: the codes of `DeltaDamaged.reason`. docs/events.md lists them.
DELTA_PROBLEMS = {
    "not_a_delta": "the record has no value, or does not begin as a delta does",
    "checksum": "the bytes of a piece differ from its checksum",
    "unknown_format": "a newer version of Headrace has written the delta",
    "bad_header": "the header can not be read, or differs from the piece that carries it",
    "missing_piece": "a piece is not where it should be in the log",
    "repeated_piece": "a piece is in the log twice",
    "wrong_size": "the pieces together are shorter or longer than the header says",
    "body_checksum": "the pieces together differ from the checksum in the header: they are of different deltas",
    "log_gone": "the log no longer has the records from the reader's offset on",
}

_Natural = Annotated[int, msgspec.Meta(ge=0)]


class DeltaDamaged(StreamError):
    """A delta can't be used. `reason` is one of `DELTA_PROBLEMS`."""

    def __init__(self, reason: str, message: str) -> None:
        assert reason in DELTA_PROBLEMS
        super().__init__(message)
        self.reason = reason


class UnknownFormat(DeltaDamaged):
    """A delta is whole, but of a format that this version of Headrace doesn't know."""

    def __init__(self, found: int) -> None:
        super().__init__(
            "unknown_format",
            f"a delta: expected format {FORMAT} or less, found {found}. Upgrade this worker to the trainer's version of "
            "Headrace.",
        )


class Point(msgspec.Struct, frozen=True):
    """A point of a chain: the weights after the delta with this sequence number. 0 is where the chain begins."""

    chain: str
    sequence: _Natural


class DenseTensor(msgspec.Struct, frozen=True):
    """Name and shape of one dense tensor."""

    name: str
    shape: tuple[_Natural, ...]


class DeltaHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Everything in a delta but the weights. `encode_delta` sets the fields from `dim` on.

    chain, sequence  where the delta belongs: `deepfm/12/0`, and the number of the delta in its chain, from 1
    parent           the point on which the delta must be applied
    offsets          by partition of `examples`: the next offset to train
    watermark_ms     event time of the newest impression trained (ms since epoch)
    examples_seen    number of examples that the weights have learned
    negative_rate    share of negatives that the weights were learned from
    at_ms            when the delta was taken, by the trainer's clock (ms since epoch)
    arrivals         Kafka arrival times (ms since epoch) of at most 64 clicks that are learned since the last delta, a sample
    rebase           the delta opens the chain of a restarted trainer, and replaces what an older epoch wrote after the parent
    version          a version that was announced at this sequence number, where it is known
    dtype            of the rows as they are sent; the dense tensors are always float32

    dim              columns of an embedding
    rows, gone       number of rows, and of keys whose rows were evicted
    dense            the dense tensors in the order of the body; null: the delta leaves them as they are
    digest           of all serving weights after the delta (`model.digest`), 16 hex digits
    pieces           number of records
    body_crc32c      CRC-32C of the body

    Unknown fields are ignored.
    """

    chain: str
    sequence: Annotated[int, msgspec.Meta(ge=1)]
    parent: Point
    offsets: dict[str, int]
    watermark_ms: int
    examples_seen: int
    negative_rate: Annotated[float, msgspec.Meta(gt=0, le=1)]
    at_ms: int
    arrivals: tuple[int, ...] = ()
    rebase: bool = False
    version: int | None = None
    dtype: Literal["float32", "float16"] = "float32"
    dim: _Natural = 0
    rows: _Natural = 0
    gone: _Natural = 0
    dense: tuple[DenseTensor, ...] | None = None
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")] = "0" * 16
    pieces: Annotated[int, msgspec.Meta(ge=1)] = 1
    body_crc32c: _Natural = 0


class Piece(NamedTuple):
    """One record of a delta, its checksum verified. `content` is the header and the part of the body."""

    format: int
    epoch: int
    ordinal: int
    sequence: int
    piece: int
    pieces: int
    header_bytes: int
    content: memoryview

    @property
    def has_history(self) -> bool:
        """Whether the body has the column `history`."""
        return self.format > _WITHOUT_HISTORY

    @property
    def identity(self) -> tuple[int, ...]:
        """Equal for the pieces of one delta."""
        return self.format, self.epoch, self.ordinal, self.sequence, self.pieces

    @property
    def name(self) -> str:
        """The delta in words, for messages. The model's name is in the header only."""
        return f"delta {self.sequence} of epoch {self.epoch}, chain {self.ordinal}"


def encode_delta(header: DeltaHeader, delta: ModelDelta, limit: int) -> list[bytes]:
    """The values of a delta's records, in order. Costs one copy of the delta.

    Args:
        limit: largest batch in bytes that the topic takes (`max.message.bytes`).

    Raises:
        ValueError: the delta can't be sent as it is: weights aren't float32, or aren't float16 numbers although the header says
            so; names or shapes don't fit; or the header alone exceeds the limit.
    """
    chain = ChainName.of(header.chain)
    columns = list(_columns(header.dtype, delta))
    body = [part for column in columns for part in _padded(column)]
    body_crc = 0
    for part in body:
        body_crc = crc32c(part, body_crc)
    header = msgspec.structs.replace(
        header,
        dim=delta.rows.embedding.shape[1],
        rows=len(delta.rows),
        gone=len(delta.gone),
        dense=None
        if delta.dense is None
        else tuple(DenseTensor(name, tuple(tensor.shape)) for name, tensor in delta.dense.items()),
        digest=f"{delta.digest:016x}",
        body_crc32c=body_crc,
        pieces=(1 << 32) - 1,  # the longest number, so that the header's final form isn't longer
    )
    room, size = limit - RECORD_OVERHEAD_BYTES - _PREFIX_BYTES, sum(map(len, body))
    longest = len(msgspec.json.encode(header))
    if longest > room:
        raise ValueError(
            f"delta {header.sequence} of {header.chain}: expected a header of at most {room:,} bytes, found {longest:,}. Raise "
            "topics.deltas_max_message_bytes."
        )
    pieces = max(1, -(-(longest + size) // room))
    encoded = msgspec.json.encode(msgspec.structs.replace(header, pieces=pieces))
    encoded += b" " * (
        longest - len(encoded)
    )  # of known length, so that the number of pieces is right; JSON ends in any spaces
    sizes = [room] * (pieces - 1) + [longest + size - room * (pieces - 1)]
    parts = _cut([memoryview(encoded), *body], sizes)
    written = _WITHOUT_HISTORY if delta.rows.history is None else FORMAT
    numbers = (chain.epoch, chain.ordinal, header.sequence)
    return [
        _record(_PREFIX.pack(_MAGIC, written, 0, *numbers, piece, pieces, 0 if piece else longest), content)
        for piece, content in enumerate(parts)
    ]


def read_piece(value: bytes | None) -> Piece:
    """One record's value.

    Raises:
        DeltaDamaged: the value isn't a piece of a delta, or its checksum is wrong.
    """
    if value is None or len(value) < _PREFIX_BYTES or not value.startswith(_MAGIC):
        shown = "none" if value is None else f"{len(value):,} bytes that begin with {value[:8]!r}"
        raise DeltaDamaged("not_a_delta", f"a piece of a delta: expected a value that begins with {_MAGIC!r}, found {shown}.")
    whole = memoryview(value)
    _, found, _, epoch, ordinal, sequence, piece, pieces, header_bytes = _PREFIX.unpack_from(value)
    content = whole[_PREFIX_BYTES:]
    expected, crc = _CRC.unpack_from(value, _PREFIX.size)[0], crc32c(content, crc32c(whole[: _PREFIX.size]))
    if crc != expected:
        raise DeltaDamaged("checksum", f"a piece of a delta: expected the CRC-32C {expected:08x}, found {crc:08x}.")
    return Piece(found, epoch, ordinal, sequence, piece, pieces, header_bytes, content)


def _columns(dtype: str, delta: ModelDelta) -> Iterator[npt.NDArray[Any]]:
    """The columns of the body, not copied where that isn't needed."""
    rows, narrow = delta.rows, dtype == "float16"
    count, dim = rows.embedding.shape
    yield _column("keys", rows.keys, torch.int64, (count,))
    yield _column("embedding", rows.embedding, torch.float32, (count, dim), narrow=narrow)
    yield _column("first_order", rows.first_order, torch.float32, (count,), narrow=narrow)
    if rows.history is not None:
        yield _column("history", rows.history, torch.float32, (count, 2))
    yield _column("gone", delta.gone, torch.int64, (len(delta.gone),))
    for name, tensor in (delta.dense or {}).items():
        yield _column(name, tensor, torch.float32, tensor.shape)


def _column(
    name: str, tensor: torch.Tensor, kind: torch.dtype, shape: Sequence[int], *, narrow: bool = False
) -> npt.NDArray[Any]:
    if tensor.dtype != kind or tensor.shape != shape:
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} of a delta: expected {kind} {tuple(shape)}, found {found}.")
    column = tensor.detach().contiguous()
    if narrow:
        column = column.half()
        if not torch.equal(column.float(), tensor):
            raise ValueError(f"{name} of a delta: expected float16 numbers as the header says, found others. Round them first.")
    array: npt.NDArray[Any] = column.numpy()
    return array if sys.byteorder == "little" else array.astype(array.dtype.newbyteorder("<"))


def _padded(column: npt.NDArray[Any]) -> Iterator[memoryview]:
    data = column.reshape(-1).view(np.uint8).data
    if data:
        yield data
    pad = padded_size(len(data)) - len(data)
    if pad:
        yield memoryview(bytes(pad))


def padded_size(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _cut(parts: Sequence[memoryview], sizes: Sequence[int]) -> Iterator[list[memoryview]]:
    """Cut a sequence of parts at sizes that add up to the parts' size."""
    left = iter(parts)
    part = memoryview(b"")
    for size in sizes:
        taken: list[memoryview] = []
        while size:
            if not part:
                part = next(left)
                continue
            taken.append(part[:size])
            part = part[size:]
            size -= len(taken[-1])
        yield taken


def _record(prefix: bytes, content: Sequence[memoryview]) -> bytes:
    crc = crc32c(prefix)
    for part in content:
        crc = crc32c(part, crc)
    return b"".join((prefix, _CRC.pack(crc), *content))
