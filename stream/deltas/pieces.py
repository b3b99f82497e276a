"""Finds the deltas among the records of `deltas`, in the order of the log. Pure: no client is needed."""

from __future__ import annotations

from dataclasses import dataclass

from stream.records.delta import DeltaDamaged, Piece, read_piece
from stream.records.delta_assembly import Delta, DeltaAssembly
from stream.records.record import Record

__all__ = ["DeltaProblem", "FoundDelta", "Pieces"]


@dataclass(frozen=True, slots=True)
class FoundDelta:
    """A delta that is whole: the offset of its first record, and the offset after its last one."""

    delta: Delta
    offset: int
    next_offset: int


@dataclass(frozen=True, slots=True)
class DeltaProblem:
    """Records from which no delta can be read.

    reason       one of `stream.records.delta.DELTA_PROBLEMS`
    message      what was expected and what was found
    offset       of the first of the records
    next_offset  from where reading goes on
    epoch, ordinal, sequence  of the delta, where they are known, else -1
    """

    reason: str
    message: str
    offset: int
    next_offset: int
    epoch: int = -1
    ordinal: int = -1
    sequence: int = -1


class Pieces:
    """Joins the pieces of deltas as they come. A delta that can't be joined is one problem.

    A record that is no piece of a delta is a problem of its own, and doesn't hurt the delta around it: a stranger may have
    written it. After any other problem, everything up to the next first piece is passed over.
    """

    def __init__(self) -> None:
        self._assembly: DeltaAssembly | None = None
        self._first: Piece | None = None
        self._offset = 0
        self._skipping = False

    @property
    def started_at(self) -> int | None:
        """The offset of the first piece of a delta whose last piece hasn't come yet; None between two deltas."""
        return None if self._assembly is None else self._offset

    def add(self, record: Record) -> list[FoundDelta | DeltaProblem]:
        """The delta that this record completes, and the problems that it shows, in the order of the log."""
        offset = record.offset
        try:
            piece = read_piece(record.value)
        except DeltaDamaged as error:
            if error.reason == "not_a_delta":
                return [DeltaProblem(error.reason, str(error), offset, offset + 1)]
            return [self._broken(error, offset)]
        found: list[FoundDelta | DeltaProblem] = []
        if piece.piece == 0:
            if self._assembly is not None:
                found.append(self._unfinished(piece, offset))
            self._skipping = False
        elif self._skipping:
            return found
        try:
            if self._assembly is None:
                self._offset, self._first = offset, piece
                self._assembly = DeltaAssembly(piece)
            else:
                self._assembly.add(piece)
            if self._assembly.whole:
                found.append(FoundDelta(self._assembly.delta(), self._offset, offset + 1))
                self._assembly = self._first = None
        except DeltaDamaged as error:
            found.append(self._broken(error, offset))
        return found

    def give_up(self, offset: int) -> list[DeltaProblem]:
        """The problem of a delta whose other pieces are not in the log before this offset; none between two deltas."""
        return [] if self._assembly is None else [self._unfinished(None, offset)]

    def broken_at(self, reason: str, message: str, offset: int, next_offset: int) -> DeltaProblem:
        """A problem of the log itself: the records between these offsets can't be read."""
        first = self._reset()
        start = offset if first is None else self._offset
        return _problem(first, reason, message, start, next_offset)

    def _unfinished(self, next_piece: Piece | None, offset: int) -> DeltaProblem:
        assembly, first = self._assembly, self._first
        assert assembly is not None and first is not None
        repeated = next_piece is not None and next_piece.identity == first.identity
        found = "the end of the log" if next_piece is None else f"the first piece of {'it' if repeated else next_piece.name}"
        message = f"{first.name}: expected piece {assembly.pieces} of {first.pieces}, found {found}."
        return self.broken_at("repeated_piece" if repeated else "missing_piece", message, offset, offset)

    def _broken(self, error: DeltaDamaged, offset: int) -> DeltaProblem:
        return self.broken_at(error.reason, str(error), offset, offset + 1)

    def _reset(self) -> Piece | None:
        first, self._first, self._assembly, self._skipping = self._first, None, None, True
        return first


def _problem(first: Piece | None, reason: str, message: str, offset: int, next_offset: int) -> DeltaProblem:
    if first is None:
        return DeltaProblem(reason, message, offset, next_offset)
    return DeltaProblem(reason, message, offset, next_offset, first.epoch, first.ordinal, first.sequence)
