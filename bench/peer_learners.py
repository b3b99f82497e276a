"""The peers of `bench/peers_learning.py`, Vowpal Wabbit and River. They score each row, and then learn it.

This file is run by a Python that has the peers, and it needs numpy and nothing else besides:

    python peer_learners.py ROWS.npz OUT.npz SETTING

ROWS.npz  N rows with T tokens: `starts` (N + 1,), the first token of each row; `fields`, `values` and `scales` (T,) of the
          tokens; `labels` (N,)
OUT.npz   `scores` (N,) from before each row was learned, and `seconds` of scoring and learning
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FIELDS", "RIVER", "VOWPAL_WABBIT"]

FIELDS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
"""A namespace of Vowpal Wabbit is one character, so there are at most 62 fields."""

Scores = npt.NDArray[np.float64]
Rows = Any  # what np.load returns, with the arrays above

# `ALL` stands for the namespaces. 2^24 weights leave few collisions among the pairs of a million rows.
_ALWAYS = "--loss_function logistic --link logistic -b 24 --random_seed 1 --quiet"
VOWPAL_WABBIT = {
    "vw-quadratic-rate-0.1": "-q :: -l 0.1",
    "vw-quadratic-rate-0.3": "-q :: -l 0.3",
    "vw-quadratic-rate-0.02": "-q :: -l 0.02",
    "vw-quadratic-ftrl": "-q :: --ftrl --ftrl_alpha 0.005 --ftrl_beta 1",
    "vw-quadratic-coin": "-q :: --coin",
    "vw-linear": "",
    "vw-linear-ftrl": "--ftrl --ftrl_alpha 0.1 --ftrl_beta 1",
    "vw-linear-coin": "--coin",
    "vw-nn-10": "--nn 10 --inpass",
    "vw-low-rank-field-aware": "--lrqfa ALL4 -l 0.02",
}
"""Settings of Vowpal Wabbit by name, as its command line takes them."""

RIVER = (
    "river-lr-ftrl",
    "river-lr-ftrl-alpha-0.1",
    "river-lr-adagrad",
    "river-lr-adagrad-rate-0.03",
    "river-lr-sgd",
    "river-fm-adagrad",
    "river-fm-adagrad-rate-0.03",
    "river-fm-sgd",
)
"""Names of River's models: logistic regressions and factorization machines."""


def main() -> None:
    source, target, setting = sys.argv[1:]
    rows = np.load(source)
    scores, seconds = _vowpal_wabbit(rows, VOWPAL_WABBIT[setting]) if setting in VOWPAL_WABBIT else _river(rows, setting)
    np.savez(target, scores=scores, seconds=seconds)


def _vowpal_wabbit(rows: Rows, setting: str) -> tuple[Scores, float]:
    """Its own driver reads a text file, learns it, and writes a prediction before each update."""
    workspace = import_module("vowpalwabbit").Workspace
    with tempfile.TemporaryDirectory(prefix="headrace-peers-") as folder:
        data, predictions = Path(folder, "data.txt"), Path(folder, "predictions.txt")
        with data.open("w") as file:
            file.writelines(_vowpal_wabbit_lines(rows))
        used = FIELDS[: int(rows["fields"].max()) + 1]
        began = time.perf_counter()
        workspace(f"{_ALWAYS} {setting.replace('ALL', used)} -d {data} -p {predictions}").finish()
        seconds = time.perf_counter() - began
        return np.loadtxt(predictions), seconds


def _vowpal_wabbit_lines(rows: Rows) -> Iterator[str]:
    each = zip(rows["fields"].tolist(), rows["values"].tolist(), rows["scales"].tolist(), strict=True)
    tokens = [f"|{FIELDS[field]} {value}" + ("" if scale == 1 else f":{scale:g}") for field, value, scale in each]
    starts = rows["starts"].tolist()
    for label, (start, stop) in zip(rows["labels"].tolist(), pairwise(starts), strict=True):
        yield f"{1 if label else -1} {' '.join(tokens[start:stop])}\n"


def _river(rows: Rows, setting: str) -> tuple[Scores, float]:
    """`predict_proba_one`, then `learn_one`, for each row."""
    model = _river_models()[setting]()
    names = [f"{field}={value}" for field, value in zip(rows["fields"].tolist(), rows["values"].tolist(), strict=True)]
    scales, starts = rows["scales"].tolist(), rows["starts"].tolist()
    features = [dict(zip(names[a:b], scales[a:b], strict=True)) for a, b in pairwise(starts)]
    labels, scores = rows["labels"].astype(bool).tolist(), np.empty(len(features))
    began = time.perf_counter()
    for number, (feature, label) in enumerate(zip(features, labels, strict=True)):
        scores[number] = model.predict_proba_one(feature).get(True, 0.5)
        model.learn_one(feature, label)
    return scores, time.perf_counter() - began


def _river_models() -> dict[str, Callable[[], Any]]:
    facto, linear, optim = (import_module(f"river.{name}") for name in ("facto", "linear_model", "optim"))

    def logistic(optimizer: Any) -> Any:
        return linear.LogisticRegression(optimizer, intercept_lr=0.01)

    def machine(weights: Any, factors: Any) -> Any:
        return facto.FMClassifier(n_factors=16, weight_optimizer=weights, latent_optimizer=factors, intercept_lr=0.01, seed=1)

    return {
        "river-lr-ftrl": lambda: logistic(optim.FTRLProximal(alpha=0.05, beta=1.0, l1=0.0, l2=0.0)),
        "river-lr-ftrl-alpha-0.1": lambda: logistic(optim.FTRLProximal(alpha=0.1, beta=1.0, l1=0.0, l2=0.0)),
        "river-lr-adagrad": lambda: logistic(optim.AdaGrad(0.1)),
        "river-lr-adagrad-rate-0.03": lambda: logistic(optim.AdaGrad(0.03)),
        "river-lr-sgd": lambda: logistic(optim.SGD(0.02)),
        "river-fm-adagrad": lambda: machine(optim.AdaGrad(0.1), optim.AdaGrad(0.1)),
        "river-fm-adagrad-rate-0.03": lambda: machine(optim.AdaGrad(0.03), optim.AdaGrad(0.03)),
        "river-fm-sgd": lambda: machine(optim.SGD(0.02), optim.SGD(0.02)),
    }


if __name__ == "__main__":
    main()
