"""What a standby has loaded: kept fresh, kept whatever happens to newer versions, gone on from. Without Kafka and a store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from model.errors import SnapshotMismatch
from model.learner import Learner
from state.errors import SnapshotCorrupt, SnapshotError, SnapshotNotFound
from state.manifest import Manifest
from state.registry import RegistryState, VersionRecord
from state.rewinds import Rewind, Rewinds
from stream.errors import NoAnswer, PositionError, StreamError
from stream.kafka.cluster import Cluster
from stream.settings import HttpSettings, KafkaSettings, TopicSettings, TrainerSettings
from stream.topics.names import TopicNames
from stream.trainer import standby
from stream.trainer.prepare import Prepared
from stream.trainer.standby import Standby
from stream.trainer.start import Start

NAMES = TopicNames.of(TopicSettings())


def registry(newest: int) -> RegistryState:
    manifests = [Manifest(version=number, created_at_ms=1_000 * number) for number in range(1, newest + 1)]
    return RegistryState(versions={each.version: VersionRecord.of(each, now_ms=1, who="t", gate="") for each in manifests})


class Stage:
    """A standby whose surroundings the test plays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, new_model: bool = False, newest: int = 3) -> None:
        self.state = registry(newest)
        self.looks: list[int] = []
        self.placed = 0
        self.look: Callable[[int], Any] = lambda newest: None
        """Called with the newest version; raises, or is awaited, or names another version to find."""
        self.report: Callable[[RegistryState], object] = lambda state: None
        self.prometheus = CollectorRegistry()
        stage = self

        async def read(*args: object) -> RegistryState:
            return stage.state

        class Follower:
            def __init__(self, *args: object, on_change: Callable[[RegistryState], object]) -> None:
                stage.report = on_change

            @property
            def state(self) -> RegistryState:
                return stage.state

            async def start(self) -> None: ...

            async def close(self) -> None: ...

        class Group:
            group, choices, joined, leader_name, refusal = "trainers", 1, True, "the leader", "because."

            def __init__(self, *args: object, **options: object) -> None:
                self.won, self.refused = asyncio.Event(), asyncio.Event()
                stage.group = self

            async def join(self) -> None: ...

            async def run(self) -> None:
                await asyncio.Event().wait()

            async def leave(self) -> None: ...

        self.group: Any = None
        monkeypatch.setattr(standby, "read_registry", read)
        monkeypatch.setattr(standby, "RegistryFollower", Follower)
        monkeypatch.setattr(standby, "Leadership", Group)
        monkeypatch.setattr(standby, "REST_S", 0.01)
        monkeypatch.setattr(standby, "REST", 0)
        self.standby = Standby(
            kafka=KafkaSettings(),
            settings=TrainerSettings(session_timeout_ms=1_000),
            names=NAMES,
            cluster=Cluster("c", {}, {}),
            http=HttpSettings(),
            prometheus=self.prometheus,
            who="me",
            look=self._look,
            place_again=self._place_again,
            new_model=new_model,
        )

    async def _look(self, state: RegistryState) -> Prepared:
        self.looks.append(state.newest)
        found = self.look(state.newest)
        if asyncio.iscoroutine(found):
            found = await found
        number = state.newest if found is None else found
        manifest = Manifest(version=number, created_at_ms=1_000 * number) if number else None
        return Prepared(cast(Learner, object()), Start(manifest, state.newest), {0: 10 * number}, {0: 100}, state.newest)

    async def _place_again(self, prepared: Prepared, state: RegistryState) -> Prepared:
        self.placed += 1
        return Prepared(prepared.learner, Start(prepared.start.manifest, state.newest), {0: 7}, {0: 100}, state.newest)

    def announce(self, newest: int) -> None:
        self.state = registry(newest)
        self.report(self.state)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.prometheus.get_sample_value(f"headrace_trainer_{name}", labels)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not true():
                await asyncio.sleep(0.005)


def failing(error: Exception, below: int = 10**9) -> Callable[[int], None]:
    def look(newest: int) -> None:
        if newest < below:
            raise error

    return look


async def test_each_newer_version_is_loaded_while_it_stands_by(monkeypatch):
    stage = Stage(monkeypatch)
    async with stage.standby as one:
        waiting = asyncio.ensure_future(one.until_chosen())
        await stage.until(lambda: stage.metric("standby_version") == 3)
        assert one.waiting_for() is None
        stage.announce(4)
        await stage.until(lambda: stage.metric("standby_version") == 4)
        assert stage.metric("standby_age_seconds") > 1_000_000
        stage.group.won.set()
        await waiting
        assert one.waiting_for() == "taking over"
        prepared = await one.newest(stage.state)
        assert (prepared.start.version, prepared.positions) == (4, {0: 40})
        assert (stage.looks, stage.placed) == ([3, 4], 0)
        one.began(prepared, lambda: {0: 90}, 32)
        await stage.until(lambda: stage.metric("catch_up_seconds") > 0)
        assert (stage.metric("leading"), stage.metric("standby_version")) == (1, pytest.approx(float("nan"), nan_ok=True))


async def test_what_is_announced_before_the_epoch_is_loaded_too(monkeypatch):
    stage = Stage(monkeypatch)
    async with stage.standby as one:
        stage.group.won.set()
        await one.until_chosen()
        assert (await one.newest(registry(5))).start.version == 5
        assert stage.looks == [3, 5]


@pytest.mark.parametrize(
    "error",
    [
        SnapshotError("the store doesn't answer"),
        SnapshotCorrupt("damaged"),
        SnapshotNotFound("deleted while it was read"),
        NoAnswer("Kafka is away"),
        RuntimeError("out of memory on the GPU"),
    ],
)
async def test_what_can_not_be_loaded_leaves_what_is_loaded(monkeypatch, error):
    stage = Stage(monkeypatch)
    async with stage.standby as one:
        waiting = asyncio.ensure_future(one.until_chosen())
        await stage.until(lambda: stage.metric("standby_version") == 3)
        stage.look = failing(error)
        stage.announce(4)
        await stage.until(lambda: (stage.metric("standby_loads_total", outcome="failed") or 0) >= 2)  # it tries again
        assert stage.metric("standby_version") == 3
        stage.group.won.set()
        await waiting
        prepared = await one.newest(stage.state)
        assert (prepared.start.version, prepared.start.newest, prepared.newest) == (3, 4, 4)
        assert prepared.positions == {0: 7}, "by the bounds of the log as they are now"


async def test_an_older_version_never_replaces_a_newer_one(monkeypatch):
    stage = Stage(monkeypatch)
    async with stage.standby as one:
        waiting = asyncio.ensure_future(one.until_chosen())
        await stage.until(lambda: stage.metric("standby_version") == 3)
        stage.look = lambda newest: 2  # neither 4 nor 3 can be read at this moment
        stage.announce(4)
        await stage.until(lambda: (stage.metric("standby_loads_total", outcome="failed") or 0) >= 1)
        stage.group.won.set()
        await waiting
        assert (await one.newest(stage.state)).start.version == 3


async def test_a_slow_store_holds_up_a_takeover_for_a_session_time_out_at_most(monkeypatch):
    stage = Stage(monkeypatch)
    slow = asyncio.Event()
    async with stage.standby as one:
        waiting = asyncio.ensure_future(one.until_chosen())
        await stage.until(lambda: stage.metric("standby_version") == 3)
        stage.look = lambda newest: slow.wait() if newest == 4 else None
        stage.announce(4)
        await stage.until(lambda: stage.looks == [3, 4])
        stage.group.won.set()
        await waiting
        prepared = await one.newest(stage.state)
        assert prepared.start.version == 3
        one.began(prepared, lambda: {0: 0}, 32)
        slow.set()  # what comes now is nobody's any more


async def test_a_load_under_way_is_used(monkeypatch):
    stage = Stage(monkeypatch)
    soon = asyncio.Event()

    async def later(newest: int) -> int:
        await soon.wait()
        return newest

    async with stage.standby as one:
        waiting = asyncio.ensure_future(one.until_chosen())
        await stage.until(lambda: stage.metric("standby_version") == 3)
        stage.look = later
        stage.announce(4)
        await stage.until(lambda: stage.looks == [3, 4])
        stage.group.won.set()
        await waiting
        asyncio.get_running_loop().call_later(0.05, soon.set)
        assert (await one.newest(stage.state)).start.version == 4
        assert stage.looks == [3, 4]


@pytest.mark.parametrize("error", [SnapshotMismatch("another schema"), PositionError("examples were deleted")])
async def test_one_that_could_never_take_over_ends(monkeypatch, error):
    stage = Stage(monkeypatch)
    with pytest.raises(type(error)):
        async with stage.standby as one:
            waiting = asyncio.ensure_future(one.until_chosen())
            await stage.until(lambda: stage.metric("standby_version") == 3)
            stage.look = failing(error)
            stage.announce(4)
            await waiting


async def test_without_any_state_nothing_is_begun_beside_versions_that_can_not_be_read(monkeypatch):
    stage = Stage(monkeypatch, newest=0)
    async with stage.standby as one:
        stage.group.won.set()
        await one.until_chosen()
        stage.look = failing(SnapshotError("the store doesn't answer"))
        with pytest.raises(SnapshotError):
            await one.newest(registry(2))


async def test_a_new_model_waits_for_nobody(monkeypatch):
    stage = Stage(monkeypatch, new_model=True)
    stage.look = lambda newest: 0
    with pytest.raises(StreamError, match=r"a new model: because\. Nothing was changed\."):
        async with stage.standby as one:
            stage.group.refused.set()
            await one.until_chosen()


async def test_a_new_model_is_new_whatever_is_announced_meanwhile(monkeypatch):
    stage = Stage(monkeypatch, new_model=True)
    stage.look = lambda newest: 0
    async with stage.standby as one:
        stage.group.won.set()
        await one.until_chosen()
        prepared = await one.newest(registry(5))
        assert (prepared.start.version, prepared.start.newest) == (None, 5)
        assert stage.looks == [3]


def sent_back(state: RegistryState, version: int, up_to: int | None = None) -> RegistryState:
    """The registry after an operator sent the trainer back."""
    rewind = Rewind(version=version, who="ann", at_ms=1, reason="bad", operation="one", up_to=up_to)
    state.rewinds = Rewinds(rewinds=(rewind,))
    return state


async def test_a_standby_replaces_what_a_rewind_left_and_takes_over_from_before_it(monkeypatch):
    stage = Stage(monkeypatch)
    stage.look = lambda newest: stage.state.newest_to_start_from
    async with stage.standby as one:
        waiting = asyncio.ensure_future(one.until_chosen())
        await stage.until(lambda: stage.metric("standby_version") == 3)
        stage.state = sent_back(registry(3), 1)
        stage.report(stage.state)
        await stage.until(lambda: stage.metric("standby_version") == 1)
        stage.group.won.set()
        await waiting
        prepared = await one.newest(stage.state)
        assert (prepared.start.version, prepared.start.newest) == (1, 3)
        assert prepared.rewind is not None and prepared.rewind.operation == "one"


async def test_a_rewind_that_is_done_is_not_done_again(monkeypatch):
    stage = Stage(monkeypatch)
    async with stage.standby as one:
        waiting = asyncio.ensure_future(one.until_chosen())
        await stage.until(lambda: stage.metric("standby_version") == 3)
        stage.group.won.set()
        await waiting
        stage.state = sent_back(registry(4), 1, up_to=3)  # and version 4 is of the new line
        prepared = await one.newest(stage.state)
        assert (prepared.start.version, prepared.rewind) == (4, None)


async def test_what_a_rewind_left_is_never_gone_on_from_although_it_is_loaded(monkeypatch):
    stage = Stage(monkeypatch)
    async with stage.standby as one:
        waiting = asyncio.ensure_future(one.until_chosen())
        await stage.until(lambda: stage.metric("standby_version") == 3)
        stage.group.won.set()
        await waiting
        stage.look = failing(SnapshotError("the store is down"))
        with pytest.raises(SnapshotError, match="the store is down"):
            await one.newest(sent_back(registry(3), 1))


@pytest.mark.parametrize("newest", [3, 4])
async def test_a_rewind_that_comes_during_a_takeover_is_not_taken_for_obeyed(monkeypatch, newest):
    """The registry's state changes in place while the standby loads a version or reads the log's bounds."""
    stage = Stage(monkeypatch)
    async with stage.standby as one:
        waiting = asyncio.ensure_future(one.until_chosen())
        await stage.until(lambda: stage.metric("standby_version") == 3)
        stage.group.won.set()
        await waiting
        state = registry(newest)

        async def meanwhile(number: int) -> int:
            sent_back(state, 1)
            return number

        async def place_again(prepared: Prepared, state: RegistryState) -> Prepared:
            sent_back(state, 1)
            return prepared

        stage.look, one._place_again = meanwhile, place_again
        monkeypatch.setattr(standby, "BOUNDS_S", -1.0)
        prepared = await one.newest(state)
        assert state.rewinds.pending is not None
        assert (prepared.start.version, prepared.rewind) == (newest, None), "weights of the line that is to be left"
