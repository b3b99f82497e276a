"""The peer of `bench/score.py`: the same predictor in an ordinary Faust agent, one request at a time.

It loads one version at its start and never swaps it, sends no heartbeats and doesn't wait for acknowledgements. All of this
costs it less than Headrace's scorer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import faust
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.features import FeatureDecoder
from model.predictor import Predictor
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.settings import SnapshotSettings
from state.store import SnapshotStore

PREFIX = os.environ["PEER_PREFIX"]

torch.set_num_threads(1)  # as in the scorer
store = SnapshotStore(SnapshotSettings(url=os.environ["PEER_SNAPSHOTS"]))
version = max(store.versions())
manifest = store.manifest(version)
schema = FeatureSchema.model_validate(manifest.features)
decoder = FeatureDecoder(schema)
predictor = Predictor.of(schema, ModelSettings.of_version(manifest.model), store.serving(version), device="cpu")

app = faust.App(
    f"{PREFIX}peer-scorer",
    broker=f"kafka://{os.environ['PEER_BROKER']}",
    datadir=os.environ["PEER_DATA_DIR"],
    store="memory://",
    consumer_auto_offset_reset="latest",
    topic_allow_declare=False,
    topic_disable_leader=True,
    web_enabled=False,
)
requests = app.topic(f"{PREFIX}score-requests", key_serializer="raw", value_serializer="raw")
scores = app.topic(f"{PREFIX}scores", key_serializer="raw", value_serializer="raw")


@app.agent(requests)
async def answer(stream: Any) -> None:
    async for event in stream.events():
        decoded = decoder.requests([event.value])
        found = predictor.predict(decoded.batch).tolist()
        listed = [{"id": name, "score": score} for name, score in zip(decoded.candidate_ids[0], found, strict=True)]
        value = {"request_id": decoded.request_ids[0], "scores": listed, "model_version": version}
        await scores.send(key=event.key, value=json.dumps(value).encode())


if __name__ == "__main__":
    app.main()
