"""What crosses of fields are worth on KuaiRand, as served: each alone, and all of them.

    HEADRACE_DATA_DIR=data .venv/bin/python bench/crosses.py                      # all, 5 seeds
    .venv/bin/python bench/crosses.py --only none,all --seeds 0,1 --rows 60000    # a look

The learner runs alone, by event time, as in `bench/hold.py`: labels are held for `join.hold_ms`, and each impression is scored
at its own time. Figures are of the last 80 % of impressions, and of their first half (in which crosses are chosen) and second
half (in which the choice is shown).
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from bench.delay_exact import from_data_set, held, play
from deploy.datasets import open_data_set
from model.metrics import measure
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from stream.settings import JoinSettings

PAIRS = {
    "user-tag": ("user_id", "tag"),
    "user-tab": ("user_id", "tab"),
    "user-author": ("user_id", "author_id"),
    "user-duration": ("user_id", "duration"),
    "video-tab": ("video_id", "tab"),
    "tab-duration": ("tab", "duration"),
}
MEASURED = 0.8  # the last share of impressions
# Batches are cut by count, as under load. The log has one impression in 5 s, so by `trainer.max_batch_age_ms` nearly each label
# would be a batch, and a run would take ten times as long.
BATCH_AGE_MS = 10**9


class _Crossed:
    """KuaiRand's first rows, with crosses in its schema."""

    def __init__(self, pairs: list[str]) -> None:
        self._data_set, self._pairs = open_data_set("kuairand"), pairs
        self.name, self.chunks = self._data_set.name, self._data_set.chunks

    def schema(self) -> FeatureSchema:
        plain = self._data_set.schema()
        crosses = tuple(FieldSpec(name=name, kind="cross", of=PAIRS[name]) for name in self._pairs)
        return plain.model_copy(update={"fields": (*plain.fields, *crosses)})


@click.command()
@click.option(
    "--only", default="", help="Among none, all and the names of crosses, separated by commas. A plus sign joins several."
)
@click.option("--seeds", default="0,1,2,3,4", show_default=True)
@click.option("--rows", default=0, help="First impressions only; 0: all.")
@click.option("--batch-rows", default=ModelSettings().batch_rows, show_default=True)
def main(only: str, seeds: str, rows: int, batch_rows: int) -> None:
    """Measure and print; the last line is one JSON object."""
    torch.set_num_threads(1)
    warn_if_busy()
    names = only.split(",") if only else ["none", *PAIRS, "all"]
    join, found = JoinSettings(), []
    print("| crosses | seed | AUC | NE | NE, first half | second half | rows |\n" + "| --- " * 7 + "|")
    for name in names:
        pairs = [] if name == "none" else list(PAIRS) if name == "all" else name.split("+")
        stream = from_data_set(_Crossed(pairs), rows or None)  # type: ignore[arg-type]
        labels = held(stream, join.window_ms, join.hold_ms, lateness_ms=join.lateness_ms)
        truth = stream.labels(join.window_ms).astype(np.float32)
        from_row = int((1 - MEASURED) * len(stream))
        half = (from_row + len(stream)) // 2
        for seed in map(int, seeds.split(",")):
            settings = ModelSettings(seed=seed, batch_rows=batch_rows)
            scores, _ = play(stream, labels, settings, batch_age_ms=BATCH_AGE_MS)
            parts = [
                measure(scores[a:b], truth[a:b]) for a, b in ((from_row, len(stream)), (from_row, half), (half, len(stream)))
            ]
            values = len(np.unique(np.concatenate((stream.batch.keys.ravel(), stream.batch.list_keys))))
            row = {"crosses": name, "seed": seed, "auc": round(parts[0].auc, 5), "ne": round(parts[0].normalised_entropy, 5)}
            row |= {
                "first": round(parts[1].normalised_entropy, 5),
                "second": round(parts[2].normalised_entropy, 5),
                "rows": values,
            }
            found.append(row)
            print("| " + " | ".join(str(each) for each in row.values()) + " |", flush=True)
    report(benchmark="crosses", rows=found, batch_rows=batch_rows)


if __name__ == "__main__":
    main()
