"""Scorers are compared where they were at the same point, and with the versions that were announced."""

from __future__ import annotations

from state.registry import VersionRecord
from stream.deltas.live_digests import LiveDigests
from stream.records.delta import DeltaHeader, Point
from stream.records.heartbeat import Heartbeat, Mark


def beat(worker: str, marks: dict[int, str], chain: str = "m/1/0", version: int = 3) -> Heartbeat:
    told = tuple(Mark(sequence, digest) for sequence, digest in marks.items())
    return Heartbeat(
        worker=worker,
        version=version,
        since_ms=0,
        host="h",
        registry_offset=0,
        at_ms=0,
        following=True,
        chain=chain,
        marks=told,
    )


def version(number: int, sequence: int | None, digest: str) -> VersionRecord:
    return VersionRecord(version=number, chain="m/1/0", sequence=sequence, digest=digest)


def test_scorers_that_report_at_different_times_meet_at_earlier_points() -> None:
    found = LiveDigests()
    found.add_beats([beat("a", {7: "x", 8: "y"}), beat("b", {5: "v", 6: "w", 7: "x"})])
    assert (found.compared, found.alone, found.differences) == (1, [], [])


def test_a_scorer_that_serves_other_weights_is_named() -> None:
    found = LiveDigests()
    found.add_beats([beat("a", {7: "x"}), beat("b", {7: "x"}), beat("c", {7: "z"})])
    assert found.differences == [("m/1/0", 7, {"x": ["a", "b"], "z": ["c"]})]


def test_a_scorer_alone_is_compared_with_versions() -> None:
    found = LiveDigests()
    found.add_versions([version(3, 7, "x"), version(4, None, "q"), version(5, 9, ""), version(6, 8, "o")])
    found.add_beats([beat("a", {7: "z"})])
    assert found.differences == [("m/1/0", 7, {"x": ["version 3"], "z": ["a"]})] and found.compared == 1


def test_what_was_compared_with_nothing_is_said() -> None:
    found = LiveDigests()
    found.add_beats(
        [
            beat("a", {7: "x"}),
            beat("b", {9: "y"}),
            beat("c", {7: "x"}, chain="m/2/0"),
            beat("old", {}, ""),
            beat("new", {}, version=-1),
        ]
    )
    assert (found.compared, found.alone) == (0, ["a", "b", "c", "old"])
    found.add_beats([beat("a", {9: "y"})])
    assert (found.compared, found.alone) == (1, []), "later heartbeats meet earlier ones; scorers that ended are left out"


def test_a_scorer_alone_is_compared_with_the_trainers_deltas() -> None:
    found = LiveDigests()
    for sequence, digest in ((7, "1" * 16), (8, "2" * 16)):
        found.add_delta(
            DeltaHeader(
                chain="m/1/0",
                sequence=sequence,
                parent=Point("m/1/0", sequence - 1),
                offsets={},
                watermark_ms=0,
                examples_seen=0,
                negative_rate=1.0,
                at_ms=0,
                digest=digest,
            )
        )
    found.add_beats([beat("a", {6: "x", 7: "1" * 16}), beat("b", {8: "z"})])
    assert (found.compared, found.alone) == (2, [])
    assert found.differences == [("m/1/0", 8, {"2" * 16: ["the trainer"], "z": ["b"]})]
