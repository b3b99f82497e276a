"""Versions are written whole, then announced; failures don't stop training and use up their number."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
import torch

from state.changes import Announcement
from state.errors import Refused, SnapshotError
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.errors import Fenced, RegistryError
from stream.trainer import snapshots
from stream.trainer.evaluation import Evaluation
from stream.trainer.snapshots import Publisher
from stream.trainer.start import Start
from stream.trainer.training import Captured
from tests.judged import judged
from tests.stream.trainer.factory import FIRST_MS, MODEL, SCHEMA, metrics


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
    """A publisher with its store, registry and letters."""

    def __init__(self, folder, *, newest=0, **settings):
        chosen = SnapshotSettings(url=str(folder / "snapshots"), **settings)
        self.store, self.metrics = SnapshotStore(chosen), metrics()
        self.registry, self.letters = Registry(self.store), Letters()
        self.publisher = Publisher(
            store=self.store,
            registry=self.registry,
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


def captured(examples=100, letters=0, negative_rate=1.0):
    return Captured(
        serving={"weights": torch.ones(3)},
        trainer={"examples_seen": torch.tensor(examples)},
        offsets={1: 7, 0: 5},
        watermark_ms=FIRST_MS,
        examples_seen=examples,
        negative_rate=negative_rate,
        evaluation=Evaluation(100).freeze(),
        letters=letters,
        at_ms=123,
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
    assert set(manifest.files) == {"dense.safetensors", "trainer.safetensors"}
    assert at.outcomes("promoted") == 1
    await at.publisher.publish(captured(200))
    assert [(each.version, each.parent) for each in at.registry.announced] == [(7, None), (8, 7)]
    await at.publisher.publish(captured(300, negative_rate=0.1))
    assert [at.store.manifest(version).negative_rate for version in (8, 9)] == [1.0, 0.1]


async def test_a_store_that_fails_stops_nothing_and_announces_nothing(bench, monkeypatch, caplog):
    at = bench()
    whole = at.store.write
    monkeypatch.setattr(at.store, "write", lambda *parts: (_ for _ in ()).throw(SnapshotError("the disk is full")))
    assert await at.publisher.publish(captured()) is None
    assert at.registry.announced == []
    assert at.outcomes("failed") == 1
    assert "the disk is full" in caplog.text
    assert at.publisher.has_news(100)
    monkeypatch.setattr(at.store, "write", whole)
    announcement = await at.publisher.publish(captured(150))
    assert announcement is not None
    assert announcement.version == 2
    assert not at.publisher.has_news(150)


async def test_a_version_that_could_not_be_announced_is_announced_again_before_another_is_written(bench):
    at = bench()
    at.registry.answers = [RegistryError("Kafka is away"), RegistryError("Kafka is away")]
    assert await at.publisher.publish(captured()) is None
    assert await at.publisher.publish(captured(150)) is None
    assert at.store.versions() == [1]
    assert at.publisher.has_news(100)  # so that a drain tries once more
    assert await at.publisher.publish(captured(150)) is not None
    assert [(each.version, each.parent, each.examples_seen) for each in at.registry.announced] == [(1, None, 100), (2, 1, 150)]
    assert at.outcomes("failed") == 2


async def test_a_registry_that_is_away_costs_one_version_however_long(bench, monkeypatch):
    monkeypatch.setattr(snapshots, "ANNOUNCE_AGAIN_S", 0.01)
    at = bench(interval_ms=100)
    at.registry.answers = [RegistryError("Kafka is away")] * 20

    async def capture():
        return captured(100)

    running = asyncio.ensure_future(at.publisher.run(lambda: 100, capture))
    async with asyncio.timeout(30):
        while not at.registry.announced:
            await asyncio.sleep(0.01)
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


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (torch.tensor([1.0, float("nan")]), "weights not finite: weights"),
        (torch.tensor([1.0, -float("inf")]), "weights not finite: weights"),
        (torch.tensor([1.0, -3e6]), "weights too large: weights holds 3e+06, expected at most 1e+06"),
    ],
)
async def test_weights_that_are_not_sane_are_said_with_the_version(bench, weights, says):
    at = bench()
    verdict = judged(problems=("scores don't vary",))
    await at.publisher.publish(dataclasses.replace(captured(), serving={"weights": weights}, verdict=verdict))
    [manifest] = at.registry.announced
    assert manifest.verdict.problems == ("scores don't vary", says)


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
    at = bench(interval_ms=100, min_examples=10)
    seen = 0

    async def capture():
        return captured(seen)

    running = asyncio.ensure_future(at.publisher.run(lambda: seen, capture))
    await asyncio.sleep(0.4)
    assert at.registry.announced == []
    seen = 9
    await asyncio.sleep(0.3)
    assert at.registry.announced == []
    seen = 10
    async with asyncio.timeout(10):
        while not at.registry.announced:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    assert [each.examples_seen for each in at.registry.announced] == [10]
    at.publisher.close()
    await running
