"""The registry's decisions after an empty start, on the versions of a simulated stream, one every 5 s."""

from __future__ import annotations

import numpy as np
import pytest

from state import decisions
from state.gate import Gate, GateState
from state.manifest import Manifest
from state.registry import RegistryState, encode_record
from state.settings import SnapshotSettings

SETTINGS = SnapshotSettings()


def apply(state: RegistryState, change: decisions.Change) -> object:  # type: ignore[type-arg]
    for offset, (key, record) in enumerate(change.records):
        assert state.apply(key.encode(), encode_record(record), offset) is None
    return change.outcome


@pytest.mark.parametrize("click_rate", [0.05, 0.01])
@pytest.mark.parametrize("clicks_first_s", [0, 60], ids=["in the order of impressions", "clicks a window before the others"])
def test_the_champion_appears_with_both_classes_and_is_never_older_than_a_minute(
    click_rate: float, clicks_first_s: int
) -> None:
    """300 impressions/s for 10 minutes. If clicks come a window before the negatives, none with clicks alone is promoted."""
    rng = np.random.default_rng(3)
    state, gate = RegistryState(), Gate(SETTINGS, GateState(line=1))
    apply(state, decisions.take_epoch(state, who="trainer", now_ms=1))
    seen, champion_since, oldest, appeared = 0, None, 0, None
    for second in range(1, 601):
        clicks = rng.binomial(300, click_rate)
        others = 300 - clicks if second > clicks_first_s else 0
        labels = np.repeat([1.0, 0.0], [clicks, others])
        gate.count(labels, None, np.ones(len(labels)), comparable=False)
        seen += len(labels)
        if second % 5:
            continue
        now_ms = second * 1_000
        manifest = Manifest(version=second, epoch=1, created_at_ms=now_ms, examples_seen=seen, verdict=gate.report())
        decided = decisions.announce(state, manifest, settings=SETTINGS, who="t", now_ms=now_ms, operation=str(second))
        outcome = apply(state, decided)
        assert isinstance(outcome, decisions.Announcement)
        if outcome.promoted:
            assert gate.state.negatives >= SETTINGS.first_clicks
            assert gate.state.clicks >= SETTINGS.first_clicks
            champion_since, appeared = second, appeared or second
        if champion_since is not None:
            oldest = max(oldest, second - champion_since)
    assert appeared is not None and appeared <= clicks_first_s + 10
    assert oldest < 60
