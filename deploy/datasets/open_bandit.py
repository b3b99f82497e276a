"""Open Bandit Dataset, the sample in its own package: real impressions and clicks (Saito et al., NeurIPS D&B 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from deploy.datasets.base import CHUNK_ROWS, Chunk, draw_delays, make_chunk
from deploy.datasets.encode import members, strings
from deploy.datasets.named import WheelDataSet
from deploy.errors import DataSetError
from model.schema import FeatureSchema, FieldSpec

__all__ = ["FILES", "REQUIREMENT", "OpenBandit"]

REQUIREMENT = "obp==0.4.1"

_LOGS = tuple((policy, campaign) for policy in ("random", "bts") for campaign in ("all", "men", "women"))
FILES = tuple(f"{policy}/{campaign}/{file}.csv" for policy, campaign in _LOGS for file in (campaign, "item_context"))

_USER = tuple(f"user_feature_{i}" for i in range(4))
_ITEM = tuple(f"item_feature_{i}" for i in range(1, 4))


class OpenBandit(WheelDataSet):
    """The data set `open-bandit`: 60,000 impressions of a fashion shop's banners, about 0.5 % of them clicked."""

    name = "open-bandit"
    title = "Open Bandit Dataset (sample): 60,000 shop recommendations, 0.5 % clicks, 24 to 30 November 2019"
    terms = (
        'CC BY 4.0. Attribution: Saito et al., "Open Bandit Dataset and Pipeline: Towards Realistic and Reproducible '
        'Off-Policy Evaluation", NeurIPS 2021 Datasets and Benchmarks. Changes made: the six logs merged by time.'
    )
    clicks = "Impressions have real times in microseconds, clicks have none: a drawn delay within 60 s, seeded by row."
    obtain = f"Run: headrace data fetch open-bandit (takes its files from the wheel {REQUIREMENT} of the package index)."

    folder_name = "open_bandit"
    files = FILES
    requirement = REQUIREMENT
    folder_in_wheel = "obp/dataset/obd"
    pip_options = ("--ignore-requires-python",)  # that version requires Python below 3.10, but only its data is used

    def schema(self) -> FeatureSchema:
        """Policy, campaign, position and hour; hashed features of user and item; the user's past clicks on the item."""
        names = ("policy", "campaign", "position", "hour", *_USER, "item_id", *_ITEM)
        numeric = (
            FieldSpec(name="item_feature_0", kind="numeric", buckets="linear", width=0.1),
            FieldSpec(name="affinity", kind="numeric"),
        )
        return FeatureSchema(fields=(*(FieldSpec(name=name) for name in names), *numeric), embedding_dim=16)

    def size(self) -> int:
        return sum(len(pyarrow.csv.read_csv(self._path() / file)) for file in FILES[::2])

    def chunks(self) -> Iterator[Chunk]:
        folder = self._path()
        try:
            log = pa.concat_tables([_log(folder, policy, campaign) for policy, campaign in _LOGS])
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataSetError(
                f"{folder}: expected the logs of open-bandit, found: {error}. Remove that folder and run: "
                "headrace data fetch open-bandit"
            ) from error
        log = log.take(pc.sort_indices(log["time_us"]))
        for start in range(0, len(log), CHUNK_ROWS):
            rows = log.slice(start, CHUNK_ROWS)
            time_ms = rows["time_us"].to_numpy() // 1_000
            page = {"policy": rows["policy"], "campaign": rows["campaign"], "position": rows["position"]}
            yield make_chunk(
                ids=strings(rows["id"]),
                timestamps_ms=time_ms,
                clicked=rows["click"].to_numpy() == 1,
                delays_ms=draw_delays(np.arange(start, start + len(rows), dtype=np.int64), seed=self._seed),
                context=members({**page, "hour": pa.array(time_ms // 3_600_000 % 24), **{f: rows[f] for f in _USER}}),
                candidate=members({f: rows[f] for f in ("item_id", "item_feature_0", *_ITEM, "affinity")}),
                users=strings(pc.binary_join_element_wise(*(rows[f] for f in _USER), "-")),
                items=strings(rows["item_id"]),
            )


def _log(folder: Path, policy: str, campaign: str) -> pa.Table:
    """One policy's log of one campaign with its items' features; item numbers are the campaign's own."""
    log = pyarrow.csv.read_csv(folder / policy / campaign / f"{campaign}.csv")
    items = pyarrow.csv.read_csv(folder / policy / campaign / "item_context.csv")
    numbers = log["item_id"].to_numpy()
    affinities = np.stack([log[f"user-item_affinity_{i}"].to_numpy() for i in range(len(items))])  # (items, N)
    shown = items.take(pc.index_in(log["item_id"], value_set=items["item_id"]))
    row = pc.cast(log.column(0), pa.string())
    return pa.table(
        {
            "id": pc.binary_join_element_wise(policy, campaign, row, "-"),
            "time_us": pc.cast(log["timestamp"], pa.timestamp("us", "UTC"), safe=False).cast(pa.int64()),
            "click": log["click"],
            "policy": pa.array([policy] * len(log)),
            "campaign": pa.array([campaign] * len(log)),
            "position": log["position"],
            **{name: log[name] for name in _USER},
            "item_id": pc.binary_join_element_wise(campaign, pc.cast(log["item_id"], pa.string()), "-"),
            "item_feature_0": shown["item_feature_0"],
            **{name: shown[name] for name in _ITEM},
            "affinity": pa.array(affinities[numbers, np.arange(len(log))]),
        }
    )
