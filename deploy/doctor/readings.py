"""What the doctor checks: the state of a system at one moment, as plain data that tests can make up.

Times are milliseconds since the epoch. Topics have their short names (`impressions`), without a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from state.registry import RegistryState
from state.settings import SnapshotSettings
from state.tracks import MAIN, Track
from stream.join.commit_metadata import Progress
from stream.records.heartbeat import Heartbeat
from stream.settings import JoinSettings, TopicSettings
from stream.topics.contract import Difference
from stream.topics.names import TopicNames

__all__ = ["Challenger", "Committed", "LogReading", "Partition", "Readings", "SampledLetter", "Tail"]

Partition = tuple[str, int]  # short name of the topic, number of the partition


@dataclass(frozen=True, slots=True)
class LogReading:
    """Offsets of one partition: the first one kept, the end for readers of committed records, and the end of the log."""

    start: int
    stable_end: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """The last records of one partition, without watermark records and transaction markers; all columns have one length.

    `event_ms` is -1 where the value has no event time.
    """

    offsets: npt.NDArray[np.int64]
    keys: Sequence[bytes | None]
    arrived_ms: npt.NDArray[np.int64]
    event_ms: npt.NDArray[np.int64]
    headers: Sequence[Sequence[tuple[str, bytes | None]]] = ()
    """Of each record; empty where they were not read."""


class SampledLetter(NamedTuple):
    """One of the newest dead letters: its reason, and the partition and offset of the record that it stands for."""

    reason: str
    partition: Partition
    offset: int


@dataclass(frozen=True, slots=True)
class Committed:
    """What the join has committed for one partition number; None where it has committed nothing."""

    impressions: int | None
    clicks: int | None
    progress: Progress | None


class Challenger(NamedTuple):
    """A track with a share of the requests, and when its trainer counted last for that share; 0 if it hasn't."""

    track: Track
    counted_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """The state at one moment. What could not be read is empty, and `unread` says why."""

    now_ms: int
    join_settings: JoinSettings
    snapshots: SnapshotSettings = field(default_factory=SnapshotSettings)
    prefix: str = ""
    differences: Sequence[Difference] = ()
    partitions: Mapping[str, int] = field(default_factory=dict)
    """How many partitions each topic has; only of topics that exist."""
    configs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    offsets_retention_ms: int | None = None
    """How long the brokers keep the committed offsets of a group without members."""
    logs: Mapping[Partition, LogReading] = field(default_factory=dict)
    tails: Mapping[Partition, Tail] = field(default_factory=dict)
    """Of impressions and clicks."""
    letters: Sequence[SampledLetter] = ()
    committed: Mapping[int, Committed] = field(default_factory=dict)
    members: Mapping[str, int] = field(default_factory=dict)
    """Members of the groups `join`, `trainer` and `scorer`; empty where they could not be counted."""
    trainer: Mapping[int, int] = field(default_factory=dict)
    """Next offset of each partition of `examples`, according to the newest announced version that the store has."""
    learned: Mapping[int, int] = field(default_factory=dict)
    """The same according to the newest delta, where that is further than the version."""
    scorer: Mapping[int, int] = field(default_factory=dict)
    """Committed offset of each partition of `score-requests`."""
    registry: RegistryState = field(default_factory=RegistryState)
    scorers: Sequence[Heartbeat] = ()
    """The newest heartbeat of each live scorer."""
    track: str = MAIN
    """The track that serves. Topics, registry, store and trainers are its own."""
    challengers: Sequence[Challenger] = ()
    """The tracks that score a share of the requests beside it."""
    arrivals: Mapping[tuple[str, int, int], int] = field(default_factory=dict)
    """Arrival of the first committed record at or after an offset, by topic, number of the partition and offset."""
    open_since_ms: Mapping[Partition, int] = field(default_factory=dict)
    """Arrival of the first record of an open transaction that holds back readers of committed records."""
    unread: Sequence[str] = ()
    unread_positions: Set[str] = frozenset()
    """The workers (`join`, `trainer`, `scorer`) whose positions could not be read. Others without a position never ran."""

    def arrived(self, topic: str, partition: int, offset: int) -> int | None:
        return self.arrivals.get((topic, partition, offset))

    @property
    def names(self) -> TopicNames:
        return TopicNames.of(TopicSettings(prefix=self.prefix), self.track)

    def topic(self, short: str) -> str:
        """The topic's full name, with its prefix."""
        return str(getattr(self.names, short.replace("-", "_"), f"{self.prefix}{short}"))
