"""Decode impressions and hash their features to keys, on one core: rows a second by size of run.

    HEADRACE_DATA_DIR=data .venv/bin/python bench/decode.py
    .venv/bin/python bench/decode.py --rows 512,4096 --rounds 9

The impressions are KuaiRand's, 34 fields in some 700 bytes. `plain` reads the data set's schema. `crosses` reads six crosses
and the hour and weekday besides.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from deploy.datasets import open_data_set
from model.features import FeatureDecoder
from model.schema import FeatureSchema, FieldSpec

IMPRESSIONS = 8_192
PAIRS = {
    "user-tag": ("user_id", "tag"),
    "user-tab": ("user_id", "tab"),
    "user-author": ("user_id", "author_id"),
    "user-duration": ("user_id", "duration"),
    "video-tab": ("video_id", "tab"),
    "tab-duration": ("tab", "duration"),
}
"""Name of each cross → the fields that it combines."""


def made() -> tuple[list[bytes], npt.NDArray[np.int64], dict[str, FeatureSchema]]:
    """Impressions, their times, and the schemas."""
    data_set = open_data_set("kuairand")
    chunk = next(iter(data_set.chunks())).head(IMPRESSIONS)
    times_ms = chunk.timestamps_ms
    values = [
        b'{"impression_id":"%d","timestamp":%d,"features":%b}' % (row, when, features)
        for row, (when, features) in enumerate(zip(times_ms.tolist(), chunk.features, strict=True))
    ]
    plain = data_set.schema()
    more = tuple(FieldSpec(name=name, kind="cross", of=of) for name, of in PAIRS.items())
    clock = (FieldSpec(name="shown_hour", kind="hour"), FieldSpec(name="shown_weekday", kind="weekday"))
    return values, times_ms, {"plain": plain, "crosses": plain.model_copy(update={"fields": (*plain.fields, *more, *clock)})}


def work(decoder: FeatureDecoder, values: list[bytes], times_ms: npt.NDArray[np.int64], rows: int) -> Callable[[], int]:
    """Decodes everything, a run of `rows` at a time."""

    def do() -> int:
        for start in range(0, len(values), rows):
            decoded = decoder.impressions(values[start : start + rows], times_ms[start : start + rows])
            assert not decoded.bad
        return len(values)

    return do


@click.command()
@click.option("--rows", default="128,512,1024,4096", show_default=True, help="Impressions in a run, separated by commas.")
@click.option("--rounds", default=9, show_default=True)
def main(rows: str, rounds: int) -> None:
    """Measure and print; the last line is one JSON object. Rates are by CPU time, which other programs disturb less."""
    warn_if_busy()
    values, times_ms, schemas = made()
    pieces = {
        f"{name}, runs of {count}": work(FeatureDecoder(schema), values, times_ms, int(count))
        for name, schema in schemas.items()
        for count in rows.split(",")
    }
    rates: dict[str, list[float]] = {name: [] for name in pieces}
    for _ in range(rounds):  # in turns, so that disturbances hit all alike
        for name, do in pieces.items():
            began_s = time.process_time()
            count = do()
            rates[name].append(count / (time.process_time() - began_s))
    for name, each in rates.items():
        print(f"{name:24s} median {statistics.median(each):10,.0f}/s   best {max(each):10,.0f}/s")
    figures = {name: {"median": statistics.median(each), "best": max(each)} for name, each in rates.items()}
    report(benchmark="decode", bytes=round(statistics.mean(map(len, values))), rates=figures)


if __name__ == "__main__":
    main()
