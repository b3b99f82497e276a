"""Tracks in the registry: numbers that never meet, shares that never overlap, and which track serves."""

from __future__ import annotations

import itertools
import shlex

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state import decisions
from state.changes import Cause
from state.comparison import COMPARISON_KEY, Comparison, finding_of
from state.errors import Refused
from state.registry import KeyedRecord, RegistryState
from state.settings import SnapshotSettings
from state.track_decisions import promote_track, register_track, share_requests, tracks_by_number
from state.tracks import MAIN, NUMBERS, SERVING_KEY, Track, numbers_before, numbers_of, track_key, track_of
from tests.state.registry_log import Log, a_log


@pytest.fixture
def log() -> Log:
    """A registry of `main` with version 1, and the tracks `wide` and `deep`."""
    log = a_log(1)
    for name in ("wide", "deep"):
        log.write(register_track(log.state, name, log.cause()))
    return log


def test_a_track_is_a_record_that_old_readers_ignore(log: Log) -> None:
    assert [(track.name, track.number) for track in tracks_by_number(log.state)] == [("main", 0), ("wide", 1), ("deep", 2)]
    assert not register_track(log.state, "wide", log.cause()).records, "a track is entered once"
    assert not register_track(log.state, MAIN, log.cause()).records
    for key in (track_key("wide"), SERVING_KEY, COMPARISON_KEY):
        assert "/" in key.removeprefix("alias/")
    assert not log.state.aliases and not log.state.problems
    again = RegistryState()
    for key, value in log.compacted.items():
        assert again.apply(key.encode(), value, 0) is None
    assert (again.tracks, again.serving) == (log.state.tracks, log.state.serving)
    newer = msgspec.json.decode(log.compacted[track_key("wide")]) | {"colour": "blue"}
    assert log.state.apply(track_key("wide").encode(), msgspec.json.encode(newer), 0) is None
    assert (track_of("alias/track/wide"), track_of("alias/track/Wide"), track_of("alias/x")) == ("wide", None, None)


@pytest.mark.parametrize("name", ["", "Wide", "9wide", "wide_deep", "a" * 32, "wide/x"])
def test_names_that_are_no_part_of_a_topic_are_refused(log: Log, name: str) -> None:
    with pytest.raises(Refused, match="expected a lowercase letter"):
        register_track(log.state, name, log.cause())


def test_numbers_of_tracks_never_meet(log: Log) -> None:
    ranges = [numbers_of(track) for track in tracks_by_number(log.state)]
    assert [each.start for each in ranges] == [1, NUMBERS + 1, 2 * NUMBERS + 1]
    assert all(one.stop == two.start for one, two in itertools.pairwise(ranges))
    for track, numbers in zip(tracks_by_number(log.state), ranges, strict=True):
        assert {numbers_before(number) for number in (numbers[0], numbers[-1])} == {track.first_number}
    # Where the registry of `main` is lost, a track gets its number again by what its own registry has used.
    assert register_track(a_log(1).state, "deep", log.cause(), used=2 * NUMBERS + 7).outcome.number == 2
    assert register_track(log.state, "new", log.cause(), used=2 * NUMBERS + 7).outcome.number == 3, "deep has it"
    # An epoch of the track makes its registry count from its first number, before there is a version.
    own = Log()
    own.write(decisions.take_epoch(own.state, who="t", now_ms=1, above=NUMBERS))
    assert (own.state.trainer.epoch, own.state.newest) == (NUMBERS + 1, NUMBERS)
    assert a_log(1).state.newest == 1


def test_a_share_is_given_undone_and_never_to_what_serves(log: Log) -> None:
    given = log.write(share_requests(log.state, "wide", 0.2, log.cause()))
    assert log.state.tracks["wide"].interval == (0.0, 0.2) and log.state.tracks["wide"].share_reason == "why"
    assert given.undo == "headrace model shadow wide --share 0% --reason undo"
    assert not share_requests(log.state, "wide", 0.2, log.cause()).records
    log.write(share_requests(log.state, "deep", 0.5, log.cause()))
    assert log.state.tracks["deep"].interval == (0.2, 0.7)
    assert log.state.has_done(log.state.tracks["deep"].share_operation)
    for name, share, found in (
        (MAIN, 0.1, "the one that does"),
        ("nobody", 0.1, "expected one of main, wide, deep"),
        ("wide", 1.2, "0 to 100 %"),
        ("wide", 0.31, "too little free"),
    ):
        with pytest.raises(Refused, match=found):
            share_requests(log.state, name, share, log.cause())
    log.write(share_requests(log.state, "wide", 0.0, log.cause()))
    assert not log.state.tracks["wide"].share


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0])), max_size=25))
def test_shares_never_overlap(changes: list[tuple[str, float]]) -> None:
    state = RegistryState(tracks={name: Track(name=name, number=index + 1) for index, name in enumerate("abcde")})
    for number, (name, share) in enumerate(changes):
        try:
            change = share_requests(state, name, share, Cause("me", number, "why", f"op{number}"))
        except Refused:
            taken = sorted(track.interval for track in state.tracks.values() if track.share and track.name != name)
            edges = [0.0, *(edge for interval in taken for edge in interval), 1.0]
            assert max(stop - start for start, stop in zip(edges[::2], edges[1::2], strict=True)) < share, "there was room"
            continue
        for key, record in change.records:
            state.tracks[key.rsplit("/", 1)[1]] = record  # type: ignore[assignment]
        shares = sorted(track.interval for track in state.tracks.values() if track.share)
        assert all(one.stop <= two.start + 1e-9 for one, two in itertools.pairwise(shares))
        assert all(interval.start >= 0 and interval.stop <= 1 + 1e-9 for interval in shares)


def test_promoted_and_back_the_shares_change_places(log: Log) -> None:
    log.write(share_requests(log.state, "wide", 0.2, log.cause()))
    log.write(share_requests(log.state, "deep", 0.5, log.cause()))
    done = log.write(promote_track(log.state, "wide", log.cause()))
    assert (log.state.serving.track, done.previous) == ("wide", MAIN)
    assert log.state.tracks[MAIN].interval == (0.0, 0.2) and not log.state.tracks["wide"].share
    assert log.state.tracks["deep"].interval == (0.2, 0.7), "another challenger goes on"
    last = log.state.serving.last
    assert last is not None and (last.who, last.reason) == ("me", "why") and log.state.has_done(last.operation)
    with pytest.raises(Refused, match="found the one that does"):
        promote_track(log.state, "wide", log.cause())
    with pytest.raises(Refused, match="none of that name"):
        promote_track(log.state, "nobody", log.cause())
    assert shlex.split(done.undo)[:4] == ["headrace", "model", "promote", MAIN]
    log.write(promote_track(log.state, MAIN, log.cause()))
    assert log.state.serving.track == MAIN and log.state.tracks["wide"].interval == (0.0, 0.2)
    assert not log.state.tracks[MAIN].share and log.state.champion.version == 1


def test_each_track_has_a_store_of_its_own() -> None:
    settings = SnapshotSettings(url="s3://bucket/headrace/")
    assert settings.store_url == settings.on_track(MAIN).store_url == "s3://bucket/headrace/"
    assert settings.on_track("wide").store_url == "s3://bucket/headrace/tracks/wide"
    with pytest.raises(ValueError, match="track"):
        SnapshotSettings(track="Wide")


@pytest.mark.parametrize(
    ("change", "error", "clicks", "verdict"),
    [
        (-0.02, 0.005, 500, "better"),
        (0.02, 0.005, 500, "worse"),
        (-0.005, 0.005, 500, "undecided"),
        (-0.02, 0.005, 99, "too_early"),
        (None, None, 500, "too_early"),
    ],
)
def test_a_verdict_needs_clicks_and_an_interval(change: float | None, error: float | None, clicks: float, verdict: str) -> None:
    found = finding_of(Comparison(against=MAIN, impressions=9_000.0, clicks=clicks, change=change, error=error), "wide")
    assert found.verdict == verdict
    assert (found.low is None) == (verdict == "too_early") and found.words.endswith(".")
    if found.low is not None and found.high is not None and change is not None:
        assert found.low < change < found.high and f"{change * 100:+.2f} %" in found.words and "500 clicks" in found.words


def test_without_impressions_the_verdict_says_what_they_must_carry() -> None:
    assert "shadow_version" in finding_of(Comparison(), "wide").words


def test_a_comparison_survives_the_registry(log: Log) -> None:
    found = Comparison(of="op/", against=MAIN, impressions=10.0, clicks=2.0, change=-0.01, error=0.1, version=NUMBERS + 3)
    state = RegistryState()
    document = msgspec.json.encode(found)
    assert state.apply(COMPARISON_KEY.encode(), document, 0) is None and state.comparison == found
    assert KeyedRecord(COMPARISON_KEY, found).record == state.comparison
