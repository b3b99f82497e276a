"""Dense weights less often than rows: every digest is right, and a version is exact."""

from __future__ import annotations

import asyncio

import pytest

from stream.trainer import snapshots
from tests.stream.trainer.fakes import DeltaLog
from tests.stream.trainer.test_rebase import Trainer, withhold
from tests.stream.trainer.test_row_precision import follow, loaded, scores
from tests.stream.trainer.test_snapshots import Bench, Trained, until


@pytest.fixture(params=["float32", "float16"])
def trainer(request):
    """A trainer that has trained a little."""
    made = Trainer(DeltaLog(), epoch=1, precision=request.param)
    made.learn(0, 64)
    return made


async def publish(trainer, *, dense):
    captured = trainer.training.capture_delta(dense=dense)
    await trainer.chain.publish(captured)
    return captured


async def test_a_scorer_follows_both_kinds_and_is_exact_at_a_version(trainer, tmp_path):
    followed = loaded(tmp_path, *trainer.version(on_chain=True))
    kinds = []
    for number, dense in enumerate((False, False, True, False)):
        trainer.learn(64 + 32 * number, 96 + 32 * number)
        kinds.append((await publish(trainer, dense=dense)).delta.dense is not None)
    assert kinds == [False, False, True, False]
    follow(followed, trainer.log.deltas)
    assert followed.digest == trainer.learner.digest

    captured = trainer.training.capture_version()
    assert captured.delta.delta.dense is not None  # although nothing was touched since the last delta
    assert len(captured.delta.delta.rows) == 0
    captured.frozen.close()
    await trainer.chain.publish(captured.delta)
    follow(followed, trainer.log.deltas[4:])
    assert trainer.training.capture_delta() is None
    started = loaded(tmp_path, *trainer.version(on_chain=True))
    assert started.digest == followed.digest
    assert (scores(started) == scores(followed)).all()


async def test_the_first_delta_of_a_chain_carries_them_whatever_is_asked(trainer, tmp_path):
    version, manifest = trainer.version(on_chain=True)
    scorer = loaded(tmp_path, version, manifest)
    trainer.learn(64, 96)
    await publish(trainer, dense=True)
    again = Trainer(trainer.log, epoch=2, precision=trainer.precision)
    await again.go_on(version, manifest)
    again.learn(64, 96)
    assert (await publish(again, dense=False)).delta.dense is not None
    follow(scorer, trainer.log.deltas)
    assert scorer.digest == again.learner.digest


def test_what_failed_the_checks_is_in_the_next_delta():
    """The learner counts dense weights as taken that nobody has got; also keys that were evicted."""
    trainer = Trainer(DeltaLog(), epoch=1)
    trainer.learn(0, 64)
    trainer.version(on_chain=True)
    trainer.learn(64, 96)
    rows = trainer.learner._rows["first_order"]
    number = int(trainer.learner._rows.touched.listed()[0])
    kept = float(rows[number, 0])
    gone = trainer.learner.serving_state()["keys"][-1:]
    trainer.learner.evict(gone)
    rows[number, 0] = float("nan")
    assert trainer.training.capture_delta() is None
    rows[number, 0] = kept
    delta = trainer.training.capture_delta(dense=False).delta
    assert delta.dense is not None
    assert delta.gone.tolist() == gone.tolist()


async def test_what_was_withheld_leaves_with_the_dense_weights_that_belong_to_it(trainer, tmp_path):
    scorer = loaded(tmp_path, *trainer.version(on_chain=True))
    trainer.learn(64, 96)
    await publish(trainer, dense=False)
    withhold(trainer.training)
    captured = trainer.training.capture_version()
    captured.frozen.close()
    assert captured.delta is None
    assert not captured.on_chain
    withhold(trainer.training, False)
    trainer.learn(96, 128)
    assert (await publish(trainer, dense=False)).delta.dense is not None
    follow(scorer, trainer.log.deltas)
    assert scorer.digest == trainer.learner.digest


async def test_they_leave_at_their_own_interval_also_when_nothing_more_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "TICK_S", 0.001)
    at, trained = Bench(tmp_path, interval_ms=100_000, delta_interval_ms=10, dense_interval_ms=400), Trained()
    trained.learn(10)
    await at.publisher.publish(trained.training.capture_version())
    running = asyncio.ensure_future(at.publisher.run(trained.training, trained.between_batches))
    async with asyncio.timeout(30):
        while all(each.model.dense is not None for each in at.log.deltas):
            trained.learn(10)
            await asyncio.sleep(0.002)
    # The last rows have left, or leave now. The dense weights that belong to them come later.
    await until(lambda: at.log.deltas[-1].model.dense is not None)
    at.publisher.close()
    await running
    assert at.log.deltas[-1].model.dense["seen"].item() == trained.training.examples_seen
