"""Where a run takes place, the examples that it learns, and the requests that its scorers answer."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from state.settings import SnapshotSettings
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.names import TopicNames
from tests.faults.snapshots.weights import Point, Weights
from tests.stream.trainer.factory import record

__all__ = ["MODEL", "SCHEMA", "Noted", "Where", "example", "requests"]

SCHEMA = FeatureSchema(fields=(FieldSpec(name="user"), FieldSpec(name="item")), embedding_dim=4)
MODEL = ModelSettings(hidden=(8,), batch_rows=32, initial_rows=64, row_history=False, cross_layers=0)
USERS, ITEMS = 150, 250


@dataclass(frozen=True)
class Noted:
    """What the trainer had at a point that it was about to publish."""

    point: Point
    parent: Point | None
    weights: Weights


@dataclass(frozen=True)
class Where:
    """Kafka, the prefix of the topics, and the folder of one run. It can be handed to another process.

    broker  the folder with the broker's data
    """

    servers: str
    broker: Path
    prefix: str
    folder: Path
    seed: int

    @property
    def kafka(self) -> KafkaSettings:
        return KafkaSettings(bootstrap_servers=self.servers)

    @property
    def topics(self) -> TopicSettings:
        return TopicSettings(prefix=self.prefix, partitions=1, request_partitions=1)

    @property
    def names(self) -> TopicNames:
        return TopicNames.of(self.topics)

    @property
    def snapshots(self) -> SnapshotSettings:
        return SnapshotSettings(
            url=str(self.store), first_examples=0, first_clicks=1, keep_ms=0, keep_versions=2, keep_good=1, keep_for_ms=0
        )

    @property
    def store(self) -> Path:
        return self.folder / "snapshots"

    def note(self, noted: Noted) -> None:
        """Note what a trainer is about to publish. The note survives the trainer."""
        with (self.folder / "noted").open("ab") as file:
            file.write(pickle.dumps(noted))

    def noted(self) -> Iterator[Noted]:
        """Everything that was noted."""
        path = self.folder / "noted"
        if not path.exists():
            return
        with path.open("rb") as file:
            while True:
                try:
                    yield pickle.load(file)
                except (EOFError, pickle.UnpicklingError):  # a trainer was killed in the middle of the last one
                    return


def example(seed: int, offset: int) -> Any:
    """The example at an offset of `examples`. It is the same whenever it is read."""
    drawn = random.Random(f"{seed} {offset}")
    user, item = int(USERS * drawn.random() ** 2), int(ITEMS * drawn.random() ** 2)
    value = {
        "impression_id": f"x{offset}",
        "timestamp": 1_650_000_000_000 + offset,
        "features": {"user": f"u{user}", "item": f"i{item}"},
    }
    return record(offset, json.dumps(value).encode(), label=b"1" if (user + item) % 3 == 0 else b"0")


def requests(drawn: random.Random, count: int = 3) -> list[Any]:
    """Requests, as a scorer reads them from Kafka."""
    found = []
    for number in range(count):
        name = f"r{number}"
        value = {
            "request_id": name,
            "context": {"user": f"u{drawn.randrange(USERS)}"},
            "candidates": [{"id": f"c{each}", "features": {"item": f"i{drawn.randrange(ITEMS)}"}} for each in range(4)],
        }
        encoded = json.dumps(value).encode()
        where = {"topic": "score-requests", "partition": 0, "offset": number, "headers": (), "timestamp": 1_650_000_000_000}
        found.append(SimpleNamespace(key=name.encode(), value=encoded, **where))
    return found
