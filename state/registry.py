"""The registry of versions: the records of the topic `snapshots`, and the state that they add up to. No Kafka, no clock.

This file is long because the records of versions and of the champion stand beside the state that is asked about them.

The topic is compacted, so the state is the last value of each key:

- `version/N`: one announced version;
- `alias/champion`: the version that scorers serve;
- `alias/trainer`: which trainer may announce;
- `alias/gate/release`: the last release of what the gate withheld, by an operator (`state.gate_release`);
- other keys below `alias/`: aliases of any name, tags, deletions under way (`state.alias_records`), rewinds of the trainer
  (`state.rewinds`), the shadow or canary (`state.canary`), tracks (`state.tracks`), and what a track's trainer knows of its
  share of the requests (`state.comparison`).

A reader ignores keys below `alias/` and fields that it doesn't know, so that it can read what a newer release has written.
A record with an empty value, a tombstone, removes its key. The records of deleted versions are removed, so the state grows
with the versions that are kept and not with those that were ever announced.

Compaction can leave an alias before the version that it names. So act on the state only once the log has been read to its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from state.alias_records import GC_KEY, Alias, Deletion, TagChange, VersionTags, alias_of, tags_of
from state.canary import CANARY_KEY, Canary
from state.comparison import COMPARISON_KEY, Comparison
from state.gate_release import RELEASE_KEY, GateRelease
from state.gate_report import GateReport
from state.manifest import Manifest, finite_or_null, nan_for_null
from state.record_times import not_later
from state.rewinds import REWINDS_KEY, Rewinds, SkippedRange
from state.tracks import SERVING_KEY, Serving, Track, numbers_before, track_of

__all__ = [
    "CHAMPION_KEY",
    "KEPT_BY_HAND",
    "KEPT_MOVES",
    "KEPT_RANGES",
    "KEPT_TIMES",
    "TRAINER_KEY",
    "Champion",
    "How",
    "KeyedRecord",
    "Move",
    "RegistryState",
    "TrainerLease",
    "VersionRange",
    "VersionRecord",
    "encode_record",
    "version_key",
]

CHAMPION_KEY = "alias/champion"
TRAINER_KEY = "alias/trainer"
_VERSION_PREFIX = "version/"

# Moves kept in the champion's record. They show a retried operation, within seconds, what it has done already, and an operator
# who did what lately. At about 200 bytes each they are most of a record that is written with every promotion.
KEPT_MOVES = 20
# Moves by hand kept besides, for `headrace snapshot history`: who did what in the last weeks.
KEPT_BY_HAND = 20
# Times kept in a version's record. A version is rarely champion more than twice.
KEPT_TIMES = 20
# Ranges of versions that were rolled back over. The oldest is dropped, whose versions are long superseded by then.
KEPT_RANGES = 50
# Malformed records kept for the operator. The count includes those that are dropped.
KEPT_PROBLEMS = 100

How = Literal["auto", "promote", "rollback"]


class VersionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One announced version: the main fields of its manifest, and its history.

    champion_at_ms  the times at which it became champion, ascending. Together the versions hold the champion's whole history,
                    which no single record of a compacted topic could
    good_at_ms      when it was tagged good; None: never
    gate            why it was promoted, or why it stays a candidate
    verdict         the gate's report when the version was captured; None: announced by something without a gate
    who             who announced it
    chain, sequence, digest, deltas_offset  as in the manifest. A release that doesn't know them leaves them out when it writes
                    the record again; the version then counts as one that is no point of a chain
    skipped         as in the manifest
    """

    version: int
    parent: int | None = None
    base: int | None = None
    kind: str = "full"
    epoch: int = 0
    created_at_ms: int = 0
    watermark_ms: int = 0
    examples_seen: int = 0
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    schema_hash: str = ""
    size: int = 0
    chain: str = ""
    sequence: int | None = None
    digest: str = ""
    deltas_offset: int | None = None
    announced_at_ms: int = 0
    who: str = ""
    gate: str = ""
    verdict: GateReport | None = None
    champion_at_ms: tuple[int, ...] = ()
    good_at_ms: int | None = None
    skipped: tuple[SkippedRange, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest, *, now_ms: int, who: str, gate: str) -> VersionRecord:
        """The record that announces a version."""
        return cls(
            version=manifest.version,
            parent=manifest.parent,
            base=manifest.base,
            kind=manifest.kind,
            epoch=manifest.epoch,
            created_at_ms=manifest.created_at_ms,
            watermark_ms=manifest.watermark_ms,
            examples_seen=manifest.examples_seen,
            metrics=manifest.metrics,
            schema_hash=manifest.schema_hash,
            size=manifest.size,
            chain=manifest.chain,
            sequence=manifest.sequence,
            digest=manifest.digest,
            deltas_offset=manifest.deltas_offset,
            announced_at_ms=now_ms,
            who=who,
            gate=gate,
            verdict=manifest.verdict,
            skipped=manifest.skipped,
        )

    @property
    def line(self) -> int:
        """The line of weights that it belongs to; 0 for versions older than lines."""
        return 0 if self.verdict is None else self.verdict.line


class VersionRange(NamedTuple):
    """Versions above one number, up to and including another. A JSON array of the two."""

    above: int
    up_to: int

    def includes(self, version: int) -> bool:
        return self.above < version <= self.up_to


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One change of the champion. `operation` is the operation's random id: by it a retry finds that it was done already."""

    version: int
    previous: int | None
    who: str
    at_ms: int
    reason: str
    how: How
    operation: str


class Champion(msgspec.Struct, frozen=True, kw_only=True):
    """The alias that scorers serve, and whether auto-promotion is held.

    `rolled_back` are the versions that a rollback went back over. They don't count as good.
    """

    version: int | None = None
    previous: int | None = None
    who: str = ""
    at_ms: int = 0
    reason: str = ""
    how: How = "auto"
    hold: bool = False
    hold_reason: str = ""
    hold_who: str = ""
    hold_at_ms: int = 0
    hold_operation: str = ""
    rolled_back: tuple[VersionRange, ...] = ()
    moves: tuple[Move, ...] = ()

    @property
    def follows(self) -> bool:
        """Whether scorers go on along the champion's chain. While auto-promotion is held they serve exactly `version`."""
        return not self.hold

    def was_rolled_back(self, version: int) -> bool:
        """Whether a rollback went back over this version."""
        return any(each.includes(version) for each in self.rolled_back)


class TrainerLease(msgspec.Struct, frozen=True, kw_only=True):
    """Which trainer may announce: the one with the largest epoch."""

    epoch: int = 0
    who: str = ""
    at_ms: int = 0


RegistryRecord = (
    VersionRecord
    | Champion
    | TrainerLease
    | Alias
    | VersionTags
    | Deletion
    | Rewinds
    | Canary
    | GateRelease
    | Track
    | Serving
    | Comparison
)
T = TypeVar("T", bound=RegistryRecord)


class KeyedRecord(NamedTuple):
    """A record of the topic: its key, and what its value says. None is a tombstone, which removes the key."""

    key: str
    record: RegistryRecord | None


@dataclass(slots=True)
class RegistryState:
    """The registry as of some offset. `apply` changes it in place: there is one owner, and readers are on its event loop.

    aliases   by name, those that were removed too (with `version` None); without champion and trainer
    tags      by version; versions that never had tags aren't in it
    deletion  the versions that are being deleted; their records are gone from `versions`
    rewinds   how the trainer was sent back, and what it leaves out since
    release   the last release of what the gate withheld
    canary    the shadow or canary that runs, or the last one; `state.canary_running` says whether it goes on
    tracks    by name; `main` only once it has had a share of the requests
    serving   which track serves; `tracks` and this are of the registry of `main` only
    comparison  what the track's trainer knows of its share of the requests
    """

    versions: dict[int, VersionRecord] = field(default_factory=dict)
    champion: Champion = field(default_factory=Champion)
    trainer: TrainerLease = field(default_factory=TrainerLease)
    aliases: dict[str, Alias] = field(default_factory=dict)
    tags: dict[int, VersionTags] = field(default_factory=dict)
    deletion: Deletion = field(default_factory=Deletion)
    rewinds: Rewinds = field(default_factory=Rewinds)
    release: GateRelease = field(default_factory=GateRelease)
    canary: Canary = field(default_factory=Canary)
    tracks: dict[str, Track] = field(default_factory=dict)
    serving: Serving = field(default_factory=Serving)
    comparison: Comparison = field(default_factory=Comparison)
    problems: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_PROBLEMS))
    problem_count: int = 0

    def copy(self) -> RegistryState:
        """The state as it is now, for a thread or across an await. The records themselves never change."""
        own = replace(
            self, versions=dict(self.versions), aliases=dict(self.aliases), tags=dict(self.tags), tracks=dict(self.tracks)
        )
        own.problems = deque(self.problems, KEPT_PROBLEMS)
        return own

    @property
    def champion_record(self) -> VersionRecord | None:
        """The record of the champion's version; None without a champion."""
        return None if self.champion.version is None else self.versions.get(self.champion.version)

    def version_that_scored(self, version: int, delta: int) -> int | None:
        """The version whose weights are those of an answer; None where there is none, or nobody can tell.

        An answer names the newest version that its scorer knew to be announced, and the number of deltas since. A later version
        of the same chain may be that very point: it was captured there, and was announced once it was written.

        Args:
            delta: -1 where the answer's is not known.
        """
        record = self.versions.get(version)
        if delta <= 0:
            known = delta == 0 or (record is not None and record.sequence is None)  # off a chain there are no deltas
            return version if known else None
        if record is None or record.sequence is None:
            return None
        point = (record.chain, record.sequence + delta)
        # A copy of the items: other threads ask while the owner may add versions.
        return next((number for number, each in list(self.versions.items()) if (each.chain, each.sequence) == point), None)

    @property
    def champion_line(self) -> int | None:
        """The line that the champion belongs to; None without a champion."""
        if self.champion.version is None:
            return None
        record = self.champion_record
        return 0 if record is None else record.line

    @property
    def withheld(self) -> GateReport | None:
        """The newest version's report while the gate withholds new versions; None while it is flowing."""
        record = self.versions.get(max(self.versions, default=0))
        return None if record is None or record.verdict is None or record.verdict.flow == "flowing" else record.verdict

    @property
    def newest(self) -> int:
        """The largest version ever announced. Whoever deletes old versions must keep this one.

        Without any it is the number before the first that the track has (`state.tracks`): 0 for `main`.
        """
        return max(max(self.versions, default=0), self.champion.version or 0, numbers_before(self.trainer.epoch))

    @property
    def newest_to_start_from(self) -> int:
        """The largest version that a trainer may start from; 0 without any. Versions that a rewind left are passed over."""
        return max((version for version in self.versions if not self.rewinds.left(version)), default=0)

    def aliases_of(self, version: int) -> list[str]:
        """The aliases that point at a version, in alphabetical order; without `champion`."""
        return sorted(name for name, alias in self.aliases.items() if alias.version == version)

    def tags_of(self, version: int) -> Mapping[str, TagChange]:
        """The tags of a version, by name."""
        record = self.tags.get(version)
        return {} if record is None else record.tags

    def champion_at(self, at_ms: int) -> int | None:
        """The champion at a wall clock time (ms since epoch). None when there was none, or it is no longer recorded.

        Where the version that was champion then is deleted, this is the newest kept one that was champion before it.
        """
        moves = ((at, record.version) for record in self.versions.values() for at in record.champion_at_ms if at <= at_ms)
        return max(moves, default=(0, None))[1]

    def has_done(self, operation: str) -> bool:
        """Whether an operation is in the log already."""
        operations = {
            self.deletion.operation,
            *(each.operation for each in self.rewinds.rewinds),
            self.release.operation,
            self.canary.operation,
            self.canary.ended_operation,
            *(turn.operation for turn in self.serving.turns),
            *(track.share_operation for track in self.tracks.values()),
            *(move.operation for move in self.champion.moves),
            *(move.operation for alias in self.aliases.values() for move in alias.moves),
            *(change.operation for tags in self.tags.values() for change in tags.changes),
        }
        return operation in operations

    def apply(self, key: bytes | None, value: bytes | None, offset: int, arrived_ms: int | None = None) -> str | None:
        """Apply one record of the topic, which arrived at `arrived_ms` by the broker's clock. Never raises.

        Returns:
            None, or what is wrong with the record. A malformed record changes nothing but `problems`.
        """
        try:
            self._apply((key or b"").decode(), value, arrived_ms)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            problem = f"snapshots offset {offset}, key {key!r}: {error}"
            self.problems.append(problem)
            self.problem_count += 1
            return problem
        return None

    def _apply(self, key: str, value: bytes | None, arrived_ms: int | None) -> None:
        if key.startswith(_VERSION_PREFIX):
            number = key.removeprefix(_VERSION_PREFIX)
            if not (number.isascii() and number.isdigit()):
                raise ValueError(f"expected version/N with a number, found {number!r}")
            version = int(number)
            if value is None:
                self.versions.pop(version, None)
                return
            record = _decode(value, VersionRecord, arrived_ms)
            if record.version != version:
                raise ValueError(f"expected version {version} in the value, found {record.version}")
            self.versions[version] = record
        elif key == CHAMPION_KEY:
            self.champion = Champion() if value is None else _decode(value, Champion, arrived_ms)
        elif key == TRAINER_KEY:
            self.trainer = TrainerLease() if value is None else _decode(value, TrainerLease, arrived_ms)
        elif key == REWINDS_KEY:
            self.rewinds = Rewinds() if value is None else _decode(value, Rewinds, arrived_ms)
        elif key == GC_KEY:
            self.deletion = Deletion() if value is None else _decode(value, Deletion, arrived_ms)
        elif key == RELEASE_KEY:
            self.release = GateRelease() if value is None else _decode(value, GateRelease, arrived_ms)
        elif key == CANARY_KEY:
            self.canary = Canary() if value is None else _decode(value, Canary, arrived_ms)
        elif key == SERVING_KEY:
            self.serving = Serving() if value is None else _decode(value, Serving, arrived_ms)
        elif key == COMPARISON_KEY:
            self.comparison = Comparison() if value is None else _decode(value, Comparison, arrived_ms)
        elif (track := track_of(key)) is not None:
            if value is None:
                self.tracks.pop(track, None)
            else:
                self.tracks[track] = _decode(value, Track, arrived_ms)
        elif (name := alias_of(key)) is not None:
            if value is None:
                self.aliases.pop(name, None)
            else:
                self.aliases[name] = _decode(value, Alias, arrived_ms)
        elif (tagged := tags_of(key)) is not None:
            if value is None:
                self.tags.pop(tagged, None)
            else:
                tags = _decode(value, VersionTags, arrived_ms)
                if tags.version != tagged:
                    raise ValueError(f"expected version {tagged} in the value, found {tags.version}")
                self.tags[tagged] = tags
        elif not key.startswith("alias/"):  # other keys below alias/ come from a newer writer
            raise ValueError("expected version/N or alias/NAME")


def version_key(version: int) -> str:
    """The key of a version's record."""
    return f"{_VERSION_PREFIX}{version}"


def encode_record(record: RegistryRecord | None) -> bytes | None:
    """A record's value, as JSON; None for a tombstone. A metric that isn't finite becomes null."""
    if record is None:
        return None
    document = msgspec.to_builtins(record)
    if isinstance(record, VersionRecord):
        document["metrics"] = finite_or_null(record.metrics)
    return msgspec.json.encode(document)


def _decode(value: bytes, kind: type[T], arrived_ms: int | None) -> T:
    """Decode a value. Unknown fields are ignored, so that older readers can read newer records."""
    document: Any = not_later(msgspec.json.decode(value), arrived_ms)
    if kind is VersionRecord and isinstance(document, dict):
        document["metrics"] = nan_for_null(document.get("metrics"))
    return msgspec.convert(document, kind)
