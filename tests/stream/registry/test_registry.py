"""The registry over a real Kafka: writers one after another, readers that see whole changes."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from deploy.settings import Settings
from state.manifest import Manifest
from state.registry import RegistryState, encode_record, version_key
from state.settings import SnapshotSettings
from stream.errors import Fenced, NoAnswer, RegistryError, TopicError
from stream.kafka.clients import aiokafka_options
from stream.registry import writer as registry
from stream.registry.follower import RegistryFollower
from stream.registry.log import RegistryLog, read_registry
from stream.registry.writer import RegistryWriter, registry_transactional_id
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.names import TopicNames
from tests.judged import JUDGED

pytestmark = pytest.mark.kafka

GATE = SnapshotSettings(first_examples=0, good_after_ms=0)


def manifest(version: int, epoch: int = 1) -> Manifest:
    metrics = {"window_examples": 1_000.0, "window_log_loss": 0.5, "window_calibration": 1.0}
    return Manifest(version=version, epoch=epoch, created_at_ms=version, metrics=metrics, verdict=JUDGED)


class Cluster:
    """Makes writers and readers of one registry, and closes them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.names = TopicNames.of(settings.topics)
        self.opened: list[Any] = []

    def writer(self, who: str = "trainer") -> RegistryWriter:
        self.opened.append(RegistryWriter(self.settings.kafka, self.names, who=who))
        return self.opened[-1]

    async def reader(self, seen: list[int | None] | None = None) -> RegistryFollower:
        on_change = None if seen is None else lambda state: seen.append(state.champion.version)
        reader = RegistryFollower(self.settings.kafka, self.names, on_change=on_change)
        self.opened.append(reader)
        await reader.start()
        return reader

    async def state(self) -> RegistryState:
        return await read_registry(self.settings.kafka, self.names)

    async def __aenter__(self) -> Cluster:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for each in self.opened:
            await each.close()


async def until(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def test_a_trainer_an_operator_and_a_reader(topics: Settings) -> None:
    async def run() -> None:
        async with Cluster(topics) as cluster:
            seen: list[int | None] = []
            reader = await cluster.reader(seen)
            assert seen == [None] and reader.position == 0
            trainer = cluster.writer()
            epoch = await trainer.take_trainer_epoch()
            assert epoch == 1
            for version in (1, 2, 3):
                announced = await trainer.announce(manifest(version), gate=GATE)
                assert announced.promoted and announced.previous == (version - 1 or None)
            with pytest.MonkeyPatch.context() as patched:  # this machine's clock jumps ahead; the brokers' doesn't
                patched.setattr(time, "time_ns", lambda: 9_000_000_000_000_000_000)
                assert await trainer.tag_due(GATE.model_copy(update={"good_after_ms": 600_000})) == ()
            assert await trainer.tag_due(GATE) == (1, 2, 3)
            assert await trainer.tag_due(GATE) == ()

            operator = cluster.writer("operator")
            written = await operator.rollback(2, "bad")
            assert (written.outcome.previous, written.outcome.version, written.outcome.held) == (3, 2, True)
            assert abs(written.at_ms - time.time() * 1_000) < 60_000
            await until(lambda: reader.position >= written.position)
            assert reader.state.champion.version == 2 and reader.state.champion.hold

            held = await trainer.announce(manifest(4), gate=GATE)  # the operator fenced it meanwhile
            assert not held.promoted and held.reason.startswith("candidate: held (rolled back: bad)")
            resumed = await operator.resume()
            assert (
                resumed.outcome.changed and resumed.outcome.undo.command == "headrace snapshot hold --reason 'rolled back: bad'"
            )
            assert (await trainer.announce(manifest(5), gate=GATE)).promoted
            await until(lambda: reader.state.champion.version == 5)
            assert seen[0] is None and seen[-1] == 5
            state = await cluster.state()
            assert repr(state) == repr(reader.state)
            assert state.problem_count == 0

    asyncio.run(run())


def test_an_operation_is_one_cheap_transaction(topics: Settings) -> None:
    """A trainer announces every few seconds; the median of 30 is a few ms, and 50 ms is the promise."""

    async def run() -> None:
        async with Cluster(topics) as cluster:
            trainer = cluster.writer()
            await trainer.take_trainer_epoch()
            took = []
            for version in range(1, 31):
                began = time.monotonic()
                await trainer.announce(manifest(version), gate=GATE)
                took.append(time.monotonic() - began)
            assert sorted(took)[15] < 0.05, f"median of {sorted(took)[15] * 1_000:.1f} ms"

    asyncio.run(run())


def test_writers_that_race_lose_nothing(topics: Settings) -> None:
    """Two operators and a trainer at once: each change is decided on all those before it."""

    async def run() -> None:
        async with Cluster(topics) as cluster:
            trainer = cluster.writer()
            await trainer.take_trainer_epoch()
            for version in (1, 2):
                await trainer.announce(manifest(version), gate=GATE)
            done: list[str] = []

            async def operate(who: str) -> None:
                writer = cluster.writer(who)
                for turn in range(5):
                    while True:
                        try:
                            to = 1 if writer._log.state.champion.version == 2 else 2
                            written = await writer.promote(to, f"{who} {turn}")
                        except Fenced:
                            continue
                        except RegistryError as error:
                            assert "champion already" in str(error)
                            continue
                        assert written.outcome.version == to
                        done.append(f"{who} {turn}")
                        break

            async def announce() -> None:
                for version in range(3, 8):
                    outcome = await trainer.announce(manifest(version), gate=GATE)
                    done.append(f"announced {outcome.version}")
                    await asyncio.sleep(0.05)

            await asyncio.gather(operate("a"), operate("b"), announce())
            state = await cluster.state()
            moves = state.champion.moves
            assert sorted(state.versions) == list(range(1, 8))
            for before, after in itertools.pairwise(moves):
                assert after.previous == before.version  # nobody decided on an old state
                assert after.at_ms > before.at_ms
            by_hand = [move.reason for move in moves if move.how == "promote"]
            # An alias that was written over an unseen one would have dropped its move; a retry must not do it twice.
            assert sorted(by_hand) == sorted(each for each in done if not each.startswith("announced"))
            assert len(by_hand) == 10

    asyncio.run(run())


def test_nothing_to_do_and_not_allowed_are_said_of_the_newest_state_only(topics: Settings) -> None:
    """Such an answer commits nothing, so no commit can fail and show that others have written meanwhile."""

    async def run() -> None:
        async with Cluster(topics) as cluster:
            first, second = cluster.writer("first"), cluster.writer("second")
            nothing_due = SnapshotSettings(good_after_ms=10**9)
            await first.take_trainer_epoch()
            for version in (1, 2):
                await first.announce(manifest(version), gate=GATE)
            assert (await first.hold("sale")).outcome.changed
            await first.tag_due(nothing_due)  # it has read up to its own hold, and no further
            assert (await second.resume()).outcome.changed
            assert (await first.hold("sale")).outcome.changed  # it knew of its own hold only
            await first.tag_due(nothing_due)
            await second.promote(1, "back")
            await first.promote(2, "forth")  # by what it knew, 2 was champion already
            champion = (await cluster.state()).champion
            assert (champion.version, champion.previous, champion.hold) == (2, 1, True)

    asyncio.run(run())


def test_a_trainer_thought_dead_cannot_announce(topics: Settings) -> None:
    async def run() -> None:
        async with Cluster(topics) as cluster:
            old, new = cluster.writer("old"), cluster.writer("new")
            assert await old.take_trainer_epoch() == 1
            await old.announce(manifest(1, epoch=1), gate=GATE)
            assert await new.take_trainer_epoch() == 2
            with pytest.raises(Fenced, match=r"version 2: expected the trainer's epoch 2 \(taken by new\), found 1"):
                await old.announce(manifest(2, epoch=1), gate=GATE)
            assert (await new.announce(manifest(2, epoch=2), gate=GATE)).promoted
            assert sorted((await cluster.state()).versions) == [1, 2]

    asyncio.run(run())


def test_a_commit_whose_answer_is_lost_is_not_done_twice(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollback is committed, then the writer is told that it failed: going back twice would be one version too far."""

    async def run() -> None:
        async with Cluster(topics) as cluster:
            trainer = cluster.writer()
            await trainer.take_trainer_epoch()
            for version in (1, 2, 3):
                await trainer.announce(manifest(version), gate=GATE)
            await trainer.tag_good(1, 2)
            operator = cluster.writer("operator")
            commit, lost = operator._commit, []

            async def commit_and_lose_the_answer(*how: Any) -> None:
                await commit(*how)
                if not lost:
                    lost.append(True)
                    raise registry._CommitFailed from TimeoutError("lost")

            monkeypatch.setattr(operator, "_commit", commit_and_lose_the_answer)
            written = await operator.rollback(2, "bad")
            assert lost and (written.outcome.previous, written.outcome.version) == (3, 2)
            assert written.outcome.undo.command == "headrace snapshot promote 3 --reason 'undo of 2' --resume"
            lost.clear()
            assert (await operator.hold("again")).outcome.changed is False  # held by the rollback already
            announced = await operator.announce(manifest(4), gate=GATE)
            assert not announced.promoted
            state = await cluster.state()
            assert state.champion.version == 2 and len(state.champion.moves) == 4
            assert written.position <= (await _end(cluster))

    asyncio.run(run())


async def _end(cluster: Cluster) -> int:
    log = RegistryLog(cluster.settings.kafka, cluster.names, follow=False)
    await log.open()
    await log.catch_up()
    await log.close()
    return log.position


def test_a_writer_that_dies_mid_transaction_is_settled_by_the_next(topics: Settings) -> None:
    async def run() -> None:
        from aiokafka import AIOKafkaProducer

        async with Cluster(topics) as cluster:
            trainer = cluster.writer()
            await trainer.take_trainer_epoch()
            await trainer.announce(manifest(1), gate=GATE)
            dying = AIOKafkaProducer(
                **aiokafka_options(topics.kafka), transactional_id=registry_transactional_id(cluster.names)
            )
            await dying.start()
            await dying.begin_transaction()
            record = (await cluster.state()).versions[1]
            key = version_key(1).encode()
            await (await dying.send(cluster.names.snapshots, key=key, value=encode_record(record), partition=0))
            reader = await cluster.reader()  # the open transaction holds back nothing that was committed before
            assert list(reader.state.versions) == [1]
            began = time.monotonic()
            await trainer.announce(manifest(2), gate=GATE)
            assert time.monotonic() - began < 5
            await until(lambda: 2 in reader.state.versions)
            await dying.stop()

    asyncio.run(run())


def test_a_reader_passes_over_what_it_cannot_read(topics: Settings) -> None:
    async def run() -> None:
        from aiokafka import AIOKafkaProducer

        async with Cluster(topics) as cluster, AIOKafkaProducer(**aiokafka_options(topics.kafka)) as foreign:
            await foreign.send_and_wait(cluster.names.snapshots, key=b"version/x", value=b"{")
            await foreign.send_and_wait(cluster.names.snapshots, key=b"version/1", value=b"\xff")
            trainer = cluster.writer()
            await trainer.take_trainer_epoch()
            assert (await trainer.announce(manifest(1), gate=GATE)).promoted
            reader = await cluster.reader()
            assert reader.state.champion.version == 1 and reader.state.problem_count == 2
            await foreign.send_and_wait(cluster.names.snapshots, key=b"nonsense", value=b"1")
            await until(lambda: reader.state.problem_count == 3)
            assert "expected version/N or alias/NAME" in reader.state.problems[-1]

    asyncio.run(run())


def test_caught_up_follows_the_clock_and_stops_without_news(topics: Settings) -> None:
    async def run() -> None:
        async with Cluster(topics) as cluster:
            trainer = cluster.writer()
            await trainer.take_trainer_epoch()
            reader = await cluster.reader()
            first = reader.caught_up_at
            assert first is not None and time.monotonic() - first < 1
            await until(lambda: reader.caught_up_at > first + 1)  # nothing new, but known to be so
            assert time.monotonic() - reader.caught_up_at < 1.5

    asyncio.run(run())


def test_a_callback_that_fails_stops_nothing(topics: Settings, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with Cluster(topics) as cluster:
            calls = []

            def fails(state: RegistryState) -> None:
                calls.append(state.champion.version)
                raise ValueError("callback")

            reader = RegistryFollower(topics.kafka, cluster.names, on_change=fails)
            cluster.opened.append(reader)
            await reader.start()
            trainer = cluster.writer()
            await trainer.take_trainer_epoch()
            await trainer.announce(manifest(1), gate=GATE)
            await until(lambda: calls[-1:] == [1])
            assert reader.state.champion.version == 1

    asyncio.run(run())
    assert "the callback failed on a change" in caplog.text


def test_a_reader_that_loses_its_consumer_connects_again(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with Cluster(topics) as cluster:
            trainer = cluster.writer()
            await trainer.take_trainer_epoch()
            await trainer.announce(manifest(1), gate=GATE)
            seen: list[int | None] = []
            reader = await cluster.reader(seen)
            broken = reader._log

            async def fail(timeout_ms: int) -> int:
                raise ConnectionResetError("gone")

            monkeypatch.setattr(broken, "poll", fail)
            await trainer.announce(manifest(2), gate=GATE)
            assert reader.state.champion.version == 1  # the old state stands until the new one is whole
            await until(lambda: reader.state.champion.version == 2)
            assert seen == [1, 2] and reader._log is not broken

    asyncio.run(run())


def test_a_topic_that_is_not_there(settings: Settings) -> None:
    names = TopicNames.of(settings.topics)
    expected = rf"topic {names.snapshots}: expected at .*, found none of that name\. `headrace topics create` makes it"

    async def write() -> None:
        writer = RegistryWriter(settings.kafka, names, who="me")
        try:
            await writer.take_trainer_epoch()
        finally:
            await writer.close()

    async def read() -> None:
        reader = RegistryFollower(settings.kafka, names)
        try:
            await reader.start()
        finally:
            await reader.close()

    for attempt in (write, read):
        with pytest.raises(TopicError, match=expected):
            asyncio.run(attempt())
    with pytest.raises(TopicError, match=expected):
        asyncio.run(read_registry(settings.kafka, names))


def test_a_kafka_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ATTEMPTS", 2)
    nowhere = KafkaSettings(bootstrap_servers="127.0.0.1:1")
    names = TopicNames.of(TopicSettings())

    async def write() -> None:
        await RegistryWriter(nowhere, names, who="me").hold("x")

    for attempt in (write(), read_registry(nowhere, names), RegistryFollower(nowhere, names).start()):
        with pytest.raises(
            NoAnswer, match=r"Kafka at 127\.0\.0\.1:1 \(PLAINTEXT\): expected an answer .*`headrace kafka status`"
        ):
            asyncio.run(attempt)  # type: ignore[arg-type]
