"""Logs without records that the join needs: topics that were created anew, deleted records. The join must then stop."""

from __future__ import annotations

import asyncio
import shutil
import signal

from stream.topics.admin import create_topics
from tests.faults.kinds.base import ask, kinds, names_of, ready
from tests.faults.play import Kind
from tests.faults.run import POLL_S, Run, happens
from tests.faults.sender import Sender

__all__ = ["KINDS"]

KINDS: list[Kind] = []
kind = kinds(KINDS)

REFUSES = {"settles": False, "sends": False, "static": True, "crashes": (2, 10)}


async def _half(run: Run, ends: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGKILL)) -> None:
    """Send and join the first half of the stream, end the worker, and read the topics."""
    worker, rows = run.worker(), run.stream.rows
    await ready(worker)
    async with Sender(run.settings) as sender:
        await sender.send(rows[: len(rows) // 2], over_s=1.0)
    async with happens("the first half is read"):
        while await asyncio.to_thread(run.logs.behind):
            await asyncio.sleep(POLL_S)
    await run.end(worker, run.draw.choice(ends))
    await run.ledger()


async def _stops_without_output(run: Run, pattern: str) -> None:
    """Start the worker again. It must end each time with an error that matches the pattern, and write no records."""
    before = await asyncio.to_thread(run.logs.written)
    worker = run.workers["one"]
    run.start(worker)
    await run.refused(pattern, worker)
    after = await asyncio.to_thread(run.logs.written)
    assert after == before, f"expected no more records in examples and dead-letters, found records from {before} to {after}"


async def _anew(run: Run, topic: str) -> None:
    await _half(run)
    if run.draw.random() < 0.5:
        shutil.rmtree(run.state_of("one"))
    await ask(run, lambda admin: admin.delete(topic))
    async with happens("the topic is gone"):
        while topic in await ask(run, lambda admin: admin.topics()):
            await asyncio.sleep(POLL_S)
    await asyncio.to_thread(create_topics, run.settings.kafka, run.settings.topics)
    run.logs.forget(topic)
    rows = run.stream.rows
    if run.draw.random() < 0.5:  # so that the new log may be as long as the old one
        async with Sender(run.settings) as sender:
            await sender.send(rows[len(rows) // 2 :], over_s=0.5)
    await _stops_without_output(run, "was (deleted and )?made anew")


for _topic in ("impressions", "clicks", "examples"):

    @kind(f"topic {_topic} deleted and made again", **REFUSES)
    async def _deleted(run: Run, topic: str = _topic) -> None:
        await _anew(run, getattr(names_of(run), topic))


@kind("records deleted before they were read", **REFUSES)
async def _truncated(run: Run) -> None:
    await _half(run)
    await _rest(run)
    ends, topic = await asyncio.to_thread(run.logs.ends, "impressions"), names_of(run).impressions
    await ask(run, lambda admin: admin.truncate(topic, {number: end - 1 for number, end in ends.items()}))
    await _stops_without_output(run, "were deleted before they were read")


@kind("behind by more than the retention", **REFUSES)
async def _behind(run: Run) -> None:
    """Retention deletes records that a stopped worker hasn't read."""
    await _half(run)
    await _rest(run)
    topic = names_of(run).impressions
    await ask(run, lambda admin: admin.configure(topic, retention_ms=1_000, segment_ms=1_000))
    async with happens("retention deletes"):
        while not await asyncio.to_thread(run.logs.deleted, "impressions"):
            await asyncio.sleep(0.5)
    await _stops_without_output(run, "were deleted before they were read")


@kind("records deleted that a rebuild needs, and the disk lost", **REFUSES)
async def _needed(run: Run) -> None:
    await _half(run)
    shutil.rmtree(run.state_of("one"))
    committed = await asyncio.to_thread(run.logs.committed)
    source = run.draw.choice(["impressions", "examples"])
    ends = await asyncio.to_thread(run.logs.ends, source)
    before = {number: committed[source, number] if source == "impressions" else end for number, end in ends.items()}
    topic = getattr(names_of(run), source)
    await ask(run, lambda admin: admin.truncate(topic, before))
    await _stops_without_output(run, "rebuilding needs offsets from")


@kind("records deleted that were read, and the disk kept", static=True, sends=False)
async def _read(run: Run) -> None:
    """After an orderly stop, the worker's disk has all of its state, so that it doesn't need the deleted records."""
    await _half(run, ends=(signal.SIGTERM,))
    committed = await asyncio.to_thread(run.logs.committed)
    for source in ("impressions", "clicks"):
        topic = getattr(names_of(run), source)
        before = {number: committed[source, number] for number in range(2)}
        await ask(run, lambda admin, topic=topic, before=before: admin.truncate(topic, before))  # type: ignore[misc]
    run.start(run.workers["one"])
    run.over()
    await _rest(run)


async def _rest(run: Run) -> None:
    """Send the second half of the stream."""
    rows = run.stream.rows
    async with Sender(run.settings) as sender:
        await sender.send(rows[len(rows) // 2 :], over_s=1.0)
