"""The join's local state: writes are read back, drops are gone, and a damaged file never looks like the end of the data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from state.errors import StateInUse
from state.held_click import HeldClick
from state.join_state import Chunk, JoinState, StateOptions
from tests.state.made_state import META, OPTIONS

ALL = (1 << 60, 0)


def test_everything_is_read_back_after_closing(state):
    batch = state.batch()
    batch.remember([(b"a", (5, 0, False)), ("é🎬".encode(), (1 << 47, 1 << 62, True)), (b"\x00", (0, 2, False))])
    batch.add_pending([(5, 0, b"a", b"value of a"), (0, 2, b"\x00", b"\xff" * 300_000)])
    batch.add_pending([(1 << 47, 1 << 62, "é🎬".encode(), b"")], labelled=True)
    batch.hold([((5, 0), HeldClick(7, 9)), ((1 << 47, 1 << 62), HeldClick(1 << 48))])
    batch.add_early([(b"a", (9, 4, b"click")), (b"a", (8, 5, b"")), (b"\x00\xff" * 20, (9, 6, b"c"))])
    batch.add_chunk(Chunk(0, 5, 2), [b"a", b"\x00"])
    batch.set_meta(META)
    batch.write()
    for reopened in (False, True):
        if reopened:
            state.close()
            state.__init__(state.path, OPTIONS)
        assert state.meta() == META
        assert state.entries([b"a", b"nobody", "é🎬".encode(), b"\x00"]) == [
            *((5, 0, False), None, (1 << 47, 1 << 62, True), (0, 2, False)),
        ]
        assert state.pending([(5, 0), (5, 1), (1 << 47, 1 << 62), (0, 2)]) == [
            (5, 0, b"a", b"value of a", False),
            None,
            (1 << 47, 1 << 62, "é🎬".encode(), b"", True),
            (0, 2, b"\x00", b"\xff" * 300_000, False),
        ]
        assert state.held([(5, 0), (0, 2), (1 << 47, 1 << 62)]) == [(7, 9), None, (1 << 48, -1)]
        assert sorted(state.early_clicks()) == [
            (b"\x00\xff" * 20, (9, 6, b"c")),
            (b"a", (8, 5, b"")),
            (b"a", (9, 4, b"click")),
        ]
        assert list(state.all_chunks()) == [Chunk(0, 5, 2)]
        assert [(*row[:3], row[4]) for row in state.pending_between((0, 0), ALL)] == [
            *((0, 2, b"\x00", False), (5, 0, b"a", False), (1 << 47, 1 << 62, "é🎬".encode(), True)),
        ]
        assert len(list(state.pending_impressions())) == 3
        assert state.entries([]) == state.pending([]) == state.held([]) == []


def test_nothing_is_seen_before_the_batch_is_written(state):
    batch = state.batch()
    batch.remember([(b"a", (5, 0, False))])
    batch.add_pending([(5, 0, b"a", b"v")])
    batch.set_meta(META)
    assert (state.entries([b"a"]), list(state.pending_impressions()), state.meta()) == ([None], [], None)
    batch.write()
    assert (state.entries([b"a"]), list(state.pending_impressions()), state.meta()) == ([(5, 0, False)], [(5, 0)], META)


IMPRESSIONS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3)), unique=True, max_size=20)
BOUNDS = st.tuples(st.integers(0, 310), st.integers(0, 4))
DROPS = st.lists(st.one_of(st.tuples(st.integers(-50, 320), st.integers(-50, 320)), IMPRESSIONS), max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(IMPRESSIONS, DROPS, IMPRESSIONS, BOUNDS, BOUNDS)
def test_pending_is_dropped_by_range_and_one_by_one(state, first, drops, later, begin, end):
    """Compared with a set. Impressions that a batch adds after a drop stay, as in a step that expires and remembers."""
    batch, expected = state.batch(), set(first)
    batch.drop_pending_before(0, 1 << 60)  # of the example before
    batch.add_pending((*impression, b"k", b"v%d-%d" % impression) for impression in first)
    batch.write()
    for drop in drops:
        batch = state.batch()
        if isinstance(drop, tuple):
            batch.drop_pending_before(*drop)
            expected -= {impression for impression in expected if drop[0] <= impression[0] < drop[1]}
        else:
            batch.drop_pending(drop)
            expected -= set(drop)
        batch.add_pending((*impression, b"k", b"v%d-%d" % impression) for impression in later)
        expected |= set(later)
        batch.write()
    between = [(time_ms, offset) for time_ms, offset, *_ in state.pending_between(begin, end)]
    assert between == sorted(place for place in expected if begin <= place < end)
    assert list(state.pending_impressions()) == sorted(expected)
    asked = sorted(set(first) | set(later))
    found = [(*impression, b"k", b"v%d-%d" % impression, False) if impression in expected else None for impression in asked]
    assert state.pending(asked) == found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(IMPRESSIONS, IMPRESSIONS, BOUNDS, BOUNDS)
def test_clicks_are_held_by_impression(state, first, drops, begin, end):
    batch = state.batch()
    batch.drop_held(state.held_between((0, 0), ALL))  # of the example before
    batch.hold((impression, HeldClick(impression[0] + 3, impression[1])) for impression in first)
    batch.drop_held(drops)
    batch.write()
    expected = {each: (each[0] + 3, each[1]) for each in first if each not in drops}
    assert state.held_between(begin, end) == {
        impression: click for impression, click in expected.items() if begin <= impression < end
    }
    assert state.held(first) == [expected.get(impression) for impression in first]


def test_early_clicks_are_dropped_one_by_one(state):
    batch = state.batch()
    batch.add_early([(b"a", (9, 4, b"")), (b"a", (8, 5, b"")), (b"ab", (9, 4, b""))])
    batch.drop_early([(b"a", (9, 4, b""))])
    batch.write()
    assert [(key, click[:2]) for key, click in state.early_clicks()] == [(b"a", (8, 5)), (b"ab", (9, 4))]


def test_forgetting_spares_an_id_that_was_used_again(state):
    old, again = Chunk(0, 20, 0), Chunk(10, 120, 2)
    batch = state.batch()
    batch.remember([(b"once", (10, 0, True)), (b"twice", (20, 1, False)), (b"now", (20, 2, False)), (b"gone", (20, 3, False))])
    batch.add_chunk(old, [b"once", b"twice", b"now", b"gone"])
    batch.write()
    batch = state.batch()
    batch.remember([(b"twice", (120, 10, False))])
    batch.add_chunk(again, [b"twice"])
    batch.write()
    # The batch that forgets also has a new use of one id, and a click of another.
    batch = state.batch()
    changed = {b"now": (130, 11, False), b"gone": (20, 3, True)}
    batch.remember(changed.items())
    batch.forget(old, lambda offset: 100, changed)
    batch.write()
    assert state.entries([b"once", b"twice", b"now", b"gone"]) == [None, (120, 10, False), (130, 11, False), None]
    assert list(state.all_chunks()) == [again]
    batch = state.batch()
    batch.forget(again, lambda offset: 121, {})
    batch.write()
    assert state.entries([b"twice"]) == [None]
    assert list(state.all_chunks()) == []


def test_chunks_come_by_first_offset_and_chunks_of_one_offset_stay_apart(state):
    # A rebuild that was abandoned and the next one may divide the same offsets into different chunks.
    chunks = [Chunk(0, 5, 0), Chunk(0, 7, 0), Chunk(3, 1, 2), Chunk(300, 0, 0), Chunk(70_000, 0, 0)]
    batch = state.batch()
    for chunk in reversed(chunks):
        batch.add_chunk(chunk, [b"%d" % chunk.first_offset])
    batch.write()
    assert list(state.all_chunks()) == chunks


@pytest.mark.parametrize("write_buffers_mb", [256, 16])
def test_a_process_that_ends_at_once_leaves_a_prefix(tmp_path, write_buffers_mb):
    """Without a write-ahead log, a crash loses the last batches, and all families end at the same batch."""
    program = """
import os, sys
from pathlib import Path
from state.join_state import Chunk, JoinMeta, JoinState, StateOptions
state = JoinState(Path(sys.argv[1]), StateOptions(8, write_buffers_mb=int(sys.argv[2])))
for index in range(3_000):
    batch = state.batch()
    key = b"%d" % index
    batch.remember([(key, (index, index, False))])
    # 1 MiB of chunks and 64 MiB of payloads fill their buffers at different times.
    batch.add_pending([(index, index, key, os.urandom(40_000))])
    batch.add_early([(key, (index, index, b"c" * 900))])
    batch.add_chunk(Chunk(index, index, index), [key] * 100)
    batch.set_meta(JoinMeta(identity="x", impressions_position=index + 1, clicks_position=0, examples_position=0,
                            watermark_ms=0, impressions_seen_ms=0, clicks_seen_ms=0))
    batch.write()
    if index == 1_000:
        state.flush()
os._exit(1)
"""
    path = tmp_path / "state"
    command = [sys.executable, "-c", program, path, str(write_buffers_mb)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=False, timeout=120)
    state = JoinState(path, OPTIONS)
    try:
        meta = state.meta()
        assert meta is not None
        position = meta.impressions_position
        assert 1_000 < position < 3_000, "this must end before everything was written, and after something was"
        keys = [b"%d" % index for index in range(3_000)]
        assert [entry is not None for entry in state.entries(keys)] == [index < position for index in range(3_000)]
        assert [offset for _, offset, *_ in state.pending_between((0, 0), (10**6, 0))] == list(range(position))
        assert len(list(state.early_clicks())) == position
        assert [chunk.first_offset for chunk in state.all_chunks()] == list(range(position))
    finally:
        state.close()


@pytest.mark.parametrize("end", ["state.flush(); time.sleep(0.5); write(700)", "state.close(); JoinState(path, OPTIONS)"])
def test_all_families_reach_the_disk_at_one_point(tmp_path, end):
    """After small writes, far from filling any buffer, and a crash, the disk has the first 700 batches in every family."""
    program = f"""
import os, signal, sys, time
from pathlib import Path
from state.join_state import Chunk, JoinMeta, JoinState, StateOptions
path, OPTIONS = Path(sys.argv[1]), StateOptions(8)
state = JoinState(path, OPTIONS)
def write(index):
    batch = state.batch()
    key = b"%d" % index
    batch.remember([(key, (index, index, False))])
    batch.add_pending([(index, index, key, b"value")])
    batch.add_early([(key, (index, index, b"click"))])
    batch.add_chunk(Chunk(index, index, index), [key])
    batch.set_meta(JoinMeta(identity="x", impressions_position=index + 1, clicks_position=0, examples_position=0,
                            watermark_ms=0, impressions_seen_ms=0, clicks_seen_ms=0))
    batch.write()
for index in range(700):
    write(index)
{end}
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "state"
    subprocess.run([sys.executable, "-c", program, path], cwd=Path(__file__).parents[2], check=False, timeout=60)
    state = JoinState(path, OPTIONS)
    try:
        meta = state.meta()
        assert meta is not None
        assert meta.impressions_position == 700
        assert sum(entry is not None for entry in state.entries([b"%d" % index for index in range(701)])) == 700
        assert len(list(state.pending_impressions())) == len(list(state.early_clicks())) == len(list(state.all_chunks())) == 700
    finally:
        state.close()


def test_two_processes_cannot_have_it_open(state):
    with pytest.raises(StateInUse, match="Another process has it open") as error:
        JoinState(state.path, OPTIONS)
    assert str(state.path) in str(error.value)
    assert "lock hold by" in str(error.value)
    program = f"""
from pathlib import Path
from state.join_state import JoinState, StateOptions
JoinState(Path({str(state.path)!r}), StateOptions(8))
"""
    other = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert "StateInUse" in other.stderr
    assert "While lock file" in other.stderr


def test_closing_releases_the_lock_and_closing_twice_is_allowed(state):
    state.close()
    state.close()
    JoinState(state.path, OPTIONS).close()


def test_all_partitions_share_one_bound_for_their_write_buffers(tmp_path):
    """Each partition alone is far from filling its own buffers."""
    options = StateOptions(8, write_buffers_mb=4)
    states = [JoinState(tmp_path / str(number), options) for number in range(3)]
    try:
        for index in range(400):
            state, key = states[index % 3], b"%d" % index
            batch = state.batch()
            batch.add_pending([(index, index, key, os.urandom(40_000))])
            batch.write()
        assert options._buffers.get_usage() <= 8 << 20  # one half may be being flushed
        assert all(list((tmp_path / str(number)).glob("*.sst")) for number in range(3))
    finally:
        for state in states:
            state.close()
