"""A copy of the weights that follows a chain: how far it is, how a delta is put into it, and how answers name it."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple, Protocol

from model.predictor import Prepared
from model.rows import ModelDelta
from state.chain import ChainPoint, Offered, Problem, Progress, after
from state.chain_name import ChainName
from state.chain_versions import Marks, Naming, covers, is_left, point_of
from state.registry import RegistryState, VersionRecord
from stream.records.delta import DeltaHeader
from stream.records.heartbeat import Mark
from stream.scorer.freshness import MAX_WAITING
from stream.scorer.serving import Served, WeightsState

__all__ = ["DeltaLog", "Listener", "LogItem", "Replica", "WholeDelta", "offered_by"]

# Points that a heartbeat reports besides its own. Scorers are compared at equal points, and with four deltas a second and a
# heartbeat a second the last eight overlap between scorers that are up to a second apart.
KEPT_POINTS = 8


class WholeDelta(Protocol):
    """A delta that was read whole."""

    @property
    def header(self) -> DeltaHeader: ...

    @property
    def model(self) -> ModelDelta: ...


class LogItem(NamedTuple):
    """What the log of deltas brings, and the offset to read next."""

    found: WholeDelta | Problem
    next_offset: int


class DeltaLog(Protocol):
    """The log of deltas from some offset on. Iterating waits for more; it connects again by itself."""

    @property
    def position(self) -> int:
        """The next offset to read."""

    @property
    def at_end(self) -> bool:
        """Whether nothing more was there when it last looked."""

    def __aiter__(self) -> AsyncIterator[LogItem]: ...


class Replica:
    """Weights of a version that deltas are put into, one after another.

    Args:
        served: the version's weights, which belong to this replica from now on.
        record: the version; it is a point of a published chain.
        before: the replica that it replaces, if any: what that one refused, this one reads no second time.
    """

    def __init__(self, served: Served, record: VersionRecord, before: Replica | None = None) -> None:
        point, offset = point_of(record), record.deltas_offset
        assert point is not None and offset is not None
        refused = None if before is None else before.progress.refused
        served.is_replica = True
        self.served, self.line = served, record.line
        self.progress: Progress = Progress(point, served.predictor.digest, refused=refused)
        self.offset = offset
        """Where reading goes on: behind the last delta that was applied."""
        self.answers_from: ChainPoint | None = None
        """The point of the champion, if these weights began below it: before that they don't answer."""
        self.recent: tuple[Mark, ...] = (Mark(point.sequence, f"{self.progress.digest:016x}"),)
        self.unanswered: deque[int] = deque(maxlen=MAX_WAITING)
        """Arrivals of clicks (ms) that were learned before this replica answers, while another one does (`freshness`)."""
        self._marks = Marks(point.chain, ())

    def mark(self, records: Iterable[VersionRecord]) -> None:
        """Take the announced versions, by which answers name the weights. Not while a delta is being applied."""
        self._marks = Marks(self.progress.point.chain, records)
        state = self.served.state
        self._become(Naming(state.version, state.delta), state.captured_at_ms)

    def covers(self, champion: VersionRecord) -> bool:
        """Whether these weights are at the champion's point or past it."""
        return covers(self.progress, self.line, champion)

    def is_left(self, registry: RegistryState) -> bool:
        """Whether the trainer was sent back from these weights, so that they must not answer any more."""
        return is_left(self.progress.point, registry)

    def prepare(self, delta: WholeDelta) -> Prepared:
        """Find out what applying a delta would do, while the weights are in use.

        Raises:
            DigestMismatch: the weights wouldn't have the digest that the delta names.
            ModelError: the delta doesn't fit the model.
        """
        return self.served.predictor.prepare(delta.model)

    def apply(self, prepared: Prepared, delta: WholeDelta, offered: Offered) -> None:
        """Put a delta into the weights. Runs in the thread that scores, between two batches."""
        predictor, state = self.served.predictor, self.served.state
        predictor.apply(prepared)
        predictor.negative_rate = delta.header.negative_rate
        self.progress = after(self.progress, offered)
        self.recent = (*self.recent, Mark(offered.point.sequence, delta.header.digest))[-KEPT_POINTS:]
        self._become(Naming(state.version, state.delta + 1), delta.header.at_ms)

    def _become(self, naming: Naming, captured_at_ms: int) -> None:
        point = self.progress.point
        if self._marks.chain == point.chain:
            naming = self._marks.name(point, naming)
        self.served.state = WeightsState(
            naming.version, captured_at_ms, naming.delta, point, self.progress.digest, recent=self.recent
        )


class Listener(Protocol):
    """Who answers requests, and needs to know of the replica."""

    def follow(self, replica: Replica) -> None:
        """From now on this replica may answer in the champion's place."""

    def cannot_follow(self, reason: str) -> None:
        """No replica can be brought to the champion for now."""

    def dropped(self) -> None:
        """There is no replica any more, since nobody wants one."""

    def renamed(self) -> None:
        """The version by which answers name the replica has changed."""

    @property
    def is_serving(self) -> bool:
        """Whether there are weights to answer with."""

    @property
    def waits(self) -> bool:
        """Whether a replica should answer, and other weights do."""


def offered_by(header: DeltaHeader) -> Offered:
    """What the rules of a chain need of a header."""
    parent = ChainPoint(ChainName.of(header.parent.chain), header.parent.sequence)
    return Offered(
        ChainPoint(ChainName.of(header.chain), header.sequence), parent, int(header.digest, 16), rebase=header.rebase
    )
