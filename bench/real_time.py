"""Compares predictions as served, at real speed and while the model learns, with known probabilities of clicks.

    .venv/bin/python bench/real_time.py                                   # 10 minutes at real speed, window 60 s
    .venv/bin/python bench/real_time.py --accelerated --seeds 0,1,2,3     # by event time, without Kafka: 1 minute a seed
    .venv/bin/python bench/real_time.py --accelerated --window-s 600 --minutes 30
    .venv/bin/python bench/real_time.py --accelerated --ctr 0.03 --ctr-step 200:0.06 --ctr-step 400:0.03
    .venv/bin/python bench/real_time.py --accelerated --saturate          # begin with a model that says 0.998 to everything

A simulated stream has 300 impressions a second, a CTR of 5 %, lognormal click delays with a mean of 20 s, a new item every 2 s,
and a new value of the feature `hour` each minute. It runs through a real Apache Kafka, join, trainer and scorer, from an empty
start. Each impression is scored when it is shown, as a service would do. The figures begin one minute after the first labels:

- in_band_share: share of 30 s stretches in which mean prediction over mean true probability is from 0.9 to 1.1;
- new_items_in_band_share: share of pools of 2,000 impressions of items under 60 s old in which this ratio is from 0.7 to 1.4;
- ne_lost_share: share of (1 - normalised entropy) lost against a learner that knows each label at once;
- champion_age_max_s: greatest age of a version when it answered;
- one_class_promoted: number of promoted versions that had seen only clicks, or no clicks;
- ideal_in_band_share: in_band_share of an observer that knows everything except the hour's effect, and sees each click at once;
- ideal_held_in_band_share: the same for an observer that sees the labels when the join sends them, and answers by versions.

The true probability is that of a click within the attribution window. With --accelerated, the learner runs by event time
without Kafka, with the same delays of join, trainer and snapshots, and without the gate.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from bench.real_time_figures import SETTLED_MS, Seen, Served, figures, ideal_in_band, mean_of, stretches, within_window
from bench.real_time_live import LiveRun, run_live
from deploy.cli.simulate import CTR_STEP
from deploy.demo.play import worker_environment
from deploy.evaluate.labels import Labels, held
from deploy.evaluate.play import Serving, play
from deploy.evaluate.stream import Stream, simulated
from deploy.feeding.simulation import CtrStep, Simulation, simulation_schema
from deploy.local_kafka.cluster import LocalKafka
from deploy.settings import LocalKafkaSettings, Settings
from model.learner import Learner
from stream.settings import JoinSettings
from stream.topics.admin import create_topics

COMMIT_MS = 200  # from a label's time until the trainer reads it: a step of the join and a transaction
SWAP_MS = 400  # from the capture of a version until it answers


def run_settings(window_ms: int, base: Settings) -> Settings:
    """The defaults, with the simulator's features and topics of two partitions."""
    return base.model_copy(
        update={
            "topics": base.topics.model_copy(update={"partitions": 2, "request_partitions": 2}),
            "join": base.join.model_copy(update={"window_ms": window_ms}),
            "trainer": base.trainer.model_copy(update={"threads": 1}),
            "features": simulation_schema(),
        }
    )


def live(simulation: Simulation, settings: Settings) -> tuple[LiveRun, Simulation]:
    """One run at real speed."""
    work = Path(tempfile.mkdtemp(prefix="headrace-real-time-"))
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
            return asyncio.run(run_live(simulation, settings, worker_environment(settings), work))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def labels_of(stream: Stream, join: JoinSettings) -> Labels:
    """The labels as the join sends them, at the times when the trainer reads them."""
    return held(stream, join.window_ms, join.held_ms, lateness_ms=join.lateness_ms, commit_ms=COMMIT_MS)


def seen(stream: Stream, settings: Settings) -> Seen:
    """What an observer behind the join sees of a stream."""
    return Seen(labels_of(stream, settings.join), settings.join.held_ms, settings.snapshots.delta_interval_ms, SWAP_MS)


def accelerated(simulation: Simulation, settings: Settings, *, saturate: bool) -> tuple[Stream, Served]:
    """One run by event time."""
    stream = simulated(simulation)
    interval_ms = settings.snapshots.delta_interval_ms
    learner = Learner(stream.schema, settings.model, device="cpu")
    if saturate:
        serving = learner.serving_state()
        serving["bias"] += 6.0
        learner.restore(serving, learner.trainer_state())
    played = play(
        stream,
        labels_of(stream, settings.join),
        learner,
        serving=[Serving(every_ms=interval_ms, late_ms=SWAP_MS)],
        batch_age_ms=settings.trainer.max_batch_age_ms,
    )
    first_labels_ms = simulation.start_ms + settings.join.held_ms + settings.join.lateness_ms
    return stream, Served(played.scores[0], played.captured_ms[0], first_labels_ms)


@click.command()
@click.option("--window-s", default=60.0, show_default=True, help="Attribution window.")
@click.option("--minutes", default=10.0, show_default=True, help="Length of the stream.")
@click.option("--seeds", default="0", show_default=True, help="Separated by commas, for one run each.")
@click.option("--accelerated", "fast", is_flag=True, help="By event time, without Kafka.")
@click.option("--hold-ms", type=int, help="Instead of the default of join.hold_ms.")
@click.option("--lateness-ms", type=int, help="Instead of the default of join.lateness_ms.")
@click.option("--interval-ms", type=int, help="Instead of the default of snapshots.delta_interval_ms.")
@click.option("--ctr", default=0.05, show_default=True)
@click.option("--ctr-step", "ctr_steps", type=CTR_STEP, multiple=True, metavar="SECONDS:CTR")
@click.option("--hour-effect", default=0.2, show_default=True, help="Standard deviation of an hour's effect on the log odds.")
@click.option("--saturate", is_flag=True, help="Begin with logits of 6 everywhere (with --accelerated).")
@click.option("--no-reference", is_flag=True, help="Leave out ne_lost_share.")
def main(
    window_s: float,
    minutes: float,
    seeds: str,
    fast: bool,
    hold_ms: int | None,
    lateness_ms: int | None,
    interval_ms: int | None,
    ctr: float,
    ctr_steps: tuple[CtrStep, ...],
    hour_effect: float,
    saturate: bool,
    no_reference: bool,
) -> None:
    """Measure and print; the last line is one JSON object."""
    if saturate and not fast:
        raise click.UsageError("--saturate: expected together with --accelerated, found without. Add it.")
    torch.set_num_threads(1)
    warn_if_busy()
    settings = run_settings(int(window_s * 1_000), Settings())
    changed = {name: value for name, value in (("hold_ms", hold_ms), ("lateness_ms", lateness_ms)) if value is not None}
    settings = settings.model_copy(update={"join": settings.join.model_copy(update=changed)})
    if interval_ms is not None:
        snapshots = settings.snapshots.model_copy(update={"delta_interval_ms": interval_ms})
        settings = settings.model_copy(update={"snapshots": snapshots})
    rows = []
    for seed in map(int, seeds.split(",")):
        simulation = Simulation(
            rate=300.0,
            count=round(minutes * 60 * 300),
            ctr=ctr,
            ctr_steps=tuple(sorted(ctr_steps)),
            delay="lognormal",
            delay_ms=20_000.0,
            hour_ms=60_000,
            hour_effect=hour_effect,
            new_items=0.5,
            seed=seed,
        )
        more: dict[str, float] = {}
        if fast:
            stream, served = accelerated(simulation, settings, saturate=saturate)
        else:
            run, simulation = live(simulation, settings)
            stream, served = run.stream, run.served
            more = {"one_class_promoted": run.one_class_promoted, "versions": run.versions, "machine_busy": run.busy}
            for version, reason in sorted(run.gate.items())[-3:]:
                click.echo(f"version {version}: {reason}", err=True)
        quick = figures(stream, simulation, served, settings.join.window_ms, settings.model, reference=False)
        click.echo(f"seed {seed}, without the reference: {quick | more}")
        measured = figures(stream, simulation, served, settings.join.window_ms, settings.model, reference=not no_reference)
        from_ms = served.first_labels_ms + SETTLED_MS
        measured["ideal_in_band_share"] = ideal_in_band(stream, simulation, from_ms)
        measured["ideal_held_in_band_share"] = ideal_in_band(stream, simulation, from_ms, seen(stream, settings))
        truth = stream.probabilities * within_window(simulation, settings.join.window_ms)
        ratios = stretches(stream, served.scores, truth, from_ms)
        click.echo(f"seed {seed}: {measured | more}\n  {np.round(ratios, 2).tolist()}")
        if saturate:
            after = stretches(stream, served.scores, truth, served.first_labels_ms + 120_000)
            measured["ratio_after_two_minutes"] = round(float(after[0]), 3)
        rows.append(measured | more)
    report(benchmark="real_time", **mean_of(rows), seeds=len(rows), accelerated=fast, window_s=window_s, minutes=minutes)


if __name__ == "__main__":
    main()
