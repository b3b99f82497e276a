"""How fast `headrace bootstrap` learns a file, against the same learner on the same examples in memory.

    .venv/bin/python bench/bootstrap.py                                  # a million rows: some ten minutes
    .venv/bin/python bench/bootstrap.py --rows 100000 --rounds 1         # a quick look

A Parquet file has 39 categorical features, Zipf 1.1, and a model as in `bench/train.py`. In each round the run reads, encodes
and decodes the file in its other process and learns it, without checkpoints; then a new learner learns the decoded columns,
which are in memory by then, batch after batch. The rate of the run counts from its first batch to its last, and `opening_s` is
what came before: to read, check and sort the file. The last line is one JSON object; `value` is the median ratio of the two,
and `cpu` that of the training threads' CPU times a row, which other programs on the machine hardly change.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from bench.train import CLICK_RATE, DIM, FIELDS, HIDDEN, ZIPF
from deploy.bootstrap.learning import Checkpoints, Progress, Run
from deploy.bootstrap.reader import HistoryReader
from deploy.bootstrap.source import Source
from model.features import FeatureBatch
from model.learner import Learner
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings

WINDOW_MS = 60_000


def write_log(file: Path, rows: int, ids: int) -> None:
    """A log of `rows` impressions, a millisecond apart, whose features have `ids` values together."""
    random = np.random.default_rng(0)
    per_field = ids // FIELDS
    odds = np.cumsum(np.arange(1, per_field + 1) ** -ZIPF)
    columns = {"timestamp": np.arange(rows) + 1_700_000_000_000, "clicked": random.random(rows) < CLICK_RATE}
    for field in range(FIELDS):
        ranks = np.searchsorted(odds / odds[-1], random.random(rows))
        columns[f"f{field}"] = random.permutation(per_field)[np.minimum(ranks, per_field - 1)]
    pq.write_table(pa.table(columns), file)


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows a second, CPU seconds of the training thread a row, and seconds before the first batch."""

    rate: float
    cpu_s: float
    opening_s: float = 0.0


def bootstrap(source: Source, model: ModelSettings, folder: Path) -> Measured:
    """A run from its first batch on."""
    began = time.perf_counter()
    run = Run(source, model, Checkpoints(folder, "bench"), device="cpu", checkpoint_s=1e9)
    learning = time.perf_counter()
    first: list[tuple[float, int]] = []

    def show(progress: Progress) -> None:
        if not first:
            first.append((time.perf_counter(), progress.examples))

    cpu_s = time.thread_time()
    run.learn(show)
    cpu_s = time.thread_time() - cpu_s
    at, examples = first[0]
    # A version is written after the last batch in any case.
    rows = run.training.examples_seen
    return Measured((rows - examples) / (run.learned_s - (at - learning)), cpu_s / rows, at - began)


def in_memory(source: Source, model: ModelSettings) -> Measured:
    """A new learner on the decoded columns."""
    with HistoryReader(source) as reader:
        columns = list(reader)
    batch = FeatureBatch.concat([each.batch for each in columns])
    labels = np.concatenate([each.clicked for each in columns]).astype(np.float32)
    times_ms = np.concatenate([each.times_ms for each in columns])
    learner = Learner(source.schema, model, device="cpu")
    rows = model.batch_rows
    learner.learn(batch.slice(0, rows), labels[:rows], None, None, times_ms[:rows])
    began, cpu_s = time.perf_counter(), time.thread_time()
    for at in range(rows, len(labels), rows):
        part = slice(at, at + rows)
        learner.learn(batch.slice(at, at + rows), labels[part], None, None, times_ms[part])
    learned = len(labels) - rows
    return Measured(learned / (time.perf_counter() - began), (time.thread_time() - cpu_s) / learned)


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--rows", default=1_000_000, show_default=True, help="Rows of the file.")
@click.option("--ids", default=1_000_000, show_default=True, help="Values of all features together.")
@click.option("--batch-rows", default=512, show_default=True, help="Examples in a batch.")
@click.option("--rounds", default=3, show_default=True, help="Rounds.")
@click.option("--threads", default=1, show_default=True, help="Torch's threads; the other core decodes.")
def main(rows: int, ids: int, batch_rows: int, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    schema = FeatureSchema(fields=tuple(FieldSpec(name=f"f{at}") for at in range(FIELDS)), embedding_dim=DIM)
    model = ModelSettings(hidden=HIDDEN, batch_rows=batch_rows, row_history=False, cross_layers=0)
    warn_if_busy()
    runs, alone = [], []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder) / "log.parquet"
        write_log(file, rows, ids)
        source = Source("parquet", schema, WINDOW_MS, path=file)
        for number in range(rounds):
            runs.append(bootstrap(source, model, Path(folder) / str(number)))
            alone.append(in_memory(source, model))
            click.echo(f"round {number + 1}: bootstrap {runs[-1].rate:,.0f} rows/s, in memory {alone[-1].rate:,.0f}", err=True)
    pairs = list(zip(runs, alone, strict=True))
    report(
        benchmark="bootstrap",
        value=round(statistics.median(found.rate / wanted.rate for found, wanted in pairs), 3),
        cpu=round(statistics.median(found.cpu_s / wanted.cpu_s for found, wanted in pairs), 3),
        unit="share of the rate in memory",
        rows_per_s=round(statistics.median(each.rate for each in runs)),
        in_memory=round(statistics.median(each.rate for each in alone)),
        opening_s=round(statistics.median(each.opening_s for each in runs), 1),
        rows=rows,
        ids=ids,
        batch_rows=batch_rows,
        threads=threads,
        rounds=rounds,
    )


if __name__ == "__main__":
    main()
