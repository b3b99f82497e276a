"""What thinner deltas save and what they cost: rows in float16, and dense weights less often than rows.

    .venv/bin/python bench/thin_deltas.py                          # KuaiRand and a simulation, 10 minutes
    .venv/bin/python bench/thin_deltas.py --impressions 50000 --streams simulation-ctr-2

Impressions come at `--rate` a second, in the order of the stream, whatever their event times are. A label is learned
`--hold-ms` after its impression. Every `--delta-ms` the learner's delta is encoded, joined and applied to a predictor, which
scores the impressions until the next one. So all that is measured went through the records and the digest as in production,
but for Kafka. For each kind of deltas there is a learner of its own; they all learn the same.

| figure | what it is |
| --- | --- |
| `ne`, `auc` | of the scores served, over the last 80 % of impressions |
| `kb_a_delta`, `mb_a_second` | bytes of the records' values |
| `encode_ms`, `join_ms`, `apply_ms` | medians: tensors to records; records to tensors; `prepare` and `apply` of the predictor |

KuaiRand is read from HEADRACE_DATA_DIR, and skipped if it isn't there. The last line is one JSON object.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from deploy.datasets import open_data_set
from deploy.evaluate.stream import Stream, from_data_set, simulated
from deploy.feeding.simulation import Simulation
from model.learner import Learner
from model.metrics import measure
from model.predictor import Predictor
from model.rows import RowPrecision
from model.settings import ModelSettings
from stream.records.delta import DeltaHeader, Point, encode_delta
from stream.records.delta_assembly import assemble
from stream.trainer.snapshots import YOUNG_GROWTH

MEASURED = 0.8  # the last share of impressions
LIMIT_BYTES = 1_048_588  # of a record, as `topics.deltas_max_message_bytes` has it
CHAIN = "deepfm/1/0"


class Kind(NamedTuple):
    """How deltas are made: the precision of rows, and the time between two that carry the dense weights (ms; 0: all do)."""

    rows: RowPrecision
    dense_ms: int

    @property
    def name(self) -> str:
        return f"{self.rows}, dense " + (f"every {self.dense_ms / 1000:g} s" if self.dense_ms else "always")


KINDS = (
    Kind("float32", 0),
    Kind("float16", 0),
    Kind("float32", 1_000),
    Kind("float32", 5_000),
    Kind("float16", 1_000),
)


class Measured(NamedTuple):
    """Scores (N,), NaN before the first delta; bytes, and seconds of encoding, joining and applying, for each delta."""

    scores: npt.NDArray[np.float32]
    sizes: list[int]
    encode_s: list[float]
    join_s: list[float]
    apply_s: list[float]


def play(stream: Stream, labels: npt.NDArray[np.float32], kind: Kind, *, between: int, held: int, rate: float) -> Measured:
    """Learn and serve all impressions.

    Args:
        between: impressions between two deltas.
        held: impressions between an impression and when its label is learned.
    """
    settings = ModelSettings()
    learner = Learner(stream.schema, settings, device="cpu", row_precision=kind.rows)
    predictor = Predictor.of(stream.schema, settings, learner.serving_state(), device="cpu")
    found = Measured(np.full(len(stream), np.nan, np.float32), [], [], [], [])
    learned = sequence = dense_at = dense_learned = 0
    for start in range(0, len(stream), between):
        stop = min(start + between, len(stream))
        if sequence:
            found.scores[start:stop] = predictor.predict(stream.batch.slice(start, stop))
        until = stop - held
        while learned + settings.batch_rows <= until:
            part = slice(learned, learned + settings.batch_rows)
            learner.learn(stream.batch.slice(part.start, part.stop), labels[part])
            learned = part.stop
        if not learner.touched:
            continue
        dense = (stop - dense_at) * 1000 >= kind.dense_ms * rate or learned > YOUNG_GROWTH * dense_learned
        if dense:
            dense_at, dense_learned = stop, learned
        delta = learner.take_delta(dense=dense)
        header = DeltaHeader(
            chain=CHAIN,
            sequence=sequence + 1,
            parent=Point(CHAIN, sequence),
            offsets={"0": learned},
            watermark_ms=0,
            examples_seen=learned,
            negative_rate=1.0,
            at_ms=0,
            dtype=kind.rows,
        )
        sequence += 1
        times = [time.perf_counter()]
        records = encode_delta(header, delta, LIMIT_BYTES)
        times.append(time.perf_counter())
        received = assemble(records)
        times.append(time.perf_counter())
        predictor.apply(predictor.prepare(received.model))
        times.append(time.perf_counter())
        found.sizes.append(sum(map(len, records)))
        for taken, began, ended in zip((found.encode_s, found.join_s, found.apply_s), times, times[1:], strict=False):
            taken.append(ended - began)
    return found


def streams(names: list[str], impressions: int) -> list[Stream]:
    """The streams by name, cut to so many impressions."""
    made = []
    for name in names:
        if name.startswith("simulation-ctr-"):
            ctr = float(name.removeprefix("simulation-ctr-")) / 100
            # Items come all the time, and an hour of the simulation is a minute, so that weights have to follow.
            made.append(simulated(Simulation(rate=2_000.0, count=impressions, ctr=ctr, hour_ms=60_000, new_items=2.0), name))
            continue
        data_set = open_data_set(name)
        if data_set.find() is None:
            click.echo(f"{name}: skipped, since it isn't in HEADRACE_DATA_DIR or data/", err=True)
            continue
        whole = from_data_set(data_set)
        part = slice(0, min(impressions, len(whole)))
        made.append(
            replace(
                whole,
                batch=whole.batch.slice(part.start, part.stop),
                shown_ms=whole.shown_ms[part],
                clicked_ms=whole.clicked_ms[part],
                probabilities=whole.probabilities[part],
                ages_ms=whole.ages_ms[part],
            )
        )
    return made


@click.command()
@click.option("--streams", "names", default="kuairand,simulation-ctr-2", show_default=True)
@click.option("--impressions", default=150_000, show_default=True, help="Impressions of each stream.")
@click.option("--rate", default=2_000.0, show_default=True, help="Impressions a second.")
@click.option("--delta-ms", default=250, show_default=True, help="Time between two deltas.")
@click.option("--hold-ms", default=10_000, show_default=True, help="Time from an impression to its label.")
def main(names: str, impressions: int, rate: float, delta_ms: int, hold_ms: int) -> None:
    """Measure and print; the last line is one JSON object."""
    warn_if_busy()
    torch.set_num_threads(1)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for stream in streams(names.split(","), impressions):
        labels = (stream.clicked_ms >= 0).astype(np.float32)
        measured_from = int(len(stream) * (1 - MEASURED))
        figures[stream.name] = {}
        for kind in KINDS:
            found = play(stream, labels, kind, between=int(rate * delta_ms / 1000), held=int(rate * hold_ms / 1000), rate=rate)
            metrics = measure(found.scores[measured_from:], labels[measured_from:])
            figures[stream.name][kind.name] = row = {
                "ne": round(metrics.normalised_entropy, 6),
                "auc": round(metrics.auc, 5),
                "kb_a_delta": round(statistics.mean(found.sizes) / 1000, 1),
                "mb_a_second": round(sum(found.sizes) / len(stream) * rate / 1e6, 2),
                "encode_ms": round(statistics.median(found.encode_s) * 1000, 2),
                "join_ms": round(statistics.median(found.join_s) * 1000, 2),
                "apply_ms": round(statistics.median(found.apply_s) * 1000, 2),
            }
            click.echo(
                f"{stream.name:20s} {kind.name:26s} " + "  ".join(f"{key} {value}" for key, value in row.items()), err=True
            )
    report(benchmark="thin_deltas", impressions=impressions, rate=rate, streams=figures)


if __name__ == "__main__":
    main()
