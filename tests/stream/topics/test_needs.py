"""One formula of retention, and one rule of partitions, in the code and on the pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream.settings import JoinSettings, TopicSettings
from stream.topics.names import TopicNames
from stream.topics.needs import RETENTION_FORMULA, retention_shortfalls, unequal_partitions

ROOT = Path(__file__).resolve().parents[3]
NAMES = TopicNames.of(TopicSettings(prefix="a-"))


def test_the_formula_is_what_its_words_say() -> None:
    join = JoinSettings(window_ms=1_000, dedupe_horizon_ms=20_000, lateness_ms=300_000, negative_skew_ms=7)
    assert RETENTION_FORMULA == "window + 2 × dedupe horizon + lateness + skew"
    assert join.reaches_back_ms == 1_000 + 2 * 20_000 + 300_000 + 7
    kept = {NAMES.clicks: {"retention.ms": str(join.reaches_back_ms)}}
    assert list(retention_shortfalls(NAMES, join, kept)) == []
    kept = {NAMES.clicks: {"retention.ms": str(join.reaches_back_ms - 1)}}
    [short] = retention_shortfalls(NAMES, join, kept)
    assert (short.topic, short.what) == (NAMES.clicks, "retention.ms")
    assert RETENTION_FORMULA in short.expected


@pytest.mark.parametrize("page", ["docs/operations.md", "docs/join.md", "docs/settings.md"])
def test_every_page_has_the_same_formula(page: str) -> None:
    assert RETENTION_FORMULA in (ROOT / page).read_text()


def test_partitions_of_the_four_topics() -> None:
    equal = {f"a-{name}": 2 for name in ("impressions", "clicks", "examples", "dead-letters")}
    assert unequal_partitions(NAMES, equal | {"a-scores": 9}) is None
    assert unequal_partitions(NAMES, {"a-impressions": 2}) is None
    for name in equal:
        problem = unequal_partitions(NAMES, equal | {name: 1})
        assert problem is not None
        assert f"{name} 1" in problem.found
