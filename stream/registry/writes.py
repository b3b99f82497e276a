"""What the registry of versions can be asked to write, one method for each kind of change.

`stream.registry.writer` does them, one after another across all processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from state import alias_decisions, canary_decisions, decisions, gate_decisions, track_decisions, upkeep
from state.alias_decisions import AliasMoved, Tagged
from state.alias_records import Doomed
from state.canary import CanaryOutcome, Mode, Progress, Thresholds
from state.canary_decisions import CanaryChanged
from state.changes import Announcement, Cause, Change, Held, Moved, Rewinding
from state.comparison import COMPARISON_KEY, Comparison
from state.gate_release import Released
from state.manifest import Manifest
from state.registry import KeyedRecord, RegistryState
from state.rewind_decisions import rewound
from state.served_band import decision_of
from state.settings import SnapshotSettings
from state.track_decisions import Promoted, Shared
from state.tracks import Track
from state.upkeep import Reindexed, Retired

__all__ = ["Decide", "RegistryWrites", "Written"]

T = TypeVar("T")
Decide = Callable[[RegistryState, Cause], Change[T]]


@dataclass(frozen=True, slots=True)
class Written(Generic[T]):
    """A change that is in the log.

    `position` is the offset after its last record: a reader at that position has applied the change. `at_ms` is the timestamp
    of its last record: the broker's clock (ms since epoch), since the topic stamps records on arrival. When nothing had to be
    written, `position` is the end of the log and `at_ms` None.
    """

    outcome: T
    position: int
    at_ms: int | None


class RegistryWrites(ABC):
    """The changes. All raise as `stream.registry.writer.RegistryWriter` says."""

    @abstractmethod
    async def _change(self, decide: Decide[T], reason: str = "") -> Written[T]:
        """Run one operation to its end."""

    async def take_trainer_epoch(self, *, above: int = 0) -> int:
        """Take the next trainer epoch, and one above `above`. A trainer with an older one can no longer announce."""

        def decide(state: RegistryState, cause: Cause) -> Change[int]:
            return decisions.take_epoch(state, who=cause.who, now_ms=cause.now_ms, above=above)

        return (await self._change(decide)).outcome

    async def announce(self, manifest: Manifest, *, gate: SnapshotSettings) -> Announcement:
        """Enter a version, which must be whole in the store, and promote it if the gate lets it through."""

        def decide(state: RegistryState, cause: Cause) -> Change[Announcement]:
            return decisions.announce(
                state, manifest, settings=gate, who=cause.who, now_ms=cause.now_ms, operation=cause.operation
            )

        return (await self._change(decide)).outcome

    async def promote(self, version: int, reason: str, *, hold: bool | None = None, hold_reason: str = "") -> Written[Moved]:
        """Make a version champion. `hold` also holds auto-promotion (True) or lets it go on (False)."""
        return await self._change(
            lambda state, cause: decisions.promote(state, version, cause, hold=hold, hold_reason=hold_reason), reason
        )

    async def rollback(self, target: int, reason: str, rewinding: Rewinding | None = None) -> Written[Moved]:
        """Put an older version back and hold auto-promotion. With `rewinding`, send the trainer back, too."""

        def decide(state: RegistryState, cause: Cause) -> Change[Moved]:
            skipped = () if rewinding is None else rewinding.signed(cause)
            return decisions.rollback(state, target, cause, rewind=rewinding is not None, skipped=skipped)

        return await self._change(decide, reason)

    async def rollback_by_itself(self, target: int, reason: str, *, under: str) -> Moved | None:
        """Put an older version back, unless somebody has decided already: then None is returned.

        That is so if auto-promotion is held, or if `under` isn't the last decision any more (`state.served_band.decision_of`).
        """

        def decide(state: RegistryState, cause: Cause) -> Change[Moved | None]:
            if state.champion.hold or decision_of(state.champion) != under:
                return Change((), None)
            change = decisions.rollback(state, target, cause)
            return Change(change.records, change.outcome)

        return (await self._change(decide, reason)).outcome

    async def rewound(self, operation: str, *, epoch: int, chain: str, up_to: int | None = None) -> bool:
        """Say that this trainer has gone back, as an operation asked for. Returns whether that was still to be done."""

        def decide(state: RegistryState, cause: Cause) -> Change[bool]:
            return rewound(state, operation, epoch=epoch, chain=chain, up_to=up_to, who=cause.who, now_ms=cause.now_ms)

        return (await self._change(decide)).outcome

    async def hold(self, reason: str) -> Written[Held]:
        """Stop auto-promotion."""
        return await self._change(decisions.hold, reason)

    async def resume(self, reason: str = "") -> Written[Held]:
        """Let auto-promotion go on."""
        return await self._change(decisions.resume, reason)

    async def release(self, reason: str) -> Written[Released]:
        """Release what the gate withholds."""
        return await self._change(gate_decisions.release, reason)

    async def set_alias(self, name: str, version: int, reason: str) -> Written[AliasMoved]:
        """Point an alias other than `champion` at a version."""
        return await self._change(lambda state, cause: alias_decisions.set_alias(state, name, version, cause), reason)

    async def remove_alias(self, name: str, reason: str) -> Written[AliasMoved]:
        """Remove an alias; its history stays."""
        return await self._change(lambda state, cause: alias_decisions.remove_alias(state, name, cause), reason)

    async def tag(
        self, version: int, values: Mapping[str, str], reason: str, *, remove: Collection[str] = ()
    ) -> Written[Tagged]:
        """Put tags on a version, or change or remove them."""

        def decide(state: RegistryState, cause: Cause) -> Change[Tagged]:
            return alias_decisions.tag(state, version, values, cause, remove=remove)

        return await self._change(decide, reason)

    async def begin_canary(
        self, mode: Mode, version: int, share: float, thresholds: Thresholds, reason: str
    ) -> Written[CanaryChanged]:
        """Give a version a share of the requests."""

        def decide(state: RegistryState, cause: Cause) -> Change[CanaryChanged]:
            return canary_decisions.begin_canary(state, mode, version, share, thresholds, cause)

        return await self._change(decide, reason)

    async def end_canary(self, outcome: CanaryOutcome, reason: str, *, of: str = "") -> Written[CanaryChanged]:
        """End the shadow or canary, if it is the one that the operation `of` began. Promoted, its version becomes champion."""
        return await self._change(lambda state, cause: canary_decisions.end_canary(state, outcome, cause, of=of), reason)

    async def note_canary(self, of: str, progress: Progress) -> Written[CanaryChanged]:
        """Note what is known of the shadow or canary that the operation `of` began."""
        return await self._change(lambda state, _: canary_decisions.note_progress(state, of, progress))

    async def register_track(self, name: str, *, used: int) -> Track:
        """Give a track its number, where it has none yet. In the registry of `main`, as the two methods after this one."""
        return (await self._change(lambda state, cause: track_decisions.register_track(state, name, cause, used=used))).outcome

    async def share_requests(self, name: str, share: float, reason: str) -> Written[Shared]:
        """Let a track score a share of the requests beside the one that serves."""
        return await self._change(lambda state, cause: track_decisions.share_requests(state, name, share, cause), reason)

    async def promote_track(self, name: str, reason: str) -> Written[Promoted]:
        """Let another track serve."""
        return await self._change(lambda state, cause: track_decisions.promote_track(state, name, cause), reason)

    async def note_comparison(self, comparison: Comparison) -> None:
        """Note in the track's own registry what is known of its share."""
        record = KeyedRecord(COMPARISON_KEY, comparison)
        await self._change(lambda state, _: Change((record,) if state.comparison != comparison else (), None))

    async def retire(
        self,
        choose: upkeep.Choose,
        reason: str,
        *,
        rests: Collection[Doomed] = (),
        ended: str = "",
    ) -> Written[Retired]:
        """Take away the records of versions whose files are then to be deleted; see `stream.registry.collect`."""

        def decide(state: RegistryState, cause: Cause) -> Change[Retired]:
            return upkeep.retire(state, choose, cause, rests=rests, ended=ended)

        return await self._change(decide, reason)

    async def reindex(
        self, manifests: Mapping[int, Manifest], reason: str, *, champion: int | None = None
    ) -> Written[Reindexed]:
        """Enter versions of the store that the registry doesn't know."""
        return await self._change(lambda state, cause: upkeep.reindex(state, manifests, cause, champion=champion), reason)

    async def tag_good(self, *versions: int) -> tuple[int, ...]:
        """Tag versions as good: a rollback that names no version goes to the newest of them. Returns those newly tagged."""
        return (await self._change(lambda state, cause: decisions.tag_good(state, versions, now_ms=cause.now_ms))).outcome
