"""A join worker among its like, and its end: one instance id twice, one folder for two, asked to stop while it takes over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.processes.workers import Worker
from deploy.settings import Settings
from tests.stream.join.made_up import join_settings, join_worker, made_up, send, settled, until

pytestmark = pytest.mark.kafka

Start = Callable[..., Worker]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Worker] = []

    def one(settings: Settings, name: str, change: str = "") -> Worker:
        worker = join_worker(settings, tmp_path, name, change=change)
        started.append(worker)
        worker.start()
        return worker

    yield one
    for worker in started:
        if worker.returncode is None:
            worker.kill()
        worker.wait_stopped()


def test_the_one_that_was_put_out_says_so_and_does_not_come_back(topics, start):
    """Two workers with one instance id: before, they put each other out every few seconds."""
    settings = join_settings(topics, session_timeout_ms=6_000)
    away = settings.model_copy(update={"state_dir": settings.state_dir.with_name("away")})
    quick = "import stream.worker.membership; stream.worker.membership.PUT_OUT_S = 4.0"

    async def check() -> None:
        events = made_up(2_000, seed=3)
        first = start(settings, "first", quick)
        await asyncio.to_thread(first.wait_ready)
        # Under way: the first meets the second's fence before the group says anything.
        sending = asyncio.ensure_future(send(settings, events.part(0.0, 0.5), over_s=12.0))
        second = start(away, "second", quick)
        await until(lambda: "has taken this worker's place" in first.log.read_text(), "the first to notice", second)
        assert not first.is_ready()
        await until(lambda: first.returncode is not None, "the end of the first", second)
        assert first.returncode == 1
        assert "join.instance_id: expected to be the only worker of group" in first.log.read_text()
        assert "has taken this worker's place" not in second.log.read_text()
        await sending
        await send(settings, events.part(0.5, 1.0))
        await settled(away, events, second)

    asyncio.run(check())


def test_one_folder_for_two_workers(topics, start):
    settings = join_settings(topics, instance_id=None, session_timeout_ms=6_000)

    async def check() -> None:
        events = made_up(3_000, seed=4)
        workers = [start(settings, "first"), start(settings, "second")]
        await send(settings, events.part(0.0, 0.5))
        for worker in workers:
            await asyncio.to_thread(worker.wait_ready)
        workers[0].kill()
        await send(settings, events.part(0.5, 1.0))
        await settled(settings, events, workers[1])

    asyncio.run(check())


HANGS = """
import asyncio, sys
from stream.join import committed
async def hang(*args, **kwargs):
    print("hanging", file=sys.stderr, flush=True)
    await asyncio.sleep(600)
committed.committed_offsets = hang
"""


def test_asked_to_stop_while_it_takes_over(topics, start):
    settings = join_settings(topics)

    async def check() -> None:
        worker = start(settings, "stuck", HANGS)
        await until(lambda: "hanging" in worker.log.read_text(), "a takeover", worker)
        worker.ask_to_stop()
        await asyncio.to_thread(worker.wait_stopped)
        assert worker.returncode == 0, worker.log.read_text()[-4_000:]
        # And what it leaves is no obstacle.
        events = made_up(500, seed=5)
        again = start(settings, "again")
        await send(settings, events.arriving)
        await settled(settings, events, again)

    asyncio.run(check())
