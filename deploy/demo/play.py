"""One run of the demo: start Kafka and the workers, replay a data set, roll back and undo, check the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from deploy.datasets import DataSet
from deploy.demo.audit import Audit, Ledger
from deploy.demo.freshness import read_followed
from deploy.demo.view import Figures, View
from deploy.errors import DeployError
from deploy.feeding.replay import Replayer
from deploy.local_kafka.cluster import LocalKafka
from deploy.processes.workers import Worker, stop_workers
from deploy.settings import NOT_SETTINGS, LocalKafkaSettings, Settings
from stream.registry.heartbeat import HeartbeatReader
from stream.registry.log import read_registry
from stream.registry.operations import ChampionMoved, Operations, RollbackRequest
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames

__all__ = ["DemoResult", "demo_settings", "play", "worker_environment"]

# The stream is paced so that people can watch the model learn, and so that a run takes about 2 minutes on two cores: 119 and
# 122 s were measured (docs/experiments.md).
REPLAY_S = 75.0
SCORED_FRACTION = 0.15
SETTLE_S = 90.0  # longest wait, once the stream has ended, for the last labels and for the trainer to learn them
LOOK_S = 0.5
BEHIND_NICE = 10
CONFIRM_MS = 10_000


class DemoResult(msgspec.Struct, kw_only=True):
    """The demo's summary. Metrics are over the last 80 % of event time."""

    dataset: str
    impressions: int
    clicks: int
    examples: int
    positives: int
    events_per_s: float
    auc: float | None
    ne: float | None
    calibration: float | None
    served_auc: float | None
    versions: int
    scores: int
    rollback_ms: float
    click_to_served_ms_p50: float | None
    click_to_served_ms_p99: float | None
    dead_letters: int
    peak_rss_mb: dict[str, float]
    exactly_once: bool
    problems: list[str]
    rollback: dict[str, int | None]
    seconds: float


def demo_settings(
    base: Settings, data_set: DataSet, work: Path, bootstrap_servers: str, *, evaluation_from_ms: int, window_ms: int = 60_000
) -> Settings:
    """The user's settings, with the demo's own Kafka, folders, schema and intervals."""
    # On two cores, training gets one thread: the broker, the join and the scorer need the other core.
    threads = base.trainer.threads or (1 if (os.cpu_count() or 1) <= 2 else 0)
    return base.model_copy(
        update={
            "kafka": base.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers}),
            "topics": base.topics.model_copy(update={"partitions": 2, "request_partitions": 2, "replication_factor": 1}),
            "join": base.join.model_copy(update={"window_ms": window_ms, "instance_id": "demo-join"}),
            "trainer": base.trainer.model_copy(update={"evaluation_from_ms": evaluation_from_ms, "threads": threads}),
            "features": data_set.schema(),
            "snapshots": base.snapshots.model_copy(
                update={"url": str(work / "snapshots"), "interval_ms": 3_000, "good_after_ms": 1_500}
            ),
            "state_dir": work / "state",
        }
    )


def worker_environment(settings: Settings) -> dict[str, str]:
    """Environment variables that give a worker exactly these settings: one variable a section, as JSON."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_") or name in NOT_SETTINGS}
    env.pop("HEADRACE_CONFIG", None)
    for name, value in settings.model_dump(mode="json", exclude_unset=False).items():
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        env[f"HEADRACE_{name.upper()}"] = text
    return env


async def play(
    data_set: DataSet,
    base: Settings,
    work: Path,
    view: View,
    *,
    limit: int | None = None,
    fast: bool = False,
    window_ms: int = 60_000,
) -> DemoResult:
    """Run the demo, with all its files in the folder `work`.

    Raises:
        DeployError: a process didn't start or ended early, or a step did not finish in time.
    """
    began = time.monotonic()
    total, evaluation_from_ms = _extent(data_set, limit)
    with contextlib.ExitStack() as stack:
        view.say("starting Apache Kafka …")
        kafka = stack.enter_context(LocalKafka(LocalKafkaSettings(dir=work / "kafka", heap_mb=768)))
        settings = demo_settings(
            base, data_set, work, kafka.bootstrap_servers, evaluation_from_ms=evaluation_from_ms, window_ms=window_ms
        )
        await asyncio.to_thread(create_topics, settings.kafka, settings.topics)
        view.say(f"Kafka at {kafka.bootstrap_servers}; starting join, trainer and scorer …")
        workers = stack.enter_context(_running(settings, work))
        rate = None if fast else 1.45 * total / REPLAY_S  # impressions and their clicks
        replayer = Replayer(data_set, settings, rate=rate, limit=limit, scored_fraction=SCORED_FRACTION)
        run = _Run(settings, workers, replayer, total, view)
        await run.stream()
        view.say("stream ended; publishing, then rolling back …")
        rolled = await run.roll_back_and_undo()
        peaks = {kind: worker.peak_rss_mb() for kind, worker in workers.items()}
        return await run.result(data_set.name, rolled, peaks, began)


def _extent(data_set: DataSet, limit: int | None) -> tuple[int, int]:
    """The number of impressions, and the event time (ms since epoch) at which the last 80 % of the time begin."""
    count, first, last = 0, 0, 0
    for chunk in data_set.chunks():
        rows = chunk.head(limit - count) if limit is not None and count + len(chunk) > limit else chunk
        if not len(rows):
            break
        first = int(rows.timestamps_ms[0]) if not count else first
        last = int(rows.timestamps_ms[-1])
        count += len(rows)
    return count, first + (last - first) // 5


@contextlib.contextmanager
def _running(settings: Settings, work: Path) -> Iterator[Mapping[str, Worker]]:
    env = worker_environment(settings)
    # The scorer gets the processor first, since somebody waits for its answers.
    niceness = {"join": BEHIND_NICE, "trainer": BEHIND_NICE, "scorer": 0}
    workers = {kind: Worker(kind, env, work / f"{kind}.log", cwd=work, nice=nice) for kind, nice in niceness.items()}
    try:
        for worker in workers.values():
            worker.start()
        # The scorer is ready when there is a model, which is later.
        workers["join"].wait_ready()
        workers["trainer"].wait_ready()
        yield workers
    finally:
        stop_workers(list(workers.values()))


class _Run:
    """The replay, and what is measured of it."""

    def __init__(self, settings: Settings, workers: Mapping[str, Worker], replayer: Replayer, total: int, view: View) -> None:
        self._settings, self._workers, self._replayer = settings, workers, replayer
        self._names, self._view, self._total = TopicNames.of(settings.topics), view, total
        self._served: dict[int, int] = {}  # version → since when it answers, in ms
        self._scores: tuple[float, float] = (time.monotonic(), 0.0)
        self._ledger = Ledger()
        self._seconds = 0.0

    async def stream(self) -> None:
        """Replay everything. Wait until no impression is pending in the join and the trainer has learned every example."""
        began = time.monotonic()
        sending = asyncio.ensure_future(self._replayer.run_async())
        async with (
            HeartbeatReader(self._settings.kafka, self._names) as scorers,
            Audit(self._settings) as audit,
        ):
            ended: float | None = None
            try:
                while True:
                    await asyncio.sleep(LOOK_S)
                    figures = await self._look(scorers)
                    self._view.show(figures)
                    if not sending.done():
                        continue
                    sending.result()
                    ended = ended or time.monotonic()
                    self._ledger = await audit.read()
                    written = self._ledger.labels.total() + self._ledger.corrections.total()
                    # `figures` are of a look after every impression had its first label. What is pending may be corrected.
                    if self._seconds and not figures.pending and figures.learned + self._rejected() >= written:
                        break
                    settled = len(self._ledger.labels) + len(self._ledger.left_out)
                    if not self._seconds and settled >= self._replayer.stats.impressions:
                        self._seconds = time.monotonic() - began
                    if time.monotonic() - ended > SETTLE_S:
                        self._view.say("[red]not everything was labelled and learned in time[/]")
                        break
                await self._await_last_version(scorers)
            finally:
                if not sending.done():
                    self._replayer.stop()
                    sending.cancel()
                    with contextlib.suppress(BaseException):
                        await sending
            self._ledger = await audit.read()

    def _rejected(self) -> int:
        """The number of examples that the trainer could not use."""
        metrics = self._workers["trainer"].metrics()
        return int(_sum(metrics, "headrace_trainer_dead_letters_total"))

    async def _await_last_version(self, scorers: HeartbeatReader) -> None:
        """Wait until the scorer serves the champion, and an older version is tagged good."""
        deadline = time.monotonic() + 30.0
        while time.monotonic() < deadline:
            await asyncio.sleep(LOOK_S)
            self._view.show(await self._look(scorers))
            state = await read_registry(self._settings.kafka, self._names)
            champion = state.champion.version
            good = [record for record in state.versions.values() if record.good_at_ms and record.version != champion]
            if champion in self._served and good:
                return
        held = [f"version {record.version}: {record.gate}" for record in state.versions.values() if not record.good_at_ms][-3:]
        raise DeployError(
            f"there is nothing to roll back to: expected champion {champion} to be served and a good version before it, found "
            f"none within 30 s. What the gate said last: {'; '.join(held) or 'nothing, no version was held back'}. A version "
            "is tagged good `snapshots.good_after_ms` after it became champion."
        )

    async def _look(self, scorers: HeartbeatReader) -> Figures:
        """The figures now, from the workers' metrics and heartbeats."""
        for worker in self._workers.values():
            worker.check()
        join, trainer, scorer = (self._workers[kind].metrics() for kind in ("join", "trainer", "scorer"))
        live = await scorers.live()
        for beat in live:
            if beat.version > 0:
                self._served.setdefault(beat.version, beat.since_ms)
        then, before = self._scores
        now, candidates = time.monotonic(), _sum(scorer, "headrace_scorer_candidates_total")
        self._scores = (now, candidates)
        stats = self._replayer.stats
        return Figures(
            sent=stats.impressions,
            total=self._total,
            events_per_s=stats.events_per_s,
            joined=int(_sum(join, "headrace_join_examples_total")),
            pending=int(_sum(join, "headrace_join_pending_impressions")),
            learned=int(_sum(trainer, "headrace_trainer_examples_total")),
            lag=int(_sum(trainer, "headrace_trainer_lag_records")),
            auc=trainer.get(("headrace_trainer_progressive_auc", ("window",))),
            normalised_entropy=trainer.get(("headrace_trainer_progressive_normalised_entropy", ("window",))),
            calibration=trainer.get(("headrace_trainer_progressive_calibration", ("window",))),
            served_auc=trainer.get(("headrace_trainer_served_auc", ("total",))),
            version=max((beat.version for beat in live), default=None),
            scores_per_s=(candidates - before) / max(now - then, 1e-6),
        )

    async def roll_back_and_undo(self) -> ChampionMoved:
        """Roll back to the last good version, wait for the scorer, and undo the rollback."""
        operations = Operations(self._settings.kafka, self._names, "demo")
        rolled = await operations.rollback(RollbackRequest("to show that it works", timeout_ms=CONFIRM_MS))
        assert rolled.undo is not None  # a rollback has a champion before it
        self._view.say(
            f"rolled back from version {rolled.previous} to {rolled.version} in {rolled.took_ms:.0f} ms, "
            f"{len(rolled.confirmed)} scorer confirmed; undo: {rolled.undo.command}"
        )
        if rolled.unconfirmed:
            raise DeployError(f"rollback: {len(rolled.unconfirmed)} scorers did not confirm within {CONFIRM_MS} ms")
        undone = await operations.undo(rolled, timeout_ms=CONFIRM_MS)
        if undone.unconfirmed:
            raise DeployError(f"undo of the rollback: {len(undone.unconfirmed)} scorers did not confirm within {CONFIRM_MS} ms")
        self._view.say(f"undone: version {rolled.previous} answers again")
        return rolled

    async def result(self, name: str, rolled: ChampionMoved, peaks: dict[str, float], began: float) -> DemoResult:
        ledger, stats = self._ledger, self._replayer.stats
        state = await read_registry(self._settings.kafka, self._names)
        newest = max(state.versions.values(), key=lambda record: record.version)
        waits = (await read_followed(self._settings)).click_to_answer_ms
        problems = ledger.problems()
        if len(ledger.impressions) != stats.impressions:
            problems.append(f"{stats.impressions} impressions sent, {len(ledger.impressions)} found")
        return DemoResult(
            dataset=name,
            impressions=stats.impressions,
            clicks=stats.clicks,
            examples=sum(ledger.labels.values()),
            positives=len(ledger.positives),
            events_per_s=round(stats.events / self._seconds, 1) if self._seconds else 0.0,
            auc=_rounded(newest.metrics.get("evaluation_auc")),
            ne=_rounded(newest.metrics.get("evaluation_ne")),
            calibration=_rounded(newest.metrics.get("evaluation_calibration")),
            served_auc=_rounded(newest.metrics.get("evaluation_served_auc")),
            versions=len(state.versions),
            scores=stats.answers,
            rollback_ms=rolled.took_ms,
            click_to_served_ms_p50=_quantile(waits, 0.5),
            click_to_served_ms_p99=_quantile(waits, 0.99),
            dead_letters=sum(ledger.dead_letters.values()),
            peak_rss_mb=peaks,
            exactly_once=not problems,
            problems=problems,
            rollback={"from": rolled.previous, "to": rolled.version},
            seconds=round(time.monotonic() - began, 1),
        )


def _sum(metrics: Mapping[tuple[str, tuple[str, ...]], float], name: str) -> float:
    return sum(value for (sample, _), value in metrics.items() if sample == name)


def _rounded(value: float | None) -> float | None:
    return None if value is None or value != value else round(value, 4)


def _quantile(values: npt.NDArray[np.int64], q: float) -> float | None:
    return round(float(np.quantile(values, q)), 1) if len(values) else None
