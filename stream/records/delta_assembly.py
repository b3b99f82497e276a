"""Joins the pieces of a delta. `stream.records.delta` has the format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from crc32c import crc32c

from model.rows import ModelDelta, Rows
from state.chain_name import ChainName
from stream.records.delta import FORMAT, DeltaDamaged, DeltaHeader, Piece, UnknownFormat, padded_size, read_piece

__all__ = ["Delta", "DeltaAssembly", "assemble"]

_decode_header = msgspec.json.Decoder(DeltaHeader).decode


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta as it was read: what it says of itself, and what it changes."""

    header: DeltaHeader
    model: ModelDelta


def assemble(values: Sequence[bytes]) -> Delta:
    """The delta of these records.

    Raises:
        DeltaDamaged: a piece is damaged, missing, or at the wrong place.
    """
    if not values:
        raise DeltaDamaged("missing_piece", "a delta: expected its pieces, found none.")
    assembly = DeltaAssembly(read_piece(values[0]))
    for value in values[1:]:
        assembly.add(read_piece(value))
    return assembly.delta()


class DeltaAssembly:
    """Joins the pieces of one delta, each copied to its place in the body as it comes.

    ```python
    assembly = DeltaAssembly(read_piece(first))
    while not assembly.whole:
        assembly.add(read_piece(next_value()))
    assembly.delta()
    ```

    Every method raises DeltaDamaged; after that the assembly is of no use. `pieces` is the number of pieces so far.
    """

    def __init__(self, first: Piece) -> None:
        if not 1 <= first.format <= FORMAT:
            raise UnknownFormat(first.format)
        self._first, self.pieces = first, 0
        if first.piece:
            raise DeltaDamaged("missing_piece", f"{first.name}: expected its first piece, found piece {first.piece}.")
        self.header = self._read_header(first)
        size = _body_bytes(self.header, history=first.has_history)
        if size > first.pieces * len(first.content):
            room = f"at most {first.pieces:,} times {len(first.content):,}"  # no piece is larger than the first
            raise DeltaDamaged("wrong_size", self._found(f"a body of {size:,} bytes", room))
        try:
            self._body: npt.NDArray[np.uint8] = np.empty(size, np.uint8)
        except (MemoryError, ValueError, OverflowError) as error:  # ValueError: more bytes than an address has
            raise DeltaDamaged("wrong_size", self._found("a body that fits into memory", f"{size:,} bytes")) from error
        self._filled = self._crc = 0
        self._take(first.content[first.header_bytes :])

    @property
    def whole(self) -> bool:
        """Whether every piece is there."""
        return self.pieces == self._first.pieces

    def add(self, piece: Piece) -> None:
        """Add the next piece."""
        if piece.identity != self._first.identity or self.whole:
            raise DeltaDamaged("missing_piece", self._found(f"piece {self.pieces}", f"piece {piece.piece} of {piece.name}"))
        if piece.piece != self.pieces:
            reason = "repeated_piece" if piece.piece < self.pieces else "missing_piece"
            raise DeltaDamaged(reason, self._found(f"piece {self.pieces}", f"piece {piece.piece}"))
        self._take(piece.content)

    def delta(self) -> Delta:
        """The delta, without another copy: its tensors are views of the body (float16 rows are widened)."""
        header = self.header
        if not self.whole:
            raise DeltaDamaged("missing_piece", self._found(f"{self._first.pieces} pieces", f"{self.pieces}"))
        if self._filled != len(self._body):
            raise DeltaDamaged("wrong_size", self._found(f"{len(self._body):,} bytes", f"{self._filled:,}"))
        if self._crc != header.body_crc32c:
            raise DeltaDamaged("body_checksum", self._found(f"the CRC-32C {header.body_crc32c:08x}", f"{self._crc:08x}"))
        width = np.float32 if header.dtype == "float32" else np.float16
        taken = 0

        def column(dtype: type[np.generic], *shape: int) -> torch.Tensor:
            nonlocal taken
            size = math.prod(shape) * np.dtype(dtype).itemsize
            found = self._body[taken : taken + size].view(dtype).reshape(shape)
            taken += padded_size(size)
            return torch.from_numpy(found)

        keys = column(np.int64, header.rows)
        embedding = column(width, header.rows, header.dim).float()
        first_order = column(width, header.rows).float()
        history = column(np.float32, header.rows, 2) if self._first.has_history else None
        gone = column(np.int64, header.gone)
        dense = None if header.dense is None else {each.name: column(np.float32, *each.shape) for each in header.dense}
        return Delta(header, ModelDelta(Rows(keys, embedding, first_order, history), gone, dense, int(header.digest, 16)))

    def _take(self, part: memoryview) -> None:
        end = self._filled + len(part)
        if end > len(self._body):
            raise DeltaDamaged("wrong_size", self._found(f"{len(self._body):,} bytes", f"at least {end:,}"))
        self._body[self._filled : end] = np.frombuffer(part, np.uint8)
        self._crc = crc32c(part, self._crc)
        self._filled = end
        self.pieces += 1

    def _read_header(self, first: Piece) -> DeltaHeader:
        try:
            header = _decode_header(first.content[: first.header_bytes])
            chain = ChainName.of(header.chain)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise DeltaDamaged("bad_header", self._found("a header", f"{error}")) from error
        claimed = (chain.epoch, chain.ordinal, header.sequence, header.pieces)
        if claimed != (first.epoch, first.ordinal, first.sequence, first.pieces):
            named = f"delta {header.sequence} of {header.chain} in {header.pieces} pieces"
            raise DeltaDamaged("bad_header", self._found("a header of the same delta", named))
        return header

    def _found(self, expected: str, found: str) -> str:
        return f"{self._first.name}: expected {expected}, found {found}."


def _body_bytes(header: DeltaHeader, *, history: bool) -> int:
    width = 4 if header.dtype == "float32" else 2
    sizes = [8 * header.rows, width * header.rows * header.dim, width * header.rows, 8 * header.gone]
    if history:
        sizes.append(8 * header.rows)
    sizes += [4 * math.prod(each.shape) for each in header.dense or ()]
    return sum(map(padded_size, sizes))
