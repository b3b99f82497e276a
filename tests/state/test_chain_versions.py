"""From which versions a chain is followed, when one must be read, and what its points are called."""

from __future__ import annotations

from typing import Any

import pytest

from state.chain import ChainPoint, Progress, Refusal
from state.chain_name import ChainName
from state.chain_versions import LogSeen, Marks, Naming, covers, is_behind, is_beyond, is_left, leads_on, point_of, starts
from state.gate_report import GateReport
from state.registry import Champion, RegistryState, VersionRecord
from state.rewinds import Rewind, Rewinds

OURS, LATER = ChainName("deepfm", 3, 0), ChainName("deepfm", 4, 0)
AT = Progress(ChainPoint(OURS, 100), 1)
READING, OVERDUE, UNREADABLE = LogSeen(1_000, False), LogSeen(1_000, True), LogSeen(None, False)


def version(number: int, sequence: int | None, chain: str = "deepfm/3/0", *, line: int = 1, **more: Any) -> VersionRecord:
    offset = None if sequence is None else 10 * sequence
    fields: dict[str, Any] = {"chain": chain, "sequence": sequence, "deltas_offset": offset, **more}
    return VersionRecord(version=number, verdict=GateReport(line=line), **fields)


def registry(champion: int | None, *records: VersionRecord) -> RegistryState:
    return RegistryState({record.version: record for record in records}, Champion(version=champion))


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(version(1, 5, ""), id="older than chains"),
        pytest.param(version(1, None), id="no point of a published chain: it was captured while versions were withheld"),
        pytest.param(version(1, 5, deltas_offset=None), id="without an offset"),
        pytest.param(version(1, 5, "deepfm#3"), id="a name of a newer writer"),
    ],
)
def test_not_every_version_can_be_followed_from(record: VersionRecord) -> None:
    assert point_of(record) is None
    assert starts(registry(1, record, version(2, 9))) == []
    assert not covers(AT, 1, record)


def test_the_newest_version_of_the_champions_line_comes_first() -> None:
    found = starts(
        registry(
            4,
            version(3, 20),
            version(4, 40),
            version(5, 60),
            version(6, None),  # withheld
            version(7, 1, "deepfm/4/0"),  # a trainer restarted
            version(8, 0, "deepfm/5/0", line=5),  # a new model, not champion yet
            version(9, 0, "lr/3/0"),
        )
    )
    assert [record.version for record in found] == [7, 5, 4]
    assert starts(registry(None, version(3, 20))) == []
    assert starts(registry(3, version(4, 20))) == [], "the champion's record isn't there"


@pytest.mark.parametrize(
    "champion, log, covered, behind",
    [
        pytest.param(version(1, 100), READING, True, False, id="at it"),
        pytest.param(version(1, 40), READING, True, False, id="the champion is behind the applied deltas"),
        pytest.param(version(1, 101, deltas_offset=1_001), READING, False, False, id="ahead, its delta isn't read yet"),
        pytest.param(version(1, 101, deltas_offset=1_000), READING, False, True, id="ahead, and the log didn't bring it"),
        pytest.param(
            version(1, 101, deltas_offset=5_000), OVERDUE, False, True, id="ahead, and the log doesn't bring it in time"
        ),
        pytest.param(version(1, 101, deltas_offset=5_000), UNREADABLE, False, True, id="ahead, without a log"),
        pytest.param(version(1, 100), UNREADABLE, True, False, id="at it, without a log"),
        pytest.param(version(1, 7, "deepfm/2/0"), READING, True, False, id="of a chain that ours goes on from"),
        pytest.param(version(1, 7, "deepfm/2/0", line=0), READING, False, True, id="older, of another line"),
        pytest.param(version(1, 1, "deepfm/4/0", deltas_offset=1_001), READING, False, False, id="a restart, to be read"),
        pytest.param(version(1, 1, "deepfm/4/0", deltas_offset=990), READING, False, True, id="a restart that was passed over"),
        pytest.param(version(1, 0, "deepfm/4/0", line=4, deltas_offset=9), READING, False, True, id="a new line"),
        pytest.param(version(1, 7, "lr/2/0"), READING, False, True, id="another model"),
    ],
)
def test_when_the_champion_must_be_read(champion: VersionRecord, log: LogSeen, covered: bool, behind: bool) -> None:
    assert (covers(AT, 1, champion), is_behind(AT, 1, champion, log)) == (covered, behind)


@pytest.mark.parametrize(
    "needs, record, beyond",
    [
        pytest.param(ChainPoint(OURS, 101), version(1, 101), True, id="it has the delta that was refused"),
        pytest.param(ChainPoint(OURS, 103), version(1, 102), False, id="it ends before the delta that was refused"),
        pytest.param(ChainPoint(OURS, 103), version(1, 1, "deepfm/4/0"), True, id="of the next chain"),
        pytest.param(None, version(1, 101), True, id="what was refused isn't known"),
        pytest.param(None, version(1, 100), False, id="nothing new in it"),
    ],
)
def test_which_version_heals(needs: ChainPoint | None, record: VersionRecord, beyond: bool) -> None:
    broken = AT._replace(broken=Refusal("gap", "", needs))
    assert is_beyond(broken, record) == beyond
    assert not is_beyond(AT, record), "nothing is broken"


def test_a_point_is_called_by_the_newest_version_at_or_below_it() -> None:
    marks = Marks(OURS, [version(7, 60), version(5, 40), version(9, 80), version(6, None), version(8, 1, "deepfm/4/0")])
    before = Naming(2, 90)
    names = [marks.name(ChainPoint(OURS, sequence), before) for sequence in (39, 40, 59, 60, 79, 500)]
    assert names == [(2, 90), (5, 0), (5, 19), (7, 0), (7, 19), (2, 90)]
    assert marks.name(ChainPoint(OURS, 85), before) == (9, 5)


def test_a_name_never_goes_back_when_a_version_is_deleted() -> None:
    marks = Marks(OURS, [version(5, 40)])
    assert marks.name(ChainPoint(OURS, 90), Naming(9, 10)) == (9, 10), "version 9, at 80, was deleted"


def test_a_chain_without_versions_keeps_the_name_of_the_chain_before() -> None:
    assert Marks(LATER, [version(5, 40)]).name(ChainPoint(LATER, 3), Naming(5, 63)) == (5, 63)


def gone_back(state: RegistryState, to: int, chain: str = "deepfm/3/1", up_to: int | None = 9) -> RegistryState:
    rewind = Rewind(version=to, who="ann", at_ms=1, reason="bad", operation="one", up_to=up_to, chain=chain)
    state.rewinds = Rewinds(rewinds=(*state.rewinds.rewinds, rewind))
    return state


@pytest.mark.parametrize(
    "chain, sequence, left",
    [
        pytest.param("deepfm/3/0", 39, False, id="before the version"),
        pytest.param("deepfm/3/0", 40, False, id="the version itself"),
        pytest.param("deepfm/3/0", 41, True, id="after it"),
        pytest.param("deepfm/3/1", 1, False, id="the chain that was begun there"),
        pytest.param("deepfm/4/0", 1, False, id="a trainer that went on from there"),
        pytest.param("deepfm/2/0", 900, False, id="an older trainer"),
        pytest.param("lr/3/0", 41, False, id="another model"),
    ],
)
def test_what_the_trainer_was_sent_back_from_is_left(chain: str, sequence: int, left: bool) -> None:
    point = ChainPoint(ChainName.of(chain), sequence)
    state = registry(4, version(4, 40), version(9, 90))
    assert not is_left(point, gone_back(registry(4, version(4, 40)), 4, up_to=None)), "it hasn't gone back yet"
    assert is_left(point, gone_back(state, 4)) == left
    assert not is_left(point, gone_back(registry(4, version(4, 40)), 4, chain="deepfm#3")), "of a newer writer"
    assert not is_left(point, gone_back(registry(9, version(9, 90)), 4)), "its version is deleted: the champion is newer"


def test_a_version_takes_the_place_of_what_is_left_once_the_log_up_to_it_is_read() -> None:
    state = gone_back(registry(4, version(4, 40), version(9, 90)), 4)
    assert not leads_on(state, 5_000), "version 9 is of the line that was left"
    state.versions[10] = version(10, 2, "deepfm/3/1", deltas_offset=1_000)
    assert not leads_on(state, 999) and leads_on(state, 1_000)
    assert not leads_on(registry(None), 5_000)
