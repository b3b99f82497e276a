"""A model goes on with other fields: its rows stay, and its scores are what they were where no field is gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.batch import FeatureBatch, Float32Array
from model.errors import SnapshotMismatch
from model.features import FeatureDecoder
from model.learner import Learner
from model.migration import moved_dense, moved_trainer
from model.schema import FeatureSchema, FieldSpec
from model.schema_change import SchemaChange
from model.settings import ModelSettings
from tests.model.made_features import impression

SETTINGS = ModelSettings(hidden=(8, 6), init_std=0.2, row_history=False, cross_layers=0)
USER, ITEM, TAGS = FieldSpec(name="user"), FieldSpec(name="item"), FieldSpec(name="tags", kind="list")
PRICE = FieldSpec(name="price", kind="numeric", buckets="scaled")
BEFORE = FeatureSchema(fields=(USER, TAGS, PRICE), embedding_dim=4)
MORE = FeatureSchema(
    fields=(
        FieldSpec(name="words", kind="list"),
        PRICE,
        ITEM,
        FieldSpec(name="hour", kind="hour"),
        TAGS,
        USER,
        FieldSpec(name="user × tags", kind="cross", of=("user", "tags")),
        FieldSpec(name="size", kind="numeric", buckets="standard"),
    ),
    embedding_dim=4,
)
ROWS = 96


def examples(schema: FeatureSchema, seed: int = 1) -> tuple[FeatureBatch, Float32Array]:
    random = np.random.default_rng(seed)
    payloads = [
        impression(
            {
                "user": int(random.integers(9)),
                "item": int(random.integers(5)),
                "tags": [str(each) for each in random.integers(4, size=random.integers(3))],
                "words": ["w"],
                "price": float(random.normal()),
                "size": float(random.normal()),
            }
        )
        for _ in range(ROWS)
    ]
    decoded = FeatureDecoder(schema).impressions(payloads, np.arange(ROWS) * 3_600_000)
    return decoded.batch, (random.random(ROWS) < 0.4).astype(np.float32)


def trained(schema: FeatureSchema, steps: int = 4, settings: ModelSettings = SETTINGS) -> Learner:
    learner = Learner(schema, settings, device="cpu")
    for step in range(steps):
        learner.learn(*examples(schema, step))
    return learner


def gone_on(learner: Learner, schema: FeatureSchema) -> Learner:
    change = SchemaChange.between(learner.schema, schema)
    settings = learner.settings
    moved = Learner(schema, settings, device="cpu")
    moved.restore(
        moved_dense(change, learner.serving_state(), settings), moved_trainer(change, learner.trainer_state(), settings)
    )
    return moved


def test_more_fields_in_another_order_change_no_score_and_no_row() -> None:
    learner = trained(BEFORE)
    moved = gone_on(learner, MORE)
    before, after = learner.serving_state(), moved.serving_state()
    assert moved.rows == learner.rows
    for name in ("keys", "embedding", "first_order"):
        assert torch.equal(before[name], after[name])
    np.testing.assert_allclose(moved.predict(examples(MORE)[0]), learner.predict(examples(BEFORE)[0]), rtol=2e-6)
    assert SchemaChange.between(BEFORE, MORE).keeps_scores


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("model", [{"name": "lr"}, {"name": "fm"}, {"name": "deepfm"}, {"name": "lr", "cross_layers": 1}])
def test_embeddings_may_be_as_narrow_as_what_fields_have_besides(model: dict[str, Any], history: bool, dim: int) -> None:
    settings = ModelSettings(**model, row_history=history, hidden=(8,), init_std=0.2, dense_learning_rate=0.01)
    schemas = [FeatureSchema(fields=fields, embedding_dim=dim) for fields in ((USER, TAGS, PRICE), (PRICE, ITEM, TAGS, USER))]
    learner = trained(schemas[0], 8, settings)
    moved = gone_on(learner, schemas[1])
    np.testing.assert_allclose(moved.predict(examples(schemas[1])[0]), learner.predict(examples(schemas[0])[0]), rtol=1e-5)


def test_what_fields_had_of_the_optimizer_goes_with_them() -> None:
    """Where new fields have constant rows of zero, both models make the same steps."""
    learner = trained(BEFORE)
    schema = FeatureSchema(fields=(PRICE, USER, TAGS), embedding_dim=4)  # the same fields, so that nothing else is learned
    moved = gone_on(learner, schema)
    for step in range(4, 8):
        expected, found = learner.learn(*examples(BEFORE, step)), moved.learn(*examples(schema, step))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_served_may_change_in_every_model() -> None:
    """PNN reads pairs of fields, which can't be moved; but nothing has to be."""
    settings = ModelSettings(name="pnn", hidden=(8,), init_std=0.2)
    learner = trained(BEFORE, settings=settings)
    schema = BEFORE.model_copy(update={"fields": (FieldSpec(name="user", serve_as="nobody"), *BEFORE.fields[1:])})
    np.testing.assert_array_equal(gone_on(learner, schema).predict(examples(schema)[0]), learner.predict(examples(BEFORE)[0]))
    with pytest.raises(SnapshotMismatch, match="can't go on with other fields"):
        gone_on(learner, BEFORE.model_copy(update={"fields": BEFORE.fields[::-1]}))


def test_a_new_field_is_learned() -> None:
    moved = gone_on(trained(BEFORE), MORE)
    before = moved.predict(examples(MORE)[0])
    for step in range(4, 12):
        moved.learn(*examples(MORE, step))
    weight = moved.serving_state()["mlp.0.weight"]
    assert (weight.abs().sum(0) > 0).all()
    assert not np.allclose(moved.predict(examples(MORE)[0]), before)


def test_fields_that_went_and_come_back_find_nothing_lost_but_their_inputs() -> None:
    learner = trained(MORE)
    back = gone_on(gone_on(learner, BEFORE), MORE)
    before, after = learner.serving_state(), back.serving_state()
    assert torch.equal(before["embedding"], after["embedding"])
    kept, gone = SchemaChange.between(MORE, BEFORE), SchemaChange.between(BEFORE, MORE)
    assert not kept.keeps_scores
    for place, earlier in enumerate(gone.came_from):
        columns = slice(place * 4, place * 4 + 4)
        old, new = before["mlp.0.weight"][:, columns], after["mlp.0.weight"][:, columns]
        assert torch.equal(new, torch.zeros_like(old) if earlier is None else old)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"name": "price", "kind": "numeric", "buckets": "log"},
            "features.fields[price]: expected buckets = 'log', found 'scaled'",
        ),
        ({"name": "user", "space": "people"}, "features.fields[user]: expected space = 'people', found 'user'"),
        ({"name": "tags"}, "features.fields[tags]: expected kind = 'categorical', found 'list'. To change what a field means"),
    ],
)
def test_another_meaning_under_the_same_name_is_refused(changed: dict[str, Any], says: str) -> None:
    others = tuple(field for field in BEFORE.fields if field.name != changed["name"])
    with pytest.raises(SnapshotMismatch) as refused:
        SchemaChange.between(BEFORE, FeatureSchema(fields=(*others, FieldSpec.model_validate(changed)), embedding_dim=4))
    assert says in str(refused.value)


def test_schemas_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(SnapshotMismatch, match="expected one of item, found only user, tags, price"):
        SchemaChange.between(BEFORE, FeatureSchema(fields=(ITEM,), embedding_dim=4))
    with pytest.raises(SnapshotMismatch, match=r"features\.embedding_dim: expected 8, found 4"):
        SchemaChange.between(BEFORE, BEFORE.model_copy(update={"embedding_dim": 8}))
    zones = [FeatureSchema(fields=(FieldSpec(name="hour", kind="hour"),), timezone=zone) for zone in ("UTC", "Asia/Tokyo")]
    with pytest.raises(SnapshotMismatch, match=r"features.fields\[hour\]: expected timezone = 'Asia/Tokyo', found 'UTC'"):
        SchemaChange.between(*zones)


def test_what_changes_is_said_field_by_field() -> None:
    after = FeatureSchema(
        fields=(FieldSpec(name="user", serve_as="nobody"), TAGS, ITEM, FieldSpec(name="friend", space="user")), embedding_dim=4
    )
    change = SchemaChange.between(BEFORE, after)
    assert change.explained() == [
        "user is served as 'nobody', and was served as it is sent",
        "item is new: it begins without effect on scores, and learns from now on",
        "friend is new and reads the rows of user, which exist: scores change at once",
        "price is gone: its rows stay, and are not read",
    ]
    assert not change.keeps_scores
    assert not change.serves_alike
    other_order = BEFORE.model_copy(update={"fields": BEFORE.fields[::-1]})
    assert SchemaChange.between(BEFORE, other_order).explained() == ["the fields are in another order"]
    elsewhere = BEFORE.model_copy(update={"timezone": "Asia/Tokyo"})  # there is no hour
    assert SchemaChange.between(BEFORE, elsewhere).explained() == ["a setting has changed that no field reads"]
    assert SchemaChange.between(BEFORE, BEFORE).is_none
