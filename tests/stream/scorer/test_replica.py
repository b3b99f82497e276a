"""A replica has the trainer's weights bit for bit after every delta, from whatever version it began."""

from __future__ import annotations

import numpy as np
import pytest

from model.errors import DigestMismatch
from model.learner import Learner
from model.predictor import Predictor
from state.registry import VersionRecord
from stream.records.delta import DeltaHeader, Point, encode_delta
from stream.records.delta_assembly import Delta, assemble
from stream.scorer.replica import KEPT_POINTS, Replica, offered_by
from stream.scorer.serving import Served, WeightsState
from tests.model.test_learner import SCHEMA, SETTINGS, learn, records

CHAIN = "deepfm/1/0"
BATCH, LABELS = records(600)


def replica_of(learner: Learner, sequence: int = 0) -> Replica:
    predictor = Predictor.of(SCHEMA, SETTINGS, learner.serving_state(), device="cpu")
    record = VersionRecord(version=1, chain=CHAIN, sequence=sequence, deltas_offset=10 * sequence)
    return Replica(Served(WeightsState(1, 0), None, predictor), record)  # type: ignore[arg-type]


def taken(learner: Learner, sequence: int, *, dense: bool = True, **changed: object) -> Delta:
    """What the learner has learned, as it comes from the log in several pieces."""
    fields = {"chain": CHAIN, "parent": Point(CHAIN, sequence - 1), "sequence": sequence, "negative_rate": 0.5, **changed}
    header = DeltaHeader(offsets={}, watermark_ms=0, examples_seen=0, at_ms=1_000 + sequence, **fields)  # type: ignore[arg-type]
    return assemble(encode_delta(header, learner.take_delta(dense=dense), 4_096))


def apply(replica: Replica, delta: Delta) -> None:
    replica.apply(replica.prepare(delta), delta, offered_by(delta.header))


def test_it_has_the_learners_weights_after_every_delta() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    replicas = [replica_of(learner)]
    for sequence in range(1, 13):
        learn(learner, BATCH.slice(50 * sequence - 50, 50 * sequence), LABELS[50 * sequence - 50 : 50 * sequence])
        delta = taken(learner, sequence)
        for replica in replicas:
            apply(replica, delta)
            state = replica.served.state
            assert state.digest == learner.digest == replica.served.predictor.digest
            assert state.recent[-1].digest == f"{learner.digest:016x}" and len(state.recent) <= KEPT_POINTS
            assert state.captured_at_ms == 1_000 + sequence
        if sequence == 6:
            replicas.append(replica_of(learner, sequence=6))  # begins with a version of here
    assert [(each.served.state.version, each.served.state.delta) for each in replicas] == [(1, 12), (1, 6)]
    whole = Predictor.of(SCHEMA, SETTINGS, learner.serving_state(), device="cpu", negative_rate=0.5)
    for replica in replicas:
        np.testing.assert_array_equal(replica.served.predictor.predict(BATCH), whole.predict(BATCH))


def test_what_does_not_lead_to_the_digest_changes_nothing() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    replica = replica_of(learner)
    learn(learner, BATCH.slice(0, 50), LABELS[:50])
    missed = taken(learner, 1)
    learn(learner, BATCH.slice(50, 100), LABELS[50:100])
    before = replica.served.predictor.predict(BATCH)
    with pytest.raises(DigestMismatch):
        replica.prepare(taken(learner, 2))
    assert replica.served.state.delta == 0
    np.testing.assert_array_equal(replica.served.predictor.predict(BATCH), before)
    apply(replica, missed)


def test_dense_weights_may_come_less_often() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    replica = replica_of(learner)
    for sequence in range(1, 7):
        learn(learner, BATCH.slice(50 * sequence - 50, 50 * sequence), LABELS[50 * sequence - 50 : 50 * sequence])
        apply(replica, taken(learner, sequence, dense=sequence % 3 == 0))
    whole = Predictor.of(SCHEMA, SETTINGS, learner.serving_state(), device="cpu", negative_rate=0.5)
    np.testing.assert_array_equal(replica.served.predictor.predict(BATCH), whole.predict(BATCH))


def test_a_replica_that_replaces_another_remembers_what_that_one_refused() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    before = replica_of(learner)
    before.progress = before.progress._replace(refused=("gap", "", None))  # type: ignore[arg-type]
    record = VersionRecord(version=2, chain=CHAIN, sequence=3, deltas_offset=30)
    assert Replica(before.served, record, before).progress.refused == ("gap", "", None)
