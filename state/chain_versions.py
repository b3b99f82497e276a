"""Which versions a replica that follows a chain may begin with, and when it must be replaced by one. Pure.

The champion's version says which line of weights is followed, not up to where: scorers follow the chain to its end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from state.chain import ChainPoint, Progress, order
from state.chain_name import ChainName
from state.registry import RegistryState, VersionRecord

__all__ = [
    "LogSeen",
    "Marks",
    "Naming",
    "before_champion",
    "covers",
    "is_behind",
    "is_beyond",
    "is_left",
    "leads_on",
    "point_of",
    "starts",
]


class LogSeen(NamedTuple):
    """How far a reader of deltas has come.

    position  the next offset to read; None: the log can't be read
    overdue   the champion is known for so long that the log should have brought it
    """

    position: int | None
    overdue: bool


class Naming(NamedTuple):
    """How answers name the weights: a version, and the number of deltas since."""

    version: int
    delta: int


def point_of(record: VersionRecord) -> ChainPoint | None:
    """The point of a published chain that a version is; None for a version that can't be followed from."""
    if not record.chain or record.sequence is None or record.deltas_offset is None:
        return None
    try:
        return ChainPoint(ChainName.of(record.chain), record.sequence)
    except ValueError:
        return None  # of a newer writer


def starts(registry: RegistryState) -> list[VersionRecord]:
    """The versions of the champion's line from which on its chain can be followed: the newest first, the champion last.

    From every one of them the log leads to the same weights, and from the newest it takes the fewest deltas.
    """
    champion = registry.champion_record
    first = None if champion is None else point_of(champion)
    if champion is None or first is None:
        return []
    found = []
    for record in registry.versions.values():
        point = point_of(record)
        if (
            point is not None
            and record.line == champion.line
            and point.chain.model == first.chain.model
            and order(point) >= order(first)
        ):
            found.append((order(point), record.version, record))
    return [record for *_, record in sorted(found, key=lambda each: each[:2], reverse=True)]


def before_champion(registry: RegistryState) -> list[VersionRecord]:
    """The versions of the champion's chain below it, the newest first: the log leads from them to the champion."""
    champion = registry.champion_record
    if champion is None or champion.sequence is None or not champion.chain:
        return []
    found = [
        record
        for record in registry.versions.values()
        if point_of(record) is not None and record.chain == champion.chain and (record.sequence or 0) < champion.sequence
    ]
    return sorted(found, key=lambda record: (record.sequence or 0, record.version), reverse=True)


def covers(progress: Progress, line: int, champion: VersionRecord) -> bool:
    """Whether a replica that began with a version of `line` is at the champion's point or has come past it."""
    point = point_of(champion)
    if point is None or point.chain.model != progress.point.chain.model:
        return False
    if point.chain == progress.point.chain:
        return point.sequence <= progress.point.sequence
    return champion.line == line and order(point) <= order(progress.point)


def is_behind(progress: Progress, line: int, champion: VersionRecord, log: LogSeen) -> bool:
    """Whether the log can no longer bring a replica to the champion, so that a version must be read.

    The registry and the log are read apart, so a champion whose deltas weren't read yet is waited for.
    """
    if covers(progress, line, champion):
        return False
    if log.position is None or champion.deltas_offset is None:
        return True
    return log.position >= champion.deltas_offset or log.overdue


def is_beyond(progress: Progress, record: VersionRecord) -> bool:
    """Whether a version contains what broke a replica's chain."""
    point = point_of(record)
    if point is None or progress.broken is None or order(point) <= order(progress.point):
        return False
    needs = progress.broken.needs
    return needs is None or order(point) >= order(needs)


def is_left(point: ChainPoint, registry: RegistryState) -> bool:
    """Whether weights are of a line that the trainer was sent back from, so that they must not answer any more.

    They are past the version that it was sent back to, and before the chain that it has begun there.
    """
    for rewind in registry.rewinds.rewinds:
        target = registry.versions.get(rewind.version)
        back = None if target is None else point_of(target)
        if rewind.up_to is None or back is None:
            continue  # the trainer hasn't gone back yet; or nobody can tell, and newer versions lead away from that line
        try:
            begun = ChainName.of(rewind.chain)
        except ValueError:
            continue  # of a newer writer
        is_between = order(back) < order(point) < (begun.epoch, begun.ordinal, 0)
        if is_between and begun.model == point.chain.model:
            return True
    return False


def leads_on(registry: RegistryState, position: int) -> bool:
    """Whether a version can take the place of weights that are left, and the log from them to it has been read."""
    newest = next(iter(starts(registry)), None)
    point = None if newest is None else point_of(newest)
    if newest is None or point is None or newest.deltas_offset is None or is_left(point, registry):
        return False
    return position >= newest.deltas_offset


class Marks:
    """The announced versions of one chain, by sequence number: the name of a point is the newest version at or below it."""

    def __init__(self, chain: ChainName, records: Iterable[VersionRecord]) -> None:
        self.chain = chain
        text = str(chain)
        marks = sorted(
            (record.sequence, record.version) for record in records if record.chain == text and record.sequence is not None
        )
        self._sequences = [sequence for sequence, _ in marks]
        self._versions = [version for _, version in marks]

    def name(self, point: ChainPoint, before: Naming) -> Naming:
        """The name of a point of this chain.

        Args:
            before: its name without the announced versions of this chain. It stays where none of them is newer.
        """
        index = bisect_right(self._sequences, point.sequence) - 1
        if index < 0:
            return before
        delta = point.sequence - self._sequences[index]
        return before if delta > before.delta else Naming(self._versions[index], delta)
