"""Changes of tracks. As in `state.decisions`, each function looks at the state and returns the records to write.

The state is that of the track `main`, which holds the records of all tracks (`state.tracks`).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from msgspec.structs import replace

from state.changes import Cause, Change
from state.errors import Refused
from state.registry import KeyedRecord, RegistryState
from state.tracks import (
    KEPT_TURNS,
    MAIN,
    NUMBERS,
    SERVING_KEY,
    TRACK_NAME,
    Serving,
    Track,
    Turn,
    numbers_before,
    track_key,
)

__all__ = [
    "Promoted",
    "Shared",
    "free_interval",
    "promote_track",
    "register_track",
    "require_name",
    "share_requests",
    "tracks_by_number",
]

# Shares are sums of decimal fractions: 0.1 + 0.2 is a little more than 0.3.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Shared:
    """A track after a change of its share. `undo` is the command that restores the share before; None: nothing was changed."""

    track: Track
    undo: str | None


@dataclass(frozen=True, slots=True)
class Promoted:
    """Another track serves.

    shadow  the track that served before, with the share that the promoted one had
    undo    the command that lets the former track serve again
    """

    track: str
    previous: str
    shadow: Track
    undo: str


def tracks_by_number(state: RegistryState) -> list[Track]:
    """All tracks in the order of their first starts, `main` first, also where nothing is written about it."""
    known = {MAIN: Track(name=MAIN), **state.tracks}
    return sorted(known.values(), key=lambda track: track.number)


def register_track(state: RegistryState, name: str, cause: Cause, *, used: int = 0) -> Change[Track]:
    """Give a track its number, when its trainer starts for the first time.

    Args:
        used: largest epoch or version of the track. Where the registry of `main` was lost, the track gets the number again that
            it had.

    Raises:
        Refused: the name can't be that of a track.
    """
    require_name(name)
    known = state.tracks.get(name)
    if known is not None or name == MAIN:
        return Change((), known or Track(name=MAIN))
    taken, number = {track.number for track in state.tracks.values()}, numbers_before(used) // NUMBERS
    if number in taken or not number:
        number = 1 + max(taken, default=0)
    track = Track(name=name, number=number, at_ms=cause.now_ms, who=cause.who)
    return Change((KeyedRecord(track_key(name), track),), track)


def share_requests(state: RegistryState, name: str, share: float, cause: Cause) -> Change[Shared]:
    """Let a track score a share of the requests beside the one that serves; 0 ends that.

    Raises:
        Refused: there is no such track, it serves, or so many requests aren't free.
    """
    before = _known(state, name)
    if not 0 <= share <= 1:
        raise Refused(f"share of {name}: expected 0 to 100 % of the requests, found {share:.4%}. Name another share.")
    if share and name == state.serving.track:
        raise Refused(
            f"share of {name}: expected a track that doesn't serve, found the one that does. `headrace model compare` shows "
            "the others."
        )
    if share == before.share:
        return Change((), Shared(before, None))
    after = _with_share(before, share, free_interval(state, name, share) if share else 0.0, cause)
    words = ["headrace", "model", "shadow", name, "--share", f"{before.share * 100:g}%", "--reason", "undo"]
    return Change((KeyedRecord(track_key(name), after),), Shared(after, shlex.join(words)))


def free_interval(state: RegistryState, name: str, share: float) -> float:
    """Where an interval of this length begins that no other track has; as low as possible, so that shares can grow.

    Raises:
        Refused: there is none.
    """
    others = sorted(track.interval for track in state.tracks.values() if track.share and track.name != name)
    start = 0.0
    for other in others:
        if start + share <= other.start + _ROUNDING:
            return start
        start = max(start, other.stop)
    if start + share <= 1 + _ROUNDING:
        return start
    taken = ", ".join(
        f"{track.name} {track.share:.4g}" for track in state.tracks.values() if track.share and track.name != name
    )
    raise Refused(
        f"share of {name}: expected {share:.4g} of the requests in one stretch that no other track scores, found too little "
        f"free ({taken}). Lower a share: `headrace model shadow NAME --share …`."
    )


def promote_track(state: RegistryState, name: str, cause: Cause) -> Change[Promoted]:
    """Let another track serve. The one that served before gets the share that the new one had, so that both stay comparable.

    Raises:
        Refused: there is no such track, or it serves already.
    """
    entry, previous = _known(state, name), state.serving.track
    if name == previous:
        last = state.serving.last
        since = "from the beginning" if last is None else f"by {last.who}, {last.reason!r}"
        raise Refused(f"track {name}: expected one that doesn't serve, found the one that does ({since}). Nothing was changed.")
    turn = Turn(
        track=name,
        previous=previous,
        who=cause.who,
        at_ms=cause.now_ms,
        reason=cause.reason,
        operation=cause.operation,
    )
    serving = Serving(track=name, turns=(*state.serving.turns, turn)[-KEPT_TURNS:])
    former = _with_share(_known(state, previous), entry.share, entry.share_from, cause)
    records = [KeyedRecord(SERVING_KEY, serving), KeyedRecord(track_key(previous), former)]
    if entry.share:
        records.append(KeyedRecord(track_key(name), _with_share(entry, 0.0, 0.0, cause)))
    undo = shlex.join(["headrace", "model", "promote", previous, "--reason", "undo", "--yes"])
    return Change(tuple(records), Promoted(name, previous, former, undo))


def require_name(name: str) -> None:
    """Raise Refused for a name that can't be a track's."""
    if not TRACK_NAME.fullmatch(name):
        raise Refused(
            f"track {name!r}: expected a lowercase letter, then at most 30 lowercase letters, digits or dashes, found another "
            "name. Choose one such as wide-history."
        )


def _known(state: RegistryState, name: str) -> Track:
    known = state.tracks.get(name) or (Track(name=MAIN) if name == MAIN else None)
    if known is None:
        names = ", ".join(track.name for track in tracks_by_number(state))
        raise Refused(
            f"track {name!r}: expected one of {names}, found none of that name. A trainer makes a track: `headrace run trainer "
            "--track NAME`."
        )
    return known


def _with_share(track: Track, share: float, start: float, cause: Cause) -> Track:
    return replace(
        track,
        share=share,
        share_from=start,
        share_at_ms=cause.now_ms,
        share_who=cause.who,
        share_reason=cause.reason,
        share_operation=cause.operation,
    )
