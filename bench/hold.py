"""How long to hold labels: quality as served for each hold, on simulated streams, KuaiRand and MovieLens-100K.

    .venv/bin/python bench/hold.py                                        # everything, about 15 minutes
    .venv/bin/python bench/hold.py --streams movielens-100k --holds 0,10  # one stream and two holds

The learner runs alone, without Kafka, by event time. A first label leaves at impression + hold + lateness; it is 1 if and only
if the click came within the hold. A later click within the window leaves as a correction, which takes the negative back. Each
impression is scored at its event time, by a model that has learned the labels that were sent before that time. The figures are
of the last 80 % of impressions; on simulated streams NE uses the true probabilities instead of labels. The row `known` is a
learner that knows each label at once.

KuaiRand is read from HEADRACE_DATA_DIR, and skipped if it isn't there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from deploy.datasets import open_data_set
from deploy.evaluate.labels import at_once, held
from deploy.evaluate.play import play
from deploy.evaluate.stream import Stream, from_data_set, simulated
from deploy.feeding.simulation import Simulation
from deploy.settings import Settings
from model.learner import Learner
from model.metrics import measure
from model.settings import ModelSettings
from stream.settings import JoinSettings

DATA_SETS = ("kuairand", "movielens-100k")
MEASURED = 0.8  # the last share of impressions
HOLDS_S = "0,5,10,20,30,60"


def simulations(count: int) -> dict[str, Simulation]:
    """Simulations by name, with new items all the time and a new hour each minute."""
    delays = {
        "exponential-5s": ("exponential", 5_000.0),
        "uniform-20s": ("uniform", 10_000.0),
        "lognormal-20s": ("lognormal", 20_000.0),
    }
    return {
        f"{name}-ctr-{ctr * 100:g}": Simulation(
            rate=300.0,
            count=count,
            ctr=ctr,
            delay=delay,  # type: ignore[arg-type]
            delay_ms=mean_ms,
            hour_ms=60_000,
            new_items=0.5,
        )
        for name, (delay, mean_ms) in delays.items()
        for ctr in (0.05, 0.015)
    }


def quality(stream: Stream, scores: npt.NDArray[np.float32], window_ms: int) -> dict[str, float]:
    """AUC, NE and calibration of the measured impressions."""
    rows = np.arange(len(stream)) >= (1 - MEASURED) * len(stream)
    rows &= ~np.isnan(scores)
    labels = stream.labels(window_ms)
    metrics = measure(scores[rows], labels[rows].astype(np.float32))
    entropy, calibration = metrics.normalised_entropy, metrics.calibration
    if not np.isnan(stream.probabilities).any():
        # The expected loss under the true probabilities has no noise of single labels. Only the share of clicks that come
        # within the window is taken from the labels; it is the same for every hold.
        clicks = stream.clicked_ms >= 0
        truth = stream.probabilities[rows] * (labels.sum() / clicks.sum())
        p = np.clip(scores[rows].astype(np.float64), 1e-7, 1 - 1e-7)
        base = truth.mean()
        loss = -(truth * np.log(p) + (1 - truth) * np.log1p(-p)).mean()
        entropy = float(loss / -(base * np.log(base) + (1 - base) * np.log1p(-base)))
        calibration = float(p.mean() / base)
    return {"auc": round(metrics.auc, 4), "ne": round(entropy, 4), "calibration": round(calibration, 3)}


def measure_stream(stream: Stream, holds_s: list[float], join: JoinSettings, model: ModelSettings) -> list[dict[str, object]]:
    """One row for each hold, and one for a learner that knows each label at once."""
    window_ms = join.window_ms
    clicked = stream.labels(window_ms)
    delays_ms = (stream.clicked_ms - stream.shown_ms)[clicked]
    rows = []
    plans = [("known", 0.0, at_once(stream, window_ms))]
    for hold_s in holds_s:
        hold_ms = int(hold_s * 1_000)
        late = float((delays_ms > hold_ms).mean())
        plans.append((f"{hold_s:g}", late, held(stream, window_ms, hold_ms, lateness_ms=join.lateness_ms)))
    for hold, late, labels in plans:
        scores = play(stream, labels, Learner(stream.schema, model, device="cpu")).scores[0]
        row = {"stream": stream.name, "hold_s": hold, "late": round(late, 3), **quality(stream, scores, window_ms)}
        rows.append(row)
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    return rows


@click.command()
@click.option("--streams", default="all", show_default=True, help="Names, separated by commas.")
@click.option("--holds", default=HOLDS_S, show_default=True, help="Seconds, separated by commas.")
@click.option("--count", default=90_000, show_default=True, help="Impressions of a simulated stream, at 300 a second.")
@click.option("--window-s", default=60.0, show_default=True)
@click.option("--lateness-ms", default=JoinSettings().lateness_ms, show_default=True)
def main(streams: str, holds: str, count: int, window_s: float, lateness_ms: int) -> None:
    """Measure and print; the last line is one JSON object."""
    torch.set_num_threads(1)
    warn_if_busy()
    known = simulations(count)
    names = [*known, *DATA_SETS] if streams == "all" else streams.split(",")
    unknown = sorted({*names} - {*known, *DATA_SETS})
    if unknown:
        raise click.UsageError(f"--streams: expected some of {', '.join([*known, *DATA_SETS])}, found {', '.join(unknown)}")
    settings = Settings()
    join = JoinSettings(window_ms=int(window_s * 1_000), lateness_ms=lateness_ms)
    rows, skipped = [], []
    print("| stream | hold, s | later than the hold | AUC | NE | calibration |\n| --- | --- | --- | --- | --- | --- |")
    for name in names:
        if name in known:
            stream = simulated(known[name], name)
        else:
            data_set = open_data_set(name)
            if data_set.find() is None and name == "kuairand":
                print(f"{name}: skipped, since it isn't in HEADRACE_DATA_DIR or data/", file=sys.stderr)
                skipped.append(name)
                continue
            if data_set.find() is None:
                data_set.fetch(lambda line: click.echo(line, err=True))
            stream = from_data_set(data_set)
        rows += measure_stream(stream, [float(hold) for hold in holds.split(",")], join, settings.model)
    report(benchmark="hold", rows=rows, skipped=skipped, window_s=window_s, lateness_ms=lateness_ms)


if __name__ == "__main__":
    main()
