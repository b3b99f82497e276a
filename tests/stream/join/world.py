"""A log, workers with a folder each that take its partition from one another, and the oracle that is told of commits alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from state.join_state import StateOptions
from stream.errors import Abandoned
from stream.join.commit_metadata import decode_progress
from stream.join.committed import Committed
from stream.join.events import Events
from stream.join.local_state import LocalState
from stream.join.metrics import JoinMetrics
from stream.join.partition import PartitionJoin, TakenOver
from stream.join.rebuild import Rebuild
from stream.kafka.transport import LogEnd, Run
from stream.records.replay import REPLAY_HEADER
from stream.records.watermark import WATERMARK_HEADER
from stream.settings import JoinSettings, TopicSettings
from stream.topics.names import TopicNames
from tests.stream.join.fake_log import Crash, FakeConsumer, FakeLog, FakeProducer
from tests.stream.join.oracle import Oracle
from tests.stream.join.owner import Owner

__all__ = ["END_MS", "NAMES", "World", "time_of"]

NAMES = TopicNames.of(TopicSettings())
OPTIONS = StateOptions(8)
END_MS = 100_000


def time_of(record: Any) -> int:
    """An event's own time."""
    return int(record.value.split(b":")[-1][:-1])


class PlainClock:
    """In the place of `SourceClock`: the front is the largest event time, so that a single event moves the watermark."""

    def read(self, events: Events) -> None:
        events.front_ms = None


class World:
    """The log, the workers' folders, the partition where one of them has it, and the oracle.

    `plain_clocks`: one event is enough to say how far its source has come, where the real rule asks for five.
    """

    def __init__(
        self,
        chosen: JoinSettings,
        folder: Path,
        destroy: Callable[[Path], None],
        copy: Callable[[Path, Path], None] = lambda path, to: None,
        *,
        plain_clocks: bool = False,
    ) -> None:
        self.plain_clocks = plain_clocks
        self.settings, self.folder, self.now_ms = chosen, folder, 0
        self.lose = lambda worker: destroy(folder / worker / "partition-0")
        self.copy = lambda worker, to: copy(folder / worker / "partition-0", folder / to / "partition-0")
        self.log, self.oracle = FakeLog(NAMES), Oracle(chosen)
        self.owner, self.partition = "", None
        self.idle: set[str] = set()
        self.metrics = JoinMetrics(CollectorRegistry())
        self.audited = {NAMES.examples: 0, NAMES.dead_letters: 0}
        self.firsts: dict[int, int] = {}
        self.corrections: dict[int, int] = {}
        self.left_out: set[int] = set()
        self.dead: set[tuple[str, int]] = set()

    def committed(self) -> Committed:
        at = *self.log.starts.values(), len(self.log.topics[NAMES.examples])
        if not self.log.committed:
            return Committed(0, 0, *at, None)
        (impressions, metadata), (clicks, _) = (self.log.committed[topic] for topic in (NAMES.impressions, NAMES.clicks))
        return Committed(impressions, clicks, *at, decode_progress(metadata) if metadata else None)

    def reset(self, impressions: int, clicks: int) -> None:
        """Set the offsets by hand, as Kafka's consumer-groups tool does: without metadata."""
        self.log.committed = {NAMES.impressions: (impressions, ""), NAMES.clicks: (clicks, "")}

    async def take(self, worker: str, still_ours: Callable[[], bool] = lambda: True) -> PartitionJoin:
        """As `Takeover.take` does, with the fakes."""
        committed = self.committed()
        state = LocalState(self.folder / worker, OPTIONS, "i").open(0, committed)
        try:
            consumer = FakeConsumer(self.log)
            rebuilt = await Rebuild(
                self.settings, NAMES, 0, "i", consumer=consumer, state=state, committed=committed, still_ours=still_ours
            ).run()
        except BaseException:
            state.close()
            raise
        partition = PartitionJoin(
            0,
            settings=self.settings,
            names=NAMES,
            group="g",
            identity="i",
            partitions=1,
            taken=TakenOver(FakeProducer(self.log), state, rebuilt.memory, rebuilt.positions, rebuilt.pending),
            owner=Owner(self.log_end),
            metrics=self.metrics,
        )
        if self.plain_clocks:
            partition._clocks = {topic: PlainClock() for topic in partition._clocks}  # type: ignore[misc]
        return partition

    def log_end(self, topic: str) -> LogEnd | None:
        end = len(self.log.topics[topic])
        return LogEnd(end, 1 << 60, end) if topic in self.idle else None

    def send(self, topic: str, rows: list[tuple[bytes, int] | None]) -> None:
        """Events by id and how far their time is from now, and gaps."""
        for row in rows:
            if row is None:
                self.log.gap(topic)
            else:
                time_ms = max(self.now_ms + row[1], 0)
                self.log.append(topic, row[0], b'{"impression_id":"%b","timestamp":%d}' % (row[0], time_ms))

    def mark(self, time_ms: int) -> None:
        """A watermark record in both sources."""
        for topic in (NAMES.impressions, NAMES.clicks):
            self.log.append(topic, None, b"", ((WATERMARK_HEADER, b"%d" % time_ms),))

    def replay(self, index: int) -> None:
        """One of the labels is fed again, as `dead-letters replay` does with one that the trainer couldn't use."""
        labels = [record for record in self.log.records(NAMES.examples) if record.key is not None]
        if labels:
            label = labels[index % len(labels)]
            kept = [(name, value) for name, value in label.headers if name != REPLAY_HEADER]
            headers = [(name, b"replay" if value == b"first" else value) for name, value in kept]
            self.log.append(NAMES.examples, label.key, label.value, (*headers, (REPLAY_HEADER, b"dead-letters/0/0")))

    def is_open(self, worker: str) -> bool:
        return self.partition is not None and self.owner == worker

    async def own(self, worker: str) -> PartitionJoin:
        if self.partition is None:
            self.owner, self.partition = worker, await self.take(worker)
        return self.partition

    async def leave(self) -> None:
        if self.partition is not None:
            await self.partition.close()
            self.partition = None

    def runs(self, topic: str, start: int, counts: list[int]) -> list[Run]:
        """The next records cut into runs of so many offsets."""
        log, cut = self.log.topics[topic], []
        for count in counts:
            after = min(start + count, len(log))
            if after > start:
                cut.append(Run(topic, 0, start, after, self.log.records(topic, start, after)))
            start = after
        return cut

    async def step(self, impressions: list[int], clicks: list[int], *, clicks_first: bool = False, crash: str = "") -> None:
        partition = await self.own("a")
        assert partition is not None
        cut = [self.runs(NAMES.impressions, partition.positions.impressions, impressions)]
        cut.append(self.runs(NAMES.clicks, partition.positions.clicks, clicks))
        runs = [run for part in (reversed(cut) if clicks_first else cut) for run in part]
        partition._producer.crash = crash
        # A watermark that moved without settling anything was not committed; a crash takes it back.
        partition._idle._since.update(dict.fromkeys(self.idle, float("-inf")))  # for long, where the position is at the end
        memory = partition.memory
        self.oracle.watermark_ms, before = memory.watermark_ms, dict(self.log.committed)
        self.oracle.change(partition._settings, memory.history.pruned(*partition.low_water()[:2]))
        try:
            await partition._step(runs)
        except Crash:
            await self.leave()
        if self.log.committed != before:
            for run in runs:
                judge = self.oracle.impression if run.topic == NAMES.impressions else self.oracle.click
                for record in run.records:
                    if record.value and time_of(record) > record.timestamp + partition._settings.max_future_ms:
                        self.oracle.dead.add((f"future_timestamp in {run.topic}", record.offset))
                    elif record.value:
                        judge(record.key, time_of(record), record.offset)
        assert partition is not None
        if self.log.committed != before:
            progress = self.committed().progress
            assert progress is not None
            self.oracle.move(progress.watermark_ms, progress.cut)
        self.audit()

    def audit(self) -> None:
        """The log against the oracle."""
        for record in self.log.records(NAMES.examples, self.audited[NAMES.examples]):
            headers = dict(record.headers)
            if REPLAY_HEADER in headers:
                continue
            if headers["kind"] == b"matched":
                assert record.key is None
                arrivals = json.loads(headers["click_arrived_ms"])
                for (offset, time_ms, click_ms), arrived_ms in zip(json.loads(record.value), arrivals, strict=True):
                    # A later step may have found an earlier click.
                    assert self.arrived_ms(offset) == arrived_ms or click_ms > self.oracle.clicks[offset]
                    assert self.oracle.accepted[offset][1] == time_ms
                    assert self.oracle.counts_for(click_ms, offset)
                continue
            if record.key is None:
                offsets = set(json.loads(record.value))
                assert not offsets & (self.left_out | self.firsts.keys()), "left out twice, or a label as well"
                self.left_out |= offsets
                continue
            offset, click_ms = int(headers["source_offset"]), int(headers.get("click_ms", b"-1"))
            assert (headers["label"] == b"1") == (click_ms >= 0) == ("click_arrived_ms" in headers)
            assert click_ms < 0 or self.arrived_ms(offset) == int(headers["click_arrived_ms"])
            if headers["kind"] == b"correction":
                assert offset in self.left_out | self.firsts.keys(), "a correction of nothing"
                assert offset not in self.corrections, "a second correction"
                self.corrections[offset] = click_ms
            else:
                assert offset not in self.left_out | self.firsts.keys(), "a second first label"
                self.firsts[offset] = click_ms
            source = self.log.topics[NAMES.impressions][offset]
            assert (record.key, record.value) == (source.key, source.value)
        for record in self.log.records(NAMES.dead_letters, self.audited[NAMES.dead_letters]):
            headers = dict(record.headers)
            reason = headers["reason"].decode()
            if reason == "future_timestamp":  # of either source
                reason += f" in {headers['source_topic'].decode()}"
            letter = reason, int(headers["source_offset"])
            assert letter not in self.dead, "said twice"
            self.dead.add(letter)
        for topic in self.audited:
            self.audited[topic] = len(self.log.topics[topic])
        oracle = self.oracle
        assert (self.firsts, self.corrections, self.left_out) == (oracle.firsts, oracle.corrections, oracle.left_out)
        for reason, offset in self.dead ^ oracle.dead:
            click = self.log.topics[NAMES.clicks][offset]
            assert reason == "orphan_click"
            assert self.either_way(click.key, time_of(click), 1 << 60)

    def arrived_ms(self, offset: int) -> int:
        """When the click arrived that decided an impression's label."""
        return int(self.log.topics[NAMES.clicks][self.oracle.deciding[offset]].timestamp)

    def either_way(self, key: bytes, click_ms: int, impressions_position: int) -> bool:
        """Whether the log allows two answers for a click: it counts for a use of its id which is not the newest by then.

        Read before the newer use it is a duplicate or late, read after it it waits: the log doesn't say which, so a rebuild
        makes it wait. No impression that is still accepted can be matched by it; all that can come of it is a dead letter.
        Where it made a label, and is the only one of its time, `examples` says so.
        """
        same = [r for r in self.log.records(NAMES.clicks) if r.value and (r.key, time_of(r)) == (key, click_ms)]
        clicks = self.oracle.clicks
        if len(same) == 1 and any(who == key and clicks.get(o) == click_ms for o, (who, _) in self.oracle.accepted.items()):
            return False
        uses = sorted(o for o, (who, _) in self.oracle.accepted.items() if who == key and o < impressions_position)
        return any(self.oracle.counts_for(click_ms, offset) for offset in uses[:-1])

    def told_apart(self, content: dict[str, Any]) -> dict[str, Any]:
        """What is the same on every way: without the clicks for which there are two answers."""
        position = content["positions"][0]
        early = [(key, click) for key, click in content["early"] if not self.either_way(key, click[0], position)]
        return {**content, "early": early}

    def content(self, partition: PartitionJoin) -> dict[str, Any]:
        """What decides the future: the same for every way to the same place in the log."""
        state, memory = partition._state, partition.memory
        history = memory.history.pruned(*partition.low_water()[:2])
        late_ms = history.late_before(memory.watermark_ms)
        keys = sorted({record.key for record in self.log.records(NAMES.impressions) if record.key})
        entries = zip(keys, state.entries(keys), strict=True)
        early = sorted(state.early_clicks())
        assert early == sorted((key, click) for key, waiting in memory.early.items() for click in waiting.values())
        rows = [  # without those that wait to be deleted
            row
            for row in state.pending_between((0, 0), (1 << 60, 0))
            if row[0] + history.of(row[1]).window_ms >= memory.watermark_ms
        ]
        pending = [row for row in rows if not memory.first_is_out(row[0], row[1], history.of(row[1]))]
        assert partition.pending == len(pending)
        return {
            "positions": (partition.positions.impressions, partition.positions.clicks),
            "event time": (memory.watermark_ms, memory.impressions_seen_ms, memory.clicks_seen_ms, memory.cut),
            "ids": {
                key: entry
                for key, entry in entries
                if entry is not None and entry[0] >= late_ms - history.of(entry[1]).horizon_ms
            },
            "pending": rows,
            "held": state.held_between((0, 0), (1 << 60, 0)),
            "early": early,
        }

    async def give_up(self, worker: str, reads: int) -> None:
        """A worker takes the partition, and loses it to the one that had it after so many fetches."""
        owner, had = self.owner, self.partition is not None
        await self.leave()
        left = iter(range(reads))
        with contextlib.suppress(Abandoned):
            await (await self.take(worker, lambda: next(left, None) is not None)).close()
        if had:
            await self.own(owner)

    async def move(self, to: str, given_up_after: list[int]) -> None:
        """The partition goes to a worker, after rebuilds that were given up; what it has then is what a third one finds."""
        before = None
        if self.partition is not None and self.partition.memory.watermark_ms == self.oracle.watermark_ms:
            before = self.content(self.partition)
        await self.leave()
        for reads in given_up_after:
            await self.give_up(to, reads)
        partition = await self.own(to)
        self.lose("third")
        third = await self.take("third")
        there = self.content(partition)
        assert partition.pending == len(self.oracle.pending())
        assert self.told_apart(self.content(third)) == self.told_apart(there)
        committed = self.committed().progress
        if before is not None and committed is not None and before["event time"][0] == committed.watermark_ms:
            assert self.told_apart(there) == self.told_apart(before)
        assert self._low_water_holds(partition)
        assert self._low_water_holds(third)
        await third.close()

    def _low_water_holds(self, partition: PartitionJoin) -> bool:
        low = partition._progress(partition.positions)
        pending = [offset for _, offset, *_ in partition._state.pending_between((0, 0), (1 << 60, 0))]
        early = [click[1] for _, click in partition._state.early_clicks()]
        return all(offset >= low.impressions_low for offset in pending) and all(offset >= low.clicks_low for offset in early)

    async def end(self) -> None:
        self.mark(END_MS)
        await self.step([1 << 30], [1 << 30])
        for _ in range(1_000):
            if self.partition is not None and self.partition.memory.watermark_ms == END_MS:
                break
            await self.step([], [])
        assert self.firsts.keys() | self.left_out == self.oracle.accepted.keys()
        assert self.partition is not None
        assert (self.partition.pending, self.partition.memory.early) == (0, {})
        # What is settled is forgotten, also when nothing else happens.
        await self.step([], [])
        state = self.partition._state
        assert list(state.all_chunks()) == []
        assert (list(state.pending_impressions()), state.held_between((0, 0), (1 << 60, 0))) == ([], {})
        assert state.entries(sorted(self.oracle.last)) == [None] * len(self.oracle.last)
