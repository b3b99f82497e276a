"""Calibration by decile and by value, of settled impressions: what is kept, what is said, and that both are bounded."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from model.errors import ModelError
from model.features import FeatureDecoder
from model.schema import FeatureSchema, FieldSpec
from stream.trainer.calibration import DECILES, TOP, CalibrationWatch, GroupCalibration
from stream.trainer.columns import ExampleColumns
from stream.trainer.metrics import TrainerMetrics

SCHEMA = FeatureSchema(fields=(FieldSpec(name="item"), FieldSpec(name="tags", kind="list")))
SETTLED_MS = 60_000


class Impressions:
    """N impressions with the true probabilities of their clicks, one each `every_ms`; scores are these times `factor`."""

    def __init__(self, count: int, *, every_ms: int = 100, items: int = 4, factor: float = 1.0) -> None:
        rng = np.random.default_rng(0)
        self.items = np.arange(count) % items
        p = np.linspace(0.05, 0.5, items)[self.items]
        self.shown_ms = 1_000_000 + every_ms * np.arange(count)
        self.clicked = rng.random(count) < p
        self.scores = (p * factor).astype(np.float32)
        self.hashes = rng.integers(-(1 << 63), 1 << 63, count)
        self._decoder = FeatureDecoder(SCHEMA)

    def batch(self, rows: np.ndarray, labels: np.ndarray, corrects: np.ndarray | None = None) -> ExampleColumns:
        values = [
            json.dumps({"impression_id": "x", "timestamp": 1, "features": {"item": f"i{self.items[row]}"}}) for row in rows
        ]
        encoded = [value.encode() for value in values]
        size = len(rows)
        return ExampleColumns(
            batch=self._decoder.impressions(encoded).batch,
            labels=labels.astype(np.float32),
            weights=None,
            impression_ms=self.shown_ms[rows],
            reached_ms=self.shown_ms[rows],
            served=self.scores[rows],
            versions=np.zeros(size, np.int64),
            deltas=np.zeros(size, np.int64),
            id_hashes=self.hashes[rows],
            records=[SimpleNamespace(value=value) for value in encoded],  # type: ignore[misc]
            corrects=corrects,
        )

    def feed(self, watch: CalibrationWatch, *, late: bool = False) -> None:
        """Every label in batches of 500. With `late`, clicks come as corrections, 100 impressions later or more."""
        count = len(self.items)
        for start in range(0, count, 500):
            rows = np.arange(start, min(start + 500, count))
            watch.observe(self.batch(rows, self.clicked[rows] & (not late)), self.scores[rows])
            corrected = np.flatnonzero(self.clicked[max(0, start - 100) : max(0, start + 400)]) + max(0, start - 100)
            if late and len(corrected):
                ones = np.ones(len(corrected), np.bool_)
                watch.observe(self.batch(corrected, ones, ones), self.scores[corrected])


def reported(watch: CalibrationWatch, impressions: Impressions) -> dict[tuple[str, str], GroupCalibration]:
    """A report with names, which are found in examples after the report that first needs them."""
    watch.report()
    last = np.arange(len(impressions.items) - 50, len(impressions.items))
    watch.observe(impressions.batch(last, impressions.clicked[last]), impressions.scores[last])
    return {(group.field, group.value): group for group in watch.report()}


def test_groups_hold_the_settled_impressions_and_say_how_they_are_calibrated() -> None:
    impressions = Impressions(4_000, factor=1.2)
    watch = CalibrationWatch(SCHEMA, ["item"], SETTLED_MS)
    impressions.feed(watch)
    found = reported(watch, impressions)
    settled = 4_000 - SETTLED_MS // 100
    by_item = {value: group for (field, value), group in found.items() if field == "item"}
    assert set(by_item) == {"i0", "i1", "i2", "i3"}
    for number in range(4):
        group, rows = by_item[f"i{number}"], np.flatnonzero(impressions.items[:settled] == number)
        assert group.impressions == len(rows)
        assert group.clicks == impressions.clicked[rows].sum()
        assert group.calibration == pytest.approx(impressions.scores[rows].sum() / group.clicks)
    assert sum(group.impressions for (field, _), group in found.items() if field == "decile") == settled
    assert by_item["i3"].off


def test_values_of_fields_that_events_do_not_carry_have_their_names_too() -> None:
    schema = FeatureSchema(
        fields=(
            FieldSpec(name="item"),
            FieldSpec(name="hour", kind="hour"),
            FieldSpec(name="both", kind="cross", of=("item", "hour")),
        ),
        timezone="Asia/Kolkata",  # 1970-01-01 00:16:40 UTC is 05:46:40 there
    )
    impressions = Impressions(2_000, items=2)
    decoder = FeatureDecoder(schema)
    impressions._decoder = SimpleNamespace(impressions=lambda run: decoder.impressions(run, np.full(len(run), 1_000_000)))  # type: ignore[assignment]
    watch = CalibrationWatch(schema, ["hour", "both"], SETTLED_MS)
    impressions.feed(watch)
    found = reported(watch, impressions)
    assert {value for field, value in found if field == "hour"} == {"5"}
    assert {value for field, value in found if field == "both"} == {"i0 × 5", "i1 × 5"}


@pytest.mark.parametrize("ring", [50_000, 3_000])
def test_late_clicks_count_once_in_the_group_of_their_impression(ring: int) -> None:
    """Also with a ring that holds a part of the impressions only, for which a sample of them is drawn."""
    impressions = Impressions(20_000, every_ms=20)
    watch = CalibrationWatch(SCHEMA, ["item"], SETTLED_MS, ring=ring)
    impressions.feed(watch, late=True)
    found = reported(watch, impressions)
    shares = {}
    for number in range(4):
        group = found["item", f"i{number}"]
        true = 0.05 + 0.15 * number
        assert group.clicks / group.impressions == pytest.approx(true, abs=4 * np.sqrt(true / group.impressions))
        assert not group.off
        shares[number] = group.impressions / (20_000 - SETTLED_MS / 20) * 4
    assert min(shares.values()) > (0.99 if ring == 50_000 else 0.01)
    assert sum(map(len, watch._parts)) <= ring
    watched_ms = watch._watermark_ms - int(watch._parts[0].impression_ms.min())
    assert watched_ms >= 2 * SETTLED_MS  # so that there are settled impressions in the ring


def test_only_the_most_frequent_values_are_shown_whatever_there_are() -> None:
    impressions = Impressions(6_000, items=900)
    watch = CalibrationWatch(SCHEMA, ["item"], SETTLED_MS)
    impressions.feed(watch)
    found = reported(watch, impressions)
    assert sum(field == "item" for field, _ in found) <= TOP
    assert sum(field == "decile" for field, _ in found) == DECILES


def test_nothing_is_said_before_an_impression_is_settled() -> None:
    impressions = Impressions(500)
    watch = CalibrationWatch(SCHEMA, [], SETTLED_MS)
    assert watch.report() == []
    impressions.feed(watch)
    assert watch.report() == []


@pytest.mark.parametrize("field", ["tags", "price"])
def test_a_field_without_single_values_is_rejected(field: str) -> None:
    with pytest.raises(ModelError, match=rf"calibration_fields: expected fields with a single value \(item\), found '{field}'"):
        CalibrationWatch(SCHEMA, [field], SETTLED_MS)


def test_a_group_is_off_beyond_chance_and_tolerance() -> None:
    def group(calibration: float, error: float, clicks: float = 1_000) -> GroupCalibration:
        return GroupCalibration("item", "a", 10_000, clicks, calibration, error)

    assert group(1.2, 0.05).off
    assert not group(1.2, 0.07).off  # chance
    assert not group(1.04, 0.001).off  # tolerance
    assert not group(5.0, 0.1, clicks=3).off  # too few clicks to say


def test_gauges_of_groups_that_are_gone_are_removed() -> None:
    registry = CollectorRegistry()
    metrics = TrainerMetrics(registry)

    def values() -> Any:
        lines = generate_latest(registry).decode().splitlines()
        return {line.split('value="')[1].split('"')[0] for line in lines if line.startswith("headrace_trainer_group_clicks{")}

    metrics.calibrated([GroupCalibration("item", "a", 10, 5, 1.0, 0.1), GroupCalibration("item", "b", 10, 50, 2.0, 0.1)])
    assert values() == {"a", "b"}
    assert registry.get_sample_value("headrace_trainer_groups_off") == 1
    metrics.calibrated([GroupCalibration("item", "c", 10, 5, 1.0, 0.1)])
    assert values() == {"c"}
    assert registry.get_sample_value("headrace_trainer_groups_off") == 0
