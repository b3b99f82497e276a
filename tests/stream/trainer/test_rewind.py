"""A trainer is sent back, running and dead, on the real Kafka: its weights, the log of deltas, what it leaves out."""

from __future__ import annotations

import time

import pytest
import torch

from model.learner import Learner
from state.store import SnapshotStore
from stream.deltas.pieces import FoundDelta
from stream.deltas.reader import read_back
from stream.registry.log import read_registry
from stream.registry.operations import Operations
from stream.registry.requests import RollbackRequest
from stream.registry.skipping import SkipRequest, TimeRange
from stream.topics.names import TopicNames
from stream.trainer.batching import BatchCutter
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import ExampleDecoder
from stream.trainer.training import Training
from tests.stream.trainer.factory import MODEL, SCHEMA, metrics, record, run
from tests.stream.trainer.process import newest, one_partition, send, until
from tests.stream.trainer.test_rebase import Replica

pytestmark = pytest.mark.kafka

# Batches are cut by count alone. Row history is state like weights, so whatever goes back takes it along.
BY_COUNT = {"HEADRACE_TRAINER__MAX_BATCH_AGE_MS": "100000000", "HEADRACE_MODEL__ROW_HISTORY": "true"}
WITH_HISTORY = MODEL.model_copy(update={"row_history": True})


def learned_at_once(*offsets: range) -> dict[str, torch.Tensor]:
    """The weights of a trainer that is given these examples, one after another."""
    torch.set_num_threads(1)
    learner = Learner(SCHEMA, WITH_HISTORY, device="cpu")
    training = Training(learner, BatchCutter(MODEL.batch_rows, {0: 0}), Evaluation(9), metrics(), max_batch_age_s=1e9)
    training.add(ExampleDecoder(SCHEMA).decode(run([record(offset) for some in offsets for offset in some])))
    while training.step(0.0):
        pass
    return {**learner.serving_state(), **learner.trainer_state()}


def full(count: int) -> int:
    """Examples in full batches."""
    return count // MODEL.batch_rows * MODEL.batch_rows


async def test_the_trainer_goes_back_alive_and_dead_and_leaves_out_what_was_poisoned(settings, tmp_path, start):
    here = one_partition(settings, "back", tmp_path)
    names, store = TopicNames.of(here.topics), SnapshotStore(here.snapshots)
    operations = Operations(here.kafka, names, "ann@desk", store=store)

    async def version_of(examples: int, process) -> int:
        def seen() -> bool:
            return any(store.manifest(version).examples_seen == examples for version in store.versions()[-1:])

        await until(seen, process)
        version = store.versions()[-1]
        while await newest(here) < version:
            assert process.process.poll() is None, process.log.read_text()
        return version

    async def weights(version: int) -> dict[str, torch.Tensor]:
        found = {**store.serving(version), **store.trainer(version)}
        return {name: tensor for name, tensor in found.items() if not name.startswith("kept.")}

    async def equal(version: int, *offsets: range) -> None:
        expected, found = learned_at_once(*offsets), await weights(version)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), "bit for bit"

    process = start(here, **BY_COUNT)
    await send(here, range(1_000))
    target = await version_of(full(1_000), process)
    poisoned_from = time.time_ns() // 1_000_000
    await send(here, range(1_000, 2_000))
    poisoned_to = time.time_ns() // 1_000_000 + 1
    bad = await version_of(full(2_000), process)

    # The leading trainer goes back in place.
    times = SkipRequest(times=(TimeRange(poisoned_from, poisoned_to),))
    plan = await operations.plan(RollbackRequest("flipped labels", to=target, rewind=True, skip=times, timeout_ms=60_000))
    assert [(each.partition, each.first, each.to) for each in plan.skipped or ()] == [(0, 1_000, 2_000)]
    assert (plan.offsets, plan.checked) == ({"0": full(1_000)}, "hashes")
    done = await operations.rollback(plan)
    assert done.trainer is not None and done.trainer.version == target
    assert done.trainer.up_to is not None and done.trainer.up_to >= bad
    await send(here, range(2_000, 3_500))
    new = await version_of(full(2_500), process)
    manifest = store.manifest(new)
    assert (manifest.offsets, manifest.epoch, manifest.chain.split("/")[2]) == ({"0": 1_000 + full(2_500)}, 1, "1")
    assert [(each.first, each.to, each.who, each.why) for each in manifest.skipped] == [
        (1_000, 2_000, "ann@desk", "flipped labels")
    ]
    # Each manifest of the new line knows it, from the first one on, for a registry that is lost.
    for version in range(done.trainer.up_to + 1, new + 1):
        known = store.manifest(version).rewinds
        assert known is not None and known.skipped == manifest.skipped
        assert [(each.version, each.up_to, each.operation) for each in known.rewinds] == [
            (target, version - 1 if version == done.trainer.up_to + 1 else done.trainer.up_to, done.trainer.operation)
        ]
    assert process.metric("skipped_examples_total") == 1_000
    assert process.metric("rewinds_total") == 1
    await equal(new, range(1_000), range(2_000, 3_500))
    assert not (await operations.resume()).held

    # A dead one goes back when it is started again, also where it has to skip more in the middle of what it reads.
    process.kill()
    more = SkipRequest(to_latest=True)
    done = await operations.rollback(RollbackRequest("still bad", to=target, rewind=True, skip=more, timeout_ms=300))
    assert done.trainer is None, "nobody has gone back yet"
    process = start(here, **BY_COUNT)
    await until(lambda: process.metric("skipped_examples_total") == 3_500 - full(1_000), process)
    assert (await read_registry(here.kafka, names)).rewinds.pending is None
    await send(here, range(3_500, 4_500))
    latest = await version_of(full(1_000) + full(1_000), process)
    await equal(latest, range(full(1_000)), range(3_500, 4_500))
    process.stop()
    assert len(store.manifest(latest).skipped) == 2

    # A scorer that has followed from the target on is where the trainer is.
    replica = Replica()
    for piece in store.read(target).rows():
        replica._put(piece)
    replica.dense = store.read(target).dense()
    digests, at = [], store.manifest(target).deltas_offset
    assert at is not None
    async for found in read_back(here.kafka, names, at):
        assert isinstance(found, FoundDelta)
        replica.apply(found.delta.model)
        digests.append(found.delta.header.rebase)
    assert sum(digests) == 2
    assert f"{replica.digest:016x}" == store.manifest(latest).digest
