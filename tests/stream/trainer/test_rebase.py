"""A trainer that restarts goes on in place: scorers at the old chain's newest point reach its weights by one delta."""

from __future__ import annotations

import pytest
import torch

from model.digest import dense_hash, digest_sum, row_hashes
from model.learner import Learner
from model.rows import Rows
from state.gate import GateState
from state.manifest import Manifest
from state.settings import SnapshotSettings
from stream.deltas.pieces import DeltaProblem, FoundDelta
from stream.records.delta import Point
from stream.trainer import rebase
from stream.trainer.batching import BatchCutter
from stream.trainer.bookkeeping import bookkeeping_in
from stream.trainer.chain import NAME, Chain
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import ExampleDecoder
from stream.trainer.judge import Judge
from stream.trainer.rebase import where_in_the_log
from stream.trainer.sanity import Sanity
from stream.trainer.start import Start
from stream.trainer.training import Training
from tests.stream.trainer.factory import MODEL, SCHEMA, metrics, record, run, value
from tests.stream.trainer.fakes import DeltaLog, whole


class Replica:
    """What a scorer has: rows by key, and the dense part."""

    def __init__(self):
        self.rows, self.dense = {}, {}

    def load(self, version):
        for piece in version.pieces:
            self._put(piece.serving)
        self.dense = version.dense

    def apply(self, model):
        self._put(model.rows)
        for key in model.gone.tolist():
            self.rows.pop(key, None)
        self.dense = model.dense or self.dense

    def _put(self, rows):
        for key, *weights in zip(rows.keys.tolist(), rows.embedding.clone(), rows.first_order.clone(), strict=True):
            self.rows[key] = weights

    @property
    def digest(self):
        keys = torch.tensor(sorted(self.rows), dtype=torch.int64)
        embedding = torch.stack([self.rows[key][0] for key in keys.tolist()])
        first_order = torch.stack([self.rows[key][1] for key in keys.tolist()])
        return (digest_sum(row_hashes(Rows(keys, embedding, first_order))) + dense_hash(self.dense)) % (1 << 64)


class Trainer:
    """A trainer without threads and without Kafka."""

    def __init__(self, log, *, epoch, rows=32, precision="float32", schema=SCHEMA):
        self.log, self.epoch, self.rows, self.precision, self.schema = log, epoch, rows, precision, schema
        self.learner = Learner(schema, MODEL, device="cpu", row_precision=precision)
        self.decoder = ExampleDecoder(schema)
        self.base = None
        self._begin({0: 0})

    def _begin(self, positions, ordinal=0):
        self.chain = Chain(
            f"deepfm/{self.epoch}/{ordinal}",
            self.log,
            self.base,
            self.learner.touched_keys,
            row_precision=self.precision,
            schema_hash=self.schema.fingerprint(),
        )
        cutter = BatchCutter(self.rows, positions)
        self.training = Training(
            self.learner, cutter, Evaluation(100), metrics(), max_batch_age_s=1e9, bookkeeping={NAME: self.chain}
        )

    async def go_on(self, version, manifest, *, sent_back=False, ordinal=0):
        version.restore(self.learner)
        start = Start(manifest, 1, bookkeeping_in(version.small))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rebase, "read_back", lambda kafka, names, *, start: found_in(self.log, start))
            self.base = await rebase.go_on_in_place(self.learner, start, None, None, sent_back=sent_back)
        self._begin({int(name): offset for name, offset in manifest.offsets.items()}, ordinal)

    def learn(self, first, end, feature="u"):
        records = [record(offset, value(offset, features={"user": f"{feature}{offset % 7}"})) for offset in range(first, end)]
        self.training.add(self.decoder.decode(run(records)))
        while self.training.step(0.0):
            pass

    async def publish(self):
        await self.chain.publish(self.training.capture_delta())

    def version(self, *, on_chain):
        """A version, and its manifest as the publisher writes it."""
        captured = self.training.capture_version()
        offsets = {str(number): offset for number, offset in captured.position.offsets.items()}
        schema = {"schema_hash": self.schema.fingerprint(), "features": self.schema.model_dump(mode="json")}
        if not on_chain:
            return whole(captured), Manifest(version=2, offsets=offsets, **schema)
        point = self.chain.begin() if self.chain.begins_with_a_version else self.chain.published
        return whole(captured), Manifest(
            version=1,
            offsets=offsets,
            chain=point.point.chain,
            sequence=point.point.sequence,
            deltas_offset=point.offset,
            digest=f"{captured.digest:016x}",
            row_precision=self.precision,
            **schema,
        )


def withhold(training, withheld=True):
    """Have the gate withhold what is trained from now on, or let it flow again."""
    judge = Judge(SnapshotSettings(), GateState(flow="withheld" if withheld else "flowing"))
    training._judge, training._sanity = judge, Sanity(judge)


async def found_in(log, offset):
    yield DeltaProblem("not_a_delta", "a stranger's record", 0, 1)
    at = 0
    for each in log.deltas:
        if at >= offset:
            yield FoundDelta(each, at, at + each.header.pieces)
        at += each.header.pieces + 1


@pytest.mark.parametrize("feature", ["u", "other"])  # the same examples again, and others: rows of the old branch are gone then
async def test_a_replica_follows_a_trainer_that_restarts_from_a_version(feature):
    log, replica = DeltaLog(), Replica()
    old = Trainer(log, epoch=3)
    old.learn(0, 320)
    version, manifest = old.version(on_chain=True)
    replica.load(version)
    for first in (320, 480):
        old.learn(first, first + 160, "old" if feature == "other" else feature)
        await old.publish()
    for each in log.deltas:
        replica.apply(each.model)
    assert replica.digest == old.learner.digest

    new = Trainer(log, epoch=4, rows=24)  # batches are cut elsewhere, so the weights differ in their last bits
    await new.go_on(version, manifest)
    assert new.base.published.point == Point("deepfm/3/0", 2)
    new.learn(320, 560, feature)
    assert not new.chain.is_ready(new.training.positions)
    new.learn(560, 680, feature)
    assert new.chain.is_ready(new.training.positions)
    await new.publish()
    rebase = log.deltas[-1]
    assert (rebase.header.parent, rebase.header.rebase, rebase.header.sequence) == (Point("deepfm/3/0", 2), True, 1)
    assert bool(len(rebase.model.gone)) == (feature == "other")
    replica.apply(rebase.model)
    assert replica.digest == new.learner.digest == rebase.model.digest
    new.learn(680, 800, feature)
    await new.publish()
    replica.apply(log.deltas[-1].model)
    assert replica.digest == new.learner.digest
    assert set(replica.rows) == set(new.learner.serving_state()["keys"].tolist())


async def test_a_version_that_was_withheld_knows_what_it_has_changed():
    log, replica = DeltaLog(), Replica()
    old = Trainer(log, epoch=3)
    old.learn(0, 320)
    replica.load(old.version(on_chain=True)[0])
    old.learn(320, 480)
    await old.publish()
    replica.apply(log.deltas[-1].model)
    withhold(old.training)
    old.learn(480, 640, "withheld")
    version, manifest = old.version(on_chain=False)

    new = Trainer(log, epoch=4)
    await new.go_on(version, manifest)
    assert new.base.published.point == Point("deepfm/3/0", 1)
    assert new.chain.is_ready(new.training.positions)
    await new.publish()
    replica.apply(log.deltas[-1].model)
    assert replica.digest == new.learner.digest
    assert len(log.deltas[-1].model.rows) < len(replica.rows)  # not all of them


async def test_two_restarts_in_a_row_from_one_version():
    log, replica = DeltaLog(), Replica()
    first = Trainer(log, epoch=3)
    first.learn(0, 320)
    version, manifest = first.version(on_chain=True)
    replica.load(version)
    for epoch, rows in ((4, 24), (5, 40)):
        again = Trainer(log, epoch=epoch, rows=rows)
        await again.go_on(version, manifest)
        again.learn(320, 720 + epoch)
        await again.publish()
        replica.apply(log.deltas[-1].model)
        assert replica.digest == again.learner.digest
    assert log.points == [("deepfm/4/0", 1), ("deepfm/5/0", 1)]
    assert log.deltas[-1].header.parent == Point("deepfm/4/0", 1)


async def test_the_log_has_lost_what_came_after_the_version():
    log = DeltaLog()
    old = Trainer(log, epoch=3)
    old.learn(0, 320)
    version, manifest = old.version(on_chain=True)
    for first in (320, 480):
        old.learn(first, first + 160)
        await old.publish()
    del log.deltas[0]  # by retention
    new = Trainer(log, epoch=4)
    await new.go_on(version, manifest)
    assert new.base.published.point == Point("deepfm/3/0", 0)  # scorers load the version before they apply what follows


def test_a_version_from_before_there_were_deltas_is_nowhere_in_the_log():
    assert where_in_the_log(Manifest(version=1), {}) is None
    assert where_in_the_log(Manifest(version=1), {"kept.chain.published": torch.zeros(3, dtype=torch.uint8)}) is None


@pytest.mark.parametrize("same_learner", [True, False])
async def test_a_trainer_that_is_sent_back_learns_as_if_it_had_never_gone_on(same_learner):
    log, replica = DeltaLog(), Replica()
    old = Trainer(log, epoch=3)
    old.learn(0, 320)
    version, manifest = old.version(on_chain=True)
    replica.load(version)
    for first in (320, 480):
        old.learn(first, first + 160, "poison")
        await old.publish()
    for each in log.deltas:
        replica.apply(each.model)
    old.learn(640, 700, "never sent")

    back = old if same_learner else Trainer(log, epoch=4)
    await back.go_on(version, manifest, sent_back=True, ordinal=1)
    assert back.chain.is_ready(back.training.positions), "at once, and not when it has come as far as the old chain"
    await back.publish()
    rebase = log.deltas[-1]
    assert (rebase.header.rebase, rebase.header.parent) == (True, Point("deepfm/3/0", 2))
    assert len(rebase.model.gone) > 0, "rows that only the old line had"
    assert rebase.header.offsets == manifest.offsets
    replica.apply(rebase.model)
    assert replica.digest == back.learner.digest == int(manifest.digest, 16)

    whole_run = Trainer(DeltaLog(), epoch=1)
    whole_run.learn(0, 320)
    for each in (back, whole_run):
        each.learn(320, 800)
    await back.publish()
    replica.apply(log.deltas[-1].model)
    expected, found = ({**each.learner.serving_state(), **each.learner.trainer_state()} for each in (whole_run, back))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected), "bit for bit"
    assert replica.digest == back.learner.digest


@pytest.mark.parametrize(
    "problem",
    [
        DeltaProblem("log_gone", "expected offset 0, found a log from 9", 0, 9),
        DeltaProblem("checksum", "damaged: scorers were healed by a version, and are further", 3, 4),
    ],
)
async def test_a_trainer_that_is_sent_back_begins_with_a_version_where_the_log_has_lost_deltas(monkeypatch, problem):
    trainer = Trainer(DeltaLog(), epoch=3)
    trainer.learn(0, 320)
    version, manifest = trainer.version(on_chain=True)

    async def lost(log, start):
        yield problem

    monkeypatch.setitem(globals(), "found_in", lost)
    await trainer.go_on(version, manifest, sent_back=True)
    assert trainer.chain.begins_with_a_version
    assert trainer.chain.is_ready(trainer.training.positions)
    await trainer.go_on(version, manifest)
    assert not trainer.chain.begins_with_a_version, "one that restarts goes on: scorers that are further wait for it"
