"""What `stream.registry.operations` is asked for, what it plans, and what it has done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from state import decisions
from state.changes import Held, Rewinding, Undo
from state.registry import RegistryState
from state.rewinds import Rewind, SkippedRange
from stream.records.heartbeat import Heartbeat
from stream.registry.heartbeat import Confirmation, Silent
from stream.registry.skipping import NOTHING, SkipRequest

__all__ = ["ChampionMoved", "Checked", "Goal", "Plan", "PromoteRequest", "Resumed", "RollbackRequest", "Seen", "When"]

# Longest wait for the scorers to confirm a rollback, when the request names none.
CONFIRM_MS = 10_000

# What was checked of a version's files.
Checked = Literal["hashes", "sizes", "nothing"]


@dataclass(frozen=True, slots=True)
class RollbackRequest:
    """An older version to put back. At most one of `to`, `back_ms` and `before_ms` is set.

    to          this version
    back_ms     the champion this long ago
    before_ms   the champion at this time (ms since epoch)
    (none)      the newest version older than the champion that is tagged good
    reason      why; it stays in the registry
    timeout_ms  longest wait for the scorers, and for the trainer if it goes back too, to confirm
    rewind      the trainer goes back too: its weights and its offsets (`state.rewinds`). The champion may then be named by `to`
    skip        what the trainer leaves out of the log from then on; only with `rewind`
    """

    reason: str
    to: int | None = None
    back_ms: int | None = None
    before_ms: int | None = None
    timeout_ms: int = CONFIRM_MS
    rewind: bool = False
    skip: SkipRequest = NOTHING

    def __post_init__(self) -> None:
        if self.skip and not self.rewind:
            raise ValueError("a rollback: expected a rewind of the trainer beside what is to be skipped, found none.")

    @property
    def goes_by_time(self) -> bool:
        """Whether Kafka's time decides what it does."""
        return self.back_ms is not None or bool(self.skip.times)

    def target(self, state: RegistryState, now_ms: int) -> int:
        """The version that it goes to. Raises Refused where there is none."""
        choice = {"to": self.to, "back_ms": self.back_ms, "before_ms": self.before_ms}
        return decisions.rollback_target(state, **choice, now_ms=now_ms, or_champion=self.rewind)


@dataclass(frozen=True, slots=True)
class PromoteRequest:
    """A version to make champion.

    reason       why; it stays in the registry
    hold         also hold auto-promotion (True) or let it go on (False); None: leave it as it is
    hold_reason  why it is held
    timeout_ms   longest wait for the scorers to confirm; None: don't wait
    """

    version: int
    reason: str
    hold: bool | None = None
    hold_reason: str = ""
    timeout_ms: int | None = None


class Goal(NamedTuple):
    """Where a rollback goes, and what is asked of the trainer."""

    target: int
    rewinding: Rewinding | None

    @property
    def command(self) -> str:
        """The command that goes there whatever has happened meanwhile. It may be run again."""
        words = f"headrace snapshot rollback --to {self.target}"
        if self.rewinding is None:
            return words
        ranges = (f" --skip {each.partition}:{each.first}-{each.to}" for each in self.rewinding.skipped)
        return f"{words} --rewind-trainer{''.join(ranges)}"


class When(NamedTuple):
    """A moment by Kafka's clock (ms since epoch), as well as it was known, and by this process's monotonic clock."""

    kafka_ms: int
    monotonic_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request would do to the registry as it is now.

    version, previous   the champion after it and before it
    held, held_already  whether auto-promotion would be held after it, and whether it is held now
    undo                what would restore the present champion; None when there is no champion now
    live                the scorers that would have to confirm
    skipped             what the trainer would leave out; None: it wouldn't go back
    offsets             by partition of `examples`, from where it would learn again
    checked             what was checked of the version's files: hashes, sizes or nothing
    made                when it was made
    """

    request: RollbackRequest | PromoteRequest
    version: int
    previous: int | None
    held: bool
    held_already: bool
    undo: Undo | None
    live: list[Heartbeat]
    skipped: tuple[SkippedRange, ...] | None = None
    offsets: dict[str, int] = field(default_factory=dict)
    checked: Checked = "nothing"
    made: When | None = None


@dataclass(frozen=True, slots=True)
class ChampionMoved:
    """What a promotion or a rollback did.

    version, previous       the champion after it and before it
    held                    whether auto-promotion is held now
    undo                    what restores exactly what was before; `undo.command` is the command. None when there was no
                            champion before
    confirmed, unconfirmed  scorers that serve `version`, and the last heartbeats of those that didn't confirm in time. Both are
                            empty when no wait was asked for
    silent                  scorers that have sent no heartbeat for so long that nobody waited for them: they stand still or
                            were killed. One that goes on reads the registry before it answers
    took_ms                 from the beginning of the operation to the last confirmation, or to the end of the wait
    skipped                 what the trainer leaves out; None: it wasn't sent back
    trainer                 how the trainer went back; None: it wasn't sent back, or hasn't gone in time. The next trainer that
                            starts goes back then
    trainer_ms              from the beginning of the operation until the trainer had gone back
    """

    version: int
    previous: int | None
    held: bool
    undo: Undo | None
    confirmed: list[Confirmation]
    unconfirmed: list[Heartbeat]
    took_ms: float
    silent: tuple[Silent, ...] = ()
    skipped: tuple[SkippedRange, ...] | None = None
    trainer: Rewind | None = None
    trainer_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Resumed:
    """What letting auto-promotion go on did.

    confirmed, unconfirmed  scorers that follow the champion's chain, or serve it where it has none, and the last heartbeats of
                            those that didn't confirm in time. Both are empty when nothing was changed
    silent                  as in `ChampionMoved`
    took_ms                 from the beginning of the operation to the last confirmation, or to the end of the wait
    """

    held: Held
    confirmed: list[Confirmation]
    unconfirmed: list[Heartbeat]
    took_ms: float
    silent: tuple[Silent, ...] = ()


class Seen(NamedTuple):
    """The registry, the last heartbeat of every live scorer, scorers that are silent, and the time by Kafka's clock."""

    state: RegistryState
    live: list[Heartbeat]
    silent: list[Silent]
    now_ms: int
