"""A heartbeat: a record on `scorers` in which a scorer says what it serves. `stream.registry.heartbeat` sends and reads them.

The key is the worker's id, the value is JSON (`Heartbeat`). A tombstone says that the worker has stopped by itself.
"""

from __future__ import annotations

import msgspec

from state.tracks import MAIN
from stream.records.record import Record

__all__ = [
    "DEFAULT_HEARTBEAT_MS",
    "Heartbeat",
    "Mark",
    "ShadowBeat",
    "encode_heartbeat",
    "live_limit",
    "live_limit_ms",
    "read_heartbeat",
    "worker_of",
]

# The interval of a heartbeat that has no `heartbeat_ms`. Scorers of 0.1.0 did not send it; their `scorer.heartbeat_ms` was this
# by default.
DEFAULT_HEARTBEAT_MS = 1_000
# Heartbeats that may be missing, and the time that a pause of the process or a new leader of the topic's partition may take.
MISSED_BEATS, GRACE_MS = 3, 2_000


class Mark(msgspec.Struct, frozen=True):
    """A point of a chain, and the digest of the weights there, 16 hex digits."""

    sequence: int
    digest: str


class ShadowBeat(msgspec.Struct, frozen=True):
    """A track that scores a share of the requests beside. Without weights `version` is -1 and `problem` says why."""

    track: str
    version: int = -1
    delta: int = 0
    weights_age_ms: int | None = None
    problem: str = ""


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """One scorer at one moment.

    `version` is the version that answers, -1 for none. For weights that follow a chain it is the newest announced version at or
    below their point. `registry_offset` is the next offset of the registry that the scorer has
    not applied. Never report a new registry offset while still serving the old version: a rollback would count it as confirmed.
    So a scorer that has finished loading a version checks that the version is still wanted.

    `fallback_of` is the champion that the worker could not read. Meanwhile it answers with another version, or with none, and
    `fallback_reason` says what was wrong with the champion. `heartbeat_ms` is the interval at which this worker sends
    heartbeats.

    following      whether the weights that answer follow the champion's chain; if not, they are exactly `version`
    chain          the chain that they are a point of; empty for a version without one
    sequence       number of the last delta of the chain that they contain
    digest         of the weights (`model.digest`), 16 hex digits
    delta          number of deltas since `version`
    weights_age_ms time since the trainer captured the weights
    marks          the last points that they were at, ascending, this one included
    problem        why the chain is not followed, or not further; empty while it is
    candidate      the version that takes part in a shadow or canary; None for none
    candidate_problem  why the version that should take part doesn't
    track          the track that serves (`state.tracks`); `registry_offset` is one of its registry
    main_offset    as `registry_offset`, of the registry of `main`, which says that the track serves; 0 until that is in effect
    shadows        the tracks that score a share of the requests beside
    """

    worker: str
    version: int
    since_ms: int
    host: str
    registry_offset: int
    at_ms: int
    stale: bool = False
    heartbeat_ms: int = DEFAULT_HEARTBEAT_MS
    fallback_of: int | None = None
    fallback_reason: str = ""
    following: bool = False
    chain: str = ""
    sequence: int | None = None
    digest: str = ""
    delta: int = 0
    weights_age_ms: int | None = None
    marks: tuple[Mark, ...] = ()
    problem: str = ""
    candidate: int | None = None
    candidate_problem: str = ""
    track: str = MAIN
    main_offset: int = 0
    shadows: tuple[ShadowBeat, ...] = ()


_decode = msgspec.json.Decoder(Heartbeat).decode


def live_limit_ms(beat: Heartbeat) -> int:
    """The age from which a worker with this last heartbeat counts as dead: three of its own intervals, and two seconds."""
    return live_limit(beat.heartbeat_ms)


def live_limit(heartbeat_ms: int) -> int:
    """The same for an interval."""
    return MISSED_BEATS * heartbeat_ms + GRACE_MS


def encode_heartbeat(beat: Heartbeat) -> tuple[bytes, bytes]:
    """Key and value of the record."""
    return beat.worker.encode(), msgspec.json.encode(beat)


def worker_of(record: Record) -> str:
    """The worker whose heartbeat or tombstone this is."""
    return (record.key or b"").decode(errors="replace")


def read_heartbeat(record: Record) -> Heartbeat | None:
    """The heartbeat in a record; None for a tombstone.

    Raises:
        ValueError: a newer version of Headrace, or somebody else, has written this record.
    """
    if record.value is None:
        return None
    try:
        return _decode(record.value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"expected a heartbeat, found {record.value[:80]!r}") from error
