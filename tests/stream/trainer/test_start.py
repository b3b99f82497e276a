"""What a trainer goes on from, and what it refuses to go on from."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from model.errors import SnapshotMismatch
from model.learner import Learner
from model.schema import FieldSpec
from model.settings import ModelSettings
from state.errors import SnapshotError
from state.manifest import Manifest
from state.registry import RegistryState, VersionRecord, encode_record, version_key
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.errors import PositionError
from stream.trainer.examples import ExampleDecoder
from stream.trainer.start import Start, _require_fitting, find_start, first_positions, go_on
from tests.stream.trainer.factory import MODEL, SCHEMA, record, run


@pytest.fixture
def store(tmp_path):
    return SnapshotStore(SnapshotSettings(url=str(tmp_path / "snapshots")))


def announced(*manifests):
    state = RegistryState()
    for offset, manifest in enumerate(manifests):
        entry = VersionRecord.of(manifest, now_ms=0, who="test", gate="")
        assert state.apply(version_key(manifest.version).encode(), encode_record(entry), offset) is None
    return state


def write(store, version, *, learner=None, schema=SCHEMA, model=MODEL, trained=0, **more):
    learner = learner or Learner(schema, model, device="cpu")
    if trained:
        decoded = ExampleDecoder(schema).decode(run([record(offset) for offset in range(trained)]))
        learner.learn(decoded.batch, decoded.labels)
    fields = dict(
        version=version,
        epoch=1,
        created_at_ms=1_000 + version,
        offsets={"0": 10 * version},
        examples_seen=learner.examples_seen,
        schema_hash=schema.fingerprint(),
        features=schema.model_dump(mode="json"),
        model=model.model_dump(mode="json"),
    )
    manifest = Manifest(**{**fields, **more})
    return store.write(manifest, learner.serving_state(), learner.trainer_state())


def find(store, state, *, schema=SCHEMA, model=MODEL):
    return find_start(state, store, schema, model)


def test_nothing_yet(store):
    start = find(store, announced())
    assert (start.manifest, start.newest, start.offsets, start.examples_seen) == (None, 0, {}, 0)


def test_the_newest_announced_version_is_restored(store):
    one, two = write(store, 1, trained=20), write(store, 2, trained=30, negative_rate=0.1)
    learner = Learner(SCHEMA, MODEL, device="cpu")
    start = go_on(learner, announced(one, two), store, SCHEMA, MODEL)
    assert (start.version, start.newest, start.offsets, start.examples_seen) == (2, 2, {0: 20}, 30)
    assert (learner.examples_seen, learner.negative_rate) == (30, 0.1)
    serving = store.serving(2)
    assert all(torch.equal(tensor, serving[name]) for name, tensor in learner.serving_state().items())


def test_a_watermark_beyond_the_versions_own_time_is_not_believed(store):
    """Release 0.1.0 took the time of any example."""
    absurd = write(store, 1, watermark_ms=253_402_300_799_999)
    assert find(store, announced(absurd)).watermark_ms == absurd.created_at_ms
    sound = write(store, 2, watermark_ms=900)
    assert find(store, announced(sound)).watermark_ms == 900


def test_a_version_that_nobody_announced_is_not_used(store):
    """Killed between the write and the announcement: its number is passed over, its examples are trained again."""
    one = write(store, 1)
    write(store, 2)
    start = find(store, announced(one))
    assert start.version == 1
    assert store.next_version() == 3


def test_a_half_written_version_is_not_used(store, tmp_path):
    one, two = write(store, 1), write(store, 2)
    (tmp_path / "snapshots/v0000000002/trainer.safetensors").unlink()
    assert find(store, announced(one, two)).version == 1


def test_a_version_with_damaged_weights_is_passed_over(store, tmp_path, caplog):
    one, two = write(store, 1, trained=20), write(store, 2, trained=30)
    file = tmp_path / "snapshots/v0000000002/serving-00000.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(bytes(damaged))
    learner = Learner(SCHEMA, MODEL, device="cpu")
    start = go_on(learner, announced(one, two), store, SCHEMA, MODEL)
    assert start.version == 1
    assert learner.examples_seen == 20
    assert "passing over version 2" in caplog.text


def test_a_manifest_that_belongs_to_another_version_of_that_number_is_not_used(store):
    one = write(store, 1)
    two = write(store, 2)
    other = Manifest(version=2, epoch=2, created_at_ms=5)
    assert find(store, announced(one, two)).version == 2
    assert find(store, announced(one, other)).version == 1


def test_an_empty_store_is_refused_where_the_registry_knows_versions(store):
    """Another folder, a volume that isn't mounted: a new model would begin, and replace the champion."""
    with pytest.raises(SnapshotError) as refused:
        find(store, announced(Manifest(version=7, epoch=1)))
    text = str(refused.value)
    assert "expected one of the 1 versions that the registry knows (newest 7), found an empty store" in text
    assert "`headrace run trainer --new-model`, once" in text


def test_a_new_model_begins_above_the_announced_numbers_whatever_there_is(store, caplog):
    one = write(store, 1)
    for state in (announced(one), announced(Manifest(version=7, epoch=1))):
        start = find_start(state, store, SCHEMA, MODEL, new_model=True)
        assert (start.manifest, start.newest) == (None, state.newest)
    assert "leave --new-model out at the next start" in caplog.text


def test_examples_that_were_made_anew_are_refused(store):
    one = write(store, 1, topic_ids={"examples": "old", "snapshots": "s"})
    assert find_start(announced(one), store, SCHEMA, MODEL, topic_ids={"examples": "old", "snapshots": "s"}).version == 1
    with pytest.raises(PositionError) as refused:
        find_start(announced(one), store, SCHEMA, MODEL, topic_ids={"examples": "new", "snapshots": "s"})
    text = str(refused.value)
    assert text.startswith("examples: expected the topic with id old, which version 1 was trained on, found id new.")
    assert "--new-model" in text


def test_a_registry_that_was_made_anew_is_refused(store):
    """`snapshots` was deleted and made again: the registry is empty, the store isn't."""
    write(store, 1, topic_ids={"examples": "e", "snapshots": "old"})
    with pytest.raises(SnapshotError) as refused:
        find_start(announced(), store, SCHEMA, MODEL, topic_ids={"examples": "e", "snapshots": "new"})
    text = str(refused.value)
    assert "holds 1 versions: expected a registry that knows one of them, found one that knows no version at all" in text
    assert "`snapshots` was created again (id new, version 1 was announced to old)" in text
    assert find_start(announced(), store, SCHEMA, MODEL, topic_ids={"snapshots": "new"}, new_model=True).manifest is None


def test_a_trainer_that_died_before_its_first_announcement_begins_anew(store, caplog):
    write(store, 1, topic_ids={"snapshots": "s"})
    assert find_start(announced(), store, SCHEMA, MODEL, topic_ids={"snapshots": "s"}).manifest is None
    assert "none of its 1 versions was announced; beginning a new model" in caplog.text


def test_a_store_of_other_versions_is_refused(store):
    write(store, 1)
    with pytest.raises(SnapshotError) as refused:
        find(store, announced(Manifest(version=7, epoch=1, created_at_ms=1)))
    text = str(refused.value)
    assert store.url in text
    assert "expected one of the 1 versions that the registry knows (newest 7), found none that is whole" in text
    assert "Is snapshots.url right?" in text


def test_another_schema_is_refused_with_what_differs(store):
    one = write(store, 1)
    changed = SCHEMA.model_copy(
        update={"fields": (FieldSpec(name="user", kind="list"), FieldSpec(name="price", kind="numeric"))}
    )
    shaped = MODEL.model_copy(update={"hidden": (16,)})
    with pytest.raises(SnapshotMismatch) as refused:
        find(store, announced(one), schema=changed, model=shaped)
    text = str(refused.value)
    assert text.startswith("version 1 can't be trained on with these settings:")
    assert "model.hidden: expected [16], found [8]" in text
    assert "features.fields[user]: expected kind = 'list', found 'categorical'" in text
    assert "`headrace run trainer --new-model`, once" in text


def test_training_goes_on_with_other_fields_and_says_what_changes(store, caplog):
    one = write(store, 1, trained=60)
    more = SCHEMA.model_copy(update={"fields": (FieldSpec(name="page"), *SCHEMA.fields[::-1])})
    learner = Learner(more, MODEL, device="cpu")
    start = go_on(learner, announced(one), store, more, MODEL)
    assert (start.version, learner.examples_seen) == (1, 60)
    assert "going on from version 1 with other features.fields: page is new: it begins without effect on scores" in caplog.text
    had = Learner(SCHEMA, MODEL, device="cpu")
    go_on(had, announced(one), store, SCHEMA, MODEL)
    scores = [
        each.predict(ExampleDecoder(each.schema).decode(run([record(n) for n in range(40)])).batch) for each in (had, learner)
    ]
    np.testing.assert_allclose(*scores, rtol=1e-6)
    assert scores[0].std() > 0


def test_another_shape_is_refused_and_another_rate_is_not(store):
    one = write(store, 1)
    with pytest.raises(SnapshotMismatch, match=r"model\.hidden: expected \[16\], found \[8\]"):
        find(store, announced(one), model=MODEL.model_copy(update={"hidden": (16,)}))
    with pytest.raises(SnapshotMismatch, match=r"model\.row_history: expected True, found False"):
        find(store, announced(one), model=MODEL.model_copy(update={"row_history": True}))
    assert find(store, announced(one), model=MODEL.model_copy(update={"row_learning_rate": 0.5, "batch_rows": 7})).version == 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"name": "wide_deep"}, "model.name: expected 'wide_deep', found 'deepfm'"),  # whose weights have the same shapes
        ({"cross_layers": 2}, "model.cross_layers: expected 2, found 0"),
        ({"first_order": "ftrl"}, "model.first_order: expected 'ftrl', found 'adagrad'"),
    ],
)
def test_another_model_is_refused(store, change, found):
    one = write(store, 1)
    with pytest.raises(SnapshotMismatch) as refused:
        find(store, announced(one), model=MODEL.model_copy(update=change))
    text = str(refused.value)
    assert text.startswith("version 1 can't be trained on with these settings:")
    assert found in text
    assert (
        "Put the old settings back, or begin a new model from the start of the log: `headrace run trainer --new-model`" in text
    )


def test_a_version_from_before_there_was_a_choice_goes_on(store):
    """Its manifest names neither cross layers nor an optimizer of the first-order weights."""
    one = write(store, 1)
    old = {name: value for name, value in one.model.items() if not name.startswith(("cross_", "first_order", "ftrl_"))}
    assert len(old) == len(one.model) - 8
    assert ModelSettings.of_version(old) == MODEL
    changed = ModelSettings.of_version({**old, "cross_layers": 2, "cross_rank": 4})
    assert (changed.cross_layers, changed.cross_rank) == (2, 4)


def test_ftrls_own_rates_dont_change_while_a_model_goes_on(store):
    """They give the weights of what is saved; another rate would change every weight when it is next touched."""
    model = MODEL.model_copy(update={"first_order": "ftrl"})
    one = write(store, 1, model=model, learner=Learner(SCHEMA, model, device="cpu"))
    assert find(store, announced(one), model=model).version == 1
    with pytest.raises(SnapshotMismatch, match=r"model\.ftrl_alpha: expected 0\.5, found 0\.05"):
        find(store, announced(one), model=model.model_copy(update={"ftrl_alpha": 0.5}))


def test_a_model_of_a_newer_release_is_refused(store):
    one = write(store, 1)
    newer = msgspec.structs.replace(one, model={**one.model, "attention": 3})
    with pytest.raises(
        SnapshotMismatch, match=r"version 1: expected model settings of this release, found others: attention\. Start"
    ):
        _require_fitting(newer, SCHEMA, MODEL)


def test_weights_of_another_moment_than_the_manifest_are_passed_over(store):
    one = write(store, 1, trained=20)
    two = write(store, 2, trained=30, examples_seen=31)
    assert go_on(Learner(SCHEMA, MODEL, device="cpu"), announced(one, two), store, SCHEMA, MODEL).version == 1


def positions(offsets, beginnings, ends, lost="stop"):
    start = Start(Manifest(version=3, offsets=offsets), 3)
    return first_positions(start, "examples", beginnings, ends, lost_examples=lost)


def test_positions_are_the_versions_and_new_partitions_begin_at_their_start():
    assert positions({"1": 9, "0": 5}, {0: 0, 1: 4, 2: 2}, {0: 9, 1: 9, 2: 2}) == {0: 5, 1: 9, 2: 2}


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ({"0": 10}, "examples partition 0: expected offset 10, up to which version 3 is trained, found a log that ends at 9"),
        ({"0": 5, "4": 1}, "expected partitions [4], which version 3 was trained on, found 1 partitions"),
        ({"0": 1}, "expected offset 1, found a log that begins at 3: 2 offsets were deleted by retention"),
    ],
)
def test_a_log_that_is_not_the_one_trained_on_is_refused(offsets, expected):
    with pytest.raises(PositionError) as refused:
        positions(offsets, {0: 3}, {0: 9})
    assert expected in str(refused.value)


def test_lost_examples_can_be_skipped(caplog):
    assert positions({"0": 1}, {0: 3}, {0: 9}, "skip") == {0: 3}
    assert "Going on without them" in caplog.text
