"""However runs come and are cut, each request is taken once, in the order of its partition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.kafka.transport import Run
from stream.scorer import intake as module
from stream.scorer.intake import Intake
from tests.stream.scorer.factory import record


def run(partition: int, before: int, after: int, *, gaps: frozenset[int] = frozenset(), value: bytes = b"v") -> Run:
    """A run in which the offsets in `gaps` hold no record (transaction markers)."""
    kept = [offset for offset in range(before, after) if offset not in gaps]
    return Run("score-requests", partition, before, after, [record(value, b"k", offset, partition) for offset in kept])


_lengths = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), max_size=20)


@given(_lengths, st.sets(st.integers(0, 120)), st.integers(1, 7), st.integers(1, 40), st.data())
def test_every_record_once_and_in_order(
    lengths: list[tuple[int, int]], gaps: set[int], requests: int, size: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_REQUESTS", requests)
        patch.setattr(module, "MAX_BYTES", size)
        intake = Intake()
        intake.assign({0: 0, 1: 0, 2: 0})
        ends = {0: 0, 1: 0, 2: 0}
        taken: dict[int, list[int]] = {0: [], 1: [], 2: []}
        positions = {0: 0, 1: 0, 2: 0}

        def take() -> bool:
            batch = intake.take()
            if batch is None:
                return False
            assert len(batch.records) <= requests
            assert len(batch.records) <= 1 or sum(len(each.value) for each in batch.records) <= size
            for each in batch.records:
                taken[each.partition].append(each.offset)
                assert each.offset < batch.positions[each.partition]
            for partition, position in batch.positions.items():
                assert position > positions[partition]
                positions[partition] = position
            # What a position says is answered has been taken, all of it.
            for partition, position in positions.items():
                assert taken[partition] == [at for at in range(position) if at not in gaps]
            return True

        for partition, length in lengths:
            start = ends[partition]
            ends[partition] = start + length
            overlap = data.draw(st.integers(0, start))  # read before a rebalance, and again
            assert intake.put(run(partition, start - overlap, start + length, gaps=frozenset(gaps), value=b"v" * 5)) is None
            if data.draw(st.booleans()):
                take()
        while take():
            pass
        assert positions == ends and intake.empty and not intake.full


def test_a_gap_is_asked_for_and_not_taken() -> None:
    intake = Intake()
    intake.assign({0: 5})
    assert intake.put(run(0, 7, 9)) == 5
    assert intake.take() is None and intake.expected == {0: 5}


def test_runs_of_another_assignment_are_nothing() -> None:
    intake = Intake()
    assert intake.put(run(0, 0, 3)) is None and intake.empty
    intake.assign({0: 0, 1: 4})
    assert intake.put(run(1, 0, 4)) is None and intake.empty
    intake.put(run(0, 0, 3))
    before = intake.take()
    assert before is not None
    intake.put(run(0, 3, 6))
    intake.assign({0: 3})
    assert intake.empty and before.generation != intake.generation
    intake.drop()
    assert intake.put(run(0, 3, 6)) is None and intake.empty


def test_a_request_larger_than_a_batch_travels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 3)
    intake = Intake()
    intake.assign({0: 0})
    intake.put(run(0, 0, 2, value=b"larger"))
    batches = [intake.take(), intake.take()]
    assert [len(batch.records) for batch in batches if batch is not None] == [1, 1]


def test_a_run_without_records_moves_the_position() -> None:
    intake = Intake()
    intake.assign({0: 0})
    intake.put(run(0, 0, 2, gaps=frozenset((0, 1))))
    batch = intake.take()
    assert batch is not None and batch.records == [] and batch.positions == {0: 2}


def test_full_when_enough_waits() -> None:
    intake = Intake()
    intake.assign({0: 0})
    intake.put(run(0, 0, module.MAX_WAITING))
    assert intake.full
    intake.take()
    assert not intake.full
