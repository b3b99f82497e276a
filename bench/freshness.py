"""Measures freshness at real speed: how long after a click the first answer comes by weights that have learned it.

    .venv/bin/python bench/freshness.py                               # 2,000 events/s for 2 minutes, after one of warming up
    .venv/bin/python bench/freshness.py --hold-ms 2000 --lateness-ms 500
    .venv/bin/python bench/freshness.py --rate 500 --minutes 1

A simulated stream has a CTR of 5 % and lognormal click delays with a mean of 5 s. A service asks for scores of all impressions
of 10 ms at once, shows them, and sends them with their scores. Broker, join, trainer, scorer and this service share the
machine.

The figures come from the topics after the run (`deploy/demo/freshness.py`). They are of all clicks, corrections included.

A label is due when the join may give it: at the impression's event time + hold + lateness, and a correction at the click's
arrival, if that is later. (A join that waits for the watermark gives a correction at the click's event time + lateness.)
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from bench.freshness_figures import due_ms, figures
from bench.live_load import Shown, draw_live, play_live
from bench.real_time import run_settings
from deploy.demo.freshness import read_followed
from deploy.demo.play import worker_environment
from deploy.feeding.simulation import Simulation
from deploy.local_kafka.cluster import LocalKafka
from deploy.processes.usage import usage
from deploy.processes.workers import Worker
from deploy.settings import LocalKafkaSettings, Settings
from stream.topics.admin import create_topics

CTR = 0.05
WARM_S = 60.0  # until the figures begin: model and chain have begun, caches are warm
KINDS = ("join", "trainer", "scorer")
SETTLE_S = 3.0  # after the last event: the last answers are in the log


async def run(simulation: Simulation, settings: Settings, work: Path, warm_ms: int) -> dict[str, float]:
    """Start the workers, play the stream, and read what came of it."""
    workers = [Worker(kind, worker_environment(settings), work / f"{kind}.log", cwd=work) for kind in KINDS]

    def look(shown: Shown, now_ms: int) -> None:
        for worker in workers:
            worker.check()
        share = float((~np.isnan(shown.scores[: max(1, int(np.searchsorted(live.stream.shown_ms, now_ms)))])).mean())
        print(f"{(now_ms - start_ms) // 1_000:5d} s  {share:.0%} of the impressions with a score", flush=True)

    try:
        for worker in workers:
            worker.start()
        for worker in workers[:2]:  # the scorer is only ready once there is a version
            await asyncio.to_thread(worker.wait_ready, 120.0)
        live, simulation = draw_live(simulation)
        start_ms = simulation.start_ms
        await play_live(live, settings, start_ms, look)
        await asyncio.sleep(SETTLE_S)
        product = histogram(workers[2], "headrace_scorer_click_to_answer_seconds")
        cpu = {f"{worker.kind}_cpu_s": usage(worker.pid).cpu_seconds for worker in workers}
        followed, join = await read_followed(settings), settings.join
        due = due_ms(followed, join.held_ms, join.lateness_ms)
        found = figures(followed, due, start_ms + join.held_ms + join.lateness_ms + warm_ms)
        # Some clicks of the last moment are always left.
        return {**found, "unanswered_clicks": followed.total - len(followed.clicks), **product, **cpu}
    finally:
        for worker in workers:
            worker.ask_to_stop()
        for worker in workers:
            await asyncio.to_thread(worker.wait_stopped)


def histogram(worker: Worker, name: str) -> dict[str, float]:
    """What the scorer's own histogram says: number and mean."""
    found = worker.metrics()
    count, total = found.get((f"{name}_count", ()), 0.0), found.get((f"{name}_sum", ()), 0.0)
    return {"histogram_clicks": count, "histogram_mean_ms": round(1_000 * total / max(1.0, count), 1)}


@click.command()
@click.option("--rate", default=2_000.0, show_default=True, help="Impressions and clicks a second.")
@click.option("--minutes", default=2.0, show_default=True, help="Length of what is measured, after a minute of warming up.")
@click.option("--hold-ms", type=int, help="Instead of the default of join.hold_ms.")
@click.option("--lateness-ms", type=int, help="Instead of the default of join.lateness_ms.")
@click.option("--step-ms", type=int, help="Instead of the default of join.step_ms.")
@click.option("--batch-age-ms", type=int, help="Instead of the default of trainer.max_batch_age_ms.")
@click.option("--delta-interval-ms", type=int, help="Instead of the default of snapshots.delta_interval_ms.")
@click.option("--seed", default=0, show_default=True)
@click.option("--quick", is_flag=True, help="20 s after 10 s of warming up: too short for a result.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the workers' logs and the topics in this folder.")
def main(
    rate: float,
    minutes: float,
    hold_ms: int | None,
    lateness_ms: int | None,
    step_ms: int | None,
    batch_age_ms: int | None,
    delta_interval_ms: int | None,
    seed: int,
    quick: bool,
    keep: Path | None,
) -> None:
    """Measure and print; the last line is one JSON object."""
    warn_if_busy()
    base = run_settings(60_000, Settings())
    settings = base.model_copy(
        update={
            "join": _changed(base.join, hold_ms=hold_ms, lateness_ms=lateness_ms, step_ms=step_ms),
            "trainer": _changed(base.trainer, max_batch_age_ms=batch_age_ms),
            "snapshots": _changed(base.snapshots, delta_interval_ms=delta_interval_ms),
        }
    )
    warm_s, measured_s = (10.0, 20.0) if quick else (WARM_S, 60 * minutes)
    join = settings.join
    seconds = (join.held_ms + join.lateness_ms) / 1_000 + warm_s + measured_s
    impressions = rate / (1 + CTR)
    simulation = Simulation(
        rate=impressions,
        count=round(impressions * seconds),
        ctr=CTR,
        delay="lognormal",
        delay_ms=5_000.0,
        hour_ms=60_000,
        new_items=0.5,
        seed=seed,
    )
    work = keep or Path(tempfile.mkdtemp(prefix="headrace-freshness-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        with LocalKafka(LocalKafkaSettings(dir=work / "kafka", heap_mb=768)) as kafka:
            settings = settings.model_copy(
                update={
                    "kafka": settings.kafka.model_copy(update={"bootstrap_servers": kafka.bootstrap_servers}),
                    "snapshots": settings.snapshots.model_copy(update={"url": str(work / "snapshots")}),
                    "state_dir": work / "state",
                }
            )
            create_topics(settings.kafka, settings.topics)
            found = asyncio.run(run(simulation, settings, work, int(warm_s * 1_000)))
    finally:
        if keep is None:
            shutil.rmtree(work, ignore_errors=True)
    report(**found, events_per_s=rate, hold_ms=join.held_ms, lateness_ms=join.lateness_ms)


def _changed(part: Any, **values: int | None) -> Any:
    """A part of the settings with the values that are given."""
    return part.model_copy(update={name: value for name, value in values.items() if value is not None})


if __name__ == "__main__":
    main()
