"""The candidate beside the weights that answer: read, refused for want of room, damaged, dropped. Without Kafka."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from state.canary import Canary
from state.manifest import Manifest
from state.registry import Champion, Move, RegistryState, VersionRange, VersionRecord
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.scorer import candidate as module
from stream.scorer.candidate import CandidateKeeper, NoRoom, load_candidate
from stream.scorer.candidate_metrics import CandidateMetrics
from stream.scorer.serving import Served, WeightsState
from tests.judged import JUDGED
from tests.stream.scorer.factory import MODEL, SCHEMA, weights


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.001)
    monkeypatch.setattr(module, "MAX_RETRY_S", 0.002)


def registry(operation: str = "op", *, version: int = 4, **changed: Any) -> RegistryState:
    canary = Canary(mode="canary", version=version, share=0.05, at_ms=100, operation=operation, **changed)
    state = RegistryState({number: VersionRecord(version=number) for number in (3, 4, 5)}, Champion(version=3))
    state.canary = canary
    return state


class Scene:
    """A keeper over a made-up store."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.asked: list[int] = []
        self.wait: threading.Event | None = None
        self.prometheus = CollectorRegistry()
        self.changes = 0
        self.keeper = CandidateKeeper(self._load, CandidateMetrics(self.prometheus), on_change=self._changed)

    def _load(self, record: VersionRecord) -> Served:
        self.asked.append(record.version)
        if self.wait is not None:
            assert self.wait.wait(10)
        if self.errors:
            raise self.errors.pop(0)
        fake: Any = None
        return Served(WeightsState(record.version, 1), fake, fake, size=10)

    def _changed(self) -> None:
        self.changes += 1

    @property
    def version(self) -> int | None:
        return None if self.keeper.trial is None else self.keeper.trial.served.version

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.001)

    def metric(self, name: str, **labels: str) -> float:
        return self.prometheus.get_sample_value(f"headrace_scorer_candidate_{name}", labels) or 0.0


def scene(steps: Callable[[Scene], Awaitable[None]]) -> None:
    async def run() -> None:
        it = Scene()
        try:
            await steps(it)
        finally:
            await it.keeper.close()

    asyncio.run(run())


def test_it_is_read_takes_part_and_is_dropped() -> None:
    async def steps(it: Scene) -> None:
        it.keeper.want(RegistryState())
        assert it.keeper.trial is None and it.asked == []
        it.keeper.want(registry())
        assert it.version is None, "the champion answers everything while it is read"
        await it.until(lambda: it.version == 4)
        trial = it.keeper.trial
        assert trial is not None and (trial.mode, trial.share, it.keeper.size) == ("canary", 0.05, 10)
        assert (it.metric("ready"), it.metric("version")) == (1, 4)
        it.keeper.want(registry())
        assert it.keeper.trial is trial and it.asked == [4]
        since = it.keeper.since_ms
        it.keeper.want(registry(outcome="stopped"))
        assert it.keeper.trial is None and it.keeper.size == 0 and it.keeper.since_ms >= since
        assert (it.metric("ready"), it.metric("version")) == (0, -1)

    scene(steps)


def test_a_rollback_drops_it_at_once() -> None:
    async def steps(it: Scene) -> None:
        it.keeper.want(registry())
        await it.until(lambda: it.version == 4)
        state = registry()
        move = Move(version=2, previous=3, who="", at_ms=101, reason="", how="rollback", operation="")
        state.champion = Champion(version=2, moves=(move,), rolled_back=(VersionRange(2, 3),))
        it.keeper.want(state)
        assert it.keeper.trial is None

    scene(steps)


def test_what_cannot_be_read_is_tried_again_and_said() -> None:
    async def steps(it: Scene) -> None:
        it.errors = [NoRoom("expected room for 151 MB"), RuntimeError("torn\nfile"), RuntimeError("")]
        seen = []
        it.keeper.want(registry())
        async with asyncio.timeout(10):
            while it.version is None:
                if it.keeper.problem and it.keeper.problem not in seen:
                    seen.append(it.keeper.problem)
                    assert it.metric("problem") == 1
                await asyncio.sleep(0)
        assert seen == ["expected room for 151 MB", "torn file", "RuntimeError('')"]
        assert it.keeper.problem == "" and it.metric("problem") == 0
        assert it.metric("failures_total", what="load") == 2, "no room is no failure to read"

    scene(steps)


def test_a_trial_that_ends_while_its_version_is_read_never_takes_part() -> None:
    async def steps(it: Scene) -> None:
        it.wait = threading.Event()
        it.keeper.want(registry())
        await it.until(lambda: it.asked == [4])
        it.keeper.want(registry(outcome="taken_back"))
        it.keeper.want(registry("next", version=5))
        it.wait.set()
        await it.until(lambda: it.version == 5)
        assert it.asked == [4, 5]

    scene(steps)


def test_damaged_it_takes_no_part_until_it_is_read_again() -> None:
    async def steps(it: Scene) -> None:
        it.keeper.want(registry())
        await it.until(lambda: it.version == 4)
        it.keeper.damaged()
        assert it.keeper.trial is None and it.keeper.problem == "its memory has changed by itself"
        await it.until(lambda: it.version == 4)
        assert it.asked == [4, 4] and it.keeper.problem == ""

    scene(steps)


def test_without_room_it_is_not_read(tmp_path: Path) -> None:
    store = SnapshotStore(SnapshotSettings(url=str(tmp_path)))
    made = Manifest(
        version=4,
        created_at_ms=7,
        features=SCHEMA.model_dump(mode="json"),
        model=MODEL.model_dump(mode="json"),
        verdict=JUDGED,
    )
    size = store.write(made, weights(4), None).serving_size
    record = VersionRecord(version=4, created_at_ms=7)
    served = load_candidate(store, record, device="cpu", spare_bytes=size + 5, taken_bytes=5)
    assert served.version == 4 and served.size == size
    with pytest.raises(NoRoom, match=r"expected room for 0\.00. MB in the spare memory, found 0\.00. MB.*scorer.spare_mb"):
        load_candidate(store, record, device="cpu", spare_bytes=size + 5, taken_bytes=6)


def test_the_share_is_counted() -> None:
    async def steps(it: Scene) -> None:
        it.keeper.want(registry())
        await it.until(lambda: it.version == 4)
        trial = it.keeper.trial
        assert trial is not None
        it.keeper.scored(trial, 5, 0)
        it.keeper.scored(trial, 1, 2)
        assert it.metric("requests_total", outcome="canary") == 6
        assert it.metric("requests_total", outcome="champion") == 2
        assert it.metric("failures_total", what="score") == 1

    scene(steps)
