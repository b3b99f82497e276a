"""Recovery time of one join worker, by the number of pending impressions and by the state that it finds on its disk.

    .venv/bin/python bench/recovery.py                       # 50,000, 200,000 and 800,000 pending: some 5 minutes
    .venv/bin/python bench/recovery.py --pending 20000       # this size only; may be repeated

A real Apache Kafka runs on the other core. Impressions of 700 bytes, whose windows don't end, and clicks (CTR 3 %) are joined
over 4 partitions. Then the worker is stopped and started again:

- clean: after an orderly stop, whose state is at the end of the log;
- killed: after SIGKILL behind the last commit; what was not flushed to the disk is read again from the log;
- copied: the clean state is copied back first, as from a checkpoint in the fastest possible store, the local disk;
- nothing: without its folder; everything is read again from the low-water offsets.

Two times are reported in seconds: of taking over (the slowest partition, from the worker's log), and from the start of the
process until it is ready. After each start as many impressions must be pending as before, else the benchmark ends with an
error.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from bench.join import PARTITIONS, fill
from deploy.demo.play import worker_environment
from deploy.local_kafka.cluster import LocalKafka
from deploy.processes.workers import Worker
from deploy.settings import LocalKafkaSettings, Settings
from stream.settings import JoinSettings, KafkaSettings, TopicSettings

SIZES = (50_000, 200_000, 800_000)
# Longer than the longest stream: the streams have 5,000 impressions for each second of event time.
WINDOW_MS = 3_600_000
PATIENCE_S = 300.0
TAKEN = re.compile(r"took over partition \d+ in ([0-9.]+) s")


def settings_for(bootstrap_servers: str, pending: int, work: Path) -> Settings:
    return Settings(
        kafka=KafkaSettings(bootstrap_servers=bootstrap_servers),
        topics=TopicSettings(prefix=f"{pending}-", partitions=PARTITIONS),
        # Static membership: otherwise the partitions of a killed worker only come back after the session timeout.
        join=JoinSettings(window_ms=WINDOW_MS, max_ahead_ms=WINDOW_MS, instance_id="one"),
        state_dir=work / f"{pending}-state",
    )


def pending_of(worker: Worker) -> dict[str, int]:
    """Impressions pending by partition, for partitions that report them already."""
    gauge = "headrace_join_pending_impressions"
    return {labels[0]: round(value) for (name, labels), value in worker.metrics().items() if name == gauge}


def wait_joined(worker: Worker, impressions: int, clicks: int) -> int:
    """Wait until the worker has counted every event; returns the number of impressions that are pending then."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        sums: Counter[str] = Counter()
        for (name, _), value in worker.metrics().items():
            sums[name] += round(value)
        read = sums["headrace_join_impressions_total"], sums["headrace_join_clicks_total"] + sums["headrace_join_early_clicks"]
        if read == (impressions, clicks):
            return sums["headrace_join_pending_impressions"]
        worker.check()
        if time.monotonic() > deadline:
            raise SystemExit(f"expected {impressions} impressions and {clicks} clicks within {PATIENCE_S:.0f} s, found {read}")
        time.sleep(0.2)


def started(worker: Worker, pending: int | None = None) -> dict[str, float]:
    """Start the worker on core 0; returns how long taking over took, and how long it was until the worker was ready.

    Raises:
        SystemExit: a number of impressions other than `pending` is pending then.
    """
    logged = worker.log.stat().st_size if worker.log.exists() else 0
    began = time.monotonic()
    worker.start()
    os.sched_setaffinity(worker.pid, {0})
    worker.wait_ready(PATIENCE_S)
    ready_s = time.monotonic() - began
    with worker.log.open() as log:
        log.seek(logged)
        taken = [float(seconds) for seconds in TAKEN.findall(log.read())]
    if len(taken) != PARTITIONS:
        raise SystemExit(f"expected {PARTITIONS} partitions taken over, found {len(taken)} in {worker.log}")
    if pending is not None:
        while len(found := pending_of(worker)) < PARTITIONS:  # each reports with its first step
            worker.check()
            time.sleep(0.1)
        if sum(found.values()) != pending:
            raise SystemExit(f"expected {pending:,} impressions pending after the start, as before it, found {found}")
    return {"takeover_s": max(taken), "ready_s": round(ready_s, 2)}


def stop(worker: Worker) -> None:
    worker.ask_to_stop()
    worker.wait_stopped()
    if worker.returncode:
        raise SystemExit(f"the worker ended with {worker.returncode}: {worker.log.read_text()[-2000:]}")


def measure(bootstrap_servers: str, impressions: int, work: Path) -> dict[str, object]:
    """Recovery with this many impressions, in each of the four ways."""
    settings = settings_for(bootstrap_servers, impressions, work)
    clicks = asyncio.run(fill(settings, impressions, ended=False)).clicks
    worker = Worker("join", worker_environment(settings), work / f"{impressions}.log", cwd=work)
    found: dict[str, object] = {"impressions": impressions}
    try:
        started(worker)
        pending = wait_joined(worker, impressions, clicks)
        worker.kill()
        found["killed"] = started(worker, pending)
        stop(worker)
        found["clean"] = started(worker, pending)
        stop(worker)
        files = [path for path in settings.state_dir.rglob("*") if path.is_file()]
        found["state_mb"] = round(sum(path.stat().st_size for path in files) / 2**20)
        copy = settings.state_dir.with_suffix(".copy")
        settings.state_dir.rename(copy)
        began = time.monotonic()
        shutil.copytree(copy, settings.state_dir)
        found["copied"] = {"copy_s": round(time.monotonic() - began, 2), **started(worker, pending)}
        stop(worker)
        shutil.rmtree(settings.state_dir)
        found["nothing"] = started(worker, pending)
        found["peak_rss_mb"] = worker.peak_rss_mb()
        stop(worker)
    finally:
        worker.ask_to_stop()
        worker.wait_stopped()
    return found


@click.command()
@click.option("--pending", "sizes", type=int, multiple=True, default=SIZES, show_default=True, help="Impressions pending.")
def main(sizes: tuple[int, ...]) -> None:
    """Measure and print; the last line is one JSON object."""
    work = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    warn_if_busy()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores - {0} or cores)  # this process and the Kafka that it starts leave core 0 to the worker
    results = []
    try:
        with LocalKafka(LocalKafkaSettings(dir=work / "kafka", heap_mb=1024)) as kafka:
            for pending in sizes:
                found = measure(kafka.bootstrap_servers, pending, work)
                results.append(found)
                click.echo(f"{pending:>9,} impressions, {found['state_mb']} MB on disk")
                for way in ("clean", "killed", "copied", "nothing"):
                    click.echo(f"  {way:8s} {found[way]}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.sched_setaffinity(0, cores)
    report(unit="s", partitions=PARTITIONS, results=results)


if __name__ == "__main__":
    main()
