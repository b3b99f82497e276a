"""Deltas among the records of a log, without Kafka."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from stream.deltas.pieces import DeltaProblem, FoundDelta, Pieces
from stream.records.delta import DELTA_PROBLEMS
from tests.stream.records.made_deltas import pieces

LIMIT = 8_000


def delta(sequence: int, count: int = 3) -> list[bytes]:
    return pieces(sequence, count=count, limit=LIMIT)


def read(values: Iterable[bytes | None]) -> list[Any]:
    """What is found: the sequence and the offsets of each delta, the reason and the offsets of each problem."""
    joined = Pieces()
    found: list[FoundDelta | DeltaProblem] = []
    end = 0
    for offset, value in enumerate(values):
        found += joined.add(SimpleNamespace(offset=offset, value=value))  # type: ignore[arg-type]
        end = offset + 1
    found += joined.give_up(end)
    assert joined.started_at is None
    return [
        (each.delta.header.sequence, each.offset, each.next_offset)
        if isinstance(each, FoundDelta)
        else (each.reason, each.sequence, each.offset, each.next_offset)
        for each in found
    ]


def flipped(value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] ^ 1])


A, B, C = delta(1), delta(2), delta(3)


def test_deltas_one_after_another() -> None:
    assert read([*A, *delta(2, 1), *C]) == [(1, 0, 3), (2, 3, 4), (3, 4, 7)]
    joined = Pieces()
    for offset, value in enumerate(A):
        assert joined.started_at == (0 if offset else None)
        joined.add(SimpleNamespace(offset=offset, value=value))  # type: ignore[arg-type]
    assert joined.started_at is None


def test_each_damage_is_one_problem_and_the_next_delta_is_whole() -> None:
    cases: list[tuple[list[bytes | None], list[Any]]] = [
        ([A[0], A[2]], [("missing_piece", 1, 0, 2)]),
        ([A[0], A[1]], [("missing_piece", 1, 0, 2)]),
        ([A[1], A[2]], [("missing_piece", 1, 0, 1)]),
        ([A[0], A[1], A[1], A[2]], [("repeated_piece", 1, 0, 3)]),
        ([A[0], A[2], A[1]], [("missing_piece", 1, 0, 2)]),
        ([A[2], A[1], A[0]], [("missing_piece", 1, 0, 1), ("missing_piece", 1, 2, 3)]),
        ([A[0], flipped(A[1]), A[2]], [("checksum", 1, 0, 2)]),
        ([flipped(A[0]), A[1], A[2]], [("checksum", -1, 0, 1)]),
        ([A[0], B[1], A[1], A[2]], [("missing_piece", 1, 0, 2)]),
        ([A[0], A[0], A[1], A[2]], [("repeated_piece", 1, 0, 1), (1, 1, 4)]),
        ([*A, *A], [(1, 0, 3), (1, 3, 6)]),
        # What no trainer wrote stands by itself, and the delta around it is whole.
        ([A[0], b"hello", A[1], None, A[2]], [("not_a_delta", -1, 1, 2), ("not_a_delta", -1, 3, 4), (1, 0, 5)]),
    ]
    for values, expected in cases:
        end = len(values)
        after = [(3, end, end + 3)]
        # The delta that isn't finished is only seen to be broken where the next one begins.
        assert read([*values, *C]) == expected + after, [DELTA_PROBLEMS[each[0]] for each in expected if each[0] != 1]
        assert read(values) == expected


@given(st.data())
def test_whatever_happens_to_the_records_only_whole_deltas_are_found(data: st.DataObject) -> None:
    """Records lost, repeated, exchanged and damaged: what is found is as it was written, and what is hurt is reported."""
    written = {sequence: delta(sequence, data.draw(st.integers(1, 3))) for sequence in (1, 2, 3, 4)}
    log: list[tuple[int, bytes]] = [(sequence, value) for sequence, values in written.items() for value in values]
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(log) - 1))
        match data.draw(st.sampled_from(["lose", "repeat", "move", "flip", "stranger"])):
            case "lose" if len(log) > 1:
                del log[at]
            case "repeat":
                log.insert(data.draw(st.integers(0, len(log))), log[at])
            case "move":
                log.insert(data.draw(st.integers(0, len(log) - 1)), log.pop(at))
            case "flip":
                log[at] = (log[at][0], flipped(log[at][1]))
            case _:
                log.insert(at, (0, b"stranger"))
    values = [value for _, value in log]
    found = read(values)
    deltas = [each for each in found if each[0] in written]
    problems = [each for each in found if each[0] not in written]
    for sequence, offset, next_offset in deltas:
        between = [value for value in values[offset:next_offset] if not value.startswith(b"strange")]
        assert between == written[sequence]
    if not problems:
        assert values == [value for sequence, _, _ in deltas for value in written[sequence]]
    assert {each[0] for each in problems} <= DELTA_PROBLEMS.keys()
    for sequence, parts in written.items():  # a delta whose pieces are together in the log is found
        together = any(values[start : start + len(parts)] == parts for start in range(len(values)))
        assert not together or sequence in {each[0] for each in deltas}
