"""In which order a trainer starts: nothing is written before everything that could keep it from starting was looked at."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from model.errors import SnapshotMismatch
from model.learner import Learner
from state.errors import SnapshotError
from state.gate_release import GateRelease
from state.manifest import Manifest
from state.registry import Champion, RegistryState, VersionRecord
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.errors import PositionError
from stream.kafka.cluster import Cluster
from stream.settings import HttpSettings, KafkaSettings, TopicSettings, TrainerSettings
from stream.topics.names import TopicNames
from stream.trainer import prepare, rebase, run, standby
from tests.judged import judged
from tests.stream.trainer.factory import MODEL, SCHEMA

NAMES = TopicNames.of(TopicSettings())
CLUSTER = Cluster("c", {NAMES.examples: "e", NAMES.snapshots: "s"}, {NAMES.examples: 1, NAMES.dead_letters: 1})


class Stage:
    """The trainer's surroundings: what it asks of them is noted in order."""

    def __init__(self, folder, monkeypatch) -> None:
        self.asked: list[str] = []
        self.store = SnapshotStore(SnapshotSettings(url=str(folder / "snapshots")))
        self.state = RegistryState()
        self.later: RegistryState | None = None
        self.ends = {0: 100}
        self.served = None
        stage = self

        async def cluster(*args):
            return CLUSTER

        async def registry(*args):
            stage.asked.append("look")
            return stage.state

        async def bounds(*args):
            return {0: 0}, stage.ends

        class Writer:
            def __init__(self, *args, **kwargs): ...

            async def take_trainer_epoch(self, *, above):
                assert above == 6, "what the log of deltas has seen"
                stage.asked.append("epoch")
                return 7

            async def close(self): ...

        class Reader(Writer):
            @property
            def state(self):
                return stage.later or stage.state

            async def start(self):
                stage.asked.append("follow")

        class Alone:
            """The group of trainers, with this one in it."""

            group, choices, joined, leader_name = "trainers", 1, True, "t"

            def __init__(self, *args, **kwargs):
                self.won, self.refused = asyncio.Event(), asyncio.Event()

            async def join(self):
                stage.asked.append("lead")
                self.won.set()

            async def run(self):
                await asyncio.Event().wait()

            async def leave(self):
                stage.asked.append("leave")

        class Deltas(Writer):
            position, limit = 40, 100_000

            async def open(self):
                stage.asked.append("deltas")

        async def read_back(*args, **kwargs):
            for each in ():
                yield each

        async def serve(each, **kwargs):
            stage.asked.append("serve")
            stage.served = each

        class Standing(Reader):
            async def start(self): ...

        async def newest_epoch(*args):
            return 6

        monkeypatch.setattr(run, "newest_epoch", newest_epoch)
        monkeypatch.setattr(run, "describe_cluster", cluster)
        monkeypatch.setattr(standby, "read_registry", registry)
        monkeypatch.setattr(standby, "Leadership", Alone)
        monkeypatch.setattr(standby, "RegistryFollower", Standing)
        monkeypatch.setattr(run, "RegistryWriter", Writer)
        monkeypatch.setattr(run, "RegistryFollower", Reader)
        monkeypatch.setattr(run, "DeltaWriter", Deltas)
        monkeypatch.setattr(rebase, "read_back", read_back)
        monkeypatch.setattr(run, "serve", serve)
        monkeypatch.setattr(prepare, "_log_bounds", bounds)

    def version(self, number: int, **more) -> VersionRecord:
        learner = Learner(SCHEMA, MODEL, device="cpu")
        manifest = Manifest(
            **{
                "version": number,
                "offsets": {"0": 10 * number},
                "schema_hash": SCHEMA.fingerprint(),
                "features": SCHEMA.model_dump(mode="json"),
                "model": MODEL.model_dump(mode="json"),
                "verdict": judged(line=1),
                **more,
            }
        )
        self.store.write(manifest, learner.serving_state(), learner.trainer_state())
        return VersionRecord.of(manifest, now_ms=1, who="t", gate="")

    async def run(self, **changed):
        await run.run_trainer(
            **{
                "kafka": KafkaSettings(),
                "settings": TrainerSettings(device="cpu"),
                "names": NAMES,
                "http": HttpSettings(),
                "schema": SCHEMA,
                "model": MODEL,
                "snapshots": SnapshotSettings(url=self.store.url),
                **changed,
            }
        )


@pytest.fixture
def stage(tmp_path, monkeypatch):
    return Stage(tmp_path, monkeypatch)


def known(*records: VersionRecord) -> RegistryState:
    versions = {record.version: record for record in records}
    return RegistryState(versions=versions, champion=Champion(version=max(versions, default=None)))


async def test_a_start_looks_first_and_takes_the_epoch_then(stage):
    stage.state = known(stage.version(1))
    await stage.run()
    assert stage.asked == ["look", "lead", "epoch", "follow", "deltas", "serve", "leave"]
    assert stage.served._training.positions == {0: 10}
    assert stage.served._judge.report().line == 1


async def test_the_chain_goes_on_from_the_versions_or_begins_with_a_version(stage):
    stage.state = known(stage.version(1))  # from before there were deltas
    await stage.run()
    assert stage.served._publisher._chain.begins_with_a_version
    stage.state = known(stage.version(2, chain="deepfm/3/0", sequence=17, deltas_offset=40))
    await stage.run()
    chain = stage.served._publisher._chain
    assert (chain.name, chain.begins_with_a_version) == ("deepfm/7/0", False)
    assert chain.is_ready({0: 20})
    assert not chain.is_ready({0: 19})


async def test_a_version_that_was_announced_in_between_is_gone_on_from(stage):
    one = stage.version(1)
    stage.state = known(one)
    stage.later = known(one, stage.version(2))
    await stage.run()
    assert stage.served._training.positions == {0: 20}


async def test_another_schema_ends_nobody(stage):
    stage.state = known(stage.version(1))
    with pytest.raises(SnapshotMismatch):
        await stage.run(schema=SCHEMA.model_copy(update={"embedding_dim": 8}))
    assert stage.asked == ["look", "leave"]


async def test_a_store_without_the_registrys_versions_ends_nobody(stage, tmp_path):
    stage.state = known(stage.version(1))
    with pytest.raises(SnapshotError, match="found an empty store"):
        await stage.run(snapshots=SnapshotSettings(url=str(tmp_path / "elsewhere")))
    assert stage.asked == ["look", "leave"]


@pytest.mark.parametrize("more", [{"offsets": {"0": 101}}, {"topic_ids": {"examples": "of before"}}])
async def test_another_log_ends_nobody(stage, more):
    stage.state = known(stage.version(1, **more))
    with pytest.raises(PositionError):
        await stage.run()
    assert stage.asked == ["look", "leave"]


async def test_a_new_model_over_a_champion_begins_withheld(stage):
    stage.state = known(stage.version(1))
    await stage.run(new_model=True)
    report = stage.served._judge.report()
    assert stage.served._training.positions == {0: 0}
    assert (report.line, report.flow, report.anchor) == (7, "withheld", 1)


async def test_a_first_model_flows(stage):
    await stage.run()
    report = stage.served._judge.report()
    assert (report.line, report.flow, report.anchor) == (7, "flowing", None)


async def test_housekeeping_shows_the_gate(stage, monkeypatch):
    stage.state = known(stage.version(1), stage.version(2))
    await stage.run(new_model=True)
    shown = SimpleNamespace(verdict=None)
    each = stage.served
    monkeypatch.setattr(each._metrics, "judged", lambda verdict, newer: setattr(shown, "verdict", (verdict.flow, newer)))
    in_training_thread(each, monkeypatch)
    await each._show_gate()
    assert shown.verdict == ("withheld", 0)


def in_training_thread(worker, monkeypatch):
    """The pipeline's threads don't run, so what is for the training thread is done at once."""

    async def at_once(capture):
        return capture(worker._training)

    monkeypatch.setattr(worker._pipeline, "between_batches", at_once)


async def test_an_operators_release_is_carried_out_once_and_only_for_this_line(stage, monkeypatch):
    stage.state = known(stage.version(1))
    await stage.run(new_model=True)
    each = stage.served
    in_training_thread(each, monkeypatch)
    judge = each._judge
    assert judge.report().line == 7
    for line, operation, flow in ((1, "a", "withheld"), (None, "", "withheld"), (7, "b", "flowing")):
        stage.state.release = GateRelease(line=line, who="anna@host", reason="it is better", operation=operation)
        await each._release(stage.state)
        assert judge.report().flow == flow
    assert judge.report().reason == "released by anna@host: it is better"
    judge.question("scores jumped", 0)
    await each._release(stage.state)  # the same release as before says nothing about this
    assert judge.report().flow == "withheld"
