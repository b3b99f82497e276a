"""What a scorer costs that follows the champion's chain and is asked nothing: CPU time by thread, with and without deltas.

    .venv/bin/python bench/follow.py                                # 3 scorers, 20 s each: about 2 minutes
    .venv/bin/python bench/follow.py --scorers 1 --seconds 30

The stand-in for the trainer is that of `bench/stand_in.py`: a delta of some 1,000 rows every 250 ms, with dense weights by
`snapshots.dense_interval_ms`. Four stretches are measured, each after the one before: nothing is published; deltas are
published without dense weights; deltas with them; and a client that asks each scorer 2.5
times a second. A figure is the CPU time of one scorer as a share of one core: the mean of
all scorers. The threads of a process are found in /proc, so this runs on Linux only.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import machine, report, warn_if_busy
from bench.rollback import Client, request_body
from bench.stand_in import PROBES, Trainer, bench_settings
from deploy.demo.play import worker_environment
from deploy.local_kafka.cluster import LocalKafka
from deploy.processes.usage import usage
from deploy.processes.workers import Worker
from deploy.settings import LocalKafkaSettings, Settings
from stream.topics.admin import create_topics

READY_S, SETTLE_S = 300.0, 5.0
ASKED_RATE = 2.5  # requests a second for each scorer, of 10 candidates each
NS = 1_000_000_000


class Spent(NamedTuple):
    """CPU time in ns, and how often the thread went to sleep by itself."""

    ns: int
    waits: int


def threads(pid: int) -> dict[int, Spent]:
    """What each thread of a process has used so far."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            ns = int((task / "schedstat").read_text().split()[0])
            waits = next(line for line in (task / "status").read_text().splitlines() if line.startswith("voluntary"))
        except (OSError, ValueError):  # the thread has ended
            continue
        found[int(task.name)] = Spent(ns, int(waits.split()[1]))
    return found


async def stretch(workers: list[Worker], seconds: float) -> dict[str, float]:
    """What one scorer takes: percent of a core, and how often its threads wait, a second; the same of its main thread."""
    await asyncio.sleep(SETTLE_S)
    before = [threads(worker.pid) for worker in workers]
    cpu_s, began_s = sum(usage(worker.pid).cpu_seconds for worker in workers), time.monotonic()
    await asyncio.sleep(seconds)
    took_s = (time.monotonic() - began_s) * len(workers)
    cpu_s = sum(usage(worker.pid).cpu_seconds for worker in workers) - cpu_s
    main_ns = waits = main_waits = 0
    for worker, was in zip(workers, before, strict=True):
        now = threads(worker.pid)
        waits += sum(each.waits - was.get(tid, Spent(0, 0)).waits for tid, each in now.items())
        main_ns += now[worker.pid].ns - was[worker.pid].ns
        main_waits += now[worker.pid].waits - was[worker.pid].waits
        for tid, each in sorted(now.items()):
            share = (each.ns - was.get(tid, Spent(0, 0)).ns) / NS / took_s * len(workers) * 100
            if share >= 0.05:
                waited = (each.waits - was.get(tid, Spent(0, 0)).waits) / took_s * len(workers)
                print(f"  {tid}: {share:.2f} %, {waited:.0f} waits/s", file=sys.stderr)
    return {
        "percent": round(cpu_s / took_s * 100, 2),
        "main_percent": round(main_ns / NS / took_s * 100, 2),
        "waits_per_s": round(waits / took_s, 1),
        "main_waits_per_s": round(main_waits / took_s, 1),
    }


async def measure(settings: Settings, work: Path, scorers: int, rows: int, seconds: float) -> dict[str, object]:
    trainer = Trainer(settings, rows)
    await trainer.begin()
    workers = [Worker("scorer", worker_environment(settings), work / f"scorer-{n}.log", cwd=work) for n in range(scorers)]
    bodies = [request_body(trainer.ids, probe) for probe in range(PROBES)]
    found: dict[str, object] = {}
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            await asyncio.to_thread(worker.wait_ready, READY_S)
        print(f"{scorers} scorers are ready: {[worker.pid for worker in workers]}", file=sys.stderr)
        await asyncio.sleep(SETTLE_S)
        for name in ("idle", "rows", "dense", "asked"):
            tasks = [] if name == "idle" else [asyncio.create_task(trainer.run(dense=name != "rows"))]
            if name == "asked":
                tasks.append(asyncio.create_task(Client(settings, bodies, ASKED_RATE * scorers).ask()))
            print(f"{name}", file=sys.stderr)
            took = await stretch(workers, seconds)
            print(f"{name}: {took}", file=sys.stderr)
            found |= {f"{name}_{what}": figure for what, figure in took.items()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        await trainer.close()
        for worker in workers:
            worker.ask_to_stop()
        for worker in workers:
            await asyncio.to_thread(worker.wait_stopped)
    return found


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--scorers", default=3, show_default=True, help="Scorer processes.")
@click.option("--rows", default=100_000, show_default=True, help="Rows of the table.")
@click.option("--seconds", default=20.0, show_default=True, help="Length of each of the four stretches.")
def main(scorers: int, rows: int, seconds: float) -> None:
    warn_if_busy()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="headrace-follow-"))
    try:
        with LocalKafka(LocalKafkaSettings(dir=work / "kafka", heap_mb=768)) as kafka:
            settings = bench_settings(kafka.bootstrap_servers, work, scorers)
            create_topics(settings.kafka, settings.topics)
            found = asyncio.run(measure(settings, work, scorers, rows, seconds))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(
        benchmark="follow",
        value=found["dense_percent"],
        unit="% of a core for one scorer",
        scorers=scorers,
        rows=rows,
        seconds=seconds,
        **found,
        machine=machine(),
    )


if __name__ == "__main__":
    main()
