"""A change of the registry: who asks for it, the records to write, and what came of it. `state.decisions` makes changes."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from typing import Generic, TypeVar

from msgspec.structs import replace

from state.registry import KeyedRecord
from state.rewinds import SkippedRange

__all__ = ["Announcement", "Cause", "Change", "Held", "Moved", "Rewinding", "Undo", "clock"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Change(Generic[T]):
    """Records to write in one transaction, in order, and the outcome of the change once they are written."""

    records: tuple[KeyedRecord, ...]
    outcome: T


@dataclass(frozen=True, slots=True)
class Cause:
    """Who asks for a change, when and why. `operation` is a random id of the change; its retries have the same id."""

    who: str
    now_ms: int
    reason: str
    operation: str


@dataclass(frozen=True, slots=True)
class Rewinding:
    """That the trainer goes back, too, and the stretches of `examples` that it leaves out from then on."""

    skipped: tuple[SkippedRange, ...] = ()

    def signed(self, cause: Cause) -> tuple[SkippedRange, ...]:
        """The stretches, with who left them out, why and when."""
        return tuple(replace(each, who=cause.who, why=cause.reason, at_ms=cause.now_ms) for each in self.skipped)


@dataclass(frozen=True, slots=True)
class Announcement:
    """Whether an announced version was promoted. `reason` is the gate's, or why the gate wasn't asked.

    `previous` is the champion before; None where the version wasn't promoted, or there was none.
    """

    version: int
    promoted: bool
    reason: str
    previous: int | None = None


@dataclass(frozen=True, slots=True)
class Undo:
    """The operation that restores exactly what was before another one.

    version      the version to promote; None: the champion stays, and only the hold changes
    reason       why it is promoted
    hold         hold auto-promotion (True), let it go on (False), or leave it as it is (None)
    hold_reason  why it was held before
    """

    version: int | None
    reason: str
    hold: bool | None
    hold_reason: str = ""

    @property
    def command(self) -> str:
        """The command that does it."""
        if self.version is None:
            return (
                f"headrace snapshot hold --reason {shlex.quote(self.hold_reason)}" if self.hold else "headrace snapshot resume"
            )
        words = ["headrace", "snapshot", "promote", str(self.version), "--reason", self.reason]
        if self.hold is not None:
            words += ["--hold", self.hold_reason] if self.hold else ["--resume"]
        return shlex.join(words)


@dataclass(frozen=True, slots=True)
class Moved:
    """The champion was moved by hand.

    undo    restores what scorers served before; None where there was no champion before
    rewind  the operation that a trainer obeys by going back too; None for a move of the champion alone
    alone   whether nothing but the champion may answer from now on: a rollback ends every shadow and canary
    """

    version: int
    previous: int | None
    held: bool
    undo: Undo | None
    rewind: str | None = None
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """Whether auto-promotion is held, as the log has it.

    `changed` is False when the operation changed nothing. Then `reason`, `who` and `at_ms` (ms since epoch) are those of the
    earlier operation that held auto-promotion or let it go on, and `undo` is None.
    """

    held: bool
    reason: str
    changed: bool
    undo: Undo | None
    who: str = ""
    at_ms: int = 0


def clock(at_ms: int) -> str:
    """A time in UTC, in the form that `--before` reads."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_ms / 1_000))
