"""What the candidate of a shadow or canary costs a scorer: time of one batch of requests, without Kafka.

    .venv/bin/python bench/candidate.py                # half a minute on one core
    .venv/bin/python bench/candidate.py --share 0.2

Without a trial, with a shadow and with a canary take turns, batch by batch, over the same requests of 50 candidates and 39
fields. A single request is in the share or not, so its times are given for both. The last line is one JSON object.
`bench/score.py --share` measures the latency of a whole system.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report
from model.learner import Learner
from model.predictor import Predictor
from model.requests import RequestDecoder
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from stream.scorer.answers import answer_requests
from stream.scorer.serving import Served, WeightsState
from stream.scorer.trial import Trial, in_share

FIELDS, CANDIDATES = 39, 50
FEATURES = FeatureSchema(fields=tuple(FieldSpec(name=f"f{index}") for index in range(FIELDS)), embedding_dim=16)
MODEL = ModelSettings()


def weights(version: int) -> Served:
    serving = Learner(FEATURES, MODEL, device="cpu").serving_state()
    predictor = Predictor.of(FEATURES, MODEL, serving, device="cpu")
    return Served(WeightsState(version, 1), RequestDecoder(FEATURES), predictor)


def request(number: int, rng: np.random.Generator) -> Any:
    name = f"request-{number}"
    context = {f"f{index}": f"u{rng.integers(1_000)}" for index in range(FIELDS // 2)}
    listed = [
        {"id": f"c{row}", "features": {f"f{index}": f"i{rng.integers(1_000)}" for index in range(FIELDS // 2, FIELDS)}}
        for row in range(CANDIDATES)
    ]
    value = json.dumps({"request_id": name, "context": context, "candidates": listed}).encode()
    return SimpleNamespace(key=name.encode(), value=value, topic="", partition=0, offset=number, headers=(), timestamp=0)


@click.command()
@click.option("--share", default=0.05, show_default=True)
@click.option("--rounds", default=60, show_default=True)
def main(share: float, rounds: int) -> None:
    """Print a table, and one JSON object."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    champion, candidate = weights(1), weights(2)
    trials = {"none": None, "shadow": Trial("shadow", share, candidate), "canary": Trial("canary", share, candidate)}
    records = [request(number, rng) for number in range(400)]
    chosen = in_share([record.key.decode() for record in records], share)
    inside = [record for record, one in zip(records, chosen.tolist(), strict=True) if one]
    outside = [record for record, one in zip(records, chosen.tolist(), strict=True) if not one]
    batches = {
        "1, not in the share": [[record] for record in outside[:20]],
        "1, in the share": [[record] for record in inside[:20]],
        "20, the share of them": [records[start : start + 20] for start in range(0, 400, 20)],
    }
    document: dict[str, object] = {"share": share}
    for name, some in batches.items():
        took: dict[str, list[float]] = {mode: [] for mode in trials}
        for turn in range(rounds):
            for mode, trial in trials.items():
                began = time.perf_counter()
                answer_requests(some[turn % len(some)], champion, trial=trial, worker="w", max_candidates=99, max_bytes=1 << 20)
                took[mode].append((time.perf_counter() - began) * 1_000)
        medians = {mode: round(float(np.median(each[3:])), 2) for mode, each in took.items()}
        click.echo(f"requests in a batch: {name:24s} ms: {medians}")
        document[name] = medians
    report(**document)


if __name__ == "__main__":
    main()
