"""An operator's release of what the gate withholds, as a record of the registry. No Kafka, no clock.

The trainer follows the registry, and carries a release out once: it keeps the operation's id with its state. A release for
another line of weights than the trainer's is none of its own. Older releases of Headrace ignore the record.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

__all__ = ["RELEASE_KEY", "GateRelease", "Released"]

RELEASE_KEY = "alias/gate/release"


class GateRelease(msgspec.Struct, frozen=True, kw_only=True):
    """The last release. `line` is the line of weights that is released, None before the first release."""

    line: int | None = None
    who: str = ""
    at_ms: int = 0
    reason: str = ""
    operation: str = ""


@dataclass(frozen=True, slots=True)
class Released:
    """A release that is in the log.

    line      the line of weights
    withheld  why the gate withheld, and since when (ms since epoch), by the newest version's report; None: the report says that
              it was flowing, so the trainer withholds since a moment ago, or there is nothing to release
    """

    line: int
    withheld: str | None
    since_ms: int | None
