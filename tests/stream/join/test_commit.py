"""One step's transaction, in its order: sends, all of them written, offsets, commit, and only then the state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import MessageSizeTooLargeError
from aiokafka.structs import TopicPartition
from prometheus_client import CollectorRegistry

from stream.errors import PositionError
from stream.join.commit_metadata import Progress, decode_progress, encode_progress, new_life
from stream.join.memory import Memory
from stream.join.metrics import JoinMetrics
from stream.join.partition import PartitionJoin, Positions, TakenOver
from stream.join.settings_history import MAX_CHANGES, NEVER_MS, History, Terms
from stream.kafka.transport import LogEnd, Run
from stream.records.watermark import WATERMARK_HEADER
from stream.settings import JoinSettings, TopicSettings
from stream.topics.names import TopicNames
from tests.stream.join.fake_state import DictState
from tests.stream.join.owner import Owner

NAMES = TopicNames.of(TopicSettings())
SETTINGS = JoinSettings(window_ms=10, lateness_ms=0, dedupe_horizon_ms=0)
NUMBER = 3
LogEnds = Callable[[str], LogEnd | None]


def fresh(settings: JoinSettings) -> Memory:
    return Memory(History().with_settings(settings, form="", impressions=0, clicks=0, watermark_ms=NEVER_MS))


class Fatal(BaseException):
    """In the place of the process' end."""


class Producer:
    """Says what was asked of it. Batches hold two records; they are written a little after they were sent, the last first."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.refused: dict[str, BaseException] = {}  # topic → what its next batch ends with
        self.state: DictState | None = None
        self.commit_ends: asyncio.Event | None = None
        self._offset = 100
        self._waiting: list[tuple[asyncio.Future[Any], Any]] = []

    async def begin_transaction(self) -> None:
        self.said.append("begin")

    def create_batch(self) -> Any:
        rows: list[Any] = []

        def append(*, timestamp: int, key: Any, value: Any, headers: Any) -> Any:
            return None if len(rows) == 2 else rows.append((key, value)) or True

        return SimpleNamespace(rows=rows, append=append)

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> asyncio.Future[Any]:
        assert partition == NUMBER
        self.said.append(("send", topic, len(batch.rows)))
        future = asyncio.get_running_loop().create_future()
        offset, self._offset = self._offset, self._offset + len(batch.rows)
        self._waiting.append((future, self.refused.pop(topic, None) or SimpleNamespace(offset=offset)))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_later(0.002, self._write)
        return future

    def _write(self) -> None:
        future, answer = self._waiting.pop()
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            self.said.append("written")
            future.set_result(answer)
        if self._waiting:
            asyncio.get_running_loop().call_later(0.001, self._write)

    async def send_offsets_to_transaction(self, offsets: Any, group: str) -> None:
        self.said.append(("offsets", offsets, group))

    async def commit_transaction(self) -> None:
        assert self.state is not None
        meta = self.state.meta()
        self.said.append(("commit", None if meta is None else (meta.impressions_position, meta.clicks_position)))
        if self.commit_ends is not None:
            await self.commit_ends.wait()
            self.said.append("committed")

    async def stop(self) -> None:
        pass


class Bench:
    """A partition over the fakes, and records to give it. `log_end` says how far a topic's log goes, None for unknown."""

    def __init__(self, settings: JoinSettings = SETTINGS, log_end: LogEnds = lambda topic: None) -> None:
        self.producer, self.state, self.fatal = Producer(), DictState(), []
        self.producer.state = self.state
        self.partition = PartitionJoin(
            NUMBER,
            settings=settings,
            names=NAMES,
            group="the-group",
            identity="i",
            partitions=4,
            taken=TakenOver(self.producer, self.state, fresh(settings), Positions(0, 0, 0), 0),
            owner=Owner(log_end, self._fatal),
            metrics=JoinMetrics(CollectorRegistry()),
        )

    def _fatal(self, what: str, error: BaseException) -> None:
        self.fatal.append((what, error))
        raise Fatal

    def run(self, topic: str, rows: list[tuple[bytes, int] | int], *, gap: int = 0) -> Run:
        """A run of events (id, time) and watermark records (time), `gap` offsets without a record behind them."""
        positions = self.partition.positions
        before = positions.impressions if topic == NAMES.impressions else positions.clicks
        records = [
            SimpleNamespace(
                topic=topic,
                partition=NUMBER,
                offset=before + index,
                key=None if isinstance(row, int) else row[0],
                value=b"" if isinstance(row, int) else b'{"impression_id":"%b","timestamp":%d}' % row,
                headers=((WATERMARK_HEADER, b"%d" % row),) if isinstance(row, int) else (),
                timestamp=10**12,
            )
            for index, row in enumerate(rows)
        ]
        after = before + len(rows) + gap
        return Run(topic, NUMBER, before, after, records)

    async def step(self, impressions: list[Any], clicks: list[Any], *, gap: int = 0) -> list[Any]:
        """One step; what the producer was asked in it."""
        self.producer.said = []
        runs = [self.run(NAMES.impressions, impressions, gap=gap)] if impressions or gap else []
        runs += [self.run(NAMES.clicks, clicks)] if clicks else []
        await self.partition._step(runs)
        return self.producer.said


def test_every_step_is_one_transaction_in_its_order():
    async def check() -> None:
        bench = Bench()
        for index in range(9):
            now_ms, before = 100 * index, bench.partition.positions
            mark = now_ms + 50
            rows = [(b"%d-%d" % (index, each), now_ms + each) for each in range(6)]
            said = await bench.step([*rows, mark], [(b"nobody", now_ms), (rows[0][0], now_ms + 1), mark], gap=index)
            # Six labels in batches of two, one dead letter; every one written before the offsets.
            assert said[:5] == [
                "begin",
                *(("send", NAMES.examples, count) for count in (2, 2, 2)),
                ("send", NAMES.dead_letters, 1),
            ]
            assert said[5:9] == ["written"] * 4
            [offsets, commit] = said[9:]
            after = bench.partition.positions
            assert (after.impressions, after.clicks) == (before.impressions + 7 + index, before.clicks + 3)
            # Behind the last label and the transaction's marker. Dead letters took an offset each time, too.
            assert after.examples == 100 + 7 * index + 6 + 1
            word, committed, group = offsets
            assert (word, group) == ("offsets", "the-group")
            assert {tp: at.offset for tp, at in committed.items()} == {
                TopicPartition(NAMES.impressions, NUMBER): after.impressions,
                TopicPartition(NAMES.clicks, NUMBER): after.clicks,
            }
            [metadata] = {at.metadata for at in committed.values()}
            progress = decode_progress(metadata)
            assert (progress.watermark_ms, progress.impressions_seen_ms, progress.clicks_seen_ms) == (mark, mark, mark)
            low = (progress.impressions_low, progress.clicks_low, progress.examples_low)
            # What this step has remembered is forgotten by the next one.
            assert low == bench.partition.low_water() == (before.impressions, after.clicks, before.examples)
            # The state is as it was before until the commit is through, and then as after.
            assert commit == ("commit", (before.impressions, before.clicks) if index else None)
            meta = bench.state.meta()
            assert meta is not None
            assert (meta.impressions_position, meta.clicks_position) == (after.impressions, after.clicks)
            assert (meta.examples_position, meta.watermark_ms) == (after.examples, mark)

    asyncio.run(check())


def test_a_step_without_outputs_commits_its_offsets_too():
    async def check() -> None:
        bench = Bench()
        for _ in range(4):
            said = await bench.step([], [], gap=3)
            assert [word if isinstance(word, str) else word[0] for word in said] == ["begin", "offsets", "commit"]
        assert bench.partition.positions.impressions == 12
        # What waits holds the low water, not the position.
        said = await bench.step([(b"a", 5)], [(b"b", 5)])
        progress = decode_progress(said[1][1][TopicPartition(NAMES.clicks, NUMBER)].metadata)
        assert (progress.impressions_low, progress.clicks_low, progress.examples_low) == (12, 0, 0)
        # A tick with nothing to say says nothing.
        assert await bench.step([], []) == []

    asyncio.run(check())


@pytest.mark.parametrize("topic", [NAMES.examples, NAMES.dead_letters])
def test_a_refused_record_ends_the_process_before_the_commit(topic):
    """aiokafka would commit the transaction without it."""

    async def check() -> None:
        bench = Bench()
        bench.producer.refused[topic] = MessageSizeTooLargeError("too large")
        with pytest.raises(Fatal):
            await bench.step([(b"a", 1), (b"b", 2), (b"c", 3), 50], [(b"nobody", 1), 50])
        await asyncio.sleep(0.01)  # the other batches
        assert not any(word[0] in ("offsets", "commit") for word in bench.producer.said)
        [(what, error)] = bench.fatal
        assert (what, type(error)) == ("join partition 3: a transaction failed", MessageSizeTooLargeError)
        assert (bench.state.meta(), bench.state.payloads, bench.partition.positions) == (None, {}, Positions(0, 0, 0))

    asyncio.run(check())


@pytest.mark.parametrize("step", ["begin_transaction", "send_offsets_to_transaction", "commit_transaction"])
def test_a_failure_anywhere_ends_the_process_and_leaves_the_state(step):
    async def check() -> None:
        bench = Bench()

        async def fail(*args: Any) -> None:
            raise RuntimeError("fenced")

        setattr(bench.producer, step, fail)
        with pytest.raises(Fatal):
            await bench.step([(b"a", 1), 50], [50])
        assert [str(error) for _, error in bench.fatal] == ["fenced"]
        assert (bench.state.meta(), bench.partition.positions) == (None, Positions(0, 0, 0))

    asyncio.run(check())


def test_a_commit_that_hangs_ends_the_process():
    async def check() -> None:
        bench = Bench(SETTINGS.model_copy(update={"transaction_timeout_ms": 20}))
        bench.producer.commit_ends = asyncio.Event()
        with pytest.raises(Fatal):
            await asyncio.wait_for(bench.step([(b"a", 1), 50], [50]), 2.0)
        assert [type(error) for _, error in bench.fatal] == [TimeoutError]
        assert bench.state.meta() is None

    asyncio.run(check())


def test_whoever_cancels_waits_for_the_commit_under_way():
    async def check() -> None:
        bench = Bench()
        bench.producer.commit_ends = asyncio.Event()
        loop = asyncio.ensure_future(bench.partition.run())
        assert await bench.partition.put(bench.run(NAMES.impressions, [(b"a", 1)]))
        async with asyncio.timeout(10.0):
            while not bench.producer.said or bench.producer.said[-1][0] != "commit":
                await asyncio.sleep(0.005)
        loop.cancel()
        await asyncio.sleep(0.02)
        assert not loop.done()
        bench.producer.commit_ends.set()
        with pytest.raises(asyncio.CancelledError):
            await loop
        assert bench.partition.positions.impressions == 1
        assert bench.state.payloads.keys() == {(1, 0)}
        assert bench.fatal == []

    asyncio.run(check())


def test_a_watermark_far_beyond_its_arrival_moves_nothing():
    async def check() -> None:
        bench = Bench()
        far_ms = 10**12 + SETTINGS.max_watermark_future_ms + 1
        said = await bench.step([(b"a", 1), far_ms], [far_ms])
        assert [word for word in said if word[0] == "send"] == [("send", NAMES.dead_letters, 2)]
        assert bench.partition.memory.watermark_ms == NEVER_MS
        await bench.step([far_ms - 1], [far_ms - 1])
        assert bench.partition.memory.watermark_ms == far_ms - 1

    asyncio.run(check())


def test_the_progress_always_fits_into_the_metadata_that_a_broker_takes():
    """4,096 bytes (offset.metadata.max.bytes), however often settings have changed and however far the log is."""
    large, day_ms = 10**18, 86_400_000
    terms = tuple(
        Terms(large + index, large + index, *[365 * day_ms] * 5, NEVER_MS, False, NEVER_MS) for index in range(MAX_CHANGES)
    )
    progress = Progress(
        watermark_ms=NEVER_MS,
        impressions_seen_ms=NEVER_MS,
        clicks_seen_ms=NEVER_MS,
        impressions_low=large,
        clicks_low=large,
        examples_low=large,
        cut=large,
        terms=terms,
        partitions=10**6,
        identity="/".join(["x" * 22] * 4 + ["999999"]),
        life=new_life(),
    )
    assert len(encode_progress(progress)) < 4_096
    assert decode_progress(encode_progress(progress)) == progress


def test_too_many_changes_of_settings_are_refused():
    history = History()
    for index in range(MAX_CHANGES):
        changed = SETTINGS.model_copy(update={"window_ms": 100 + index})
        history = history.with_settings(changed, form="", impressions=index, clicks=index, watermark_ms=0)
    assert len(history.terms) == MAX_CHANGES
    again = history.with_settings(changed, form="", impressions=99, clicks=99, watermark_ms=0)
    assert again == history  # nothing has changed
    with pytest.raises(PositionError, match=f"expected at most {MAX_CHANGES} changes of window_ms"):
        history.with_settings(SETTINGS, form="", impressions=99, clicks=99, watermark_ms=0)
    assert (
        len(history.pruned(2, 99).with_settings(SETTINGS, form="", impressions=99, clicks=99, watermark_ms=0).terms)
        < MAX_CHANGES
    )
