"""Deltas and versions leave in order, failures don't stop training, and a version's number is used once."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
import torch

from model.rows import ModelDelta, Rows
from state.changes import Announcement
from state.errors import Refused, SnapshotError
from state.gate import GateState
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.errors import Fenced, NoAnswer, RegistryError
from stream.records.delta import Point
from stream.trainer import snapshots
from stream.trainer.batching import BatchCutter
from stream.trainer.captured import CapturedDelta, CapturedVersion, Position
from stream.trainer.chain import Base, Chain, Published
from stream.trainer.evaluation import Evaluation
from stream.trainer.judge import Judge
from stream.trainer.snapshots import Publisher
from stream.trainer.start import Start
from stream.trainer.training import Training
from tests.judged import judged
from tests.stream.trainer.factory import FIRST_MS, MODEL, SCHEMA, columns, metrics
from tests.stream.trainer.fakes import NO_KEYS, DeltaLog, FakeFrozen, FakeLearner


class Registry:
    """Notes what is announced, and that it is whole by then; answers with what the test puts in `answers`."""

    def __init__(self, store):
        self.store, self.announced, self.answers = store, [], []

    async def announce(self, manifest, *, gate):
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        assert self.store.verify(manifest.version) == []
        self.announced.append(manifest)
        return Announcement(manifest.version, True, "promoted")


class Letters:
    def __init__(self):
        self.written, self.changed = 0, asyncio.Condition()

    async def written_up_to(self, count):
        async with self.changed:
            await self.changed.wait_for(lambda: self.written >= count)


class Bench:
    """A publisher with its store, registry, letters and log of deltas."""

    def __init__(self, folder, *, newest=0, base=None, touched=lambda: NO_KEYS, **settings):
        chosen = SnapshotSettings(url=str(folder / "snapshots"), **settings)
        self.store, self.metrics = SnapshotStore(chosen), metrics()
        self.registry, self.letters, self.log = Registry(self.store), Letters(), DeltaLog(40)
        self.chain = Chain("deepfm/4/0", self.log, base, touched)
        self.publisher = Publisher(
            store=self.store,
            registry=self.registry,
            chain=self.chain,
            letters=self.letters,
            settings=chosen,
            schema=SCHEMA,
            model=MODEL,
            epoch=4,
            start=Start(None, newest),
            metrics=self.metrics,
            topic_ids={"examples": "E", "snapshots": "S"},
        )

    def outcomes(self, outcome):
        return self.metrics.snapshots.labels(outcome)._value.get()


def position(examples=100, letters=0, negative_rate=1.0):
    return Position({1: 7, 0: 5}, FIRST_MS, examples, negative_rate, letters, at_ms=123)


def delta(examples=100, letters=0, weight=1.0):
    """A delta of one row; its digest is the number of examples."""
    rows = Rows(torch.tensor([7]), torch.full((1, 4), weight), torch.tensor([weight]))
    return CapturedDelta(ModelDelta(rows, NO_KEYS, {"weights": torch.ones(3)}, examples), position(examples, letters))


def captured(examples=100, letters=0, negative_rate=1.0, *, withheld=False):
    return CapturedVersion(
        frozen=FakeFrozen({"weights": torch.ones(3)}, {"examples_seen": torch.tensor(examples)}),
        bookkeeping={},
        evaluation=Evaluation(100).freeze(),
        verdict=None,
        position=position(examples, letters, negative_rate),
        delta=None if withheld else delta(examples),
        on_chain=not withheld,
        digest=examples,
    )


@pytest.fixture
def bench(tmp_path):
    return lambda **settings: Bench(tmp_path, **settings)


async def test_a_version_says_all_about_itself(bench):
    at = bench(newest=6)
    announcement = await at.publisher.publish(captured())
    assert announcement is not None
    assert announcement.version == 7
    [manifest] = at.registry.announced
    assert manifest == at.store.manifest(7)
    assert (manifest.kind, manifest.parent, manifest.base, manifest.epoch, manifest.created_at_ms) == (
        "full",
        None,
        None,
        4,
        123,
    )
    assert manifest.offsets == {"0": 5, "1": 7}
    assert (manifest.watermark_ms, manifest.examples_seen) == (FIRST_MS, 100)
    assert manifest.metrics["window_examples"] == 0
    assert manifest.schema_hash == SCHEMA.fingerprint()
    assert manifest.model["hidden"] == [8]
    assert set(manifest.files) == {"dense.safetensors", "trainer.safetensors"}  # there are no rows
    assert (manifest.chain, manifest.sequence, manifest.deltas_offset) == ("deepfm/4/0", 0, 40)
    assert manifest.digest == f"{100:016x}"
    assert at.outcomes("promoted") == 1
    await at.publisher.publish(captured(200))
    assert [(each.version, each.parent) for each in at.registry.announced] == [(7, None), (8, 7)]
    await at.publisher.publish(captured(300, negative_rate=0.1))
    assert [at.store.manifest(version).negative_rate for version in (8, 9)] == [1.0, 0.1]


async def test_a_store_that_fails_stops_nothing_and_announces_nothing(bench, monkeypatch, caplog):
    at = bench()
    whole = at.store.write_version

    def full(*parts, **more):
        raise SnapshotError("the disk is full")

    monkeypatch.setattr(at.store, "write_version", full)
    assert await at.publisher.publish(captured()) is None
    assert at.registry.announced == []
    assert at.outcomes("failed") == 1
    assert "the disk is full" in caplog.text
    monkeypatch.setattr(at.store, "write_version", whole)
    announcement = await at.publisher.publish(captured(150))
    assert announcement is not None
    assert announcement.version == 2


async def test_a_version_that_could_not_be_announced_is_announced_again_before_another_is_written(bench):
    at = bench()
    at.registry.answers = [RegistryError("Kafka is away"), RegistryError("Kafka is away")]
    assert await at.publisher.publish(captured()) is None
    assert await at.publisher.publish(captured(150)) is None
    assert at.store.versions() == [1]
    assert await at.publisher.publish(captured(150)) is not None
    assert [(each.version, each.parent, each.examples_seen) for each in at.registry.announced] == [(1, None, 100), (2, 1, 150)]
    assert at.outcomes("failed") == 2


class Trained:
    """Training without threads, of which a test decides how far it has come."""

    def __init__(self, learner=None, judge=None):
        self.learner = learner or FakeLearner()
        self.training = Training(
            self.learner, BatchCutter(10, {0: 0}), Evaluation(100), metrics(), max_batch_age_s=0, judge=judge
        )
        self.offset = 0

    def learn(self, examples):
        self.training.add(columns(range(self.offset, self.offset + examples)))
        self.offset += examples
        while self.training.step(0.0) or self.training.step(1.0):
            pass

    async def between_batches(self, capture):
        return capture(self.training)


async def until(true):
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.005)


async def test_training_hears_once_that_it_is_as_far_as_scorers_are(bench, monkeypatch):
    at, trained, heard = bench(base=Base(Published(Point("deepfm/3/0", 5), 40), {0: 60})), Trained(), []
    monkeypatch.setattr(Training, "caught_up", lambda training: heard.append(training.positions[0]))
    running = asyncio.ensure_future(at.publisher.run(trained.training, trained.between_batches))
    for examples in (50, 10, 10):
        trained.learn(examples)
        await asyncio.sleep(0.1)
        await until(lambda: len(at.log.deltas) >= trained.offset // 10 - 5)
    assert heard == [60], "not before, and not twice"
    at.publisher.close()
    await running


async def test_a_registry_that_is_away_costs_one_version_however_long(bench, monkeypatch):
    monkeypatch.setattr(snapshots, "ANNOUNCE_AGAIN_S", 0.01)
    at, trained = bench(interval_ms=100), Trained()
    at.registry.answers = [RegistryError("Kafka is away")] * 20
    trained.learn(100)
    running = asyncio.ensure_future(at.publisher.run(trained.training, trained.between_batches))
    await until(lambda: at.registry.announced)
    at.publisher.close()
    await running
    assert at.store.versions() == [1]
    assert at.outcomes("failed") == 20


async def test_a_version_that_the_rules_forbid_is_given_up(bench):
    at = bench()
    refused = RegistryError("version 1: expected a number above 7")
    refused.__cause__ = Refused("the same")
    at.registry.answers = [refused]
    assert await at.publisher.publish(captured()) is None
    assert await at.publisher.publish(captured(150)) is not None
    assert [(each.version, each.parent) for each in at.registry.announced] == [(2, None)]


async def test_a_version_carries_its_verdict_and_the_topics_it_belongs_to(bench):
    at = bench()
    await at.publisher.publish(dataclasses.replace(captured(), verdict=judged(line=4, anchor=2)))
    manifest = at.store.manifest(1)
    assert manifest.verdict == judged(line=4, anchor=2)
    assert manifest.topic_ids == {"examples": "E", "snapshots": "S"}


async def test_fenced_is_the_end(bench):
    at = bench()
    at.registry.answers = [Fenced("another trainer has taken over")]
    with pytest.raises(Fenced):
        await at.publisher.publish(captured())


async def test_dead_letters_are_written_before_the_version_that_relies_on_them(bench):
    at = bench()
    publishing = asyncio.ensure_future(at.publisher.publish(captured(letters=2)))
    await asyncio.sleep(0.1)
    assert not publishing.done()
    assert at.store.versions() == []
    async with at.letters.changed:
        at.letters.written = 2
        at.letters.changed.notify_all()
    assert await publishing is not None


async def test_versions_come_at_intervals_and_only_with_news(bench):
    at, trained = bench(interval_ms=100, min_examples=10), Trained()
    running = asyncio.ensure_future(at.publisher.run(trained.training, trained.between_batches))
    await asyncio.sleep(0.4)
    assert at.registry.announced == []
    trained.learn(9)
    await asyncio.sleep(0.3)
    assert at.registry.announced == []
    trained.learn(1)
    await until(lambda: at.registry.announced)
    await asyncio.sleep(0.3)
    assert [each.examples_seen for each in at.registry.announced] == [10]
    at.publisher.close()
    await running


# Deltas


async def test_a_chain_begins_with_a_version_and_goes_on_with_deltas(bench):
    at = bench()
    await at.publisher.publish(captured(100))
    assert at.log.deltas == []  # scorers load the version
    await at.publisher.publish_delta(delta(130))
    await at.publisher.publish_delta(delta(160))
    await at.publisher.publish(captured(200))
    first, second, third = (each.header for each in at.log.deltas)
    assert [each.sequence for each in (first, second, third)] == [1, 2, 3]
    assert [each.parent for each in (first, second, third)] == [Point("deepfm/4/0", number) for number in (0, 1, 2)]
    assert (first.examples_seen, first.offsets, first.digest, first.rebase) == (130, {"0": 5, "1": 7}, f"{130:016x}", False)
    versions = [(each.chain, each.sequence, each.deltas_offset, each.digest) for each in at.registry.announced]
    assert versions == [("deepfm/4/0", 0, 40, f"{100:016x}"), ("deepfm/4/0", 3, 45, f"{200:016x}")]
    assert at.log.position == 46  # the marker of the last transaction is behind the offset that the version names


async def test_a_version_that_is_withheld_is_no_point_of_the_chain(bench):
    at = bench()
    await at.publisher.publish(captured(100))
    await at.publisher.publish(captured(150, withheld=True))
    newest = at.registry.announced[-1]
    assert (newest.chain, newest.sequence, newest.deltas_offset, newest.digest) == ("", None, None, "")
    assert at.log.deltas == []
    await at.publisher.publish(captured(200))  # released: one delta with all that changed
    assert at.log.points == [("deepfm/4/0", 1)]
    assert at.registry.announced[-1].sequence == 1


async def test_a_delta_is_sent_again_until_kafka_has_it(bench, monkeypatch, caplog):
    monkeypatch.setattr(snapshots, "SEND_AGAIN_S", 0.01)
    at = bench()
    await at.publisher.publish(captured(100))
    at.log.answers = [NoAnswer("Kafka is away"), NoAnswer("Kafka is away")]
    await at.publisher.publish_delta(delta(130))
    assert at.log.points == [("deepfm/4/0", 1)]
    assert at.metrics.deltas.labels("failed")._value.get() == 2
    assert at.metrics.deltas.labels("sent")._value.get() == 1
    assert "a delta isn't written, it is published again" in caplog.text


async def test_a_delta_waits_for_the_dead_letters_before_it(bench):
    at = bench()
    await at.publisher.publish(captured(100))
    publishing = asyncio.ensure_future(at.publisher.publish_delta(delta(130, letters=2)))
    await asyncio.sleep(0.05)
    assert at.log.deltas == []
    async with at.letters.changed:
        at.letters.written = 2
        at.letters.changed.notify_all()
    await publishing
    assert len(at.log.deltas) == 1


async def test_deltas_flow_while_a_version_is_being_written(bench, monkeypatch):
    at, trained = bench(interval_ms=100, delta_interval_ms=10), Trained()
    go_on, whole = asyncio.Event(), at.publisher._finish

    async def slow(*what):
        await go_on.wait()
        return await whole(*what)

    monkeypatch.setattr(at.publisher, "_finish", slow)
    trained.learn(100)
    running = asyncio.ensure_future(at.publisher.run(trained.training, trained.between_batches))
    await until(lambda: at.chain.published)
    for sent in range(1, 4):
        trained.learn(10)
        await until(lambda sent=sent: len(at.log.deltas) >= sent)
    assert at.registry.announced == []
    go_on.set()
    at.publisher.close()
    await running
    assert at.registry.announced[0].sequence == 0  # another one may have begun before it was asked to end
    assert [each.header.examples_seen for each in at.log.deltas] == [110, 120, 130]


async def test_nothing_is_published_before_training_has_come_as_far_as_the_chain_it_goes_on_from(bench):
    base = Base(Published(Point("deepfm/3/0", 17), 40), {0: 25})
    at, trained = bench(interval_ms=100, delta_interval_ms=10, base=base), Trained()
    running = asyncio.ensure_future(at.publisher.run(trained.training, trained.between_batches))
    trained.learn(20)
    await asyncio.sleep(0.4)
    assert at.log.deltas == at.registry.announced == []
    trained.learn(10)
    await until(lambda: at.registry.announced)
    at.publisher.close()
    await running
    header = at.log.deltas[0].header
    assert (header.rebase, header.chain, header.sequence) == (True, "deepfm/4/0", 1)
    assert header.parent == Point("deepfm/3/0", 17)


async def test_weights_that_are_not_sane_are_withheld_and_said_with_the_version(bench):
    at, trained = bench(), Trained()
    trained.learn(10)
    await at.publisher.publish(trained.training.capture_version())
    trained.learner.weight = float("nan")
    trained.learn(10)
    assert trained.training.capture_delta() is None
    trained.learner.weight = 1.0
    delta = trained.training.capture_delta()
    assert delta is not None
    assert delta.delta.rows.keys.tolist() == [2]  # what was withheld is part of the next delta


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (float("nan"), "weights not finite: embedding"),
        (-float("inf"), "weights not finite: embedding"),
        (-3e6, "weights too large: embedding holds 3e+06, expected at most 1e+06"),
    ],
)
async def test_a_version_of_such_weights_is_no_point_of_the_chain(bench, weight, says):
    at, trained = bench(), Trained(judge=Judge(SnapshotSettings(), GateState(line=1)))
    trained.learner.weight = weight
    trained.learn(10)
    captured = trained.training.capture_version()
    assert not captured.on_chain
    assert captured.verdict.problems[0] == says
    assert captured.verdict.flow == "withheld"
    assert captured.verdict.reason.startswith(says)
    await at.publisher.publish(captured)
    assert at.chain.published is None
