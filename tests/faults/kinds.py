"""Every kind of fault. Each hurts the join while events come in; what it must not hurt is the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.structs import TopicPartition

from stream.clients import aiokafka_options
from stream.topics import TopicNames
from tests.faults.network import Link
from tests.faults.run import POLL_S, FaultWorker, Kind, Run, happens
from tests.faults.worker import RECOVERY, REVOKE, STEPS, Fault
from tests.stream.join.made_up import send

__all__ = ["KINDS", "kind_named"]

KINDS: list[Kind] = []

HOUR_MS = 3_600_000
# How a log says that another has the transactional id now.
FENCED = ("ProducerFenced", "InvalidProducerEpoch")
# A worker ends when a transaction fails, and whether one is under way when its broker goes is up to chance.
MAYBE = (0, 3)


def kind_named(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def _kind(name: str, **options: object) -> Callable[[Callable[[Run], Awaitable[None]]], Callable[[Run], Awaitable[None]]]:
    def add(play: Callable[[Run], Awaitable[None]]) -> Callable[[Run], Awaitable[None]]:
        KINDS.append(Kind(name, play, **options))  # type: ignore[arg-type]
        return play

    return add


async def _ready(worker: FaultWorker) -> None:
    while not await asyncio.to_thread(worker.is_ready):
        await asyncio.sleep(POLL_S)


# Killed


@_kind("kill -9 at random moments")
async def _random_kills(run: Run) -> None:
    worker = run.worker()
    for _ in range(run.draw.randrange(1, 4)):
        if run.draw.random() < 0.7:
            await _ready(worker)
            await run.pause(0.0, 0.8)
        else:
            await run.pause(0.3, 2.0)
        await run.end(worker)
        run.start(worker)
        run.over()


async def _step(step: str, run: Run) -> None:
    after = run.draw.randrange(1, 3 if step == "in a flush" else 12)
    worker = run.worker("one", Fault(step=step, after=after, flush_s=0.2))
    await run.died(worker)
    run.over()


async def _recovery(step: str, run: Run) -> None:
    worker = run.worker()
    # Early clicks wait only once enough is under way.
    await run.labels(300 if "clicks" in step else run.draw.randrange(1, 6))
    await run.pause(0.0, 0.5)
    await run.end(worker)
    # With the disk lost, or of an older time, there is more to recover.
    shutil.rmtree(run.state_of("one"))
    run.start(worker, Fault(step=step, after=1 if "reading" in step else run.draw.randrange(1, 3)))
    await run.died(worker)
    run.over()


async def _revoke(step: str, run: Run) -> None:
    run.hold()  # by the time that another has joined, all else would have been labelled
    first = run.worker("one", Fault(step=step, after=2))  # once when it joins, without partitions
    await run.labels()
    await run.pause(0.0, 0.5)
    run.worker("two")
    await run.died(first)
    run.over()
    run.go_on()


KINDS += [Kind(f"kill -9 {step}", partial(_step, step), killed=1) for step in STEPS]
KINDS += [Kind(f"kill -9 {step}", partial(_recovery, step), static=True, killed=1) for step in RECOVERY]
KINDS += [Kind(f"kill -9 {step}", partial(_revoke, step), static=False, killed=1) for step in REVOKE]


# Fenced, moved


@_kind("stopped until fenced, then resumed", static=False)
async def _zombie(run: Run) -> None:
    run.hold()
    still = run.worker("still")
    await run.labels()
    await run.pause(0.0, 0.5)
    still.wanted = False  # fenced, it must end by itself; its return would be another kind of fault
    os.kill(still.pid, signal.SIGSTOP)
    run.over()
    await _ready(run.worker("other"))  # it has taken over
    os.kill(still.pid, signal.SIGCONT)
    run.go_on()  # what comes now it would like to label, too
    async with happens("the one that was stopped ends"):
        while still.returncode is None:
            await asyncio.sleep(POLL_S)
    log = still.log.read_text()
    assert still.returncode == 1 and any(word in log for word in FENCED), f"ended with {still.returncode}, not fenced:\n{log}"


@_kind("workers join and leave under load", static=False)
async def _comings_and_goings(run: Run) -> None:
    run.worker("0")
    for number in range(1, 4):
        await run.pause(0.3, 1.5)
        run.worker(str(number))
        if run.draw.random() < 0.6:
            gone = run.draw.choice([worker for worker in run.workers.values() if worker.wanted])
            await run.pause(0.0, 1.5)
            if any(worker is not gone and worker.wanted for worker in run.workers.values()):
                await run.leave(gone)


@_kind("a partition goes to another worker and comes back", static=False)
async def _there_and_back(run: Run) -> None:
    run.hold()
    first = run.worker("first")
    await run.labels()
    second = run.worker("second")
    await _ready(second)
    run.go_on()
    await run.labels(run.draw.randrange(1, 30))
    await run.leave(second)
    await run.pause(1.0, 3.0)
    if run.draw.random() < 0.5:
        run.start(second)
    assert first.wanted


# State


async def _with_state(run: Run, change: Callable[[FaultWorker], Awaitable[None]]) -> None:
    worker = run.worker()
    await run.labels(run.draw.randrange(1, 20))
    await run.pause(0.0, 0.8)
    await run.end(worker, run.draw.choice([signal.SIGTERM, signal.SIGKILL]))
    await change(worker)
    run.start(worker, Fault(flush_s=0.2))
    run.over()


@_kind("state folder deleted")
async def _deleted(run: Run) -> None:
    async def change(worker: FaultWorker) -> None:
        shutil.rmtree(run.state_of("one"))

    await _with_state(run, change)


@_kind("state folder of an older time")
async def _older(run: Run) -> None:
    older = run.folder / "older"

    async def change(worker: FaultWorker) -> None:
        shutil.copytree(run.state_of("one"), older)
        run.start(worker, Fault(flush_s=0.2))
        await run.labels(run.draw.randrange(1, 20))
        await run.pause(0.0, 0.5)
        await run.end(worker)
        shutil.rmtree(run.state_of("one"))
        shutil.copytree(older, run.state_of("one"))

    await _with_state(run, change)


@_kind("state folder of another worker", static=False)
async def _of_another(run: Run) -> None:
    """Each gets what the other had, also under the other partition's name."""
    one, two = run.worker("one", Fault(flush_s=0.2)), run.worker("two", Fault(flush_s=0.2))
    states = run.state_of("one"), run.state_of("two")
    await run.labels()
    while not all(any(folder.glob("partition-?")) for folder in states):  # the second to come may have taken both at first
        await asyncio.sleep(POLL_S)
    await run.pause(0.3, 1.0)
    await run.end(one)
    await run.end(two)
    aside = run.folder / "aside"
    states[0].rename(aside)
    states[1].rename(states[0])
    aside.rename(states[1])
    if run.draw.random() < 0.5:
        for folder in states:
            for path in sorted(folder.glob("partition-?")):
                other = path.with_name(f"partition-{1 - int(path.name[-1])}")
                if not other.exists():
                    path.rename(other)
    run.start(one)
    run.start(two)
    run.over()


@_kind(
    "a source stalled for hours, then the disk lost",
    sends=False,
    every_ms=6_000,
    join=(("max_ahead_ms", 24 * HOUR_MS), ("window_ms", 10_000)),
)
async def _stalled(run: Run) -> None:
    """All impressions come, 2.7 hours of them, and no click: everything waits. Then the rest, without the disk."""
    worker = run.worker()
    clicks = [row for row in run.events.arriving if row[0] == "clicks"]
    others = [row for row in run.events.arriving if row[0] != "clicks"]
    some = run.draw.randrange(1, 40)
    await send(run.settings, sorted(clicks[:some] + others[:some], key=run.events.arriving.index))
    await send(run.settings, others[some:], over_s=1.0)
    await _ready(worker)
    await run.pause(0.5, 1.5)
    await run.end(worker)
    shutil.rmtree(run.state_of("one"))
    run.start(worker)
    run.over()
    await send(run.settings, clicks[some:], over_s=1.0)


@_kind("disk full", crashes=(1, 10))
async def _disk_full(run: Run) -> None:
    async with _small_disk(run.folder / "disk", size_mb=16) as disk:
        worker = run.worker("one", Fault(flush_s=0.1), state=disk / "state")
        await run.labels()
        await run.pause(0.0, 0.5)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 65_536)
        await run.died(worker, 1)
        await run.pause(0.5, 3.0)
        filler.unlink()
        run.over()
        await run.labels()
        await run.end(worker, signal.SIGTERM)
        shutil.copytree(disk / "state", run.state_of("one"))
    run.worker("one")


@contextlib.asynccontextmanager
async def _small_disk(folder: Path, *, size_mb: int) -> AsyncIterator[Path]:
    await asyncio.to_thread(folder.mkdir)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "headrace-faults", str(folder)]
    found = await asyncio.to_thread(subprocess.run, mount, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"a small disk can't be mounted here: {found.stderr.strip()}; this kind needs root")
    try:
        yield folder
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "-l", str(folder)], check=True)


# Brokers and the network


@_kind("the broker refuses a record inside a transaction", crashes=(1, 10))
async def _refused(run: Run) -> None:
    worker = run.worker()
    await run.labels()
    await _max_message_bytes(run, 200)  # less than any batch
    await run.died(worker, 1)
    await run.pause(0.0, 2.0)
    run.over()
    await _max_message_bytes(run, 1_114_124)


async def _max_message_bytes(run: Run, limit: int) -> None:
    admin = AIOKafkaAdminClient(**aiokafka_options(run.settings.kafka))
    await admin.start()
    try:
        topic = TopicNames.of(run.settings.topics).examples
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": str(limit)})])
    finally:
        await admin.close()


async def _brokers_back(run: Run) -> None:
    run.over()
    await asyncio.to_thread(run.kafka.start)


@_kind("the broker killed and started again", cluster="alone", crashes=MAYBE)
async def _broker_killed(run: Run) -> None:
    run.worker()
    await run.labels()
    await run.pause(0.0, 1.0)
    for pid in run.kafka.pids.values():
        os.kill(pid, signal.SIGKILL)
    await run.pause(0.0, 2.0)
    await _brokers_back(run)


@_kind("one of three brokers killed", cluster="three", crashes=MAYBE)
async def _one_of_three(run: Run) -> None:
    run.worker()
    await run.labels()
    await run.pause(0.0, 1.0)
    os.kill(run.draw.choice(sorted(run.kafka.pids.values())), signal.SIGKILL)
    run.over()
    await run.pause(3.0, 6.0)
    await asyncio.to_thread(run.kafka.start)


@_kind("two of three brokers killed: too few replicas in sync", cluster="three", crashes=MAYBE)
async def _two_of_three(run: Run) -> None:
    run.worker()
    await run.labels()
    await run.pause(0.0, 1.0)
    for pid in run.draw.sample(sorted(run.kafka.pids.values()), 2):
        os.kill(pid, signal.SIGKILL)
    await run.pause(1.0, 4.0)
    await _brokers_back(run)


@_kind("partition leaders moved", cluster="three", crashes=MAYBE)
async def _leader_moved(run: Run) -> None:
    """The leader of a partition of `examples` steps down in order, and comes back."""
    run.worker()
    await run.labels()
    await run.pause(0.0, 1.0)
    place = TopicPartition(TopicNames.of(run.settings.topics).examples, run.draw.randrange(2))
    async with AIOKafkaConsumer(place.topic, **aiokafka_options(run.settings.kafka)) as consumer:
        cluster = consumer._client.cluster
        leader = cluster.leader_for_partition(place)
        os.kill(run.kafka.pids[leader], signal.SIGTERM)
        async with happens("another broker leads"):
            while cluster.leader_for_partition(place) in (leader, None, -1):
                await asyncio.sleep(POLL_S)
                await consumer._client.force_metadata_update()
    run.over()
    async with happens("the broker ends"):
        while leader in run.kafka.pids:
            await asyncio.sleep(POLL_S)
    await run.pause(1.0, 3.0)
    await asyncio.to_thread(run.kafka.start)


@_kind("network cut for longer than the session timeout", static=False, crashes=MAYBE)
async def _cut(run: Run) -> None:
    """The worker is cut off from its broker until the group lets it go; another may take over meanwhile."""
    port = int(run.kafka.bootstrap_servers.rsplit(":", 1)[1])
    async with Link(port) as link:
        run.links = {str(port): link.port}
        worker = run.worker("one")
        await run.labels()
        await run.pause(0.0, 1.0)
        members = await _members(run)
        assert members
        link.cut()
        run.links = {}
        another = run.draw.random() < 0.5
        if another:
            run.worker("two")
            run.over()
        async with happens("the group lets the worker go"):
            while members & await _members(run):
                await asyncio.sleep(POLL_S)
        await run.pause(0.5, 3.5)
        link.mend()
        if not another:
            run.over()
        await run.pause(0.5, 2.0)
        await run.labels()
        await run.end(worker, signal.SIGTERM)  # its link ends with this block
        if not another:
            run.start(worker)


async def _members(run: Run) -> set[str]:
    """Ids of the members of the join's group, by its coordinator."""
    admin = AIOKafkaAdminClient(**aiokafka_options(run.settings.kafka))
    await admin.start()
    try:
        names = TopicNames.of(run.settings.topics)
        [answer] = await admin.describe_consumer_groups([f"{names.prefix}{run.settings.join.group}"])
        [(_, _, _, _, _, members, *_)] = answer.groups
        return {member[0] for member in members}
    finally:
        await admin.close()
