"""What the doctor looks at: one moment of a system, as plain data that tests can make up.

Times are milliseconds since the epoch. Topics go by their short names (`impressions`), whatever their prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from state.registry import RegistryState
from state.settings import SnapshotSettings
from stream.join.commit_metadata import Progress
from stream.records.heartbeat import Heartbeat
from stream.settings import JoinSettings, TopicSettings
from stream.topics.contract import Difference
from stream.topics.names import TopicNames

__all__ = ["Committed", "LogReading", "Place", "Readings", "Tail"]

Place = tuple[str, int]  # short name of a topic, partition


@dataclass(frozen=True, slots=True)
class LogReading:
    """Offsets of one partition: the first kept, the end for readers of committed records, and the end of all."""

    start: int
    stable_end: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """The last records of one partition, markers left out; all columns have one length.

    `event_ms` is -1 where the value has no event time; watermark records are left out.
    """

    offsets: npt.NDArray[np.int64]
    keys: Sequence[bytes | None]
    arrived_ms: npt.NDArray[np.int64]
    event_ms: npt.NDArray[np.int64]
    headers: Sequence[Sequence[tuple[str, bytes | None]]] = ()
    """Of each record; empty where nobody looked."""


@dataclass(frozen=True, slots=True)
class Committed:
    """What the join has committed for one partition number; None where it has committed nothing."""

    impressions: int | None
    clicks: int | None
    progress: Progress | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """One moment. What could not be read is empty, and `unread` says why."""

    now_ms: int
    join_settings: JoinSettings
    snapshots: SnapshotSettings = field(default_factory=SnapshotSettings)
    prefix: str = ""
    differences: Sequence[Difference] = ()
    partitions: Mapping[str, int] = field(default_factory=dict)
    """Of the topics that are there."""
    configs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    offsets_retention_ms: int | None = None
    """How long the brokers remember what a group without members has committed."""
    logs: Mapping[Place, LogReading] = field(default_factory=dict)
    tails: Mapping[Place, Tail] = field(default_factory=dict)
    """Of impressions and clicks."""
    letters: Sequence[tuple[str, Place, int]] = ()
    """Of the newest dead letters: reason, and topic, partition and offset of the record."""
    committed: Mapping[int, Committed] = field(default_factory=dict)
    members: Mapping[str, int] = field(default_factory=dict)
    """Members of the groups `join`, `trainer` and `scorer`; empty where they could not be counted."""
    trainer: Mapping[int, int] = field(default_factory=dict)
    """Next offset of each partition of `examples`, by the newest announced version that the store has."""
    scorer: Mapping[int, int] = field(default_factory=dict)
    """Committed offset of each partition of `score-requests`."""
    registry: RegistryState = field(default_factory=RegistryState)
    scorers: Sequence[Heartbeat] = ()
    """What every live scorer says of itself."""
    arrivals: Mapping[tuple[str, int, int], int] = field(default_factory=dict)
    """Arrival of the first committed record at or after an offset, by topic, partition and offset."""
    open_since_ms: Mapping[Place, int] = field(default_factory=dict)
    """Arrival of the first record of a transaction that is open, where one holds back readers."""
    unread: Sequence[str] = ()
    unread_positions: Set[str] = frozenset()
    """Of `join`, `trainer` and `scorer`: whose positions could not be read. An empty position of the others: never ran."""

    def arrived(self, topic: str, partition: int, offset: int) -> int | None:
        return self.arrivals.get((topic, partition, offset))

    @property
    def names(self) -> TopicNames:
        return TopicNames.of(TopicSettings(prefix=self.prefix))

    def topic(self, short: str) -> str:
        """The full name, for people."""
        return f"{self.prefix}{short}"
