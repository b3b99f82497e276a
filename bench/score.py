"""Latency of score requests while the whole system runs, and the highest rate, compared with an ordinary Faust agent.

    .venv/bin/python bench/score.py            # about 7 minutes
    .venv/bin/python bench/score.py --quick    # short stretches, too short for a result
    .venv/bin/python bench/score.py --share 0.05 --no-peer   # what a shadow and a canary of 5 % cost besides

A real Apache Kafka, a join, a trainer and a scorer run on this machine. A data set is replayed at 1,000 events a second, joined
and learned all the time, and a version is published and swapped in every 3 s. Join, trainer and replay have niceness 10, as in
the demo; the scorer, the broker and this process, which sends the requests, have niceness 0. Requests have 50 candidates. A
latency is the LogAppendTime of the answer less that of the request. The peer gets the same requests under the same load.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from bench.score_load import Load, Offered, request_bodies
from deploy.datasets import DataSet, default_data_set, open_data_set
from deploy.demo.play import BEHIND_NICE, demo_settings, worker_environment
from deploy.local_kafka.cluster import LocalKafka
from deploy.processes.priority import give_way
from deploy.processes.workers import Worker
from deploy.settings import LocalKafkaSettings, Settings
from state.canary import Thresholds
from state.store import SnapshotStore
from stream.registry.canary_operations import CanaryOperations, CanaryRequest
from stream.settings import TopicSettings
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames

RATE = 200.0
CANDIDATES = 50
LIMIT_MS = 50.0
STREAM_RATE = 1_000  # events a second that are joined and learned meanwhile
SEARCH_STEPS = 4  # bisections between a rate that holds and one that doesn't: the result is precise to some 6 %
START_S = 90.0
# Stretches in which no trial, a shadow and a canary take turns, since a machine's speed changes with time.
TRIALS: tuple[Literal["none", "shadow", "canary"], ...] = ("none", "shadow", "canary") * 3


@contextmanager
def process(command: list[str], env: dict[str, str], log: Path, *, nice: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended at the end of the block."""
    with log.open("ab") as output:
        running = subprocess.Popen(
            command,
            env=env,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=partial(give_way, nice),
        )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


@contextmanager
def workers(settings: Settings, work: Path, *kinds: str, nice: int = 0) -> Iterator[dict[str, Worker]]:
    """`headrace run …` for each kind; the workers are stopped at the end of the block."""
    env = worker_environment(settings)
    running = {kind: Worker(kind, env, work / f"{kind}.log", cwd=work, nice=nice) for kind in kinds}
    try:
        for worker in running.values():
            worker.start()
        yield running
    finally:
        for worker in running.values():
            worker.ask_to_stop()
        for worker in running.values():
            worker.wait_stopped()


async def highest_rate(load: Load, seconds: float, known: Offered, alive: Callable[[], None]) -> float:
    """The highest rate that was found to hold, 0 if none: doubling or halving from a known rate, then bisection."""

    async def holds(rate: float) -> bool:
        alive()
        offered = await load.offer(rate, seconds)
        show(f"  {rate:5.0f}/s", offered)
        return offered.holds(LIMIT_MS)

    low, high = (known.rate, 2 * known.rate) if known.holds(LIMIT_MS) else (known.rate / 2, known.rate)
    if low == known.rate:
        while await holds(high):
            low, high = high, 2 * high
    else:
        while not await holds(low):
            low, high = low / 2, low
            if low < 5:
                return 0.0
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if await holds(middle) else (low, middle)
    return low


def show(name: str, offered: Offered) -> None:
    click.echo(
        f"{name:16s} p50 {offered.quantile(0.5):7.1f} ms   p99 {offered.quantile(0.99):7.1f} ms   "
        f"answered {offered.answered}/{offered.sent}   late {offered.behind}   versions {len(offered.versions)}"
    )


async def measure(
    settings: Settings, bodies: list[bytes], name: str, seconds: float, probe_s: float, alive: Callable[[], None]
) -> dict[str, object]:
    """Latencies at `RATE`, and the highest rate that holds.

    The same load runs for as long before, without being measured: a broker's code is interpreted until it has run for a while.
    """
    names = TopicNames.of(settings.topics)
    load = Load(
        settings.kafka.bootstrap_servers, names.score_requests, names.scores, settings.topics.request_partitions, bodies
    )
    async with load:
        await load.warm_up()
        show("(warming up)", await load.offer(RATE, seconds))
        alive()
        offered = await load.offer(RATE, seconds)
        show(name, offered)
        best = await highest_rate(load, probe_s, offered, alive)
    return {
        "p50_ms": offered.quantile(0.5),
        "p99_ms": offered.quantile(0.99),
        "client_p50_ms": offered.quantile(0.5, client=True),
        "client_p99_ms": offered.quantile(0.99, client=True),
        "held": offered.holds(LIMIT_MS),
        "kept_up": not offered.behind and not offered.errors,
        "versions": len(offered.versions),
        "max_rate_per_s": round(best),
    }


def wait_for_version(settings: Settings, alive: Callable[[], None]) -> None:
    store, until = SnapshotStore(settings.snapshots), time.monotonic() + START_S
    while not store.versions():
        alive()
        if time.monotonic() > until:
            raise SystemExit(f"no version within {START_S:.0f} s")
        time.sleep(0.2)


async def measure_trials(
    settings: Settings, bodies: list[bytes], seconds: float, alive: Callable[[], None], share: float
) -> dict[str, list[float]]:
    """p99 (ms) of several stretches each: without a trial, with a shadow of the oldest version, with a canary of it."""
    names = TopicNames.of(settings.topics)
    operations = CanaryOperations(settings.kafka, names, "bench")
    found: dict[str, list[float]] = {"none": [], "shadow": [], "canary": []}
    load = Load(
        settings.kafka.bootstrap_servers, names.score_requests, names.scores, settings.topics.request_partitions, bodies
    )
    async with load:
        await load.warm_up()
        for mode in TRIALS:
            if mode != "none":
                state = (await operations.look()).state
                oldest = min(version for version in state.versions if version != state.champion.version)
                await operations.begin_canary(CanaryRequest(mode, oldest, share, "bench", Thresholds(clicks=1_000_000)))
                while any(beat.candidate is None for beat in (await operations.look()).live):
                    alive()
                    await asyncio.sleep(0.2)
            offered = await load.offer(RATE, seconds)
            show(mode, offered)
            found[mode].append(round(offered.quantile(0.99), 1))
            if mode != "none":
                await operations.stop_canary("bench", timeout_ms=10_000)
    return found


def run(
    data_set: DataSet,
    bootstrap_servers: str,
    work: Path,
    seconds: float,
    probe_s: float,
    *,
    peer: bool,
    share: float | None = None,
) -> None:
    """Start the system, and measure Headrace's scorer and then the peer."""
    settings = demo_settings(Settings(), data_set, work, bootstrap_servers, evaluation_from_ms=0)
    settings = settings.model_copy(update={"topics": TopicSettings(prefix="bench-", partitions=2, request_partitions=2)})
    create_topics(settings.kafka, settings.topics)
    bodies = request_bodies(data_set, CANDIDATES)
    env = worker_environment(settings)
    replay = [sys.executable, "-m", "headrace", "replay", data_set.name, "--rate", str(STREAM_RATE), "--loop"]
    with workers(settings, work, "join", "trainer", nice=BEHIND_NICE) as behind:
        behind["join"].wait_ready()
        behind["trainer"].wait_ready()
        with process(replay, env, work / "replay.log", nice=BEHIND_NICE) as stream:

            def alive() -> None:
                for worker in behind.values():
                    worker.check()
                if stream.poll() is not None:
                    raise SystemExit(f"the replay ended: {(work / 'replay.log').read_text()[-2000:]}")

            wait_for_version(settings, alive)
            with workers(settings, work, "scorer") as scoring:
                scoring["scorer"].wait_ready()
                ours = asyncio.run(measure(settings, bodies, "headrace", seconds, probe_s, alive))
                trials = asyncio.run(measure_trials(settings, bodies, seconds, alive, share)) if share else None
                peak = scoring["scorer"].peak_rss_mb()
            theirs = asyncio.run(measure_peer(settings, bodies, work, seconds, probe_s, alive)) if peer else None
            learned = sum(
                value for (name, _), value in behind["trainer"].metrics().items() if name == "headrace_trainer_examples_total"
            )
    held = theirs is not None and bool(theirs["kept_up"])
    beside = theirs["p99_ms"] if theirs is not None and held else None
    report(
        value=ours["p99_ms"],
        peer=beside,
        ratio=round(float(str(ours["p99_ms"])) / float(str(beside)), 3) if beside else None,
        unit="ms, p99, less is better",
        **ours,
        peer_held=held if theirs is not None else None,
        peer_p50_ms=theirs and theirs["p50_ms"],
        peer_max_rate_per_s=theirs and theirs["max_rate_per_s"],
        requests_per_s=RATE,
        candidates=CANDIDATES,
        stream_events_per_s=STREAM_RATE,
        examples_learned=int(learned),
        fields=len(settings.features.fields),
        dataset=data_set.name,
        scorer_peak_rss_mb=peak,
        trials_p99_ms=trials,
    )


async def measure_peer(
    settings: Settings, bodies: list[bytes], work: Path, seconds: float, probe_s: float, alive: Callable[[], None]
) -> dict[str, object]:
    env = {
        **os.environ,
        "PEER_BROKER": settings.kafka.bootstrap_servers,
        "PEER_PREFIX": settings.topics.prefix,
        "PEER_SNAPSHOTS": settings.snapshots.url,
        "PEER_DATA_DIR": str(work / "peer"),
    }
    command = [sys.executable, str(Path(__file__).with_name("peer_faust_scorer.py")), "worker", "--without-web", "-l", "warn"]
    with process(command, env, work / "peer.log") as running:

        def both_alive() -> None:
            alive()
            if running.poll() is not None:
                raise SystemExit(f"the peer ended: {(work / 'peer.log').read_text()[-2000:]}")

        return await measure(settings, bodies, "faust", seconds, probe_s, both_alive)


@click.command()
@click.option("--dataset", default="auto", show_default=True, help="KuaiRand where it is found, else MovieLens-100K.")
@click.option("--seconds", default=30.0, show_default=True, help="Time at 200 requests a second.")
@click.option("--quick", is_flag=True, help="Short stretches, too short for a result.")
@click.option("--no-peer", is_flag=True)
@click.option("--share", type=float, help="Measure a shadow and a canary with this share too, such as 0.05.")
def main(dataset: str, seconds: float, quick: bool, no_peer: bool, share: float | None) -> None:
    """Measure and print; the last line is one JSON object."""
    data_set = default_data_set() if dataset == "auto" else open_data_set(dataset)
    if data_set.find() is None:
        data_set.fetch(lambda line: click.echo(line, err=True))
    warn_if_busy()
    work = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    try:
        with LocalKafka(LocalKafkaSettings(dir=work / "kafka", heap_mb=768)) as kafka:
            short = (5.0, 2.0) if quick else (seconds, 5.0)
            run(data_set, kafka.bootstrap_servers, work, *short, peer=not no_peer, share=share)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
