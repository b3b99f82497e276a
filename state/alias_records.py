"""Records of the topic `snapshots` beside versions, champion and trainer: aliases of any name, tags, deletions under way.

| key | record | says |
| --- | --- | --- |
| `alias/NAME` | `Alias` | which version a name points at, and who moved the name, when and why |
| `alias/tags/N` | `VersionTags` | tags that people or programs put on version N |
| `alias/gc` | `Deletion` | versions whose files are being deleted |

All three keys begin with `alias/`, since releases up to 0.1.0 ignore every alias that they don't know. Tags have a record of
their own for the same reason: such a release writes a version's record again when it tags the version good, and drops the
fields that it doesn't know. A tag keeps a version from being deleted, so a lost tag would cost the version.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

__all__ = [
    "GC_KEY",
    "KEPT_CHANGES",
    "NAME",
    "Alias",
    "AliasMove",
    "Deletion",
    "Doomed",
    "TagChange",
    "VersionTags",
    "alias_key",
    "alias_of",
    "tags_key",
    "tags_of",
]

GC_KEY = "alias/gc"
_ALIAS_PREFIX = "alias/"
_TAGS_PREFIX = "alias/tags/"

NAME = re.compile(r"[a-z][a-z0-9._-]{0,62}")
"""Names of aliases and tags. Without a slash, so that keys such as `alias/tags/7` are never an alias."""

# Changes kept in the record of an alias or of a version's tags: who did what lately. At about 200 bytes each, a record stays
# below 5 kB.
KEPT_CHANGES = 20

# Names below `alias/` that are records of their own.
_OTHER_RECORDS = ("champion", "trainer", "gc")


class AliasMove(msgspec.Struct, frozen=True, kw_only=True):
    """One change of an alias. `version` is None where the alias was removed; `operation` is the operation's random id."""

    version: int | None
    previous: int | None
    who: str
    at_ms: int
    reason: str
    operation: str


class Alias(msgspec.Struct, frozen=True, kw_only=True):
    """A name that points at a version. An alias that was removed stays as a record with `version` None, for its history.

    who, at_ms, reason  of the last change
    moves               the last changes, oldest first
    """

    version: int | None = None
    who: str = ""
    at_ms: int = 0
    reason: str = ""
    moves: tuple[AliasMove, ...] = ()


class TagChange(msgspec.Struct, frozen=True, kw_only=True):
    """One change of a tag. `value` is None where the tag was removed."""

    name: str
    value: str | None
    who: str
    at_ms: int
    reason: str
    operation: str


class VersionTags(msgspec.Struct, frozen=True, kw_only=True):
    """The tags of a version, by name, and their last changes, oldest first."""

    version: int
    tags: dict[str, TagChange] = msgspec.field(default_factory=dict)
    changes: tuple[TagChange, ...] = ()


class Doomed(NamedTuple):
    """A version whose files are to be deleted, as it was announced. A JSON array of the three.

    The same number with another epoch or time is another version: that of another store, which is left alone.
    """

    version: int
    epoch: int
    created_at_ms: int


class Deletion(msgspec.Struct, frozen=True, kw_only=True):
    """Versions whose files are being deleted; none when the last deletion has ended.

    The transaction that writes the versions here also removes their records. So nobody can move to them any more, whatever the
    release, before the first file goes. A process that dies while it deletes leaves the versions here, and the next one that
    deletes versions ends what the first began.
    """

    versions: tuple[Doomed, ...] = ()
    who: str = ""
    at_ms: int = 0
    reason: str = ""
    operation: str = ""


def alias_key(name: str) -> str:
    """The key of an alias."""
    return f"{_ALIAS_PREFIX}{name}"


def alias_of(key: str) -> str | None:
    """The name of the alias that a key belongs to; None for other keys."""
    name = key.removeprefix(_ALIAS_PREFIX)
    return name if name != key and NAME.fullmatch(name) and name not in _OTHER_RECORDS else None


def tags_key(version: int) -> str:
    """The key of a version's tags."""
    return f"{_TAGS_PREFIX}{version}"


def tags_of(key: str) -> int | None:
    """The version whose tags a key holds; None for other keys."""
    number = key.removeprefix(_TAGS_PREFIX)
    return int(number) if number != key and number.isascii() and number.isdigit() else None
