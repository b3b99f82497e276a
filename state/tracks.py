"""Tracks: the series of versions and deltas that a trainer publishes under a name, and which of them serves.

The track `main` is there always. A challenger is a trainer on a track of its own: it learns the same examples, and has its own
registry, deltas, store and gate. Scorers answer with the track that serves, and may score a share of the requests with other
tracks beside it.

Two kinds of records in the registry of the track `main` hold what concerns several tracks. Both keys begin with `alias/` and
have a second slash, so that older releases ignore them:

- `alias/track/NAME` (`Track`): a track's number, and its share of the requests;
- `alias/serving/track` (`Serving`): the track that serves.

One record in each track's own registry, `alias/compare/current` (`state.comparison`), holds what its trainer knows of its
share.

Version numbers and epochs of different tracks differ (`Track.first_number`), so an answer's `model_version` and the line of a
version name the track, too.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

__all__ = [
    "HASH_SPACE",
    "KEPT_TURNS",
    "MAIN",
    "NUMBERS",
    "SERVING_KEY",
    "TRACK_NAME",
    "Interval",
    "Serving",
    "Track",
    "Turn",
    "numbers_before",
    "numbers_of",
    "track_key",
    "track_of",
]

MAIN = "main"
"""The track that is there always. Its trainer, its topics and its part of the store have no name of their own."""

SERVING_KEY = "alias/serving/track"
_TRACK_PREFIX = "alias/track/"

TRACK_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
"""Names are parts of names of topics and folders, and of chains."""

HASH_SPACE = "track"
"""Space of the hash (`model.hashing`) of a request's id that decides which tracks score it beside the one that serves."""

# Numbers of versions and epochs that a track has for itself. With a version every 5 s they last for 15 years, and ten digits of
# a version's number are enough for a hundred tracks.
NUMBERS = 100_000_000
# Changes of the serving track that are kept, at some 200 bytes each.
KEPT_TURNS = 20


class Interval(NamedTuple):
    """The requests whose hash, as a fraction of its range, is at least `start` and below `stop`."""

    start: float
    stop: float


class Track(msgspec.Struct, frozen=True, kw_only=True):
    """A track, and the requests that it scores beside the one that serves.

    number            0 for `main`, and 1, 2, … in the order of the first starts
    at_ms, who        when its trainer first started, and who that was
    share             part of the requests that it scores; 0 for none
    share_from        start of its interval of hashes, so that two tracks never score the same request
    share_at_ms, …    who gave it the share, when and why; `share_operation` is the change's random id
    """

    name: str
    number: int = 0
    at_ms: int = 0
    who: str = ""
    share: float = 0.0
    share_from: float = 0.0
    share_at_ms: int = 0
    share_who: str = ""
    share_reason: str = ""
    share_operation: str = ""

    @property
    def interval(self) -> Interval:
        """The hashes of its requests."""
        return Interval(self.share_from, self.share_from + self.share)

    @property
    def first_number(self) -> int:
        """Its versions and epochs are larger than this, and at most `NUMBERS` larger."""
        return self.number * NUMBERS


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One change of the serving track. `operation` is the operation's random id."""

    track: str
    previous: str
    who: str
    at_ms: int
    reason: str
    operation: str


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """The track that serves, and the last changes, oldest first."""

    track: str = MAIN
    turns: tuple[Turn, ...] = ()

    @property
    def last(self) -> Turn | None:
        """The last change; None where `main` has always served."""
        return self.turns[-1] if self.turns else None


def track_key(name: str) -> str:
    """The key of a track's record."""
    return f"{_TRACK_PREFIX}{name}"


def track_of(key: str) -> str | None:
    """The track whose record has this key; None for another key."""
    name = key.removeprefix(_TRACK_PREFIX)
    return name if name != key and TRACK_NAME.fullmatch(name) else None


def numbers_of(track: Track) -> range:
    """The numbers that the track's versions and epochs can have."""
    return range(track.first_number + 1, track.first_number + NUMBERS + 1)


def numbers_before(number: int) -> int:
    """`Track.first_number` of the track that a version or an epoch of this number is of."""
    return max(number - 1, 0) // NUMBERS * NUMBERS
