"""What the skeleton does around a worker's own methods: readiness, guards, the way in and out of the group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from faust.types import TP

from stream.errors import Abandoned, Replaced, TopicError
from stream.kafka.cluster import Cluster
from stream.kafka.transport import LogEnd, Run
from stream.settings import KafkaSettings
from stream.worker import Part, Worker, membership

RUN = Run("clicks", 0, 0, 5, [])


class Ended(BaseException):
    """In the place of the process' end."""


class Counter(Worker):
    """A worker that notes what it is asked to do, and fails where `fails` says so."""

    name = "counter"

    def __init__(self) -> None:
        super().__init__(
            KafkaSettings(),
            Cluster("c", {}, {}),
            group="g",
            topics=("clicks",),
            session_timeout_ms=6_000,
            instance_id="one",
            instance_setting="counter.instance_id",
        )
        self.asked: list[str] = []
        self.fails: dict[str, BaseException] = {}
        self.missing: str | None = None
        self.app.consumer = SimpleNamespace(
            assignment=lambda: {TP("clicks", 0)},
            member_id=lambda: "member",
            log_end=lambda tp: LogEnd(7, 0, 9) if tp.partition == 0 else None,
        )

    def _do(self, what: str) -> None:
        self.asked.append(what)
        if what in self.fails:
            raise self.fails[what]

    def next_offset(self, tp: TP) -> int | None:
        return 3

    async def deliver(self, run: Run) -> None:
        self._do("deliver")

    async def revoked(self) -> None:
        self._do("revoked")

    async def assigned(self) -> str | None:
        assert self.app.consumer.assignment() == {TP("clicks", 0)}
        self._do("assigned")
        return self.missing

    def work(self) -> Iterable[Part]:
        return self.source_parts("clicks", {0: 4})

    async def drain(self) -> None:
        self._do("drain")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, BaseException]]:
    """What the process would have ended with."""
    found: list[tuple[str, BaseException]] = []

    def fatal(what: str, error: BaseException) -> NoReturn:
        found.append((what, error))
        raise Ended

    monkeypatch.setattr("stream.worker.skeleton.fatal", fatal)
    monkeypatch.setattr("stream.worker.guards.fatal", fatal)
    return found


def check(scene: Callable[[Counter], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(20.0):
            await scene(Counter())

    asyncio.run(run())


def names(worker: Worker) -> list[str]:
    return [part.name for part in worker.parts()]


async def runs() -> AsyncIterator[Run]:
    yield RUN


def test_from_joining_to_being_revoked(ended: list[Any]) -> None:
    async def scene(worker: Counter) -> None:
        assert (worker.ready(), names(worker)) == ("joining the group", [])
        worker.joins = True
        assert names(worker) == ["the group's assignment"]
        await worker._on_rebalance_complete()
        assert (worker.ready(), names(worker)) == (None, ["clicks, partition 0"])
        await worker._consume(runs())
        await worker._on_revoked()
        assert (worker.ready(), names(worker)) == ("partitions are being assigned", ["the group's assignment"])
        worker.missing = "partitions [0] belong to another"
        await worker._on_rebalance_complete()
        assert (worker.ready(), names(worker)) == (worker.missing, ["the group's assignment"])
        assert worker.asked == ["assigned", "deliver", "revoked", "assigned"]

    check(scene)
    assert ended == []


@pytest.mark.parametrize(
    ("method", "call", "said"),
    [
        ("deliver", lambda worker: worker._consume(runs()), "counter agent"),
        ("revoked", lambda worker: worker._on_revoked(), "counter: giving up partitions"),
        ("assigned", lambda worker: worker._on_rebalance_complete(), "counter: taking over partitions"),
    ],
)
def test_an_exception_in_a_hook_ends_the_process(
    ended: list[tuple[str, BaseException]], method: str, call: Callable[[Counter], Awaitable[None]], said: str
) -> None:
    """Faust would log it and count the run, or the rebalance, as handled."""
    error = ValueError("x")

    async def scene(worker: Counter) -> None:
        worker.fails[method] = error
        with pytest.raises(Ended):
            await call(worker)
        assert worker.ready() is not None

    check(scene)
    assert ended == [(said, error)]


def test_a_takeover_that_is_given_up_is_news(ended: list[Any]) -> None:
    async def scene(worker: Counter) -> None:
        worker.fails["assigned"] = Abandoned("another rebalance has begun")
        await worker._on_rebalance_complete()
        assert worker.ready() == "joining the group"
        assert not worker.membership.joined

    check(scene)
    assert ended == []


def test_a_worker_that_was_put_out_finishes_says_so_and_ends(
    ended: list[tuple[str, BaseException]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "PUT_OUT_S", 0.01)

    async def scene(worker: Counter) -> None:
        worker.joins = True
        await worker._on_rebalance_complete()
        worker.app.consumer.member_id = lambda: ""

        async def other() -> str:
            return "client c at /there"

        monkeypatch.setattr(worker.membership, "_other", other)
        with pytest.raises(Ended):
            await worker._on_revoked()
        assert worker.asked == ["assigned", "revoked"]
        assert "counter.instance_id: expected to be the only worker of group g" in str(worker.ready())
        assert names(worker) == [], "the watchdog leaves it alone while it waits"

    check(scene)
    [(what, error)] = ended
    assert (what, type(error)) == ("counter", Replaced)


def test_background_tasks_end_the_process_when_they_fail_and_not_when_they_are_cancelled(
    ended: list[tuple[str, BaseException]],
) -> None:
    error = TopicError("gone")

    async def fails() -> None:
        raise error

    async def lasts() -> None:
        await asyncio.Event().wait()

    async def scene(worker: Counter) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # of `Ended`, in a callback
        worker.background(lasts())
        await worker.cancel_background()
        await worker.cancel_background()
        assert ended == []
        worker.background(fails())
        await asyncio.sleep(0.01)

    check(scene)
    assert ended == [("counter", error)]


def test_lags_and_the_end_of_a_log() -> None:
    async def scene(worker: Counter) -> None:
        assert dict(worker.lags("clicks", {0: 4, 1: 4})) == {0: 3}
        assert dict(worker.lags("clicks", {0: 8})) == {0: 0}
        assert worker.log_end(TP("clicks", 0)) == LogEnd(7, 0, 9)

    check(scene)
