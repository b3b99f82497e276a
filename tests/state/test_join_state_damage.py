"""Damage to the join's local state is an error, and never looks like its end; other layouts are no damage."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import msgspec
import pytest
from rocksdict import AccessType, Rdict

from state.errors import JoinStateError, StateDamaged
from state.held_click import NOT_KNOWN_MS, HeldClick
from state.join_folder import state_error
from state.join_state import LAYOUT, Chunk, JoinState, StateOptions
from tests.state.made_state import META, OPTIONS


def fill(path: Path) -> None:
    state = JoinState(path, OPTIONS)
    batch = state.batch()
    batch.remember((b"%d" % index, (index, index, False)) for index in range(5_000))
    batch.add_pending((index, index, b"%d" % index, os.urandom(100)) for index in range(5_000))
    batch.add_early((b"%d" % index, (index, index, os.urandom(100))) for index in range(5_000))
    for start in range(0, 5_000, 500):
        batch.add_chunk(Chunk(start, start + 499, 0), [b"%d" % index for index in range(start, start + 500)])
    batch.set_meta(META)
    batch.write()
    state.close()


def read_all(path: Path) -> list[int]:
    # Separate options: a copy would find blocks of its original in a shared block cache, which would hide the damage.
    state = JoinState(path, StateOptions(8))
    try:
        state.meta()
        keys, rows = [b"%d" % index for index in range(5_000)], [(index, index) for index in range(5_000)]
        return [
            sum(entry is not None for entry in state.entries(keys)),
            sum(value is not None for value in state.pending(rows)),
            len(list(state.pending_impressions())),
            sum(1 for _ in state.pending_between((0, 0), (10**6, 0))),
            sum(1 for _ in state.early_clicks()),
            sum(1 for _ in state.all_chunks()),
        ]
    finally:
        state.close()


WHOLE = [5_000, 5_000, 5_000, 5_000, 5_000, 10]


def test_damage_is_an_error_and_never_an_end(tmp_path):
    """Every data file in turn is damaged in several ways. No data is missing without an error."""
    fill(tmp_path / "whole")
    assert read_all(tmp_path / "whole") == WHOLE
    names = [each.name for each in (tmp_path / "whole").iterdir() if each.name.startswith(("CURRENT", "MANIFEST", "0"))]
    assert sum(name.endswith(".sst") for name in names) >= 4
    path, found = tmp_path / "damaged", set()
    for name in names:
        for where in (0.0, 0.3, 0.6, 1.0, "cut", "gone"):
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(tmp_path / "whole", path)
            content = bytearray((path / name).read_bytes())
            if where == "gone":
                (path / name).unlink()
            else:
                if where == "cut":
                    del content[len(content) // 2 :]
                else:
                    start = int(where * max(len(content) - 16, 0))
                    content[start : start + 16] = bytes(byte ^ 0xFF for byte in content[start : start + 16])
                (path / name).write_bytes(content)
            try:
                state = JoinState(path, OPTIONS)
                begins_anew = state.meta() is None
                state.close()
                if begins_anew:  # a truncated list of files is an older list: taking over discards such a state
                    continue
                assert read_all(path) == WHOLE, (name, where)
            except StateDamaged as error:
                found.add("opening")
                assert str(path) in str(error)
            except Exception as error:
                found.add("reading")
                assert isinstance(state_error(path, "could not read it", error), StateDamaged), (name, where)
    assert found == {"opening", "reading"}


def test_destroying_leaves_nothing(tmp_path):
    fill(tmp_path / "state")
    JoinState.destroy(tmp_path / "state")
    assert not (tmp_path / "state").exists()
    JoinState.destroy(tmp_path / "state")


def test_a_database_of_layout_3_is_opened_as_it_is(tmp_path):
    """Headrace 0.1.0 had no family `held`, and no layout in its `meta`."""
    old = {name: OPTIONS.family(write_buffer_mb=1) for name in ("ids", "payloads", "early", "chunks")}
    database = Rdict(str(tmp_path / "old"), OPTIONS.database(), old, AccessType.read_write())
    meta = json.loads(msgspec.json.encode(META))
    del meta["layout"], meta["cut"]
    database[b"meta"] = json.dumps(meta).encode()
    database.get_column_family("ids")[b"a"] = struct.pack("<qq?", 5, 0, True)
    database.close()
    opened = JoinState(tmp_path / "old", OPTIONS)
    assert opened.meta() == META
    assert opened.meta().layout == 3
    assert opened.entries([b"a"]) == [(5, 0, True)]
    batch = opened.batch()
    batch.hold([((5, 0), HeldClick(7, 9))])
    batch.write()
    assert opened.held([(5, 0)]) == [(7, 9)]
    opened.close()


def test_clicks_that_layout_4_held_have_no_arrival(state):
    state.held_clicks[struct.pack(">QQ", 5, 0)] = struct.pack("<q", 7)
    batch = state.batch()
    batch.hold([((5, 1), HeldClick(8, 9))])
    batch.write()
    assert state.held([(5, 0), (5, 1)]) == [HeldClick(7, NOT_KNOWN_MS), HeldClick(8, 9)]
    assert state.held_between((5, 0), (5, 2)) == {(5, 0): (7, -1), (5, 1): (8, 9)}


@pytest.mark.parametrize("meta", [b"{", b"\xff", b'{"identity":"x"}'])
def test_meta_that_cannot_be_read_is_damage(state, meta):
    state.db[b"meta"] = meta
    with pytest.raises(StateDamaged, match=r"expected positions in its `meta`, found: .*It is damaged"):
        state.meta()


def test_a_newer_layout_is_rejected_and_never_taken_for_damage(state):
    """Whatever else the newer layout may have changed in `meta`."""
    state.db[b"meta"] = b'{"layout":%d,"identity":7}' % (LAYOUT + 1)
    with pytest.raises(
        JoinStateError, match=rf"layout {LAYOUT} or older, found layout {LAYOUT + 1}: a newer version.*left as it is"
    ) as error:
        state.meta()
    assert not isinstance(error.value, StateDamaged)
