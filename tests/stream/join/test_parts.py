"""What the watchdog is told of a join worker: partitions by what they have committed, takeovers by what they have read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from faust.types import TP
from prometheus_client import CollectorRegistry

from stream.errors import StreamError
from stream.join.partition import Positions
from stream.join.rebuild_progress import RebuildProgress
from stream.join.worker import JoinWorker, run_join
from stream.kafka.cluster import Cluster
from stream.kafka.transport import LogEnd
from stream.settings import HttpSettings, JoinSettings, KafkaSettings, SchemaRegistrySettings, TopicSettings
from stream.topics.names import TopicNames
from stream.worker.watchdog import PATIENCE_S, REPORT_S, Watchdog

NAMES = TopicNames.of(TopicSettings())
TOPICS = (NAMES.impressions, NAMES.clicks, NAMES.examples, NAMES.dead_letters)
CLUSTER = Cluster("c", dict.fromkeys(TOPICS, "id"), dict.fromkeys(TOPICS, 2))


class Ended(BaseException):
    pass


def end(what: str, error: BaseException) -> NoReturn:
    raise Ended(str(error))


class Bench:
    """A join worker that was never started, two partitions that it owns, the ends of their logs, and its watchdog."""

    def __init__(self, folder: Path) -> None:
        self.worker = JoinWorker(
            kafka=KafkaSettings(),
            settings=JoinSettings(),
            schema_registry=SchemaRegistrySettings(),
            names=NAMES,
            cluster=CLUSTER,
            state_dir=folder,
            prometheus=CollectorRegistry(),
        )
        self.watch = self.worker.watch
        self.ends: dict[TP, int] = {TP(topic, number): 0 for topic in TOPICS[:2] for number in (0, 1)}
        self.fetched: Callable[[TP], bool] = lambda tp: True
        self.worker.app.consumer = SimpleNamespace(log_end=self._log_end)
        self.positions = {number: Positions(0, 0, 0) for number in (0, 1)}
        self.worker.partitions = {number: self._partition(at) for number, at in self.positions.items()}
        self.worker.joins, self.worker.waiting_for = True, None
        self.dog, self.now_s = Watchdog(self.worker.parts, end), 0.0

    @staticmethod
    def _partition(positions: Positions) -> Any:
        # Idle ticks count as steps; what was taken and not committed is no progress either.
        return SimpleNamespace(positions=positions, steps=0, accepted={NAMES.impressions: 9_999, NAMES.clicks: 9_999})

    def _log_end(self, tp: TP) -> LogEnd:
        at_ms = int(time.time() * 1000) - (0 if self.fetched(tp) else 60_000)
        return LogEnd(self.ends[tp], at_ms, self.ends[tp])

    def live(self, seconds: float, *moving: int) -> str | None:
        """So many seconds in which these partitions commit an impression a second; what /readyz says then."""
        for _ in range(int(seconds)):
            self.now_s += 1.0
            for number, partition in self.worker.partitions.items():
                partition.steps += 10
                if number in moving:
                    self.positions[number].impressions += 1
            self.dog.look(self.now_s)
        return self.dog.stalled


def check(folder: Path, scene: Callable[[Bench], None]) -> None:
    async def run() -> None:
        scene(Bench(folder))

    asyncio.run(run())


def test_one_of_two_partitions_hangs_while_its_loop_ticks(tmp_path: Path) -> None:
    def scene(bench: Bench) -> None:
        bench.ends[TP(NAMES.impressions, 0)] = bench.ends[TP(NAMES.impressions, 1)] = 5_000
        said = bench.live(REPORT_S + 5, 1)
        assert said is not None
        assert said.startswith("impressions, partition 0: no progress for 3")
        assert "records from offset 0 to 5000 waiting" in said
        assert "partition 1" not in said
        with pytest.raises(Ended, match="impressions, partition 0: no progress for 120 s"):
            bench.live(PATIENCE_S, 1)

    check(tmp_path, scene)


def test_nothing_waits_and_a_source_that_is_paused(tmp_path: Path) -> None:
    def scene(bench: Bench) -> None:
        assert bench.live(2 * PATIENCE_S) is None
        bench.ends[TP(NAMES.clicks, 0)] = 10  # far ahead of the impressions: they wait for those
        bench.worker._paused.add(TP(NAMES.clicks, 0))
        assert bench.live(2 * PATIENCE_S) is None

    check(tmp_path, scene)


def test_fetches_that_are_not_answered(tmp_path: Path) -> None:
    def scene(bench: Bench) -> None:
        stale = TP(NAMES.clicks, 1)
        bench.fetched = lambda tp: tp != stale
        bench.watch.leaderless = frozenset({(NAMES.clicks, 1)})
        said = bench.live(2 * PATIENCE_S)
        assert said is not None
        assert said.startswith("clicks, partition 1: no progress for ")
        assert said.endswith("with no fetch answered (no broker leads it)")
        bench.watch.leaderless = frozenset()
        with pytest.raises(Ended, match=r"clicks, partition 1: no progress for .* with no fetch answered"):
            bench.live(2 * PATIENCE_S)

    check(tmp_path, scene)


def test_a_rebuild_of_any_length_goes_on_and_one_that_hangs_does_not(tmp_path: Path) -> None:
    """Before, whatever took more than two minutes was killed, and began anew for ever."""

    def scene(bench: Bench) -> None:
        bench.worker.waiting_for = "partitions are being assigned"
        # The flow of what stayed stands still meanwhile.
        bench.ends[TP(NAMES.impressions, 0)] = 5_000
        rebuild = bench.worker._rebuilds[1] = RebuildProgress(1)
        rebuild.at("its producer")
        assert bench.live(REPORT_S - 5) is None
        rebuild.begin(9_000_000)
        for _ in range(10):
            assert bench.live(REPORT_S - 5) is None
            rebuild.advance(1_000)
        said = bench.live(REPORT_S + 5)
        assert said is not None
        assert said.startswith("taking over partition 1: no progress for ")
        with pytest.raises(Ended, match="taking over partition 1: no progress for 120 s with records to be read again"):
            bench.live(PATIENCE_S)

    check(tmp_path, scene)


def test_an_assignment_that_never_comes(tmp_path: Path) -> None:
    def scene(bench: Bench) -> None:
        bench.worker.waiting_for = "partitions are being assigned"
        with pytest.raises(Ended, match="the group's assignment: no progress for 120 s"):
            bench.live(2 * PATIENCE_S)

    check(tmp_path, scene)


def test_a_registry_that_is_away_is_told_and_ends_nothing(tmp_path: Path) -> None:
    """Records wait for it, and starting again would not help; a takeover that reads them again waits as well."""

    def scene(bench: Bench) -> None:
        bench.ends[TP(NAMES.impressions, 0)] = 5_000
        bench.worker._formats._away = "status 503"
        said = bench.live(2 * PATIENCE_S)
        assert said is not None
        assert said.startswith("impressions, partition 0: no progress for ")
        assert said.endswith("(the schema registry doesn't answer: status 503)")
        bench.worker.waiting_for = "partitions are being assigned"
        bench.worker._rebuilds[0] = RebuildProgress(0)
        said = bench.live(2 * PATIENCE_S)
        assert said is not None
        assert said.startswith("taking over partition 0: no progress for ")
        assert said.endswith("(the schema registry doesn't answer: status 503)")
        bench.worker._formats._away = None
        with pytest.raises(Ended):
            bench.live(PATIENCE_S)

    check(tmp_path, scene)


def test_a_worker_without_the_packages_of_the_registry_does_not_start(monkeypatch, tmp_path: Path) -> None:
    """Said before Kafka is asked for anything."""
    monkeypatch.setattr("stream.formats.reader._there", lambda module: module != "fastavro")
    starting = run_join(
        kafka=KafkaSettings(bootstrap_servers="127.0.0.1:1"),
        settings=JoinSettings(),
        schema_registry=SchemaRegistrySettings(url="http://registry:8081"),
        names=NAMES,
        http=HttpSettings(),
        state_dir=tmp_path,
    )
    with pytest.raises(StreamError, match=r"found no fastavro. Run `make setup` in the checkout"):
        asyncio.run(starting)
